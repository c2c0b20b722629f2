"""Finds configs for a shape on the local GPU and keeps them: `python -m triton_kernels.tune --help`.

Nothing here runs unless it is asked for. The result is a JSON file per device in the user's cache folder, which
`config.configs` prefers to the shipped one.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from triton_kernels import config
from triton_kernels.config import Config, Configs

BACKWARD = ("left_backward", "right_backward", "right_query")


def tune(*, grid: tuple[int, int, int], tile: tuple[int, int, int], heads: int = 12, dim: int = 128) -> Configs:
    """Searches configs for a video's attention in bfloat16 and stores them; takes minutes and needs the GPU alone.

    Args:
        grid: (frames, height, width) in latent tokens.
        tile: (n_f, n_h, n_w), dividing the grid; tiles of rows n_f*n_h and columns n_w.
        heads: Heads of the attention.
        dim: Size of a head.

    Returns:
        The best configs found, as stored.

    Raises:
        RuntimeError: If there is no local GPU.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(f"tune needs a GPU; JAX's default backend is {jax.default_backend()!r}.")
    b1, b2 = tile[0] * tile[1], tile[2]
    tiles = grid[0] * grid[1] * grid[2] // (b1 * b2)
    where = config.target()
    shape = {"b1": b1, "b2": b2, "dim": dim, "itemsize": 2}
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (1, tiles, b1, b2, heads, dim), jnp.bfloat16) for key in keys]
    best = search(config.configs(where, **shape), functools.partial(measure, arrays))
    config.store(where, best, **shape)
    return best


def search(start: Configs, measure: Callable[[Configs, bool], float]) -> Configs:
    """Goes through the kernels, tries the neighbours of each one's config and moves while that helps.

    Args:
        start: Where to begin.
        measure: Milliseconds of configs, of the backward pass if the second argument is true; infinity where they
            do not run.

    Returns:
        The best configs seen.
    """
    best = start
    for name in config.KERNELS:
        backward = name in BACKWARD
        least, improved = measure(best, backward), True
        while improved:
            improved = False
            for candidate in neighbours(getattr(best, name)):
                trial = dataclasses.replace(best, **{name: candidate})
                ms = measure(trial, backward)
                if ms < least:
                    best, least, improved = trial, ms, True
    return best


def neighbours(at: Config) -> Iterator[Config]:
    """Configs one step away: half and double the sizes, one stage more or less, the other orientation."""
    for field in ("rows", "keys", "warps", "split"):
        least = {"rows": 16, "keys": 16, "warps": 2, "split": 1}[field]
        value = getattr(at, field)
        for changed in (value // 2, value * 2):
            if least <= changed <= {"rows": 128, "keys": 128, "warps": 8, "split": 8}[field]:
                yield dataclasses.replace(at, **{field: changed})
    for stages in (at.stages - 1, at.stages + 1):
        if 1 <= stages <= 4:
            yield dataclasses.replace(at, stages=stages)
    yield dataclasses.replace(at, transposed=not at.transposed)


def measure(arrays: list[jax.Array], configs: Configs, backward: bool, repeats: int = 7) -> float:
    """Median ms of the forward or the backward pass on tiles q, k, v, d_out [1, A, b1, b2, H, D]."""
    from triton_kernels import operation

    q, k, v, d_out = arrays
    scale = q.shape[-1] ** -0.5
    visible = jnp.full((q.shape[1],), k.shape[1], jnp.int32)
    lse = jnp.full(q.shape[:-1], 1.0, jnp.float32)
    with config.use(configs):
        try:
            if backward:
                run = jax.jit(lambda *x: operation.backward(scale, None, *x))
                compiled, inputs = run.lower(q, k, v, d_out, lse, lse, visible).compile(), (d_out, lse, lse, visible)
            else:
                run = jax.jit(lambda *x: operation.forward(scale, *x))
                compiled, inputs = run.lower(q, k, v, visible).compile(), (visible,)
            jax.block_until_ready(compiled(q, k, v, *inputs))
        except jax.errors.JaxRuntimeError:  # too much shared memory, or too many registers
            return float("inf")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(q, k, v, *inputs))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, required=True, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, nargs=3, required=True, metavar=("N_F", "N_H", "N_W"))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=128)
    found = tune(**vars(parser.parse_args()))
    print(json.dumps(dataclasses.asdict(found), indent=1))
