"""The Wan 2.1 autoencoder, which encodes and decodes whole clips or streams.

A clip's first frame has its own latent frame; every further latent frame stands for 4 frames. The layers are causal in
time, so both directions can run frame by frame, with the state of the convolutions in a pytree that is passed in and
returned. Whole clips are a scan over the same step, `chunk` latent frames at a time: memory does not grow with the
clip, and streams give the same frames.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Real

from monarch_jax.checks import positive
from monarchrt.models.vae.causal import Implementation
from monarchrt.models.vae.config import VAEConfig
from monarchrt.models.vae.layers import (
    ChannelNorm,
    Conv,
    Downsample,
    FoldedConv,
    FrameAttention,
    Past,
    ResidualBlock,
    Upsample,
    Video,
)

PIXEL = 3  # channels of a pixel


class Head(nnx.Module):
    """Norm, SiLU, convolution: the last layers of encoder and decoder."""

    def __init__(self, features: int, out: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = ChannelNorm(features, param_dtype=param_dtype, rngs=rngs)
        kind = FoldedConv if out == PIXEL else Conv
        self.conv = kind(features, out, (3, 3, 3), dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def empty_past(self, batch: int, height: int, width: int) -> Past:
        """The past at the beginning of a clip."""
        return self.conv.empty_past(batch, height, width)

    def __call__(self, x: Video, past: Past, *, first: bool, normed: Video | None = None) -> tuple[Video, Past]:
        """The next frames and the new past; `normed` is `x` after norm and SiLU, if it was computed before."""
        return self.conv.after(past, self.norm(x, silu=True) if normed is None else normed, first=first)


class Coder(nnx.Module):
    """Base of encoder and decoder: a first convolution followed by blocks."""

    conv1: Conv

    def blocks(self) -> list[Any]:
        """The blocks after the first convolution, in order."""
        raise NotImplementedError

    def empty_past(self, batch: int, height: int, width: int) -> Past:
        """The pasts of all layers at the beginning of a clip, for inputs of `height` x `width`."""
        pasts = [self.conv1.empty_past(batch, height, width)]
        for block in self.blocks():
            pasts.append(block.empty_past(batch, height, width))
            if isinstance(block, Upsample):
                height, width = 2 * height, 2 * width
            elif isinstance(block, Downsample):
                height, width = height // 2, width // 2
        return tuple(pasts)

    def __call__(self, x: Video, pasts: Past, *, first: bool) -> tuple[Video, Past]:
        """The next frames and the new pasts; `first` if `x` is the single first frame of a clip."""
        x, past = self.conv1.after(pasts[0], x, first=first)
        updated, blocks, normed = [past], self.blocks(), None
        for block, following, old in zip(blocks, [*blocks[1:], None], pasts[1:], strict=True):
            if isinstance(block, ResidualBlock):  # may fuse the norm of the next block
                norm, both = _norm_of(following), not isinstance(following, Head)
                (x, normed), past = block(x, old, first=first, normed=normed, norm=norm, both=both)
            elif isinstance(block, Upsample):
                (x, normed), past = block(x, old, first=first, norm=_norm_of(following))
            elif isinstance(block, Head):
                x, past = block(x, old, first=first, normed=normed)
            else:
                (x, past), normed = block(x, old, first=first), None
            updated.append(past)
        return x, tuple(updated)


def _norm_of(block: Any) -> ChannelNorm | None:
    """The norm with which a block begins, if it is followed by SiLU; else None."""
    if isinstance(block, ResidualBlock):
        return block.norm1
    return block.norm if isinstance(block, Head) else None


class Encoder(Coder):
    """Maps pixels to the moments of the latents."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv1 = Conv(PIXEL, config.dim, (3, 3, 3), **options)
        blocks: list[Any] = []
        features = config.dim
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(features, width, **options))
                features = width
            if level < len(config.temporal_downsample):
                blocks.append(Downsample(width, temporal=config.temporal_downsample[level], **options))
        self.downsamples = nnx.List(blocks)
        self.middle = _middle(features, **options)
        self.head = Head(features, 2 * config.z_dim, **options)

    def blocks(self) -> list[Any]:
        """The blocks after the first convolution, in order."""
        return [*self.downsamples, *self.middle, self.head]


class Decoder(Coder):
    """Maps latents to pixels."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        features = config.widths[-1]
        self.conv1 = Conv(config.z_dim, features, (3, 3, 3), **options)
        self.middle = _middle(features, **options)
        blocks: list[Any] = []
        temporal = config.temporal_downsample[::-1]
        for level, width in enumerate(config.widths[::-1]):
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResidualBlock(features, width, **options))
                features = width
            if level < len(temporal):
                blocks.append(Upsample(width, temporal=temporal[level], **options))
                features = width // 2
        self.upsamples = nnx.List(blocks)
        self.head = Head(features, PIXEL, **options)

    def blocks(self) -> list[Any]:
        """The blocks after the first convolution, in order."""
        return [*self.middle, *self.upsamples, self.head]


def _middle(features: int, **options):
    return nnx.List(
        [
            ResidualBlock(features, features, **options),
            FrameAttention(features, **options),
            ResidualBlock(features, features, **options),
        ]
    )


class WanVAE(nnx.Module):
    """Causal video autoencoder of Wan 2.1 (Wan technical report, Section 4.1).

    Examples:
        >>> from monarchrt.models.vae import vae_config
        >>> vae = WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0))
        >>> video = jnp.zeros((1, 5, 16, 24, 3))
        >>> latents = nnx.jit(WanVAE.encode)(vae, video)
        >>> latents.shape, nnx.jit(WanVAE.decode)(vae, latents).shape
        ((1, 2, 2, 3, 16), (1, 5, 16, 24, 3))

    As a stream, where one compiled program serves all latent frames after the first:

        >>> cache = vae.init_decoder_cache(1, 16, 24)
        >>> first, cache = nnx.jit(WanVAE.decode_first)(vae, latents[:, :1], cache)
        >>> rest, cache = nnx.jit(WanVAE.decode_next)(vae, latents[:, 1:], cache)
        >>> first.shape, rest.shape
        ((1, 1, 16, 24, 3), (1, 4, 16, 24, 3))

    Args:
        config: Sizes.
        rngs: Random keys for the parameters.
        dtype: Dtype of the convolutions and of the cache; norms, softmax, inputs and outputs are float32 or wider.
        param_dtype: Dtype of the parameters.
        implementation: Implementation of 3x3x3 convolutions in half precision: "mosaic" for the Hopper kernel wherever
            it is supported, with folded steps in time in the last one (`FoldedConv`); "xla"; or None for the faster of
            both, as measured, on a Hopper GPU. Unless "xla", norms that are not fused use Triton kernels on Hopper
            where supported (half precision), and XLA elsewhere.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
    ):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.encoder = Encoder(config, **options)
        self.conv1 = Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), **options)
        self.conv2 = Conv(config.z_dim, config.z_dim, (1, 1, 1), **options)
        self.decoder = Decoder(config, **options)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Conv | ChannelNorm):
                module.implementation = implementation

    @property
    def precise_dtype(self) -> jnp.dtype:
        """Dtype of returned latents and frames: float32, or float64 in a float64 model."""
        return jnp.promote_types(self.dtype, jnp.float32)

    # Latents to frames

    def decode(self, latents: Float[Array, "B F h w Z"], *, chunk: int = 4) -> Float[Array, "B T H W 3"]:
        """Decodes a whole clip in a scan over `decode_next`, `chunk` latent frames at a time.

        Args:
            latents: Normalised latents.
            chunk: Latent frames per step; more use more memory and may be faster.

        Returns:
            Frames in [-1, 1], float32 or wider; T = 1 + 4 (F - 1), H = 8 h, W = 8 w.

        Raises:
            ValueError: If there is no frame, or the number of channels is wrong.
        """
        positive("chunk", chunk)
        self._check_latents(latents)
        batch, _, h, w, _ = latents.shape
        factor = self.config.spatial_factor
        cache = self.init_decoder_cache(batch, h * factor, w * factor)
        return _in_chunks(latents, cache, self.decode_first, self.decode_next, chunk)

    def init_decoder_cache(self, batch: int, height: int, width: int) -> Past:
        """The decoder's state before the first latent frame.

        Args:
            batch: Number of clips.
            height: Rows of pixels, a multiple of 8.
            width: Columns of pixels, a multiple of 8.

        Returns:
            A pytree of zeros.

        Raises:
            ValueError: If height or width is not a multiple of 8.
        """
        _, h, w, _ = self.config.latent_shape(1, height, width)
        return self.decoder.empty_past(positive("batch", batch), h, w)

    def decode_first(self, latent: Float[Array, "B F h w Z"], cache: Past) -> tuple[Float[Array, "B 1 H W 3"], Past]:
        """Decodes the first frame of a clip.

        Args:
            latent: The first latent frame, normalised.
            cache: From `init_decoder_cache`.

        Returns:
            One frame in [-1, 1], and the cache for `decode_next`.

        Raises:
            ValueError: If there is not exactly one latent frame, or shapes do not fit the cache.
        """
        if latent.ndim == 5 and latent.shape[1] != 1:
            raise ValueError(f"latent has {latent.shape[1]} frames; decode_first takes 1, decode_next the others.")
        return self._decode(latent, cache, first=True)

    def decode_next(self, latents: Float[Array, "B F h w Z"], cache: Past) -> tuple[Float[Array, "B T H W 3"], Past]:
        """Decodes the frames that follow, 4 per latent frame.

        Args:
            latents: Any number of latent frames, normalised; each number is one compiled program.
            cache: From `decode_first` or `decode_next`.

        Returns:
            T = 4 F frames in [-1, 1], and the new cache.

        Raises:
            ValueError: If shapes do not fit the cache.
        """
        return self._decode(latents, cache, first=False)

    def _decode(self, latents: Array, cache: Past, *, first: bool) -> tuple[Array, Past]:
        self._check_latents(latents)
        known, given = cache[0].shape, latents.shape
        if (known[0], *known[2:4]) != (given[0], *given[2:4]):
            factor = self.config.spatial_factor
            raise ValueError(
                f"latents of batch {given[0]} and {given[2]} x {given[3]} positions do not fit the cache, made for "
                f"batch {known[0]} and {known[2] * factor} x {known[3] * factor} pixels "
                f"({known[2]} x {known[3]} positions); see init_decoder_cache."
            )
        mean, std = self._statistics()
        z = latents.astype(self.precise_dtype) * std + mean
        frames, cache = self.decoder(self.conv2(z), cache, first=first)
        return jnp.clip(frames.astype(self.precise_dtype), -1, 1), cache

    # Frames to latents

    def encode(self, video: Real[Array, "B T H W C"], *, chunk: int = 4) -> Float[Array, "B F h w Z"]:
        """Encodes a whole clip in a scan over `encode_next`, `chunk` latent frames at a time.

        Args:
            video: Frames in [-1, 1].
            chunk: Latent frames per step.

        Returns:
            The normalised mean (mu - mean) / std, not a sample, in float32 or wider; F = 1 + (T - 1) / 4, h = H / 8,
            w = W / 8.

        Raises:
            ValueError: If T is not 4 k + 1, H or W is not a multiple of 8, or there are not 3 channels.
        """
        positive("chunk", chunk)
        self._check_video(video)
        batch, frames, height, width, _ = video.shape
        self.config.latent_shape(frames, height, width)
        cache = self.init_encoder_cache(batch, height, width)
        return _in_chunks(video, cache, self.encode_first, self.encode_next, chunk * self.config.temporal_factor)

    def init_encoder_cache(self, batch: int, height: int, width: int) -> Past:
        """The encoder's state before the first frame; arguments are as in `init_decoder_cache`."""
        self.config.latent_shape(1, height, width)
        return self.encoder.empty_past(positive("batch", batch), height, width)

    def encode_first(self, frame: Real[Array, "B T H W C"], cache: Past) -> tuple[Float[Array, "B 1 h w Z"], Past]:
        """Encodes a clip's first frame.

        Args:
            frame: The frame, in [-1, 1].
            cache: From `init_encoder_cache`.

        Returns:
            One normalised latent frame, and the cache for `encode_next`.

        Raises:
            ValueError: If there is not exactly one frame, or shapes do not fit the cache.
        """
        if frame.ndim == 5 and frame.shape[1] != 1:
            raise ValueError(f"frame has {frame.shape[1]} frames; encode_first takes 1, encode_next the others.")
        return self._encode(frame, cache, first=True)

    def encode_next(self, frames: Real[Array, "B T H W C"], cache: Past) -> tuple[Float[Array, "B F h w Z"], Past]:
        """Encodes the frames that follow, 4 per latent frame.

        Args:
            frames: Frames in [-1, 1], a multiple of 4 of them.
            cache: From `encode_first` or `encode_next`.

        Returns:
            Normalised latent frames, and the new cache.

        Raises:
            ValueError: If their number is not a multiple of 4, or shapes do not fit the cache.
        """
        time = self.config.temporal_factor
        if frames.ndim == 5 and (frames.shape[1] % time or not frames.shape[1]):
            raise ValueError(f"frames has {frames.shape[1]} frames; encode_next takes a multiple of {time}.")
        return self._encode(frames, cache, first=False)

    def _encode(self, frames: Array, cache: Past, *, first: bool) -> tuple[Array, Past]:
        self._check_video(frames)
        known, given = cache[0].shape, frames.shape
        if (known[0], *known[2:4]) != (given[0], *given[2:4]):
            raise ValueError(
                f"frames of batch {given[0]} and {given[2]} x {given[3]} pixels do not fit the cache, made for batch "
                f"{known[0]} and {known[2]} x {known[3]}; see init_encoder_cache."
            )
        moments, cache = self.encoder(frames, cache, first=first)
        mu = self.conv1(moments)[..., : self.config.z_dim].astype(self.precise_dtype)
        mean, std = self._statistics()
        return (mu - mean) / std, cache

    # Shared

    def _statistics(self) -> list[Array]:
        """Mean and standard deviation of the latents' channels, [1, 1, 1, 1, C]."""
        statistics = self.config.latents_mean, self.config.latents_std
        return [jnp.asarray(x, self.precise_dtype).reshape(1, 1, 1, 1, -1) for x in statistics]

    def _check_latents(self, latents: Array) -> None:
        if latents.ndim != 5 or latents.shape[-1] != self.config.z_dim or 0 in latents.shape:
            raise ValueError(
                f"latents have shape {latents.shape}; the decoder takes [B, F, h, w, {self.config.z_dim}], "
                f"channels last."
            )

    def _check_video(self, video: Array) -> None:
        if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
            raise ValueError(f"video has shape {video.shape}; the encoder takes [B, T, H, W, 3], channels last.")
        if not jnp.issubdtype(video.dtype, jnp.floating):
            raise ValueError(f"video has dtype {video.dtype}; the encoder takes floats in [-1, 1]: uint8 / 127.5 - 1.")


def _in_chunks(x: Array, cache: Past, begin: Callable, step: Callable, chunk: int) -> Array:
    """Runs `begin` on the first frame, a scan of `step` over pieces of `chunk` frames, and `step` on the remainder."""
    first, cache = begin(x[:, :1], cache)
    outputs, rest = [first], x[:, 1:]
    count, left = divmod(rest.shape[1], chunk)
    if count > 1:
        pieces = rearrange(rest[:, : count * chunk], "b (n c) ... -> n b c ...", n=count)
        cache, scanned = jax.lax.scan(lambda state, piece: step(piece, state)[::-1], cache, pieces)
        outputs.append(rearrange(scanned, "n b c ... -> b (n c) ..."))
    elif count:
        out, cache = step(rest[:, :chunk], cache)
        outputs.append(out)
    if left:
        out, cache = step(rest[:, count * chunk :], cache)
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)
