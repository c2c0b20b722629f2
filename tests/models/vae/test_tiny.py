"""The tiny autoencoder against a plain loop over frames in PyTorch, which reads the published file's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from monarchrt.models.generate.decoders import FrameDecoder, TinyDecoder
from monarchrt.models.vae import TinyVAE, TinyVAEConfig, load_tiny_vae
from monarchrt.models.vae.tiny_checkpoint import tiny_entries

torch = pytest.importorskip("torch")

WIDTH, LEVELS, CHANNELS = 3, (6, 5, 4, 3), 5


def published(seed=0, pixels=3):
    """A file's tensors, all random, numbered as the published layers are."""
    rng, shapes = np.random.default_rng(seed), {}
    shapes["encoder.0"] = (WIDTH, pixels, 3)
    shapes["encoder.17"] = (CHANNELS, WIDTH, 3)
    shapes["decoder.1"] = (LEVELS[0], CHANNELS, 3)
    shapes["decoder.22"] = (pixels, LEVELS[3], 3)
    for pool, frames in ((2, 2), (7, 2), (12, 1)):
        shapes[f"encoder.{pool}.conv!"] = (WIDTH, WIDTH * frames, 1)
        shapes[f"encoder.{pool + 1}!"] = (WIDTH, WIDTH, 3)
    blocks = [("encoder", at, WIDTH) for at in (4, 5, 6, 9, 10, 11, 14, 15, 16)]
    for level, (first, frames) in enumerate(((3, 1), (9, 2), (15, 2))):
        features, out = LEVELS[level : level + 2]
        blocks += [("decoder", at, features) for at in range(first, first + 3)]
        shapes[f"decoder.{first + 4}.conv!"] = (features * frames, features, 1)
        shapes[f"decoder.{first + 5}!"] = (out, features, 3)
    for half, at, features in blocks:
        for conv in (0, 2, 4):
            shapes[f"{half}.{at}.conv.{conv}"] = (features, 2 * features if conv == 0 else features, 3)
    tensors = {}
    for name, (out, given, size) in shapes.items():
        weight = rng.standard_normal((out, given, size, size)) / (given * size**2) ** 0.5
        tensors[name.rstrip("!") + ".weight"] = weight.astype(np.float32)
        if not name.endswith("!"):
            tensors[name + ".bias"] = (0.3 * rng.standard_normal(out)).astype(np.float32)
    return tensors


class Loop:
    """One frame after another through the layers, in the published file's numbers; [H, W, C] arrays."""

    def __init__(self, tensors):
        self.tensors, self.before = tensors, {}

    def conv(self, name, x, stride=1):
        weight, bias = (self.tensors.get(f"{name}.{leaf}") for leaf in ("weight", "bias"))
        bias = None if bias is None else torch.from_numpy(bias)
        y = torch.nn.functional.conv2d(
            torch.from_numpy(x).permute(2, 0, 1)[None],
            torch.from_numpy(weight),
            bias,
            stride=stride,
            padding=weight.shape[-1] // 2,
        )
        return y[0].permute(1, 2, 0).numpy()

    def block(self, name, x):
        seen = np.concatenate([x, self.before.get(name, np.zeros_like(x))], axis=-1)
        self.before[name] = x
        for conv in (0, 2):
            seen = np.maximum(self.conv(f"{name}.conv.{conv}", seen), 0)
        return np.maximum(self.conv(f"{name}.conv.4", seen) + x, 0)

    def decode(self, latents):
        out = []

        def on(x, level):
            if level == 3:
                out.append(np.clip(self.conv("decoder.22", np.maximum(x, 0)), 0, 1))
                return
            first = 3 + 6 * level
            for at in range(first, first + 3):
                x = self.block(f"decoder.{at}", x)
            x = self.conv(f"decoder.{first + 4}.conv", x.repeat(2, axis=0).repeat(2, axis=1))
            for frame in np.split(x, (1, 2, 2)[level], axis=-1):
                on(self.conv(f"decoder.{first + 5}", np.ascontiguousarray(frame)), level + 1)

        for latent in latents:
            on(np.maximum(self.conv("decoder.1", np.tanh(latent / 3) * 3), 0), 0)
        return np.stack(out[3:])

    def encode(self, frames):
        frames = [np.maximum(self.conv("encoder.0", frame), 0) for frame in frames]
        for level, count in enumerate((2, 2, 1)):
            at, after = 2 + 5 * level, []
            for start in range(0, len(frames), count):
                x = np.concatenate(frames[start : start + count], axis=-1)
                x = self.conv(f"encoder.{at + 1}", self.conv(f"encoder.{at}.conv", x), stride=2)
                for block in range(at + 2, at + 5):
                    x = self.block(f"encoder.{block}", x)
                after.append(x)
            frames = after
        return np.stack([self.conv("encoder.17", x) for x in frames])


@pytest.fixture(scope="module", params=["taew2_1.pth", pytest.param("taew2_1.safetensors", marks=pytest.mark.slow)])
def path(request, tmp_path_factory):
    path, tensors = tmp_path_factory.mktemp("tiny") / request.param, published()
    if path.suffix == ".pth":
        torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    else:
        safetensors.numpy.save_file(tensors, path)
    return path


LATENTS = np.random.default_rng(1).standard_normal((4, 2, 3, CHANNELS)).astype(np.float32)
VIDEO = np.random.default_rng(2).integers(0, 256, (8, 16, 24, 3), np.uint8)


def in_parts(function, x, size, pasts):
    """A stream of equal parts, with one program."""
    program, parts = jax.jit(function), []
    for start in range(0, len(x), size):
        part, pasts = program(jnp.asarray(x[None, start : start + size]), pasts)
        parts.append(part[0])
    return np.concatenate(parts)


def test_the_decoder_as_a_stream(path):
    vae, expected = load_tiny_vae(path), Loop(published()).decode(LATENTS)
    frames = in_parts(vae.decode_next, LATENTS, 2, vae.decoder_pasts(1, 2, 3))[3:]
    np.testing.assert_allclose(np.clip((frames + 1) / 2, 0, 1), expected, atol=1e-5)
    assert ((expected > 0) & (expected < 1)).mean() > 0.3


def test_the_encoder_as_a_stream(path):
    vae, expected = load_tiny_vae(path), Loop(published()).encode(VIDEO.astype(np.float32) / 255)
    latents = in_parts(vae.encode_next, VIDEO / np.float32(127.5) - 1, 4, vae.encoder_pasts(1, 16, 24))
    np.testing.assert_allclose(latents, expected, atol=1e-5)


@pytest.mark.slow
def test_whole_clips_and_bytes(path):
    vae, loop = load_tiny_vae(path.parent), Loop(published())
    decoder, expected = TinyDecoder(vae), loop.decode(LATENTS)
    assert isinstance(decoder, FrameDecoder)
    np.testing.assert_allclose((vae.decode(jnp.asarray(LATENTS)[None])[0] + 1) / 2, expected, atol=1e-5)
    state, frames = decoder.start(1, 2, 3), []
    decoder.prepare(1, [3, 1], 2, 3)
    for part in (LATENTS[:3], LATENTS[3:]):
        shown, state = decoder.decode(jnp.asarray(part)[None], state)
        frames.append(shown[0])
    assert [len(part) for part in frames] == [9, 4]
    np.testing.assert_allclose(np.concatenate(frames) / 255, expected, atol=0.5 / 255 + 1e-5)
    assert decoder.finite(state)
    _, state = decoder.decode(jnp.full((1, 1, 2, 3, CHANNELS), jnp.nan), state)
    assert not decoder.finite(state)
    padded = np.concatenate([VIDEO[:5], *[VIDEO[4:5]] * 3])  # 5 frames are two latents
    latents = decoder.encode(VIDEO[None, :5])[0]
    np.testing.assert_allclose(latents, Loop(published()).encode(padded.astype(np.float32) / 255), atol=1e-5)


def test_a_size_that_makes_no_latents():
    vae = nnx.eval_shape(lambda: TinyVAE(TinyVAEConfig(), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="video of 12x24 pixels: height and width should be multiples of 8"):
        vae.encode(jnp.zeros((1, 1, 12, 24, 3)))


def test_sizes_are_the_published_ones():
    assert TinyVAEConfig() == TinyVAEConfig(
        z_dim=16, encoder=64, decoder=(256, 128, 64, 64), downsample=(2, 2, 1), upsample=(1, 2, 2), blocks=3
    )
    assert {entry.names["official"] for entry in tiny_entries()} == set(published())


def without(name):
    return {key: value for key, value in published().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("decoder.9.conv.2.bias"), r"lacks 1 of 128 tensors of a tiny autoencoder: decoder\.9\.conv\.2\.bias"),
        (published() | {"more": np.zeros(1, np.float32)}, "has 1 tensors that a tiny autoencoder does not have: more"),
        (published(pixels=12), r"takes pixels in groups \(12 channels\).*Wan 2.1's is taew2_1, with 3"),
        (without("encoder.2.conv.weight"), r"lacks encoder\.2\.conv\.weight"),
        (
            {"decoder.conv1.weight": np.zeros((1, 1, 1, 1, 1), np.float32)},
            r"is not a tiny autoencoder \(TAEHV\) but a Wan VAE",
        ),
        (published() | {"decoder.5.conv.0.weight": np.zeros((2, 2, 3, 3), np.float32)}, "does not fit the config"),
    ],
)
def test_files_that_are_another(tmp_path, tensors, message):
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        load_tiny_vae(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has none of taew2_1\.safetensors, taew2_1\.pth; give the file itself"):
        load_tiny_vae(tmp_path)


def test_levels_that_do_not_go_together():
    with pytest.raises(ValueError, match="do not go together"):
        TinyVAEConfig(upsample=(2, 2, 2))
