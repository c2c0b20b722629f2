"""The search for configs of the Triton kernels, on made-up costs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from monarchrt.triton_kernels.config import KERNELS, Config, Stream, Target, heuristic
from monarchrt.triton_kernels.tune import BACKWARD, agree, neighbours, search, streams, tune


@pytest.mark.parametrize("few", [False, True])
def test_search_moves_to_what_is_fastest(few):
    """A made-up cost with one minimum per kernel: the search must find it, and skip what does not run."""
    start = heuristic(Target(90), b1=30, b2=52, dim=128, itemsize=2)
    goal = {name: Config(rows=128, keys=32, warps=8, stages=3) for name in KERNELS}
    goal["right_forward"] = dataclasses.replace(goal["right_forward"], split=2, more_keys=16)
    goal["left_backward"] = dataclasses.replace(goal["left_backward"], transposed=True, more_rows=32)
    stream = Stream(rows=64, tiles=7, lag=2, slots=4)
    log = []

    def cost(found, backward):
        if any(getattr(found, name).stages == 4 for name in KERNELS):
            return float("inf")
        steps = 0.0 if found.stream == stream else 1.0
        for name in KERNELS:
            if (name in BACKWARD) != backward:
                continue
            at, to = getattr(found, name), goal[name]
            steps += sum(abs(math.log2(getattr(at, x) / getattr(to, x))) for x in ("rows", "keys", "warps", "split"))
            steps += abs(at.stages - to.stages)
            steps += sum(getattr(at, x) != getattr(to, x) for x in ("transposed", "more_rows", "more_keys"))
        return steps

    best = search(start, cost, rows=21 * 52, key_tiles=21, few=few, log=log.append)
    changed = KERNELS if not few else ("right_forward", "left_forward")
    assert {name: getattr(best, name) for name in changed} == {name: goal[name] for name in changed}
    assert best.stream == stream
    assert not few or best.left_backward == start.left_backward
    assert [line.partition(" ms")[2] for line in log if "at the start" in line] == [" at the start"] * (2 - few)
    assert len([line for line in log if "ms: " in line]) == len(log) - (2 - few) >= 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_neighbours_differ_and_stay_powers_of_two(kernel):
    at = Config(rows=16, keys=128, warps=8, stages=1)
    found = list(neighbours(at, kernel))
    assert at not in found
    assert len(set(found)) == len(found)
    assert all(x.rows & (x.rows - 1) == 0 and 16 <= x.rows <= 128 for x in found)


def test_streams_leave_a_slot_to_write_to():
    found = list(streams(1092, 21))
    assert len(set(found)) == len(found) >= 12
    with pytest.raises(ValueError, match="slots=2 is not more than lag=2"):
        Stream(rows=64, tiles=7, lag=2, slots=2)


def test_tuning_needs_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="default backend is 'cpu'"):
        tune(grid=(21, 30, 52), tile=(1, 30, 52))


@pytest.mark.parametrize(("change", "same"), [(0.0, True), (1e-3, True), (0.1, False), (math.nan, False)])
def test_wrong_results_are_not_timed(change, same):
    x = jnp.ones((3, 5), jnp.bfloat16)
    assert agree(x + jnp.bfloat16(change), x) == same
