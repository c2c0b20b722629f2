"""The tiny autoencoder for Wan 2.1's latents (TAEHV, "taew2_1"): a twentieth of the exact one's cost, and less sharp.

It consists of convolutions over single frames, and blocks that also see their own input for the previous frame. These
inputs are the whole state, a pytree that is passed in and returned, so that the result does not depend on the pieces in
which a clip is processed. Latents are the normalised ones of the diffusion model; the published weights include the
normalisation. As in the exact autoencoder, the first latent frame stands for one frame and every further one for 4: the
decoder computes 4 frames for every latent frame, and the first 3 of a clip are dropped.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from monarchrt.models.vae.layers import Conv, Past, Video

RGB = 3


@dataclass(frozen=True, kw_only=True)
class TinyVAEConfig:
    """Sizes of a tiny autoencoder; the defaults are those for Wan 2.1.

    Attributes:
        z_dim: Channels of the latents.
        encoder: Channels of the encoder.
        decoder: Channels of the decoder's three levels, and of the input of its last convolution.
        downsample: Factor by which each level of the encoder reduces the number of frames.
        upsample: Factor by which each level of the decoder increases the number of frames.
        blocks: Blocks per level.
    """

    z_dim: int = 16
    encoder: int = 64
    decoder: tuple[int, ...] = (256, 128, 64, 64)
    downsample: tuple[int, ...] = (2, 2, 1)
    upsample: tuple[int, ...] = (1, 2, 2)
    blocks: int = 3

    def __post_init__(self):
        levels = {len(self.decoder) - 1, len(self.downsample), len(self.upsample)}
        if len(levels) != 1 or math.prod(self.downsample) != math.prod(self.upsample):
            raise ValueError(
                f"decoder={self.decoder}, downsample={self.downsample} and upsample={self.upsample} do not go "
                f"together; they need as many levels, with one width more, and as many frames per latent."
            )

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame."""
        return math.prod(self.upsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position, in height and in width."""
        return 2 ** len(self.upsample)


class MemoryBlock(nnx.Module):
    """Three convolutions over a frame concatenated with the previous frame, plus a residual connection."""

    def __init__(self, features: int, **options: Any):
        self.conv1 = Conv(2 * features, features, (1, 3, 3), **options)
        self.conv2 = Conv(features, features, (1, 3, 3), **options)
        self.conv3 = Conv(features, features, (1, 3, 3), **options)

    def __call__(self, x: Video, past: Past) -> tuple[Video, Past]:
        """The next frames, and the newest input frame, which is the new past."""
        before = jnp.concatenate([past, x[:, :-1]], axis=1)
        y = jax.nn.relu(self.conv1(jnp.concatenate([x, before], axis=-1)))
        return jax.nn.relu(self.conv3(jax.nn.relu(self.conv2(y))) + x), x[:, -1:]


class _Level(nnx.Module):
    """A sequence of blocks of equal size."""

    def __init__(self, features: int, blocks: int, **options: Any):
        self.blocks = nnx.List([MemoryBlock(features, **options) for _ in range(blocks)])

    def run(self, x: Video, pasts: tuple[Past, ...]) -> tuple[Video, tuple[Past, ...]]:
        """The next frames, and the new pasts."""
        after = []
        for block, past in zip(self.blocks, pasts, strict=True):
            x, past = block(x, past)
            after.append(past)
        return x, tuple(after)


class DownLevel(_Level):
    """Reduces the frames, halves rows and columns, and applies blocks."""

    def __init__(self, features: int, *, frames: int, blocks: int, **options: Any):
        self.frames = frames
        self.pool = Conv(frames * features, features, (1, 1, 1), use_bias=False, **options)
        self.shrink = Conv(features, features, (1, 3, 3), strides=(1, 2), use_bias=False, **options)
        super().__init__(features, blocks, **options)

    def __call__(self, x: Video, pasts: tuple[Past, ...]) -> tuple[Video, tuple[Past, ...]]:
        """The next frames, and the new pasts."""
        batch, count, height, width, features = x.shape
        x = x.reshape(batch, count // self.frames, self.frames, height, width, features)
        x = jnp.moveaxis(x, 2, 4).reshape(batch, -1, height, width, self.frames * features)
        return self.run(self.shrink(self.pool(x)), pasts)


class UpLevel(_Level):
    """Applies blocks, doubles rows and columns, and increases the frames."""

    def __init__(self, features: int, out: int, *, frames: int, blocks: int, **options: Any):
        super().__init__(features, blocks, **options)
        self.frames = frames
        self.grow = Conv(features, frames * features, (1, 1, 1), use_bias=False, **options)
        self.out = Conv(features, out, (1, 3, 3), use_bias=False, **options)

    def __call__(self, x: Video, pasts: tuple[Past, ...]) -> tuple[Video, tuple[Past, ...]]:
        """The next frames, and the new pasts."""
        x, after = self.run(x, pasts)
        batch, count, height, width, features = x.shape
        x = self.grow(x).reshape(batch, count, height, width, self.frames, features)  # cheaper before enlarging
        x = jnp.moveaxis(x, 4, 2).reshape(batch, count * self.frames, height, width, features)
        return self.out(x.repeat(2, axis=2).repeat(2, axis=3)), after


class TinyVAE(nnx.Module):
    """A tiny autoencoder: video to latents and back, whole or as a stream.

    Examples:
        >>> config = TinyVAEConfig(encoder=4, decoder=(8, 4, 4, 4), blocks=1)
        >>> vae = TinyVAE(config, rngs=nnx.Rngs(0))
        >>> latents = vae.encode(jnp.zeros((1, 5, 16, 24, 3)))
        >>> latents.shape, vae.decode(latents).shape
        ((1, 2, 2, 3, 16), (1, 5, 16, 24, 3))
        >>> first, pasts = vae.decode_next(latents[:, :1], vae.decoder_pasts(1, 2, 3))
        >>> first[:, 3:].shape, vae.decode_next(latents[:, 1:], pasts)[0].shape
        ((1, 1, 16, 24, 3), (1, 4, 16, 24, 3))

    Args:
        config: Sizes.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters; None: `dtype`.
        rngs: Random keys for the parameters.
    """

    def __init__(
        self,
        config: TinyVAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype or dtype, rngs=rngs)
        width = config.encoder
        self.conv_in = Conv(RGB, width, (1, 3, 3), **options)
        self.down = nnx.List(
            [DownLevel(width, frames=frames, blocks=config.blocks, **options) for frames in config.downsample]
        )
        self.to_latents = Conv(width, config.z_dim, (1, 3, 3), **options)
        self.from_latents = Conv(config.z_dim, config.decoder[0], (1, 3, 3), **options)
        sizes = zip(config.decoder, config.decoder[1:], config.upsample, strict=False)
        self.up = nnx.List(
            [UpLevel(features, out, frames=frames, blocks=config.blocks, **options) for features, out, frames in sizes]
        )
        self.conv_out = Conv(config.decoder[-1], RGB, (1, 3, 3), **options)

    def encoder_pasts(self, batch: int, height: int, width: int) -> Past:
        """State of the encoder at the beginning of a clip of `height` x `width` pixels."""
        features, levels = self.config.encoder, range(1, len(self.down) + 1)
        return self._pasts(batch, [(height >> level, width >> level, features) for level in levels])

    def decoder_pasts(self, batch: int, height: int, width: int) -> Past:
        """State of the decoder at the beginning of a clip with latents of `height` x `width`."""
        sizes = enumerate(self.config.decoder[:-1])
        return self._pasts(batch, [(height << level, width << level, features) for level, features in sizes])

    def _pasts(self, batch: int, levels: list[tuple[int, ...]]) -> Past:
        empty = lambda size: jnp.zeros((batch, 1, *size), self.dtype)  # noqa: E731
        return tuple(tuple(empty(size) for _ in range(self.config.blocks)) for size in levels)

    def encode_next(self, video: Float[Array, "B T H W 3"], pasts: Past) -> tuple[Float[Array, "B F h w C"], Past]:
        """Encodes the next frames, 4 per latent frame.

        Args:
            video: Pixels in [-1, 1].
            pasts: From `encoder_pasts` or the previous call.

        Returns:
            Normalised latents, float32, and the new state.
        """
        x, after = jax.nn.relu(self.conv_in((video + 1) / 2)), []
        for level, past in zip(self.down, pasts, strict=True):
            x, past = level(x, past)
            after.append(past)
        return self.to_latents(x).astype(jnp.float32), tuple(after)

    def decode_next(self, latents: Float[Array, "B F h w C"], pasts: Past) -> tuple[Float[Array, "B T H W 3"], Past]:
        """Decodes the next latents to 4 frames each.

        Args:
            latents: Normalised latents.
            pasts: From `decoder_pasts` or the previous call.

        Returns:
            Frames, float32, with values nominally in [-1, 1] but not clipped, and the new state. Only the last of the 4
            frames of a clip's first latent frame is valid.
        """
        x, after = jax.nn.relu(self.from_latents(3 * jnp.tanh(latents.astype(jnp.float32) / 3))), []
        for level, past in zip(self.up, pasts, strict=True):
            x, past = level(x, past)
            after.append(past)
        return 2 * self.conv_out(jax.nn.relu(x)).astype(jnp.float32) - 1, tuple(after)

    def encode(self, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """Encodes a whole clip.

        Args:
            video: Pixels in [-1, 1]; the last frame is repeated up to a multiple of 4 frames.

        Returns:
            Normalised latents; 1 + k frames for 1 + 4 k frames of video.

        Raises:
            ValueError: If height or width is not a multiple of 8.
        """
        batch, frames, height, width, _ = video.shape
        factor = self.config.spatial_factor
        if height % factor or width % factor:
            raise ValueError(f"video of {height}x{width} pixels: height and width should be multiples of {factor}.")
        more = -frames % self.config.temporal_factor
        video = jnp.concatenate([video, *[video[:, -1:]] * more], axis=1)
        return self.encode_next(video, self.encoder_pasts(batch, height, width))[0]

    def decode(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
        """Decodes a whole clip to T = 1 + 4 (F - 1) frames, clipped to [-1, 1]."""
        batch, _, height, width, _ = latents.shape
        frames, _ = self.decode_next(latents, self.decoder_pasts(batch, height, width))
        return jnp.clip(frames[:, self.config.temporal_factor - 1 :], -1, 1)
