import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.vae import PRESETS, VAEConfig, WanVAE, vae_config
from monarchrt.models.vae.layers import Conv
from tests.models.vae.conftest import SMALL, clip
from tests.untyped import there, untyped

encode = nnx.jit(WanVAE.encode, static_argnames="chunk")
decode = nnx.jit(WanVAE.decode, static_argnames="chunk")
decode_first = nnx.jit(WanVAE.decode_first)
traced = []  # latent frames of each program that `decode_next` becomes


@nnx.jit
def decode_next(vae, z, cache):
    traced.append(z.shape[1])
    return vae.decode_next(z, cache)


encode_first, encode_next = nnx.jit(WanVAE.encode_first), nnx.jit(WanVAE.encode_next)


def latents(frames, h=2, w=3, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, frames, h, w, SMALL.z_dim)), jnp.float32)


class TestParity:
    @pytest.mark.parametrize("frames", [1, 9])
    def test_encode(self, vae, torch_vae, frames):
        import torch

        video = clip(frames, batch=2)
        with torch.no_grad():
            mu = torch_vae.encode(torch.from_numpy(np.array(video)).permute(0, 4, 1, 2, 3)).latent_dist.mean
        mean, std = np.array(SMALL.latents_mean), np.array(SMALL.latents_std)
        expected = (mu.permute(0, 2, 3, 4, 1).numpy() - mean) / std
        assert expected.std() > 0.1
        out = encode(vae, video)
        assert (out.shape, out.dtype) == ((2, 1 + (frames - 1) // 4, 2, 3, 3), jnp.float32)
        np.testing.assert_allclose(out, expected, atol=1e-4)

    @pytest.mark.parametrize("frames", [1, 9])
    def test_decode(self, vae, torch_vae, frames):
        import torch

        z = latents(1 + (frames - 1) // 4, batch=2)
        mean, std = np.array(SMALL.latents_mean, np.float32), np.array(SMALL.latents_std, np.float32)
        raw = torch.from_numpy(np.asarray(z) * std + mean).permute(0, 4, 1, 2, 3)
        with torch.no_grad():
            expected = torch_vae.decode(raw).sample.permute(0, 2, 3, 4, 1).numpy()
        assert expected.std() > 0.1
        assert np.mean(np.abs(expected) == 1) < 0.5
        out = decode(vae, z, chunk=2)
        assert (out.shape, out.dtype) == ((2, frames, 16, 24, 3), jnp.float32)
        np.testing.assert_allclose(out, expected, atol=1e-4)

    def test_frames_are_clipped(self, vae):
        """With a bright decoder, many of whose numbers lie outside [-1, 1]."""
        loud = nnx.clone(vae)
        loud.decoder.head.conv.kernel[...] *= 20
        frames = decode(loud, latents(3), chunk=2)
        assert (float(frames.min()), float(frames.max())) == (-1, 1)
        assert 0.01 < np.mean(np.abs(frames) == 1) < 0.99

    def test_parameters(self):
        model = nnx.eval_shape(lambda: WanVAE(vae_config("wan21"), rngs=nnx.Rngs(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 126_892_531

    @pytest.mark.slow
    def test_half_precision_is_close(self, vae):
        graph, state = nnx.split(vae)
        half = nnx.merge(graph, state)
        for _, module in nnx.iter_graph(half):
            if isinstance(module, Conv):
                module.dtype = jnp.dtype(jnp.bfloat16)
        half.dtype = jnp.dtype(jnp.bfloat16)
        z = latents(6)
        out, expected = decode(half, z, chunk=1), decode(vae, z, chunk=1)
        assert out.dtype == jnp.float32
        assert not np.array_equal(out, expected)
        assert np.abs(out - expected).mean() < 0.03
        cache = half.init_decoder_cache(1, 16, 24)
        assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}


class TestStreaming:
    """All with the same sizes, so that few programs are compiled."""

    def stream(self, vae, z, pieces):
        frames, cache = decode_first(vae, z[:, :1], vae.init_decoder_cache(1, 16, 24))
        parts = [frames]
        for begin, end in pieces:
            frames, cache = decode_next(vae, z[:, begin:end], cache)
            assert frames.shape == (1, 4 * (end - begin), 16, 24, 3)
            parts.append(frames)
        return jnp.concatenate(parts, axis=1), cache

    def test_one_latent_frame_at_a_time_is_the_whole_clip(self, vae):
        z = latents(6)
        streamed, cache = self.stream(vae, z, [(i, i + 1) for i in range(1, 6)])
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (cache, vae.init_decoder_cache(1, 16, 24)))
        assert shapes[0] == shapes[1]
        assert traced.count(1) == 1  # one program for all of them
        np.testing.assert_array_equal(streamed, decode(vae, z, chunk=1))

    @pytest.mark.slow
    def test_unequal_pieces(self, vae):
        z = latents(6)
        streamed, _ = self.stream(vae, z, ((1, 3), (3, 4), (4, 6)))
        np.testing.assert_allclose(streamed, decode(vae, z, chunk=1), atol=1e-5)  # products of another shape
        np.testing.assert_allclose(streamed, decode(vae, z, chunk=2), atol=1e-5)  # a scan and a remainder

    def test_what_follows_changes_nothing(self, vae):
        z = latents(6)
        changed = z.at[:, 2:].add(1.0)
        a, b = decode(vae, z, chunk=1), decode(vae, changed, chunk=1)
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert np.abs(a[:, 5:] - b[:, 5:]).max() > 0.01

    def test_the_past_matters(self, vae):
        z = latents(6)
        a = decode(vae, z, chunk=1)
        b = decode(vae, z.at[:, 0].add(1.0), chunk=1)
        assert np.abs(a[:, 5:9] - b[:, 5:9]).max() > 0.01

    @pytest.mark.slow
    def test_encoder(self, vae):
        video = clip(17)
        first, cache = encode_first(vae, video[:, :1], vae.init_encoder_cache(1, 16, 24))
        pieces = [first]
        for begin, end in ((1, 5), (5, 13), (13, 17)):
            z, cache = encode_next(vae, video[:, begin:end], cache)
            pieces.append(z)
        np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), encode(vae, video, chunk=2), atol=1e-5)


class TestConv:
    @pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1)])
    @pytest.mark.parametrize("step", [1, 2])
    def test_is_a_3d_convolution(self, kernel, step):
        conv = Conv(5, 4, kernel, strides=(step, 1), dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        there(conv.bias)[...] = jnp.arange(4.0)
        x = jax.random.normal(jax.random.key(1), (2, 7, 4, 6, 5))
        expected = jax.lax.conv_general_dilated(
            x,
            conv.kernel[...],
            (step, 1, 1),
            [(0, 0), (kernel[1] // 2,) * 2, (kernel[2] // 2,) * 2],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        ) + jnp.arange(4.0).reshape(1, 1, 1, 1, 4)
        np.testing.assert_allclose(conv(x), expected, atol=1e-5)


class TestErrors:
    def test_sizes(self, vae):
        with pytest.raises(ValueError, match=r"frames=6 is not 1 \+ 4 k; the nearest that are: 5 and 9"):
            vae.encode(clip(6))
        with pytest.raises(
            ValueError, match="height=20 pixels is not a multiple of 8; the nearest that are: 16 and 24"
        ):
            vae.encode(clip(5, height=20))
        with pytest.raises(ValueError, match="width=4 pixels is not a multiple of 8; the nearest that are: 8"):
            vae.init_decoder_cache(1, 16, 4)
        with pytest.raises(ValueError, match="frames has 3 frames; encode_next takes a multiple of 4"):
            vae.encode_next(clip(3), vae.init_encoder_cache(1, 16, 24))

    def test_channels_and_dtype(self, vae):
        with pytest.raises(ValueError, match=r"latents have shape \(1, 3, 2, 3, 16\); .* \[B, F, h, w, 3\]"):
            vae.decode(jnp.zeros((1, 3, 2, 3, 16)))
        with pytest.raises(ValueError, match=r"video has shape \(1, 5, 16, 24, 4\)"):
            vae.encode(jnp.zeros((1, 5, 16, 24, 4)))
        with pytest.raises(ValueError, match=r"video has dtype uint8; .* uint8 / 127.5 - 1"):
            vae.encode(jnp.zeros((1, 5, 16, 24, 3), jnp.uint8))

    def test_cache(self, vae):
        cache = vae.init_decoder_cache(1, 16, 24)
        with pytest.raises(ValueError, match=r"batch 1 and 16 x 24 positions do not fit .* 16 x 24 pixels \(2 x 3"):
            vae.decode_next(latents(1, h=16, w=24), cache)
        with pytest.raises(ValueError, match="batch 2 and"):
            vae.decode_next(latents(1, batch=2), cache)
        with pytest.raises(ValueError, match="latent has 2 frames; decode_first takes 1"):
            vae.decode_first(latents(2), cache)
        with pytest.raises(ValueError, match="do not fit the cache"):
            vae.encode_first(clip(1, height=24), vae.init_encoder_cache(1, 16, 24))

    def test_config(self):
        with pytest.raises(ValueError, match=r"preset='wan2.1' is unknown; did you mean 'wan21'"):
            vae_config("wan2.1")
        with pytest.raises(ValueError, match="'width' is not a field of VAEConfig"):
            vae_config("tiny", width=3)
        with pytest.raises(ValueError, match="latents_mean has 16 entries; z_dim=4"):
            VAEConfig(z_dim=4)
        with pytest.raises(ValueError, match=r"temporal_downsample.* has 3 entries"):
            VAEConfig(dim_mult=(1, 2))
        with pytest.raises(dataclasses.FrozenInstanceError):
            untyped(PRESETS["tiny"]).dim = 3
