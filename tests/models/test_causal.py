import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.wan import DenseAttention, MonarchAttention, WanModel
from monarchrt.models.wan.causal import cached_forward, init_cache
from monarchrt.models.wan.rope import rope_table
from tests.untyped import there

H, W = 4, 6  # tokens of a frame
SIZE: dict[str, Any] = {"height": 2 * H, "width": 2 * W}
SETTINGS = {
    "dense": DenseAttention(),
    **{
        f"{tile}-T{iters}": MonarchAttention(tile=tile, num_iters=iters)
        for tile in [(1, H, W), (3, H, W), (3, H // 2, W), (1, H // 2, W // 3)]
        for iters in (1, 2)
    },
    "first layer dense": (DenseAttention(), MonarchAttention(), MonarchAttention(tile=(3, H, W))),
}
COMPARED = (f"{(1, H // 2, W // 3)}-T1", f"{(3, H, W)}-T2", "first layer dense")  # by default


def clip(wan, config, frames=9):
    """Latents, one timestep per block of 3 frames (repeated), text."""
    latents, _, text = wan.sample(config, grid=(frames, H, W))
    times = np.random.default_rng(1).uniform(0, 1000, (2, frames // 3)).astype(np.float32).repeat(3, axis=1)
    return latents, jnp.asarray(times), text


def roll_out(model, latents, times, cache, *, step=None):
    """Block after block; each is first seen noisier, then as it is, as denoising does."""
    step = step or nnx.jit(cached_forward)
    outputs = []
    for frame in range(0, latents.shape[1], 3):
        block, t = latents[:, frame : frame + 3], times[:, frame : frame + 3]
        _, cache = step(model, block + 1.0, jnp.full_like(t, 999.0), cache, frame=jnp.int32(frame))
        out, cache = step(model, block, t, cache, frame=jnp.int32(frame))
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1), cache


def masked_forward(model, latents, times, text, visible):
    """The whole clip at once under a mask over frames, with nothing of the cache."""
    mask = jnp.asarray(np.kron(visible, np.ones((H * W, H * W))).astype(bool))
    tokens, context = model.embed_latents(latents, times), model.embed_context(text)
    graph, state = nnx.split(model.blocks)
    rope = rope_table((latents.shape[1], H, W), model.config.head_dim)
    x = tokens.x
    for i in range(model.config.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        attend = partial(jax.nn.dot_product_attention, mask=mask)
        x = block(x, tokens.time_projection, rope, block.cross_attn.keys_values(*context), attend)
    return model.unpatchify(model.head(x, tokens.time), (latents.shape[1], H, W))


class TestParity:
    @pytest.mark.parametrize(
        "name",
        [x if x in COMPARED else pytest.param(x, marks=pytest.mark.slow) for x in SETTINGS],
    )
    def test_roll_out_equals_block_causal_forward(self, wan, name):
        model = wan.model(attention=SETTINGS[name], causal_block=3)
        latents, times, text = clip(wan, model.config)
        expected = nnx.jit(lambda m, *x: m(*x))(model, latents, times, text)
        step = nnx.jit(cached_forward)
        out, cache = roll_out(model, latents, times, init_cache(model, text, frames=9, **SIZE), step=step)
        np.testing.assert_allclose(out, expected, atol=1e-4)
        assert expected.std() > 0.1
        assert int(cache.length) == 9

    def test_dense_block_causal_forward_equals_mask(self, wan):
        model = wan.model(causal_block=3)
        latents, times, text = clip(wan, model.config)
        blocks = np.arange(9) // 3
        expected = jax.jit(partial(masked_forward, model, visible=blocks[:, None] >= blocks[None]))(
            latents, times, text
        )
        np.testing.assert_allclose(nnx.jit(lambda m, *x: m(*x))(model, latents, times, text), expected, atol=1e-4)

    @pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), f"{(3, H, W)}-T1"])
    def test_first_block_equals_bidirectional(self, wan, name):
        model = wan.model(attention=SETTINGS[name])
        latents, times, text = clip(wan, model.config, frames=3)
        expected = nnx.jit(lambda m, *x: m(*x))(model, latents, times, text)
        out, _ = nnx.jit(cached_forward)(model, latents, times, init_cache(model, text, frames=6, **SIZE))
        np.testing.assert_allclose(out, expected, atol=1e-4)

    def test_one_program_serves_every_block(self, wan):
        model = wan.model(attention=SETTINGS["first layer dense"])
        graph, state = nnx.split(model)
        traces = []

        @jax.jit
        def step(state, latents, times, cache, frame):
            traces.append(frame)
            return cached_forward(nnx.merge(graph, state), latents, times, cache, frame=frame)

        latents, times, text = clip(wan, model.config)
        cache = init_cache(model, text, frames=9, **SIZE)
        for frame in (0, 3, 6, 6):
            _, cache = step(state, latents[:, :3], times[:, :3], cache, jnp.int32(frame))
        assert len(traces) == 1

    @pytest.mark.parametrize(
        ("name", "rolling"),
        [
            pytest.param("first layer dense", False, marks=pytest.mark.slow),
            (f"{(3, H, W)}-T1", True),
            pytest.param("dense", True, marks=pytest.mark.slow),
        ],
    )
    def test_in_place_gives_the_same(self, wan, name, rolling):
        model = wan.model(attention=SETTINGS[name])
        latents, times, text = clip(wan, model.config)
        options = dict(frames=6, rolling=True, sink_frames=3) if rolling else dict(frames=9)
        cache = init_cache(model, text, **options, **SIZE)
        expected, apart = roll_out(model, latents, times, cache)
        out, together = roll_out(model, latents, times, cache, step=nnx.jit(partial(cached_forward, in_place=True)))
        np.testing.assert_allclose(out, expected, atol=1e-5)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)

    def test_i2v(self, wan):
        model = wan.model(model_type="i2v", image_dim=8, causal_block=3)
        latents, times, text = clip(wan, model.config)
        image = jax.random.normal(jax.random.key(0), (2, 5, 8))
        expected = nnx.jit(lambda m, *x: m(*x))(model, latents, times, text, image)
        out, _ = roll_out(model, latents, times, init_cache(model, text, image, frames=9, **SIZE))
        np.testing.assert_allclose(out, expected, atol=1e-4)

    def test_bfloat16(self, wan):
        exact = wan.model(attention=MonarchAttention(), causal_block=3)
        half = wan.model(attention=MonarchAttention(), causal_block=3, dtype="bfloat16")
        latents, times, text = clip(wan, exact.config)
        expected = nnx.jit(lambda m, *x: m(*x))(exact, latents, times, text)
        cache = init_cache(half, text, frames=9, **SIZE)
        assert cache.keys[0].dtype == jnp.bfloat16
        out, _ = roll_out(half, latents, times, cache)
        assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < 2e-2

    @pytest.mark.parametrize(
        ("attention", "in_place"),
        [
            pytest.param(DenseAttention(), False, marks=pytest.mark.slow),
            (MonarchAttention(), False),
            (MonarchAttention(), True),
        ],
    )
    def test_cache_is_written_in_place(self, wan, attention, in_place):
        """With the cache donated, no layer's is held twice: temporary memory does not grow with the layers' caches."""

        def memory(layers):
            config = dataclasses.replace(wan.SMALL, num_layers=layers, attention=attention)
            graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
            latents, times, text = clip(wan, config, frames=3)
            cache = jax.eval_shape(lambda state: init_cache(nnx.merge(graph, state), text, frames=60, **SIZE), state)

            def step(state, latents, times, cache, frame):
                return cached_forward(nnx.merge(graph, state), latents, times, cache, frame=frame, in_place=in_place)

            compiled = jax.jit(step, donate_argnums=3).lower(state, latents, times, cache, jnp.int32(0)).compile()
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.keys, cache.values)))
            analysis = there(compiled.memory_analysis())
            assert analysis.alias_size_in_bytes >= size
            return analysis.temp_size_in_bytes, size

        (few, few_size), (many, many_size) = memory(2), memory(12)
        assert many - few < 0.2 * (many_size - few_size)  # the new block's keys and values, 3 of 60 frames


class TestWindow:
    @pytest.mark.parametrize(("frames", "sink_frames"), [pytest.param(6, 0, marks=pytest.mark.slow), (9, 3)])
    def test_rolling(self, wan, frames, sink_frames):
        """Each block sees itself, the blocks that fit the window, and the sink."""
        model = wan.model()
        latents, times, text = clip(wan, model.config, frames=15)
        cache = init_cache(model, text, frames=frames, rolling=True, sink_frames=sink_frames, **SIZE)
        out, _ = roll_out(model, latents, times, cache)
        query, key = np.arange(15)[:, None] // 3, np.arange(15)[None] // 3
        recent = query - key < (frames - sink_frames) // 3
        visible = (key <= query) & (recent | (key < sink_frames // 3))
        expected = jax.jit(partial(masked_forward, model, visible=visible))(latents, times, text)
        np.testing.assert_allclose(out, expected, atol=1e-4)
        causal = jax.jit(partial(masked_forward, model, visible=key <= query))(latents, times, text)
        assert np.abs(expected - causal)[:, 9:].max() > 1e-3

    def test_full_cache(self, wan):
        model = wan.model()
        latents, times, text = clip(wan, model.config, frames=3)
        cache = init_cache(model, text, frames=6, **SIZE)
        with pytest.raises(ValueError, match="frame=6: 3 frames from there end past the cache's 6"):
            cached_forward(model, latents, times, cache, frame=6)
        out, _ = nnx.jit(cached_forward)(model, latents, times, cache, frame=jnp.int32(6))
        assert np.isnan(out).all()


class TestGradients:
    @pytest.mark.parametrize(
        ("attention", "rolling"),
        [
            pytest.param(DenseAttention(), False, marks=pytest.mark.slow),
            (MonarchAttention(tile=(3, H, W)), True),
        ],
    )
    def test_only_the_new_block(self, wan, attention, rolling):
        model = wan.model(attention=attention)
        latents, times, text = clip(wan, model.config, frames=6)

        @jax.jit
        @jax.grad
        def gradients(latents, keep):
            """`keep` mixes the loss with a detached cache and with an attached one."""

            def loss(detach_past):
                cache = init_cache(model, text, frames=6, rolling=rolling, detach_past=detach_past, **SIZE)
                _, cache = cached_forward(model, latents[:, :3], times[:, :3], cache)
                return jnp.sum(cached_forward(model, latents[:, 3:], times[:, 3:], cache)[0] ** 2)

            return keep * loss(False) + (1 - keep) * loss(True)

        attached, detached = gradients(latents, 1.0), gradients(latents, 0.0)
        assert np.abs(attached[:, :3]).max() > 1e-3
        assert not detached[:, :3].any()
        np.testing.assert_allclose(detached[:, 3:], attached[:, 3:], atol=1e-3, rtol=1e-3)

    def test_in_place(self, wan):
        """Through both blocks, as with a copy for each layer."""
        model = wan.model(attention=MonarchAttention(tile=(3, H, W)))
        latents, times, text = clip(wan, model.config, frames=6)

        @partial(jax.jit, static_argnums=1)
        @jax.grad
        def gradient(latents, in_place):
            cache = init_cache(model, text, frames=6, **SIZE)
            _, cache = cached_forward(model, latents[:, :3], times[:, :3], cache, in_place=in_place)
            return jnp.sum(cached_forward(model, latents[:, 3:], times[:, 3:], cache, in_place=in_place)[0] ** 2)

        found, expected = gradient(latents, True), gradient(latents, False)
        assert np.abs(expected[:, :3]).max() > 1e-3
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)

    def test_parameters(self, wan):
        """Through the newest block, keys and values included."""
        model = wan.model(attention=MonarchAttention(tile=(3, H, W)))
        latents, times, text = clip(wan, model.config, frames=6)
        cache = init_cache(model, text, frames=6, detach_past=True, **SIZE)
        _, cache = nnx.jit(cached_forward)(model, latents[:, :3], times[:, :3], cache)

        def loss(model):
            return jnp.mean(cached_forward(model, latents[:, 3:], times[:, 3:], cache)[0] ** 2)

        flat = dict(nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)))
        for name in "qkvo":
            grad = flat["blocks", "self_attn", name, "kernel"][...]
            assert np.isfinite(grad).all()
            assert (np.abs(grad).max(axis=(1, 2)) > 1e-6).all()  # in every layer


class TestBadInput:
    def test_another_attention(self, wan):
        model = wan.model()
        latents, times, text = clip(wan, model.config, frames=3)
        cache = init_cache(model, text, frames=6, **SIZE)
        for attention in (MonarchAttention(tile=(3, H, W)), SETTINGS["first layer dense"]):
            with pytest.raises(ValueError, match="cache was made for another attention"):
                cached_forward(model.with_attention(attention), latents, times, cache)

    def test_another_size(self, wan):
        model = wan.model()
        latents, times, text = clip(wan, model.config, frames=3)
        cache = init_cache(model, text, frames=6, **SIZE)
        with pytest.raises(ValueError, match="latents of batch 1 and 4x6 tokens do not fit the cache of batch 2"):
            cached_forward(model, latents[:1], times[:1], cache)
        with pytest.raises(ValueError, match=r"latents of batch 2 and 2x6 tokens do not fit .* 4x6 tokens"):
            cached_forward(model, latents[:, :, :4], times, cache)

    def test_capacity_and_tile(self, wan):
        model = wan.model(attention=MonarchAttention(tile=(3, H, W)))
        _, _, text = clip(wan, model.config, frames=3)
        with pytest.raises(ValueError, match="3 does not divide the 7 frames"):
            init_cache(model, text, frames=7, **SIZE)
        with pytest.raises(ValueError, match="height=9 is not a multiple of the patch's 2"):
            init_cache(model, text, frames=6, height=9, width=12)

    def test_block_too_long(self, wan):
        model = wan.model()
        latents, times, text = clip(wan, model.config, frames=9)
        with pytest.raises(ValueError, match="9 frames, more than the cache's 6"):
            cached_forward(model, latents, times, init_cache(model, text, frames=6, **SIZE))


def test_cache_is_a_pytree(wan):
    model = wan.model()
    _, _, text = clip(wan, model.config, frames=3)
    cache = init_cache(model, text, frames=6, **SIZE)
    leaves, tree = jax.tree.flatten(cache)
    assert dataclasses.asdict(jax.tree.unflatten(tree, leaves)).keys() == dataclasses.asdict(cache).keys()
    assert cache.keys[0].shape == (3, 2, 6, H, W, 2, 24)
