"""Decoders that stream: the protocol that the pipeline needs, Wan's VAE, the tiny one, and the patch transform."""

import atexit
import contextlib
import functools
import time
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
    """Decodes latents to frames in parts, and encodes frames that a video starts with.

    Attributes:
        channels: Channels of a latent.
        spatial: Pixels per latent position, in height and in width.
        temporal: Frames per latent frame; the first latent frame is a single frame.
    """

    channels: int
    spatial: int
    temporal: int

    def start(self, batch: int, height: int, width: int) -> Any:
        """The state before the first latents, of a batch of latents of this height and width."""
        ...

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """Starts to compile in the background, for a video decoded in parts of these numbers of latent frames."""
        ...

    def decode(self, latents: Float[Array, "B F h w C"], state: Any) -> tuple[UInt8[Array, "B T H W 3"], Any]:
        """Decodes the next latents; does not wait for the result.

        Args:
            latents: Normalised latents.
            state: From `start` or the previous call.

        Returns:
            The frames and the next state.
        """
        ...

    def finite(self, state: Any) -> Bool[Array, ""]:
        """Whether all pixels so far were finite, from the state after `decode`; uint8 frames cannot tell."""
        ...

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """Encodes frames to latents; their number must be 1 + temporal * k."""
        ...


def frames_of(decoder: FrameDecoder, latents: int) -> int:
    """Number of frames that a number of latent frames decodes to.

    Examples:
        >>> frames_of(PatchDecoder(PatchDCT(patch=4)), 7)
        7
    """
    return 1 + (latents - 1) * decoder.temporal


def to_pixels(video: Float[Array, "*f H W 3"]) -> UInt8[Array, "*f H W 3"]:
    """Converts pixels in [-1, 1] to 0...255, rounded and clipped; NaN becomes black."""
    video = jnp.nan_to_num(video.astype(jnp.float32), nan=-1.0)
    return jnp.clip(jnp.rint((video + 1) * 127.5), 0, 255).astype(jnp.uint8)


def to_host(*arrays: Array | np.ndarray) -> None:
    """Requests copies of arrays to the host, which start as soon as the arrays are computed.

    `np.asarray` then only waits for the copy; otherwise it would wait for the array and start the copy after that. On a
    CPU nothing is copied. jaxlib aborts a process that ends while a copy is under way, so the process waits at its end.
    """
    for array in arrays:
        if isinstance(array, jax.Array) and not on_cpu(array):
            for device in array.devices():
                _wait_at_exit(device)
            array.copy_to_host_async()


@functools.cache
def _wait_at_exit(device: Any) -> None:
    """Registers, once per device, that the process waits for the device's copies before it ends."""
    atexit.register(_await_copies, device)


def _await_copies(device: Any) -> None:
    """Waits until a device has finished its work, copies to the host included."""
    with contextlib.suppress(Exception):  # the device failed; the process ends anyway
        last = jnp.add(jax.device_put(np.zeros(8, np.int32), device), 1)  # computed after all work before it
        for n in range(last.size):  # copies take turns on several streams
            np.asarray(last[n])
        time.sleep(0.05)  # a copy's thread ends a moment after its copy


def on_cpu(array: Array) -> bool:
    """Whether an array is on a CPU device."""
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
        device: Device to compute on; None: that of the latents.
    """

    temporal = 1

    def __init__(self, transform: PatchDCT, *, device: Any = None):
        self._transform, self._device = transform, device
        self.channels, self.spatial = transform.channels, transform.patch
        self._synthesis = jax.device_put(jnp.asarray(transform.synthesis), device)
        self._decode = jax.jit(functools.partial(_decode_patches, patch=transform.patch))

    def start(self, batch: int, height: int, width: int) -> Bool[Array, ""]:
        """The state: only whether all pixels were finite."""
        return jnp.array(True)

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """Does nothing: compilation takes no noticeable time."""

    def decode(
        self, latents: Float[Array, "B F h w C"], state: Bool[Array, ""]
    ) -> tuple[UInt8[Array, "B F H W 3"], Bool[Array, ""]]:
        """The frames."""
        if self._device is not None:
            latents = jax.device_put(latents, self._device)
        frames, finite = self._decode(latents, self._synthesis)
        return frames, state & finite

    def finite(self, state: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether all pixels so far were finite."""
        return state

    def encode(self, video: UInt8[np.ndarray, "B F H W 3"]) -> Float[Array, "B F h w C"]:
        """The latents."""
        return jnp.asarray(self._transform.encode(video))


def _decode_patches(latents: Array, synthesis: Array, *, patch: int) -> tuple[Array, Array]:
    pixels = jnp.matmul(latents, synthesis, precision="highest")
    return _checked(rearrange(pixels, "b f h w (py px c) -> b f (h py) (w px) c", py=patch, px=patch))


def _checked(video: Array) -> tuple[Array, Array]:
    """Pixels as uint8, and whether all were finite."""
    return to_pixels(video), jnp.isfinite(video).all()


class _Compiled:
    """Base class that compiles an autoencoder's programs in advance; `self._graph` and `self._state` are its parts."""

    channels: int
    _graph: Any
    _state: Any

    def __init__(self, device: Any = None) -> None:
        self._place = None if device is None else jax.sharding.SingleDeviceSharding(device)
        self._compiling: dict[tuple[Any, tuple[int, ...]], Future[Any]] = {}
        self._prepared: set[tuple[int, tuple[int, ...], int, int]] = set()

    def _placed(self, vae: nnx.Module) -> tuple[Any, Any]:
        """Graph and parameters of an autoencoder, the parameters on the chosen device."""
        graph, state = nnx.split(vae)
        return graph, state if self._place is None else jax.device_put(state, self._place)

    def _new(self, video: tuple[int, tuple[int, ...], int, int]) -> bool:
        """Whether a video of (batch, parts, height, width) still has to be compiled for."""
        if not video[1] or video in self._prepared:
            return False
        self._prepared.add(video)
        return True

    def _compile(self, calls: Sequence[tuple[Any, int, tuple[Any, ...]]], batch: int, height: int, width: int) -> None:
        """Compiles functions for given numbers of latent frames and arguments, each in a thread."""
        pool = ThreadPoolExecutor(len(calls), "compile")
        for function, part, others in calls:
            shape = batch, part, height, width, self.channels
            latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._place)
            if (function, latents.shape) not in self._compiling:
                job = pool.submit(_compile, function, self._graph, self._state, latents, *others)
                self._compiling[function, latents.shape] = job
        pool.shutdown(wait=False)

    def _run(self, function: Callable[..., Any], latents: Array, *others: Any) -> Any:
        if self._place is not None:  # from another device: copied asynchronously
            latents = jax.device_put(latents, self._place)
        if (job := self._compiling.get((function, latents.shape))) is not None:
            job.result()  # JAX caches it; calling the function meanwhile would compile it twice
        return function(self._graph, self._state, latents, *others)


class WanDecoder(_Compiled):
    """Wan's VAE as a stream: the first latent frame is one frame, each further one four.

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
        device: Device to compute on; None: that of the latents.
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
        """The decoder's cache, whether the next latent frame is the first, and whether all pixels were finite."""
        return self._start(self._state, batch, height * self.spatial, width * self.spatial), True, jnp.array(True)

    def prepare(self, batch: int, parts: Sequence[int], height: int, width: int) -> None:
        """Compiles in the background, each program in a thread; `decode` waits for the one that it needs.

        Args:
            batch: Number of videos.
            parts: Number of latent frames of each call of `decode`, in order; empty if unknown.
            height: Height of the latents.
            width: Width of the latents.
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
        """The frames; the first block takes two programs, the others one."""
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
        """Whether all pixels so far were finite."""
        return state[2]

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """The latents, normalised."""
        return self._encode(self._graph, self._state, jnp.asarray(video))


class TinyDecoder(_Compiled):
    """The tiny autoencoder as a stream.

    Examples:
        >>> from monarchrt.models.vae.tiny import TinyVAEConfig
        >>> config = TinyVAEConfig(encoder=4, decoder=(8, 4, 4, 4), blocks=1)
        >>> decoder = TinyDecoder(TinyVAE(config, rngs=nnx.Rngs(0)))
        >>> frames, _ = decoder.decode(jnp.zeros((1, 3, 2, 3, 16)), decoder.start(1, 2, 3))
        >>> frames.shape
        (1, 9, 16, 24, 3)

    Args:
        vae: The autoencoder.
        device: Device to compute on; None: that of the latents.
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
        """The decoder's memory, whether the next latent frame is the first, and whether all pixels were finite."""
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
        """Whether all pixels so far were finite."""
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
