"""Settings and inputs that do not fit, and what a setting costs."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import (
    MonarchKVCache,
    MonarchSpec,
    bytes_moved,
    dense_flops,
    flops,
    monarch_attention,
    monarch_attention_1d,
    monarch_factors,
    sparsity,
)
from monarch_jax.tiles import tiles_to_tokens, tokens_to_tiles, visible_tiles
from tests.attention.suite import inputs, value_and_grads
from tests.untyped import untyped

GRID = (4, 6, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(grid=(4, 6)), r"grid=\(4, 6\) is not three integers \(frames, height, width\)"),
        (dict(grid=(4, 6, 0)), r"grid\[2\]=0 is not a positive integer"),
        (dict(grid=(4, 6, 7)), r"query has 192 tokens, grid=\(4, 6, 7\) has 4\*6\*7 = 168"),
        (
            dict(tile=(1, 4, 8)),
            r"tile=\(1, 4, 8\): 4 does not divide the 6 rows of grid=\(4, 6, 8\); the nearest that do are 3 or 6",
        ),
        (dict(tile=(1, 9, 8)), r"9 does not divide the 6 rows .* the nearest that does is 6"),
        (dict(tile=(3, 6, 8)), r"3 does not divide the 4 frames of grid"),
        (dict(tile=8), r"tile=8 is not three integers \(n_f, n_h, n_w\)"),
        (dict(blocks="h,w"), r"blocks='h,w' is unknown; .* Choices: 'fh,w', 'w,fh', 'f,hw'"),
        (dict(num_iters=0), r"num_iters=0 is not a positive integer"),
        (dict(num_iters=10**12), r"num_iters=1000000000000 is too large; it should be at most 100"),
        (dict(causal_block=10**5000), r"causal_block=an integer of thousands of digits is too large"),
        (dict(causal_block=3, tile=(2, 6, 8)), r"causal_block=3 frames is not a multiple of the tile's 2 frames"),
        (dict(num_iters=jnp.ones(2, int)), r"num_iters=Array.* is not a positive integer"),
        (dict(grid=(4.0, 6, 8)), r"grid\[0\]=4.0 is not a positive integer"),
        (dict(scale=jnp.inf), r"scale=inf is not a finite number; multiply query"),
        (dict(scale=-1e38), r"scale=-1e\+38 is too large for a softmax in float32; use at most 1e\+06, or multiply"),
        (dict(scale=10**400), r"scale=1000.* is too large for a softmax in float32"),
        (dict(scale="half"), r"scale='half' is not a finite number"),
        (dict(kv_frames=2.5), r"kv_frames=2.5 is not an integer or an integer scalar of JAX"),
        (dict(kv_frames=True), r"kv_frames=True is not an integer"),
        (dict(kv_frames=jnp.float32(2)), r"kv_frames has shape \(\), dtype float32; it should be an int32 scalar"),
        (dict(kv_frames=jnp.arange(1, 5)), r"kv_frames has shape \(4,\), dtype int32; it should be an int32 scalar"),
        (dict(kv_frames=jnp.int32(0)), r"kv_frames=0 is not a multiple of the tile's 1 frames from 1 to 4"),
        (dict(kv_frames=2, causal_block=2), r"causal_block=2: the queries are the last 4 frames .* which have 2"),
        (dict(implementation=["xla"]), r"implementation=\['xla'\] is not None or one of"),
        (dict(implementation=np.array(["xla", "triton"])), r"implementation=array.* is not None or one of"),
        (dict(implementation="x" * 5000), r"implementation='x{1,80}\.\.\. is not None or one of"),
        (dict(blocks=np.array(["fh,w", "w,fh"])), r"blocks=array.* is unknown; Choices: 'fh,w'"),
        (dict(intermediates=np.array(["e4m3", "e4m3"])), r"intermediates=array.* is not None"),
        (dict(tile={1, 6, 8}), r"tile={.*} is not three integers \(n_f, n_h, n_w\)"),
        (dict(tile={1: 6, 6: 6, 8: 6}), r"tile={.*} is not three integers \(n_f, n_h, n_w\)"),
        (dict(kv_frames=5), r"kv_frames=5 is not a multiple of the tile's 1 frames from 1 to 4"),
        (dict(kv_frames=3, tile=(2, 6, 8)), r"kv_frames=3 is not a multiple of the tile's 2 frames from 2 to 4"),
    ],
)
def test_bad_settings(unchecked, options, message):
    q, k, v, _ = inputs(0, GRID, batch=1, heads=1)
    with pytest.raises(ValueError, match=message):
        monarch_attention(q, k, v, **(dict(grid=GRID) | options))


def test_bad_arrays(unchecked):
    q, k, v, _ = inputs(0, GRID, batch=1, heads=2)
    cases = [
        ((q, k.astype(jnp.bfloat16), v), r"key has dtype bfloat16, query has float32"),
        ((q, k, v[:, :, :1]), r"value has heads 1 .*query has 2"),
        ((q, k[..., :8], v[..., :8]), r"key has head_dim 8 .*query has 16"),
        ((q, k[:, :48], v), r"value has shape \(1, 192, 2, 16\), key has \(1, 48, 2, 16\)"),
        ((q, k[:, :50], v[:, :50]), r"key has 50 tokens, not a multiple of 48 = 6\*8"),
        (tuple(x.astype(jnp.int32) for x in (q, k, v)), r"query has dtype int32; it should be one of bfloat16"),
        ((q[:0], k[:0], v[:0]), r"query has shape \(0, 192, 2, 16\); it should be \[batch"),
        ((q.tolist(), k, v), r"query is a list; it should be an array of JAX or NumPy"),
        ((q, np.ma.masked_array(k), v), r"key is a MaskedArray; it should be an array of JAX or NumPy"),
        ((q, k, v.tolist()), r"value is a list; it should be an array of JAX or NumPy"),
        ((q, jax.ShapeDtypeStruct(k.shape, k.dtype), v), r"key is a ShapeDtypeStruct; it should be an array of JAX"),
        ((q, types.SimpleNamespace(ndim=4), v), r"key is a SimpleNamespace; it should be an array of JAX"),
        ((q, np.full(k.shape, None), v), r"key has dtype object; it should be one of bfloat16"),
        ((q[0], k, v), r"query has shape \(192, 2, 16\); it should be \[batch, tokens, heads, head_dim\]"),
    ]
    for arrays, message in cases:
        with pytest.raises(ValueError, match=message):
            monarch_attention(*arrays, grid=GRID)


def test_bad_block_sizes(unchecked):
    q, k, v, _ = inputs(0, (1, 4, 6), batch=1, heads=1)
    with pytest.raises(ValueError, match=r"block_sizes=\(5, 4\): 20 tokens per tile do not divide the 24 of query"):
        monarch_attention_1d(q, k, v, block_sizes=(5, 4))
    with pytest.raises(ValueError, match=r"block_sizes=\(0, 4\) is not two positive integers"):
        monarch_attention_1d(q, k, v, block_sizes=(0, 4))
    with pytest.raises(ValueError, match=r"block_sizes={.*} is not two positive integers"):
        monarch_attention_1d(q, k, v, block_sizes=untyped({4, 6}))
    with pytest.raises(ValueError, match=r"block_sizes=6 is not two positive integers"):
        monarch_attention_1d(q, k, v, block_sizes=untyped(6))
    with pytest.raises(ValueError, match=r"query has shape \(24, 1, 16\); it should be \[batch"):
        monarch_attention_1d(q[0], k, v, block_sizes=(4, 6))


def test_scale_is_known_when_tracing(unchecked):
    q, k, v, _ = inputs(0, GRID, batch=1, heads=1)
    with pytest.raises(ValueError, match=r"scale=.* is not a finite number; multiply query by one that is traced"):
        jax.jit(lambda s: monarch_attention(q, k, v, grid=GRID, scale=s))(0.5)


@pytest.mark.parametrize("scale", ["0.5", b"0.5", True, np.True_, float("inf")], ids=lambda x: repr(x)[:9])
def test_what_is_no_scale(unchecked, scale):
    q, k, v, _ = inputs(0, (2, 3, 4), batch=1, heads=1)
    with pytest.raises(ValueError, match=r"scale=.* is not a finite number; multiply query by one that is traced"):
        monarch_attention(q, k, v, grid=(2, 3, 4), scale=scale)


def test_arrays_of_numpy(unchecked):
    """float64 is what JAX makes of it, alone and beside arrays of JAX."""
    arrays = inputs(0, (2, 3, 4), batch=1, heads=1)[:3]
    wide = [untyped(np.asarray(x, np.float64)) for x in arrays]
    expected = monarch_attention(*arrays, grid=(2, 3, 4))
    for given in (wide, [arrays[0], *wide[1:]], [wide[0], *arrays[1:]]):
        found = monarch_attention(*given, grid=(2, 3, 4))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert monarch_factors(*given[:2], grid=(2, 3, 4)).attention.dtype == jnp.float32
        assert monarch_attention_1d(*given, block_sizes=(3, 4)).dtype == jnp.float32
    sizes: dict[str, Any] = dict(batch=1, frames=2, height=3, width=4, heads=1, head_dim=16, dtype=jnp.float32)
    cached = MonarchKVCache.init(**sizes).append(*wide[1:]).attend(wide[0])
    np.testing.assert_allclose(np.asarray(cached), np.asarray(expected), atol=1e-6)


def test_arrays_of_numpy_in_float64(unchecked, x64):
    wide = inputs(0, (2, 3, 4), batch=1, heads=1, dtype=jnp.float64)[:3]
    found = monarch_attention(*(untyped(np.asarray(x)) for x in wide), grid=(2, 3, 4))
    assert found.dtype == jnp.float64
    with pytest.raises(ValueError, match="key has dtype float64, query has float32"):
        monarch_attention(wide[0].astype(jnp.float32), *(untyped(np.asarray(x)) for x in wide[1:]), grid=(2, 3, 4))


def test_numbers_of_numpy(unchecked, x64):
    """A scale of float64 leaves float32 as it is; whole numbers of any kind give equal specs."""
    arrays = inputs(0, (2, 3, 4), batch=1, heads=1)
    for x in value_and_grads(*arrays, grid=(2, 3, 4), scale=np.float64(0.3)):
        assert x.dtype == jnp.float32
    spec = MonarchSpec(
        grid=untyped(np.array([2, 3, 4])), num_iters=untyped(jnp.int32(1)), causal_block=untyped(np.int64(2))
    )
    assert hash(spec) == hash(MonarchSpec(grid=(2, 3, 4), causal_block=2))


def test_the_papers_sparsities():
    """Tables 5 and 6: 95, 97, 97 and 98%, and 90% training-free with half tiles."""
    small, large = (21, 30, 52), (21, 45, 80)
    settings = [(small, None), (small, (3, 30, 52)), (large, None), (large, (3, 45, 80)), (small, (1, 15, 52))]
    found = [round(100 * sparsity(grid=grid, tile=tile), 1) for grid, tile in settings]
    assert found == [94.7, 97.0, 96.5, 98.0, 91.4]


def test_costs():
    """Formulas of the method: 6 b1 b2^2 D + 4 b1^2 b2 D per pair of tiles, 8 D bytes per vector of alpha and Y."""
    spec = MonarchSpec(grid=(6, 4, 5), tile=(2, 4, 5))
    b1, b2, dim = 8, 5, 16
    assert (spec.block_rows, spec.block_cols, spec.query_tiles, spec.tile_pairs) == (b1, b2, 3, 9)
    forward = 9 * (6 * b1 * b2**2 + 4 * b1**2 * b2) * dim * 2
    assert flops(spec, heads=2, head_dim=dim) == forward
    # products of R (scores, alpha, Y) and of L (scores, output): again but for the output, and two for each
    right, left = 2 * b1 * b2**2, 2 * b1**2 * b2
    assert flops(spec, heads=2, head_dim=dim, mode="vjp") == 9 * (9 * right + 5 * left) * dim * 2
    more = MonarchSpec(grid=(6, 4, 5), tile=(2, 4, 5), num_iters=3)  # two steps more, of 2 R and 2 L
    assert flops(more, heads=2, head_dim=dim) == 9 * (7 * right + 6 * left) * dim * 2
    assert flops(more, heads=2, head_dim=dim, mode="vjp") == 9 * (21 * right + 17 * left) * dim * 2
    assert dense_flops(spec, heads=2, head_dim=dim, batch=3) == 4 * 120 * 120 * dim * 2 * 3
    moved = [bytes_moved(spec, heads=2, head_dim=dim, spill=spill) for spill in (False, True)]
    assert moved[1] - moved[0] == 8 * dim * 2 * 9 * b1 * b2
    causal = MonarchSpec(grid=(6, 4, 5), tile=(1, 4, 5), causal_block=3)
    assert causal.visible_tiles() == (3, 3, 3, 6, 6, 6)
    assert flops(causal, heads=1, head_dim=4) * 4 == flops(MonarchSpec(grid=(6, 4, 5)), heads=1, head_dim=4) * 3


def test_bad_costs(unchecked):
    spec = MonarchSpec(grid=(6, 4, 5))
    with pytest.raises(ValueError, match="mode='backward' is not 'forward' or 'vjp'"):
        flops(spec, heads=1, head_dim=1, mode=untyped("backward"))
    for count in (flops, dense_flops, bytes_moved):
        with pytest.raises(ValueError, match="heads=0 is not a positive integer"):
            count(spec, heads=0, head_dim=1)
        with pytest.raises(ValueError, match="batch=-1 is not a positive integer"):
            count(spec, heads=1, head_dim=1, batch=-1)


@pytest.mark.parametrize("count", [flops, dense_flops, bytes_moved])
def test_costs_are_of_a_spec(unchecked, count):
    with pytest.raises(ValueError, match=r"spec=\(6, 4, 5\) is not a MonarchSpec; make one"):
        count((6, 4, 5), heads=1, head_dim=1)


def test_tiles_of_other_shapes_are_refused(unchecked):
    spec = MonarchSpec(grid=(2, 4, 6), tile=(2, 4, 6))
    for x in (jnp.ones((1, 24, 2)), jnp.ones(48), untyped([1])):
        with pytest.raises(ValueError, match=r"x has shape .*; it should be \[batch, n\*48, ...\], whole tiles"):
            tokens_to_tiles(x, spec)
    for x in (jnp.ones((1, 48, 2)), jnp.ones((1, 1, 8, 5, 2)), untyped(None)):
        with pytest.raises(ValueError, match=r"x has shape .*; it should be \[batch, n\*1, 8, 6, ...\]"):
            tiles_to_tokens(x, spec)
    for frames in map(untyped, (0, -2, 1, 4, 2.0, True, "2")):
        with pytest.raises(ValueError, match=f"kv_frames={frames!r} is not"):
            visible_tiles(spec, frames)


@pytest.mark.parametrize("block", [None, 1, 2, 4])
@pytest.mark.parametrize("tied", [1, 2])
def test_what_is_seen_of_a_filled_cache_frame_by_frame(block, tied):
    """The same known and traced: a key frame is seen if it is there and its block is not after the query's."""
    if block is not None and block % tied:
        return
    frames, capacity = 4, 12
    spec = MonarchSpec(
        grid=(frames, 2, 6), tile=(tied, 2, 3), key_frames=capacity, causal_block=block
    )  # 2 tiles in a frame
    traced = jax.jit(lambda filled: visible_tiles(spec, filled))
    for filled in range(frames, capacity + 1, tied):
        seen = []
        for query in range(filled - frames, filled, tied):
            keys = [key for key in range(filled) if block is None or key // block <= query // block]
            seen += 2 * [2 * len(keys) // tied]
        assert visible_tiles(spec, filled).tolist() == seen
        assert traced(jnp.int32(filled)).tolist() == seen
