"""Several refinement steps on Hopper without a card: numbers in the interpreter, Triton's share written out in JAX."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from monarch_jax import xla
from monarch_jax.contract import Problem
from monarchrt.pallas_kernels.sm90 import refined, tuning
from monarchrt.pallas_kernels.sm90.config import backward_config, forward_config
from tests.attention.suite import error
from tests.kernels.mosaic_interpreter import interpreted
from tests.kernels.test_mosaic import tiles
from tests.kernels.test_mosaic_backward import ALONE, cut
from tests.kernels.written_pairs import Written

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")


def compare(
    monkeypatch, shape, key_tiles, visible=None, *, num_iters=2, grad_tiles=None, dtype=jnp.bfloat16, **options
):
    """Output and gradients against XLA's in float32; key tiles that no query sees hold NaN."""
    races, sharp, chunk_bytes = (
        options.pop(x, y) for x, y in (("races", False), ("sharp", 1.0), ("chunk_bytes", None))
    )
    q, k, v = tiles(0, shape, key_tiles, dtype)
    q = q * dtype(sharp)
    g = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    masked = visible is not None
    visible = jnp.array(visible if masked else (key_tiles,) * shape[1], jnp.int32)
    problem = Problem(scale=shape[-1] ** -0.5, masked=masked, num_iters=num_iters)
    wide = (q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32))
    out, back = jax.vjp(lambda q, k, v: xla.attend(problem, q, k, v, visible), *wide)
    expected = list(back(g.astype(jnp.float32)))
    axis = jnp.arange(key_tiles).reshape(1, -1, 1, 1, 1, 1)
    k, v = (jnp.where(axis < visible.max(), x, jnp.nan) for x in (k, v))
    if grad_tiles:
        expected[1:] = [jnp.where(axis >= visible.max() - grad_tiles, x, 0) for x in expected[1:]]
    config = cut(backward_config(shape[2], shape[3], shape[-1]))
    config = tuning.changed(config, {"left": ALONE})
    ahead = forward_config(shape[2], shape[3], shape[-1])
    ahead = tuning.changed(ahead, {"right": {"blocks": 2}, "left": {"blocks": 2}})
    if chunk_bytes:
        config, ahead = (dataclasses.replace(x, chunk_bytes=chunk_bytes) for x in (config, ahead))
    sizes: dict[str, Any] = dict(num_iters=num_iters, scale=problem.scale, masked=masked, kernels=Written)
    with jax.numpy_rank_promotion("allow"), interpreted(monkeypatch, detect_races=races) as found_races:
        own, own_lse = jax.block_until_ready(refined.forward(q, k, v, visible, config=ahead, **sizes))
        assert error(own, out) < (1e-2 if dtype == jnp.bfloat16 else 2e-3)
        found = refined.backward(q, k, v, visible, own, own_lse, g, grad_tiles=grad_tiles, config=config, **sizes)
        jax.block_until_ready(found)
        assert not races or not found_races()
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert x.dtype == dtype
        print(name, error(x, y))
        assert error(x, y) < (1.5e-2 if dtype == jnp.bfloat16 else 2e-3), name


def test_two_steps(monkeypatch):
    """Two query tiles of three and two key tiles, of which one is seen by nobody."""
    compare(monkeypatch, (1, 2, 3, 9, 1, 64), 3, (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "key_tiles", "visible", "options"),
    [
        ((1, 4, 3, 16, 1, 64), 2, None, dict(num_iters=3)),  # columns of four tiles share an item
        ((1, 1, 65, 7, 1, 128), 2, (2,), dict(sharp=3.0)),  # rows of two blocks, factors at their limit
        ((2, 2, 5, 40, 2, 64), 3, (2, 3), dict(grad_tiles=1, chunk_bytes=1)),  # a head and query tile at a time
        ((1, 2, 30, 52, 1, 128), 2, None, dict(dtype=jnp.float16)),
        ((1, 1, 9, 70, 1, 64), 2, (1,), dict()),  # more columns than an item has
    ],
)
def test_shapes(monkeypatch, shape, key_tiles, visible, options):
    compare(monkeypatch, shape, key_tiles, visible, **options)


@pytest.mark.slow
def test_no_races(monkeypatch):
    """Columns of several steps, so that both warpgroups use every buffer again."""
    compare(monkeypatch, (1, 2, 65, 2, 1, 64), 3, (2, 3), races=True)
