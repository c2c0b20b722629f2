"""The attention inside Flax modules, NNX and Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarch_jax import MonarchKVCache, MonarchSelfAttention, attention_fn, monarch_attention
from tests.attention.suite import error
from tests.untyped import untyped

GRID = (2, 3, 4)


def x_of(*shape):
    return jax.random.normal(jax.random.key(0), shape)


def test_nnx_attention_module():
    """nnx.MultiHeadAttention with attention_fn computes what its projections around the op compute."""
    layer = nnx.MultiHeadAttention(
        num_heads=2, in_features=16, decode=False, attention_fn=attention_fn(grid=GRID), rngs=nnx.Rngs(0)
    )
    x = x_of(3, 24, 16)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    expected = layer.out(monarch_attention(q, k, v, grid=GRID))
    assert error(nnx.jit(lambda m, x: m(x))(layer, x), expected) <= 2e-6
    grads = nnx.grad(lambda m: (m(x) ** 2).sum())(layer)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads) if g.ndim == 3)


def test_linen_attention_module():
    layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn(grid=GRID, tile=(1, 1, 1)))
    dense = nn.MultiHeadDotProductAttention(num_heads=2)
    x = x_of(2, 24, 16)
    params = dense.init(jax.random.key(1), x)
    assert error(layer.apply(params, x), dense.apply(params, x)) <= 1e-5


def test_batch_axes_of_modules_are_free():
    attend = attention_fn(grid=GRID)
    q = x_of(2, 3, 24, 2, 8)
    assert error(attend(q, q, q)[1], attend(q[1], q[1], q[1])) <= 2e-6


def test_batch_axes_are_the_same():
    attend = attention_fn(grid=GRID)
    q = x_of(6, 24, 2, 8)
    with pytest.raises(
        ValueError, match=r"query has shape \(2, 3, 24, 2, 8\), key \(6, 24, 2, 8\), .*batch axes differ"
    ):
        attend(q.reshape(2, 3, 24, 2, 8), q, q)
    with pytest.raises(TypeError, match="scale"):
        attend(q, q, q, scale=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mask=jnp.ones((1, 1, 24, 24))), "mask and bias cannot be part of a Monarch map"),
        (dict(module=object()), "sow_weights=True: attention weights are never formed"),
        (dict(is_causal=True), "is_causal=True is causal by token"),
        (dict(dropout_rate=0.1, deterministic=False), "dropout_rate=0.1: attention weights are never formed"),
    ],
)
def test_what_a_map_cannot_express(options, message):
    q = x_of(1, 24, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention_fn(grid=GRID)(q, q, q, **options)


def test_self_attention_module_and_its_cache():
    """`extend` block by block equals the block-causal call over the clip."""
    layer = MonarchSelfAttention(16, num_heads=2, causal_block=3, rngs=nnx.Rngs(0))
    x = x_of(2, 6 * 12, 16)
    expected = layer(x, grid=(6, 3, 4))
    cache = MonarchKVCache.init(batch=2, frames=6, height=3, width=4, heads=2, head_dim=8, dtype=jnp.float32)
    for n in range(2):
        out, cache = layer.extend(x[:, n * 36 : (n + 1) * 36], cache)
        assert error(out, expected[:, n * 36 : (n + 1) * 36]) <= 2e-6
    other = MonarchKVCache.init(batch=2, frames=6, height=3, width=4, heads=2, head_dim=8, tile=(3, 3, 4))
    with pytest.raises(ValueError, match=r"cache has tile=\(3, 3, 4\).*the module has tile=\(1, 3, 4\)"):
        layer.extend(x[:, :36], other)


def test_a_rolling_cache_of_a_causal_module():
    """Blocks that fit the window: as with a cache that has room for all."""
    layer = MonarchSelfAttention(16, num_heads=2, causal_block=3, rngs=nnx.Rngs(0))
    sizes: dict[str, Any] = dict(batch=1, frames=6, height=3, width=4, heads=2, head_dim=8, dtype=jnp.float32)
    rolling, whole = (MonarchKVCache.init(rolling=x, **sizes) for x in (True, False))
    for x in jnp.split(x_of(1, 6 * 12, 16), 2, axis=1):
        found, rolling = layer.extend(x, rolling)
        expected, whole = layer.extend(x, whole)
        assert error(found, expected) <= 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide features=16"),
        (dict(num_heads=0), "num_heads=0 is not a positive integer"),
        (dict(tile=(1, 3)), r"tile=\(1, 3\) is not three integers"),
        (dict(blocks="wh"), "blocks='wh' is unknown"),
        (dict(num_iters=0), "num_iters=0 is not a positive integer"),
        (dict(tile=(2, 3, 4), causal_block=3), "causal_block=3 frames is not a multiple of the tile's 2 frames"),
    ],
)
def test_bad_modules(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        MonarchSelfAttention(16, **(dict(num_heads=2) | options), rngs=nnx.Rngs(0))


def test_the_attention_fn_takes_arrays():
    x = x_of(1, 24, 2, 8)
    attend = attention_fn(grid=GRID)
    with pytest.raises(ValueError, match="key is a list; it should be an array of JAX or NumPy"):
        attend(x, x.tolist(), x)
    assert attend(*[np.asarray(x, np.float64)] * 3).dtype == jnp.float32


def test_a_list_is_a_tile(unchecked):
    layer = MonarchSelfAttention(16, num_heads=2, tile=untyped([1, 3, 4]), rngs=nnx.Rngs(0))
    assert layer.tile == (1, 3, 4)


def test_rope_is_applied_to_queries_and_keys():
    layer = MonarchSelfAttention(16, num_heads=2, rngs=nnx.Rngs(0))
    x = x_of(1, 24, 16)
    assert error(layer(x, grid=GRID, rope=lambda t: -t), layer(x, grid=GRID)) <= 2e-6  # both flip: scores stay
    assert error(layer(x, grid=GRID, rope=lambda t: 2 * t), layer(x, grid=GRID)) > 1e-3


def test_layers_in_nnx_scan_with_remat():
    """Stacked layers, scanned and rematerialised, equal a loop; gradients flow."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return MonarchSelfAttention(16, num_heads=2, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    x = x_of(1, 24, 16)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(layer, x):
        return x + layer(x, grid=GRID)

    graph, state = nnx.split(layers)
    expected = x
    for n in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], state))
        expected = expected + layer(expected, grid=GRID)
    assert error(nnx.jit(forward)(layers, x), expected) <= 1e-5
    grads = nnx.grad(lambda m: (forward(m, x) ** 2).sum())(layers)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype=int), "dtype=int64 is not one of bfloat16, float16, float32, float64"),
        (dict(param_dtype="bar"), "param_dtype='bar' is not one of"),
        (dict(rngs=None), r"rngs=None is not flax.nnx.Rngs, such as nnx.Rngs\(0\)"),
        (dict(implementation="cuda"), "implementation='cuda' is not None or one of 'mosaic'"),
        (dict(qk_norm="no"), "qk_norm='no' is not True or False"),
        (dict(keep_intermediates=1), "keep_intermediates=1 is not True or False"),
    ],
)
def test_bad_settings_of_modules(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        MonarchSelfAttention(16, **(dict(num_heads=2, rngs=nnx.Rngs(0)) | options))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((1, 24, 15)), r"x has shape \(1, 24, 15\); it should be \[batch, tokens, features=16\]"),
        (jnp.ones((24, 16)), r"x has shape \(24, 16\)"),
        (jnp.ones((1, 24, 16), int), "x has dtype int32; it should be one of bfloat16"),
        ([1.0], "x is a list; it should be an array of JAX or NumPy"),
        (jnp.ones((0, 24, 16)), r"query has shape \(0, 24, 2, 8\)"),
    ],
)
def test_bad_inputs_of_modules(unchecked, x, message):
    layer = MonarchSelfAttention(16, num_heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(x, grid=GRID)
    with pytest.raises(ValueError, match="cache is a dict; it should be a MonarchKVCache"):
        layer.extend(jnp.ones((1, 24, 16)), untyped({}))
    with pytest.raises(ValueError, match="rope=3 is not a function"):
        layer(jnp.ones((1, 24, 16)), grid=GRID, rope=untyped(3))
    for rope, returned in (
        (lambda t: t[:, :12], r"float32 \(1, 12, 2, 8\)"),
        (lambda t: t.astype(jnp.bfloat16), r"bfloat16 \(1, 24, 2, 8\)"),
        (lambda t: None, "a NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"rope returns {returned} for float32 \(1, 24, 2, 8\); it should keep"):
            layer(jnp.ones((1, 24, 16)), grid=GRID, rope=untyped(rope))


@pytest.mark.parametrize("shape", [(1, 0, 2, 8), (1, 24, 2, 0), (0, 24, 2, 8), (24, 8)])
def test_the_attention_fn_says_what_a_shape_should_be(unchecked, shape):
    with pytest.raises(ValueError, match="query has"):
        attention_fn(grid=GRID)(*[jnp.ones(shape)] * 3)
