"""Products in 8 bits: what they round, what they leave, and how far a video's latents end from bfloat16's."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.material import check_precision
from monarchrt.models.sampling import LiveRollout, Rollout
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.activations import gelu_tanh
from monarchrt.models.wan.fp8 import FP8FeedForward, FP8Linear, fp8_products, rounded
from monarchrt.models.wan.layers import MLP
from monarchrt.models.wan.unrolled import unroll_layers


@pytest.fixture(scope="module")
def model():
    model = WanModel(wan_config("tiny", num_layers=2, dtype="bfloat16", param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    kernel = model.head.proj.kernel  # zero at the start, which would make everything equal
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape, kernel.dtype)
    return model


def test_rows_are_scaled_by_their_largest_number():
    x = np.array([[1e-3, -2e-3, 0.3e-3], [500, 3, -1000], [0, 0, 0]], np.float32)
    eights, scale = rounded(jnp.asarray(x))
    expected = np.abs(x).max(1) / 448
    np.testing.assert_allclose(np.asarray(scale)[:2], expected[:2], rtol=1e-6)
    own = (x[:2] / expected[:2, None]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(eights[:2]), own)
    assert not np.asarray(eights[2]).astype(np.float32).any()
    assert np.isnan(np.asarray(rounded(jnp.array([[1.0, jnp.nan]]))[0], np.float32)).any()


def test_a_layer_is_the_product_of_what_was_rounded():
    rng = np.random.default_rng(0)
    layer = nnx.Linear(64, 48, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert layer.bias is not None
    layer.kernel[...] = jnp.asarray(rng.normal(size=(64, 48)) * np.geomspace(1e-3, 1, 48), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.normal(size=48), jnp.float32)
    x = (rng.normal(size=(2, 5, 64)) * np.geomspace(1e-2, 1e3, 5)[:, None]).astype(np.float32)

    def eight(array, axis):
        scale = np.abs(array).max(axis, keepdims=True) / np.float32(448)
        return (array / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    expected = eight(x, -1) @ eight(np.asarray(layer.kernel[...]), 0) + (bias := np.asarray(layer.bias[...]))
    found = FP8Linear(layer)(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    exact = x @ np.asarray(layer.kernel[...], np.float64)
    assert 0.01 < np.linalg.norm(expected - bias - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("outlier", [1, 2000])
def test_a_hidden_layer_is_rounded_within_a_bound(outlier):
    rng = np.random.default_rng(1)
    ffn = MLP(wan_config("tiny"), (64, 256, 64), act=gelu_tanh, rngs=nnx.Rngs(0))
    weights = {}
    for name, shape in (("fc1", (64, 256)), ("fc2", (256, 64))):
        layer = getattr(ffn, name)
        weights[name] = (rng.normal(size=shape) / 8).astype(np.float32), rng.normal(size=shape[1]).astype(np.float32)
        layer.kernel[...], layer.bias[...] = map(jnp.asarray, weights[name])
    x = rng.normal(size=(2, 5, 64)).astype(np.float32)
    x[..., 3] *= outlier
    x[0, 0] = 0
    hidden = x.astype(np.float64) @ weights["fc1"][0] + weights["fc1"][1]
    assert hidden.max() > (448 if outlier > 1 else 1)
    exact = np.asarray(jax.nn.gelu(hidden, approximate=True), np.float64) @ weights["fc2"][0] + weights["fc2"][1]
    found = np.asarray(FP8FeedForward(ffn)(jnp.asarray(x)))
    assert np.isfinite(found).all()
    each = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert each.mean() > 0.005
    assert each.max() < 0.08


def test_large_products_change_and_nothing_else(model):
    before = dict(nnx.to_flat_state(nnx.state(model)))
    after = dict(nnx.to_flat_state(nnx.state(fp8_products(model))))
    changed = {
        "/".join(map(str, path[1:-1])) for path in after if path not in before or after[path][...].dtype.itemsize == 1
    }
    assert changed == {"self_attn/q", "self_attn/k", "self_attn/v", "ffn/fc1", "ffn/fc2", "ffn"}
    for path, value in before.items():
        if "/".join(map(str, path[1:-1])) not in changed:
            assert after[path][...] is value[...]
    assert isinstance(model.blocks.ffn.fc1, nnx.Linear)  # the model itself is as it was
    again = fp8_products(fp8_products(model))
    assert isinstance(again.blocks.ffn.fc1, FP8Linear)
    wide = nnx.eval_shape(lambda: WanModel(wan_config("wan2.1-t2v-14b", num_layers=1), rngs=nnx.Rngs(0)))
    assert wide.config.dim >= 2048
    names = nnx.eval_shape(lambda wide: fp8_products(wide), wide).blocks
    assert all(isinstance(getattr(names.cross_attn, name), FP8Linear) for name in "qo")
    assert isinstance(names.self_attn.o, FP8Linear)
    assert isinstance(names.cross_attn.k, nnx.Linear)


def latents_of(model):
    text = jax.random.normal(jax.random.key(2), (1, 8, 32))
    rollout = Rollout(window=6, steps=2)
    video = LiveRollout(model, text, height=4, width=8, key=jax.random.key(0), rollout=rollout)
    return np.concatenate([video.generate() for _ in range(3)], axis=1)


def test_a_stream_stays_near_bfloat16(model):
    half, eight = latents_of(model), latents_of(fp8_products(model))
    distance = np.linalg.norm(eight - half) / np.linalg.norm(half)
    assert 1e-3 < distance < 0.1
    np.testing.assert_allclose(latents_of(unroll_layers(fp8_products(model))), eight, atol=2e-2 * np.abs(eight).max())


@pytest.mark.parametrize(
    ("capability", "refused"), [(8.0, True), (8.6, True), (8.9, False), (9.0, False), (None, False)]
)
def test_a_gpu_without_such_products_is_refused_before_anything_is_read(monkeypatch, capability, refused):
    monkeypatch.setattr("monarchrt.models.generate.material.cuda_capability", lambda: capability)
    config = GenerateConfig(checkpoint="none", precision="fp8")
    check_precision(dataclasses.replace(config, precision="bf16"))
    if not refused:
        return check_precision(config)
    with pytest.raises(UserError, match=rf"precision fp8 needs.*8\.9.*has {capability}; take bf16"):
        check_precision(config)
