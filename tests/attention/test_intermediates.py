"""alpha and Y in 8 bits: the definition against NumPy, XLA against the definition, errors beside bfloat16's."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from monarch_jax import MonarchKVCache, MonarchSelfAttention, attention_fn, monarch_attention
from monarch_jax.intermediates import rounded_to_e4m3, stored
from monarchrt.models.attention.notation import parse
from tests.attention.suite import error, inputs, value_and_grads, with_grads


def rounded(x):
    """A vector [..., D] in e4m3 with the scale of its largest magnitude, in bfloat16, over 448."""
    scale = np.abs(x).max(-1, keepdims=True).astype(ml_dtypes.bfloat16).astype(np.float64) / 448
    return (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def monarch(q, k, v, grid, off=None):
    """One step on tiles of a frame, tokens [N, D], in float64: the output, and what was rounded off alpha and Y.

    `off` is added in place of a rounding, so that the result is differentiable.
    """
    q, k, v = (x.reshape(*grid, -1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    right = softmax(scale * np.einsum("akjd,ckld->ackjl", q, k))
    alpha, y = (np.einsum("ackjl,ckld->ackjd", right, x) for x in (k, v))
    off = off or [rounded(x) - x for x in (alpha, y)]
    alpha, y = alpha + off[0], y + off[1]
    scores = scale * np.einsum("aijd,ackjd->ajick", q, alpha)
    scores -= np.einsum("ackjl->ajck", right * np.log(right))[:, :, None]
    left = softmax(scores.reshape(*scores.shape[:3], -1)).reshape(scores.shape)
    return np.einsum("ajick,ackjd->aijd", left, y).reshape(-1, q.shape[-1]), off


def test_rounding_is_that_of_float8():
    """At every number of the type, halfway between two, and beside that."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middle = (numbers[1:] + numbers[:-1]) / 2
    for x in (numbers, middle, np.nextafter(middle, np.float32(-500)), np.nextafter(middle, np.float32(500))):
        expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(rounded_to_e4m3(jnp.asarray(x)), expected)


def test_no_conversion_rounds():
    """On GPUs XLA leaves out a conversion to fewer bits and back: alpha and Y were not rounded there."""
    program = str(jax.make_jaxpr(lambda x: stored(x, "e4m3"))(jnp.ones((3, 8))))
    assert not re.search("f8_e4m3|bf16", program)
    assert "reduce_precision" in program


def test_the_definition(x64):
    """Output in float64; gradients by differences of the map with what was rounded off held fixed."""
    grid = (2, 3, 5)
    q, k, v, g = (np.asarray(x)[0, :, 0] for x in inputs(0, grid, batch=1, heads=1, dim=8, dtype=jnp.float64))
    tokens = [jnp.asarray(x)[None, :, None] for x in (q, k, v, g)]
    found = value_and_grads(*tokens, grid=grid, intermediates="e4m3", implementation="reference")
    found = [np.asarray(x)[0, :, 0] for x in found]
    out, off = monarch(q, k, v, grid)
    assert max(np.abs(x).max() for x in off) > 1e-3
    assert error(found[0], out) < 1e-12
    rng = np.random.default_rng(1)
    for n in range(3):
        step = [np.zeros_like(q) for _ in range(3)]
        step[n] = 1e-6 * rng.standard_normal(q.shape)
        high, low = (monarch(q + x * step[0], k + x * step[1], v + x * step[2], grid, off)[0] for x in (1, -1))
        np.testing.assert_allclose((found[n + 1] * step[n]).sum(), ((high - low) * g).sum() / 2, rtol=1e-6)


def test_the_largest_entry_is_as_exact_as_in_bfloat16_and_zeros_stay():
    x = np.array([[0.0, 0.0], [3.141592, -0.001], [-1e-30, 1e-31], [1e30, 2.0]], np.float32)
    found = np.asarray(stored(jnp.asarray(x), "e4m3"))
    np.testing.assert_allclose(found[:, 0], x[:, 0].astype(ml_dtypes.bfloat16).astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(found[2], x[2], rtol=0.07)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vectors_whose_scale_would_be_no_normal_number(dtype):
    """They were NaN: a 448th of a small number is 0 where subnormal numbers are."""
    small = jnp.asarray(np.array([[1e-35], [1e-37], [3e-39], [6e-8]]) * [1.0, -0.5], dtype)
    found = np.asarray(jax.jit(lambda x: stored(x, "e4m3"))(small), np.float64)
    np.testing.assert_allclose(found[:3], 0, atol=1e-34)
    np.testing.assert_allclose(found[3], np.asarray(small[3], np.float64), rtol=0.07, atol=4e-8)


@pytest.mark.parametrize("options", [dict(), pytest.param(dict(num_iters=2, causal_block=2), marks=pytest.mark.slow)])
def test_xla_computes_the_same(options):
    grid = (4, 3, 5)
    arrays = inputs(2, grid, batch=1, heads=2, dim=8)
    options = dict(grid=grid, intermediates="e4m3") | options
    found = value_and_grads(*arrays, implementation="xla", **options)
    expected = value_and_grads(*arrays, implementation="reference", **options)
    for x, y in zip(found, expected, strict=True):
        assert error(x, y) < 2e-3  # sums in another order round a few entries to the neighbour, a 16th away


def test_errors_beside_those_of_bfloat16():
    """Relative Frobenius errors of output, dq, dk and dv: alpha and Y in 8 bits against bfloat16's, docs/kernels.md."""
    grid = (2, 8, 13)
    runs = {x: with_grads(grid=grid, implementation="xla", intermediates=x) for x in (None, "e4m3")}
    for sharpness, out_bound, grad_bound in ((0.1, 0.035, 0.012), (1.0, 0.035, 0.025), (3.0, 0.06, 0.06)):
        arrays = inputs(3, grid, batch=1, heads=2, dim=64, dtype=jnp.bfloat16, sharpness=sharpness)
        wide = [x.astype(jnp.float32) for x in arrays]
        exact = runs[None](*wide)
        for intermediates, low, high in ((None, 0, 0.012), ("e4m3", 0.02, out_bound)):
            errors = [error(x, y) for x, y in zip(runs[intermediates](*arrays), exact, strict=True)]
            assert low < errors[0] < high
            assert max(errors[1:]) < (high if intermediates is None else grad_bound)


def test_every_way_in_takes_it():
    """The cache, the attention function, the module and the kind; what is no name is refused before any compute."""
    grid = (2, 3, 4)
    options: dict[str, Any] = dict(intermediates="e4m3", implementation="xla")
    q, k, v, _ = inputs(4, grid, batch=1, heads=2, dim=8)
    kind = parse("monarch(intermediates=e4m3, implementation=xla)")

    @jax.jit
    def ways(q, k, v):
        cache = MonarchKVCache.init(batch=1, frames=2, height=3, width=4, heads=2, head_dim=8, dtype=jnp.float32)
        found = [monarch_attention(q, k, v, grid=grid, implementation="xla")]
        found += [monarch_attention(q, k, v, grid=grid, **options), cache.append(k, v).attend(q, **options)]
        return [*found, attention_fn(grid=grid, **options)(q, k, v), kind(q, k, v, grid=grid)]

    plain, expected, *others = map(np.asarray, ways(q, k, v))
    assert error(expected, plain) > 1e-3
    for x in others:
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    for wrong in (
        lambda: monarch_attention(q, k, v, grid=grid, intermediates="int8"),
        lambda: attention_fn(grid=grid, intermediates="int8"),
        lambda: MonarchSelfAttention(16, num_heads=2, intermediates="int8", rngs=nnx.Rngs(0)),
        lambda: parse("monarch(intermediates=int8)"),
    ):
        with pytest.raises(ValueError, match=r"intermediates='int8' is not None .* or 'e4m3'"):
            wrong()
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run this call: intermediates='e4m3'"):
        jax.eval_shape(lambda: monarch_attention(q, k, v, grid=grid, intermediates="e4m3", implementation="triton"))
