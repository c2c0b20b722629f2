"""From latents to frames, as they come: what the pipeline needs of a decoder, and the one of the patch transform."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.vae import TinyVAE, WanVAE


@runtime_checkable
class FrameDecoder(Protocol):
    """Latents to frames, a few at a time; and frames to latents, for an image or clip to begin with.

    Attributes:
        channels: Of a latent.
        spatial: Pixels per latent position, in height and in width.
        temporal: Frames per latent after the first, which is one frame.
    """

    channels: int
    spatial: int
    temporal: int

    def start(self, batch: int, height: int, width: int) -> Any:
        """State before the first latents, which are height x width."""
        ...

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """Begins to compile for a video of parts of so many latents, while the caller does something else."""
        ...

    def decode(self, latents: Float[Array, "B F h w C"], state: Any) -> tuple[UInt8[Array, "B T H W 3"], Any]:
        """The frames of the next latents, and the state after them; dispatched, not waited for."""
        ...

    def finite(self, state: Any) -> Bool[Array, ""]:
        """Whether no pixel so far was NaN or infinite, by the state after `decode`: bytes cannot tell."""
        ...

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """Latents of frames, T = 1 + temporal * k."""
        ...


def frames_of(decoder: FrameDecoder, latents: int) -> int:
    """Frames that so many latents make.

    Examples:
        >>> frames_of(PatchDecoder(PatchDCT(patch=4)), 7)
        7
    """
    return 1 + (latents - 1) * decoder.temporal


def to_pixels(video: Float[Array, "*f H W 3"]) -> UInt8[Array, "*f H W 3"]:
    """Pixels in [-1, 1] as 0...255, rounded and clipped; not a number is black."""
    video = jnp.nan_to_num(video.astype(jnp.float32), nan=-1.0)
    return jnp.clip(jnp.rint((video + 1) * 127.5), 0, 255).astype(jnp.uint8)


def to_host(*arrays: Array | np.ndarray) -> None:
    """Begins to copy arrays to the host as soon as they are made, whether anyone waits for them then or not.

    `np.asarray` of one waits for its copy; else it would wait for the array, and only then ask for the copy. On a CPU
    there is nothing to copy, and jaxlib aborts a process that ends before such a copy was made.
    """
    for array in arrays:
        if isinstance(array, jax.Array) and not on_cpu(array):
            array.copy_to_host_async()


def on_cpu(array: Array) -> bool:
    """Whether an array is where the host's own are."""
    return all(device.platform == "cpu" for device in array.devices())


class PatchDecoder:
    """The inverse of a fixed patch transform: each latent frame is one frame.

    Examples:
        >>> dct = PatchDCT(patch=4, whitening=1.0)
        >>> decoder = PatchDecoder(dct)
        >>> video = np.full((1, 2, 8, 8, 3), 77, np.uint8)
        >>> frames, _ = decoder.decode(decoder.encode(video), decoder.start(1, 2, 2))
        >>> bool((frames == video).all())
        True

    Args:
        transform: The transform that the model was trained with.
        device: Where it works; None: where the latents are.
    """

    temporal = 1

    def __init__(self, transform: PatchDCT, *, device: Any = None):
        self._transform, self._device = transform, device
        self.channels, self.spatial = transform.channels, transform.patch
        self._synthesis = jax.device_put(jnp.asarray(transform.synthesis), device)
        self._decode = jax.jit(functools.partial(_decode_patches, patch=transform.patch))

    def start(self, batch: int, height: int, width: int) -> Bool[Array, ""]:
        """Nothing is remembered, but whether all pixels were finite."""
        return jnp.array(True)

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """It compiles in no time."""

    def decode(
        self, latents: Float[Array, "B F h w C"], state: Bool[Array, ""]
    ) -> tuple[UInt8[Array, "B F H W 3"], Bool[Array, ""]]:
        """The frames."""
        if self._device is not None:
            latents = jax.device_put(latents, self._device)
        frames, finite = self._decode(latents, self._synthesis)
        return frames, state & finite

    def finite(self, state: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether no pixel so far was NaN or infinite."""
        return state

    def encode(self, video: UInt8[np.ndarray, "B F H W 3"]) -> Float[Array, "B F h w C"]:
        """The latents."""
        return jnp.asarray(self._transform.encode(video))


def _decode_patches(latents: Array, synthesis: Array, *, patch: int) -> tuple[Array, Array]:
    pixels = jnp.matmul(latents, synthesis, precision="highest")
    return _checked(rearrange(pixels, "b f h w (py px c) -> b f (h py) (w px) c", py=patch, px=patch))


def _checked(video: Array) -> tuple[Array, Array]:
    """Pixels as bytes, and whether they were finite."""
    return to_pixels(video), jnp.isfinite(video).all()


class _Compiled:
    """Programs of an autoencoder that are compiled before they are needed; `self._graph` and `self._state` are its."""

    channels: int
    _graph: Any
    _state: Any

    def __init__(self, device: Any = None) -> None:
        self._place = None if device is None else jax.sharding.SingleDeviceSharding(device)
        self._compiling: dict[tuple[Any, tuple[int, ...]], Future[Any]] = {}
        self._prepared: set[tuple[int, tuple[int, ...], int, int]] = set()

    def _placed(self, vae: nnx.Module) -> tuple[Any, Any]:
        """Structure and parameters, these on the device that is asked for."""
        graph, state = nnx.split(vae)
        return graph, state if self._place is None else jax.device_put(state, self._place)

    def _new(self, video: tuple[int, tuple[int, ...], int, int]) -> bool:
        """Whether a video, (batch, parts, height, width), is to be compiled for, and was not before."""
        if not video[1] or video in self._prepared:
            return False
        self._prepared.add(video)
        return True

    def _compile(self, calls: Sequence[tuple[Any, int, tuple[Any, ...]]], batch: int, height: int, width: int) -> None:
        """Compiles functions for so many latents and other arguments, each in a thread of its own."""
        pool = ThreadPoolExecutor(len(calls), "compile")
        for function, part, others in calls:
            shape = batch, part, height, width, self.channels
            latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._place)
            if (function, latents.shape) not in self._compiling:
                job = pool.submit(_compile, function, self._graph, self._state, latents, *others)
                self._compiling[function, latents.shape] = job
        pool.shutdown(wait=False)

    def _run(self, function: Callable[..., Any], latents: Array, *others: Any) -> Any:
        if self._place is not None:  # from another device: copied while both go on
            latents = jax.device_put(latents, self._place)
        if (job := self._compiling.get((function, latents.shape))) is not None:
            job.result()  # JAX finds it again by itself; asking for it meanwhile would compile it twice
        return function(self._graph, self._state, latents, *others)


class WanDecoder(_Compiled):
    """Wan's VAE, streaming: the first latent is one frame, each further one is four.

    Examples:
        >>> from monarchrt.models.vae import vae_config
        >>> decoder = WanDecoder(WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0)))
        >>> state = decoder.start(1, 2, 3)
        >>> for _ in range(2):
        ...     frames, state = decoder.decode(jnp.zeros((1, 3, 2, 3, 16)), state)
        ...     print(frames.shape)
        (1, 9, 16, 24, 3)
        (1, 12, 16, 24, 3)

    Args:
        vae: The autoencoder.
        device: Where it works; None: where the latents are.
    """

    def __init__(self, vae: WanVAE, *, device: Any = None):
        super().__init__(device)
        config = vae.config
        self.channels, self.spatial, self.temporal = config.z_dim, config.spatial_factor, config.temporal_factor
        self._graph, self._state = self._placed(vae)
        self._start = functools.partial(jax.jit(_start_vae, static_argnums=(0, 2, 3, 4)), self._graph)
        self._first, self._rest, self._next, self._encode = (
            jax.jit(function, static_argnums=0)
            for function in (_decode_first, _decode_rest, _decode_next, _encode_video)
        )

    def start(self, batch: int, height: int, width: int) -> Any:
        """The decoder's cache, whether the first latent is still to come, and whether all pixels were finite."""
        return self._start(self._state, batch, height * self.spatial, width * self.spatial), True, jnp.array(True)

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """Compiles in the background, each program in a thread of its own; `decode` waits for the one it needs.

        Args:
            batch: Videos at once.
            parts: Latents of each call of `decode`, in order; empty if that is not known.
            height: Of the latents.
            width: Of the latents.
        """
        if not self._new((batch, tuple(parts), height, width)):
            return
        cache, *_ = jax.eval_shape(functools.partial(self.start, batch, height, width))
        before = jax.ShapeDtypeStruct((batch, 1, height * self.spatial, width * self.spatial, 3), jnp.uint8)
        calls: list[tuple[Any, int, tuple[Any, ...]]] = [(self._first, parts[0], (cache,))]
        if parts[0] > 1:
            calls.append((self._rest, parts[0], (cache, before)))
        calls += [(self._next, part, (cache,)) for part in dict.fromkeys(parts[1:])]
        self._compile(calls, batch, height, width)

    def decode(self, latents: Float[Array, "B F h w C"], state: Any) -> tuple[UInt8[Array, "B T H W 3"], Any]:
        """The frames; two programs for the first block and one for the others."""
        cache, first, before = state
        if not first:
            (frames, finite), cache = self._run(self._next, latents, cache)
            return frames, (cache, False, before & finite)
        (frames, finite), cache = self._run(self._first, latents, cache)
        if latents.shape[1] > 1:
            (frames, rest), cache = self._run(self._rest, latents, cache, frames)
            finite = finite & rest
        return frames, (cache, False, before & finite)

    def finite(self, state: Any) -> Bool[Array, ""]:
        """Whether no pixel so far was NaN or infinite."""
        return state[2]

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """The latents, normalised."""
        return self._encode(self._graph, self._state, jnp.asarray(video))


class TinyDecoder(_Compiled):
    """The tiny autoencoder, streaming.

    Examples:
        >>> from monarchrt.models.vae.tiny import TinyVAEConfig
        >>> config = TinyVAEConfig(encoder=4, decoder=(8, 4, 4, 4), blocks=1)
        >>> decoder = TinyDecoder(TinyVAE(config, rngs=nnx.Rngs(0)))
        >>> frames, _ = decoder.decode(jnp.zeros((1, 3, 2, 3, 16)), decoder.start(1, 2, 3))
        >>> frames.shape
        (1, 9, 16, 24, 3)

    Args:
        vae: The autoencoder.
        device: Where it works; None: where the latents are.
    """

    def __init__(self, vae: TinyVAE, *, device: Any = None):
        super().__init__(device)
        config = vae.config
        self.channels, self.spatial, self.temporal = config.z_dim, config.spatial_factor, config.temporal_factor
        self._graph, self._state = self._placed(vae)
        self._start = jax.jit(vae.decoder_pasts, static_argnums=(0, 1, 2))
        self._first, self._next = (
            jax.jit(functools.partial(_decode_tiny, dropped=dropped), static_argnums=0)
            for dropped in (self.temporal - 1, 0)
        )
        self._encode = jax.jit(_encode_video, static_argnums=0)

    def start(self, batch: int, height: int, width: int) -> Any:
        """What is remembered, whether the first latent is still to come, and whether all pixels were finite."""
        return self._start(batch, height, width), True, jnp.array(True)

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """Compiles in the background; arguments as `WanDecoder.prepare`."""
        if not self._new((batch, tuple(parts), height, width)):
            return
        pasts, *_ = jax.eval_shape(functools.partial(self.start, batch, height, width))
        calls = [
            (self._first, parts[0], (pasts,)),
            *((self._next, part, (pasts,)) for part in dict.fromkeys(parts[1:])),
        ]
        self._compile(calls, batch, height, width)

    def decode(self, latents: Float[Array, "B F h w C"], state: Any) -> tuple[UInt8[Array, "B T H W 3"], Any]:
        """The frames."""
        pasts, first, before = state
        (frames, finite), pasts = self._run(self._first if first else self._next, latents, pasts)
        return frames, (pasts, False, before & finite)

    def finite(self, state: Any) -> Bool[Array, ""]:
        """Whether no pixel so far was NaN or infinite."""
        return state[2]

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """The latents, normalised."""
        return self._encode(self._graph, self._state, jnp.asarray(video))


def _decode_tiny(graph, state, latents, pasts, *, dropped):
    frames, pasts = nnx.merge(graph, state).decode_next(latents, pasts)
    return _checked(frames[:, dropped:]), pasts


def _compile(function: Any, *arguments: Any) -> None:
    function.lower(*arguments).compile()


def _start_vae(graph, state, batch, height, width):
    return nnx.merge(graph, state).init_decoder_cache(batch, height, width)


def _decode_first(graph, state, latents, cache):
    frames, cache = nnx.merge(graph, state).decode_first(latents[:, :1], cache)
    return _checked(frames), cache


def _decode_rest(graph, state, latents, cache, before):
    frames, cache = nnx.merge(graph, state).decode_next(latents[:, 1:], cache)
    pixels, finite = _checked(frames)
    return (jnp.concatenate([before, pixels], axis=1), finite), cache


def _decode_next(graph, state, latents, cache):
    frames, cache = nnx.merge(graph, state).decode_next(latents, cache)
    return _checked(frames), cache


def _encode_video(graph, state, video):
    return nnx.merge(graph, state).encode(video.astype(jnp.float32) / 127.5 - 1)
