"""The Mosaic GPU backward pass without a card: what it refuses, sizes, numbers in the interpreter, lowering."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from monarch_jax import monarch_attention, xla
from monarch_jax.contract import Problem, Residuals
from monarchrt import pallas_kernels
from monarchrt.pallas_kernels.sm90 import tuning
from monarchrt.pallas_kernels.sm90.backward import backward
from monarchrt.pallas_kernels.sm90.config import (
    SHARED_MEMORY,
    LeftBackwardConfig,
    RightBackwardConfig,
    backward_config,
    forward_config,
)
from monarchrt.pallas_kernels.sm90.forward import forward
from monarchrt.pallas_kernels.sm90.shared import gradient_scales
from tests.attention.suite import error
from tests.kernels.mosaic_interpreter import interpreted
from tests.kernels.test_mosaic import PAPER, lower, tiles, tokens
from tests.untyped import there, untyped

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

# back through L, each warpgroup for itself
ALONE: dict[str, Any] = dict(independent=True, columns=1, row_blocks=1, stages=4)


def cut(config, blocks=2):
    """A configuration with few persistent blocks, so that small problems keep them all busy for several turns."""
    parts = {name: getattr(config, name) for name in ("right", "left", "keys", "query")}
    return dataclasses.replace(config, **{n: dataclasses.replace(x, blocks=blocks) for n, x in parts.items()})


def compare(
    monkeypatch,
    shape,
    key_tiles,
    visible=None,
    *,
    races=False,
    grad_tiles=None,
    dtype=jnp.bfloat16,
    keys=None,
    left=None,
    query=None,
    **sizes,
):
    """The kernels' gradients against XLA's in float32; key tiles that no query sees hold NaN."""
    q, k, v = tiles(0, shape, key_tiles, dtype)
    g = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    masked = visible is not None
    visible = jnp.array(visible if masked else (key_tiles,) * shape[1], jnp.int32)
    problem = Problem(scale=shape[-1] ** -0.5, masked=masked)
    wide = (q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32))
    out, lse = xla.forward(problem, *wide, visible)
    expected = list(xla.vjp(problem, Residuals(*wide, visible, out, lse), g.astype(jnp.float32)))
    axis = jnp.arange(key_tiles).reshape(1, -1, 1, 1, 1, 1)
    k, v = (jnp.where(axis < visible.max(), x, jnp.nan) for x in (k, v))
    if grad_tiles:
        expected[1:] = [jnp.where(axis >= visible.max() - grad_tiles, x, 0) for x in expected[1:]]
    config = dataclasses.replace(cut(backward_config(shape[2], shape[3], shape[-1])), **sizes)
    config = tuning.changed(config, {"keys": keys or {}, "left": left or {}, "query": query or {}})
    options = dict(scale=problem.scale, masked=masked, grad_tiles=grad_tiles, config=config)
    with interpreted(monkeypatch, detect_races=races) as found_races:
        found = jax.block_until_ready(backward(q, k, v, visible, out.astype(dtype), lse, g, **options))
        assert not races or not found_races()
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert x.dtype == dtype
        assert error(x, y) < (1e-2 if dtype == jnp.bfloat16 else 2e-3), name


@pytest.mark.parametrize("left", [pytest.param({}, marks=pytest.mark.slow), ALONE])
def test_numbers_and_no_races_in_the_interpreter(monkeypatch, left):
    """Of three key tiles one query tile sees one, the other two; one has gradients, and one holds NaN."""
    compare(monkeypatch, (1, 2, 1, 9, 1, 64), 3, (1, 2), grad_tiles=1, left=left, races=True)


@pytest.mark.slow
def test_no_races_where_warpgroups_take_turns(monkeypatch):
    """Columns of several steps, so that both warpgroups use every buffer again."""
    compare(monkeypatch, (1, 2, 65, 2, 1, 64), 3, (2, 3), left=ALONE, races=True)


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "warpgroups"), [(None, 4), ((1, 2, 3), 4), ((1, 2, 3), 2)])
def test_no_races_where_warpgroups_share_key_rows(monkeypatch, visible, warpgroups):
    """Of three items: one of four warpgroups, or one of two in every second turn, has none."""
    query = dict(warpgroups=warpgroups, stages=2)
    compare(monkeypatch, (1, 3, 1, 33, 2, 64), 3, visible, query=query, races=True)


@pytest.mark.parametrize(
    ("rows", "cols", "dim", "chunk_bytes"),
    [
        pytest.param(*x, chunk_bytes, marks=[pytest.mark.slow] * (bool(m) == n % 2))  # one of the two by default
        for n, x in enumerate([(3, 40, 64), (30, 52, 128), (90, 52, 128), (135, 80, 128)])
        for m, chunk_bytes in enumerate((2**30, 2**14))
    ],
)
def test_gradients_have_the_shapes_of_their_arrays(rows, cols, dim, chunk_bytes):
    """Several batch entries, query tiles and heads, in one chunk and in many; more key tiles than query tiles."""
    q, k, lse = (tokens(3, *x) for x in ((2, rows, cols, 2, dim), (4, rows, cols, 2, dim), (2, rows, cols, 2)))
    config = dataclasses.replace(there(backward_config(rows, cols, dim)), chunk_bytes=chunk_bytes)
    run = functools.partial(backward, scale=0.1, masked=True, grad_tiles=None, config=config)
    visible = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run, q, k, k, visible, q, lse, q)) == tuple(
        (x.shape, x.dtype) for x in (q, k, k)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "key_tiles", "visible", "sizes"),
    [
        ((1, 2, 3, 40, 1, 64), 2, None, dict(dtype=jnp.float16)),
        ((1, 2, 2, 33, 1, 64), 3, (1, 2), dict(grad_tiles=1)),
        ((1, 4, 2, 16, 1, 64), 2, None, {}),  # four query tiles share a block
        ((1, 4, 2, 80, 1, 64), 1, None, {}),  # a whole block each and a shared one, products deeper than b2
        ((1, 2, 70, 33, 1, 64), 1, None, {}),  # two blocks of rows, more than one block of pairs
        ((1, 1, 130, 33, 1, 128), 1, None, {}),  # three
        ((1, 2, 3, 40, 2, 128), 2, (1, 2), {}),
        (
            (1, 2, 3, 40, 1, 64),
            3,
            None,
            dict(keys=dict(independent=True, ring=8)),
        ),  # an odd number of key rows
        ((1, 2, 3, 33, 1, 64), 3, (1, 2), dict(keys=dict(independent=False))),
        ((1, 3, 2, 40, 1, 128), 1, None, dict(keys=dict(independent=False))),
        ((2, 2, 2, 40, 2, 64), 2, (1, 2), dict(chunk_bytes=2**14)),  # one head and query tile at a time
        ((1, 2, 3, 33, 1, 64), 2, None, dict(left=ALONE)),  # one step a column: a warpgroup without any
        ((1, 2, 70, 9, 1, 128), 2, (1, 2), dict(left=ALONE)),  # columns of two steps and of three
        ((1, 4, 70, 16, 1, 64), 1, None, dict(left=ALONE, dtype=jnp.float16)),
        ((1, 3, 2, 33, 1, 64), 2, None, dict(query=dict(warpgroups=4, stages=2))),  # a warpgroup without an item
        ((1, 4, 1, 80, 1, 64), 2, None, dict(query=dict(warpgroups=3, stages=2))),  # whole blocks and a shared one
        ((1, 5, 2, 33, 1, 64), 4, (1, 2, 2, 3, 4), dict(query=dict(warpgroups=3, stages=2), left=ALONE)),
    ],
)
def test_more_numbers_in_the_interpreter(monkeypatch, shape, key_tiles, visible, sizes):
    compare(monkeypatch, shape, key_tiles, visible, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "key_tiles", "visible", "tiles_at_a_time", "left"),
    [
        ((1, 2, 1, 9, 2, 64), 2, (1, 2), 1, {}),
        ((1, 4, 2, 32, 1, 64), 2, None, 2, {}),  # two query tiles share a block of c_L
        ((1, 4, 2, 32, 1, 64), 2, None, 2, ALONE),
        ((1, 2, 70, 33, 1, 64), 1, None, 1, {}),
    ],
)
def test_kept_intermediates_give_the_same_bits(monkeypatch, shape, key_tiles, visible, tiles_at_a_time, left):
    """Those of all heads and query tiles, read by chunks of one head and a few query tiles."""
    q, k, v = tiles(0, shape, key_tiles)
    g = jax.random.normal(jax.random.key(1), shape).astype(q.dtype)
    masked = visible is not None
    visible = jnp.array(visible if masked else (key_tiles,) * shape[1], jnp.int32)
    options: dict[str, Any] = dict(scale=shape[-1] ** -0.5, masked=masked)
    sizes = forward_config(shape[2], shape[3], shape[-1])
    sizes = tuning.changed(sizes, {"right": {"blocks": 2}, "left": {"blocks": 2}})
    config = tuning.changed(cut(backward_config(shape[2], shape[3], shape[-1])), {"left": left})
    bytes_of_chunk = 4 * key_tiles * shape[2] * shape[3] * shape[-1] * tiles_at_a_time
    found = []
    with interpreted(monkeypatch):
        out, lse, kept = forward(q, k, v, visible, config=sizes, keep=True, **options)
        for x, limit in ((None, bytes_of_chunk), (kept, bytes_of_chunk // 2)):  # kept ones leave room for twice as much
            options["config"] = dataclasses.replace(config, chunk_bytes=limit)
            found.append(backward(q, k, v, visible, out, lse, g, grad_tiles=None, kept=x, **options))
            jax.block_until_ready(found)
    for name, x, y in zip(("dq", "dk", "dv"), *found, strict=True):
        assert jnp.isfinite(x).all(), name
        assert (x == y).all(), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale", [0.125, -1.0, 0.0])
def test_the_scale_is_in_the_gradient_once(dtype, scale):
    early, late = gradient_scales(dtype, scale)
    assert early * late == scale
    assert early != 0  # d_c is a sum of scaled gradients over it


@pytest.mark.parametrize("warpgroups", [1, 5])
def test_sizes_that_no_kernel_has_are_refused(warpgroups):
    with pytest.raises(ValueError, match=f"warpgroups={warpgroups} must be"):
        tuning.changed(backward_config(30, 52, 128), {"query": {"warpgroups": warpgroups}})


def test_configurations_fit_a_block():
    for dim, cols, rows in itertools.product((64, 128), (1, 30, 45, 52, 64, 80, 90, 96), (1, 30, 45, 64, 90, 135, 192)):
        config = backward_config(rows, cols, dim)
        assert config is not None
        assert config.left.row_blocks * 64 >= rows
        for size in (
            config.left.shared_memory(rows, dim),
            *(x.shared_memory(cols, dim) for x in (config.keys, config.query)),
        ):
            assert size <= SHARED_MEMORY
    for cols, dim, independent in ((52, 128, True), (60, 128, False), (80, 64, True), (90, 64, False)):
        assert there(backward_config(30, cols, dim)).keys.independent is independent
    with pytest.raises(ValueError, match="ring=5 is below 6"):
        RightBackwardConfig(independent=True, ring=5)
    for rows in (30, 90, 96):
        assert LeftBackwardConfig(**ALONE).shared_memory(rows, 128) <= SHARED_MEMORY
    with pytest.raises(ValueError, match="independent=True with columns=2, row_blocks=1, stages=4 is not one column"):
        LeftBackwardConfig(**untyped(ALONE | dict(columns=2)))
    with pytest.raises(ValueError, match=r"stages=2 is not .* 4 or more"):  # a step would wait for itself
        LeftBackwardConfig(**untyped(ALONE | dict(stages=2)))
    with pytest.raises(ValueError, match="4 computing warpgroups"):
        LeftBackwardConfig(columns=2, row_blocks=2)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((1, 1, 200, 2, 1, 64), "b1=200 rows are above 192"), ((1, 1, 2, 104, 1, 64), "b2=104 columns are above 96")],
)
def test_larger_tiles_take_another_gradient(shape, reason):
    problem, q = Problem(scale=1.0), jnp.zeros(shape, jnp.bfloat16)
    assert pallas_kernels.supports(problem, q, q) is None
    assert reason in pallas_kernels.supports_vjp(problem, q, q)
    residuals = Residuals(q, q, q, jnp.ones(1, jnp.int32), q, jnp.zeros(shape[:-1]))
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.vjp(problem, residuals, q)


@pytest.mark.parametrize(
    ("rows", "cols", "count", "masked"),
    [
        pytest.param(*x, m, marks=[pytest.mark.slow] * ((x, m) not in ((PAPER[0], True), (PAPER[-1], False))))
        for x in PAPER
        for m in (False, True)
    ],
)
def test_lowers_for_cuda_without_a_card(rows, cols, count, masked):
    x, lse = tokens(1, count, rows, cols, 12, 128), tokens(1, count, rows, cols, 12, dtype=jnp.float32)
    visible = jax.ShapeDtypeStruct((count,), jnp.int32)

    def run(q, k, v, visible, out, lse, g):
        return pallas_kernels.vjp(Problem(scale=0.1, masked=masked), Residuals(q, k, v, visible, out, lse), g)

    assert lower(run, x, x, x, visible, x, lse, x).count("mosaic_gpu_v2") == 4


def test_causal_gradient_under_vmap_lowers():
    def loss(*x):
        out = monarch_attention(*x, grid=(6, 10, 13), causal_block=3, implementation="mosaic")
        return out.astype(jnp.float32).sum()

    stacked = tokens(2, 3, 780, 2, 128)
    assert lower(jax.vmap(jax.grad(loss, (0, 1, 2))), stacked, stacked, stacked).count("mosaic_gpu_v2") == 6


@pytest.mark.parametrize(
    ("width", "keep", "kernels"),
    [
        pytest.param(13, False, 6, marks=pytest.mark.slow),
        (13, True, 5),  # stage 1 runs once
        # the gradient of so many columns is another backend's, from the usual residuals
        pytest.param(104, True, 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_is_not_made_again(width, keep, kernels):
    def loss(*x):
        out = monarch_attention(*x, grid=(2, 6, width), keep_intermediates=keep, implementation="mosaic")
        return out.astype(jnp.float32).sum()

    x = tokens(1, 2 * 6 * width, 2, 128)
    assert lower(jax.grad(loss, (0, 1, 2)), x, x, x).count("mosaic_gpu_v2") == kernels


@pytest.mark.parametrize("heads", [pytest.param(2, marks=pytest.mark.slow), 12])  # one chunk, several
def test_gradient_under_shard_map_lowers(heads):
    """Heads over a mesh axis: results must carry the axis they vary on."""
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "heads")
    attend = functools.partial(monarch_attention, grid=(21, 30, 52), implementation="mosaic")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    x = tokens(1, 21 * 30 * 52, heads, 128)
    text = lower(jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum(), (0, 1, 2)), x, x, x)
    assert text.count("mosaic_gpu_v2") == 5  # the forward pass is one kernel


def test_gradient_of_tiles_too_large_is_tritons():
    pytest.importorskip("jax_triton")
    x = tokens(1, 3 * 4 * 104, 2, 64)
    run = functools.partial(monarch_attention, grid=(3, 4, 104), implementation="mosaic")
    text = lower(jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), (0, 1, 2)), x, x, x)
    assert "mosaic_gpu_v2" in text
    assert "triton_kernel_call_ffi" in text
