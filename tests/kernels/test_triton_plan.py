"""Triton kernels: block sizes by shape, card and user, and what a call launches with them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from monarchrt import triton_kernels
from monarchrt.triton_kernels import config, plan
from monarchrt.triton_kernels.config import Config, Stream, Target, configs, heuristic, store, use, user_file
from tests.kernels.test_triton import SETTINGS, missing
from tests.untyped import untyped


@pytest.mark.parametrize("setting", SETTINGS)
def test_scratch_stays_bounded(setting):
    """Intermediates of any number of frames stay under the limit, down to one query tile of one head."""
    _, b1, b2 = SETTINGS[setting]
    chosen = heuristic(Target(90), b1=b1, b2=b2, dim=128, itemsize=2)
    for tiles in (1, 7, 21, 84):
        shape = plan.Shape(batch=2, query_tiles=tiles, key_tiles=tiles, b1=b1, b2=b2, heads=12, dim=128, itemsize=2)
        for todo in (plan.forward(shape, chosen, "ieee"), plan.backward(shape, chosen, "ieee", None)):
            assert todo.pairs * todo.tiles * tiles * b1 * b2 * 512 <= max(chosen.scratch_bytes, tiles * b1 * b2 * 512)
            covered = {(pair, tile) for pair, tile, *_ in todo.steps if pair < shape.pairs}
            assert covered == {(p, t) for p in range(0, shape.pairs, todo.pairs) for t in range(0, tiles, todo.tiles)}
        for steps, limit in ((2, None), (4, None), (2, 2**32)):  # those of every refinement step at once
            own = dataclasses.replace(chosen, refine_scratch_bytes=limit)
            todo = plan.refined_backward(shape, own, "ieee", None, steps)
            sizes = plan.scratch_shapes(shape, todo, backward=True)
            held = sum(2 * math.prod(size) for name, size in sizes.items() if name.startswith("mid"))
            assert held <= max(limit or chosen.scratch_bytes, steps * tiles * b1 * b2 * 512)
            if limit is not None and tiles == 21:
                assert len(todo.steps) < len(plan.refined_backward(shape, chosen, "ieee", None, steps).steps)
                assert len(plan.refined(shape, own, "ieee", 2).steps) < len(
                    plan.refined(shape, chosen, "ieee", 2).steps
                )


def test_left_of_earlier_steps_has_blocks_of_its_own():
    chosen = heuristic(Target(90), b1=30, b2=52, dim=128, itemsize=2)
    own = dataclasses.replace(chosen, left_refine_backward=Config(rows=32, keys=16, warps=2, stages=1))
    shape = plan.Shape(batch=1, query_tiles=7, key_tiles=7, b1=30, b2=52, heads=12, dim=128, itemsize=2)
    calls = {x.kernel: x for x in plan.refined_backward(shape, own, "ieee", None, 2).launches}
    assert (calls["left_refine_backward"].constants["N"], calls["left_refine_backward"].warps) == (16, 2)
    assert calls["left_backward"].constants["N"] == chosen.left_backward.keys


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_tuned_configs_are_read(kind):
    where = Target(90, kind)
    assert (Path(triton_kernels.__file__).parent / "tuned" / f"{kind.replace(' ', '_')}.json").is_file()
    for b1, b2 in ((30, 52), (90, 52), (45, 80), (135, 80)):
        chosen = configs(where, b1=b1, b2=b2, dim=128, itemsize=2)
        assert isinstance(chosen.right_forward, Config)
        assert chosen != heuristic(where, b1=b1, b2=b2, dim=128, itemsize=2)


def test_other_hopper_cards_take_the_configs_of_the_h200(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for few in (False, True):
        shape = {"b1": 90, "b2": 52, "dim": 128, "itemsize": 2, "few": few}
        assert configs(Target(90, "NVIDIA H20"), **shape) == configs(Target(90, "NVIDIA H200"), **shape)
    shape: dict[str, Any] = {"b1": 90, "b2": 52, "dim": 128, "itemsize": 2}
    ampere = Target(80, "NVIDIA A100-SXM4-80GB")
    assert configs(ampere, **shape) == heuristic(ampere, **shape)


def test_the_users_configs_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape: dict[str, Any] = {"b1": 30, "b2": 52, "dim": 128, "itemsize": 2}
    where = Target(90, "NVIDIA H200")
    mine = dataclasses.replace(configs(where, **shape), right_query=Config(rows=16, keys=64, stages=1))
    assert store(where, mine, **shape) == user_file(where)
    assert configs(where, **shape) == mine
    assert configs(where, **untyped(shape | {"b2": 80})) != mine
    other = heuristic(Target(80), **shape)
    with use(other):
        assert configs(where, **shape) == other


def test_entries_for_few_query_tiles(tmp_path, monkeypatch):
    """They add to the entry of the shape, and hold only there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape: dict[str, Any] = {"b1": 30, "b2": 52, "dim": 128, "itemsize": 2}
    where = Target(90, "a new card")
    plain = configs(where, **shape)
    streamed = dataclasses.replace(plain, stream=Stream(rows=52, tiles=7, registers=168))
    store(where, streamed, **shape, few=True)
    assert configs(where, **shape) == plain
    assert configs(where, **shape, few=True) == streamed


def test_a_stream_needs_whole_key_rows():
    """Where the columns of a key row take several blocks the forward pass goes chunk by chunk."""
    chosen = dataclasses.replace(
        heuristic(Target(90), b1=30, b2=200, dim=64, itemsize=2), stream=Stream(rows=8, tiles=1)
    )
    for b2, stream in ((52, True), (200, False)):
        shape = plan.Shape(batch=1, query_tiles=2, key_tiles=4, b1=30, b2=b2, heads=2, dim=64, itemsize=2)
        assert bool(plan.forward(shape, chosen, "ieee").stream) == stream


def plan_of(*, b2, dim, grad_tiles=None, keys=64):
    shape = plan.Shape(batch=1, query_tiles=2, key_tiles=3, b1=8, b2=b2, heads=1, dim=dim, itemsize=2)
    one = config.Config(rows=16, keys=keys)
    configs = config.Configs(**dict.fromkeys(config.KERNELS, one))
    return {x.kernel: x.constants for x in plan.backward(shape, configs, "ieee", grad_tiles).launches}


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        (dict(b2=40, dim=16), False),  # dZ [b1*b2, b2] lies where alpha and Y lay, [b1*b2, 2*16]
        (dict(b2=32, dim=16), True),
        (dict(b2=40, dim=32), True),
        (dict(b2=40, dim=32, keys=32), False),  # columns in two blocks
        (dict(b2=32, dim=16, grad_tiles=1), False),  # only some key tiles have theirs
    ],
)
def test_the_scores_gradient_is_kept_where_it_fits(options, saved):
    launches = plan_of(**options)
    assert launches["right_backward"]["SAVE_DZ"] is saved
    assert launches["right_query"]["SAVED_DZ"] is saved


@missing("triton", "jax_triton")
@pytest.mark.parametrize(
    ("visible", "grad_tiles", "first"),
    [((3, 3), 1, 2), ((1, 3), 2, 1), ((2, 2), 3, -1), ((9, 1), 1, 2), ((3, 3), 7, 0), ((1, 2), None, 0)],
)
def test_the_newest_tiles_are_the_last_that_are_seen(monkeypatch, visible, grad_tiles, first):
    """`first_tile` of the backward pass, with 3 key tiles, as the kernels get it."""
    from monarchrt.triton_kernels import launch, operation

    given = {}

    def run(todo, operands, scratch, results, start, *_):
        given.update(operands)
        return {name: jnp.zeros(x.shape, x.dtype) for name, x in results.items()}

    monkeypatch.setattr(launch, "run", run)
    q, k = jnp.zeros((1, 2, 8, 8, 1, 16)), jnp.zeros((1, 3, 8, 8, 1, 16))
    rows = jnp.zeros(q.shape[:-1])
    operation.backward(1.0, grad_tiles, q, k, k, q, rows, rows, jnp.array(visible, jnp.int32))
    assert given["first_tile"].tolist() == [first]
