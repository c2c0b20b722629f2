"""Calls outside of `jax.jit`: what they compile, and what they leave behind."""

import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import MonarchKVCache, monarch_attention
from tests import forks
from tests.compiled import compiled_here

GRID = (2, 4, 6)


def tokens(seed, grid=GRID):
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.normal(size=(1, grid[0] * grid[1] * grid[2], 2, 8)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("implementation", [None, pytest.param("reference", marks=pytest.mark.slow)])
def test_a_call_compiles_once_for_its_shape(implementation):
    def call(seed):
        q, k, v = tokens(seed)
        out, vjp = jax.vjp(lambda *x: monarch_attention(*x, grid=GRID, implementation=implementation), q, k, v)
        return out, *vjp(out)

    call(0)
    with compiled_here() as events:
        call(1)
    assert events == []


def test_a_cache_compiles_once_for_its_shape():
    def run(seed):
        cache = MonarchKVCache.init(batch=1, frames=4, height=4, width=6, heads=2, head_dim=8, dtype=jnp.float32)
        for step in range(2):
            q, k, v = tokens(2 * seed + step)
            cache = cache.append(k, v)
            cache.attend(q)

    run(0)
    with compiled_here() as events:
        run(1)
    assert events == []


def leave(shapes):
    """Arrays and programs that there are more of after calls of so many shapes than after one of another."""

    def call(width):
        grid = (2, 2, width)
        q, k, v = tokens(0, grid)
        cache = MonarchKVCache.init(batch=1, frames=2, height=2, width=width, heads=2, head_dim=8, dtype=jnp.float32)
        jax.grad(lambda q: monarch_attention(q, k, v, grid=grid).sum())(q)
        cache.append(k, v).attend(q)

    def held():
        jax.clear_caches()
        gc.collect()
        return len(jax.live_arrays()), len(jax.devices()[0].client.live_executables())

    call(3)
    before = held()
    for width in range(4, 4 + shapes):
        call(width)
    return [after - first for after, first in zip(held(), before, strict=True)]


@pytest.mark.parametrize("shapes", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_shapes_leave_nothing_behind(shapes, compiled):
    """In a process of its own, whose caches may be emptied."""
    program = f"from tests.attention.test_calls import leave; print(leave({shapes}))"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    process = forks.start(program, environment=environment, imports=("jax", "flax.nnx"))
    said, error = process.communicate(600)
    assert said.strip() == "[0, 0]", error[-2000:]
