"""One block of frames after another with a cache of what came before (Self-Forcing, arXiv:2506.08009, algorithm 1).

A block is denoised and its keys and values are then rewritten from the finished latents at time 0. All of that is one
compiled program, the same for every block: a scan over the sampler's rows and one more, with the cache donated.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.compiling import LIBRARY_PRODUCTS
from monarchrt.models.sampling.noise import Noise, joined
from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS
from monarchrt.models.sampling.solve import SolverState, fresh_noise, paired, rows, solver_step, unpair
from monarchrt.models.sampling.tables import SamplerTable, sampler_table
from monarchrt.models.sharding import constrain
from monarchrt.models.wan import WanModel
from monarchrt.models.wan.causal import (
    WanCache,
    bytes_on_each,
    cache_shape,
    cached_forward,
    cross_keys_values,
    empty_runs,
    init_cache,
    rebase_cache,
    turn_cache,
)
from monarchrt.models.wan.rope import MAX_POSITIONS
from monarchrt.models.wan.unrolled import UnrolledWan, merged

FEW = 64  # steps whose timesteps are embedded all at once


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The fixed part of an autoregressive generation.

    Attributes:
        sampler: As in `sampler_table`, a table of one's own included; few-step for distilled models.
        steps: Calls of the network per block, or for few-step the list of its steps; None: the sampler's own number.
        shift: Shift of the noise levels.
        guidance: Weight of classifier-free guidance, with a negative text; 1 is none (distilled models need none).
        block: Latent frames per block.
        independent_first_frame: Whether the first frame is a block of its own.
        window: Frames of keys and values that are kept, with the block in the making; None keeps all.
        sink_frames: Leading frames that a window never lets go.
        context_noise: Timestep, 0 to 1000, that the network is told when it puts a finished block into the cache.
            Self-Forcing's setting of this name; as in its inference, the latents themselves are not noised.
    """

    sampler: str | SamplerTable = "few-step"
    steps: int | tuple[int, ...] | None = None
    shift: float = 5.0
    guidance: float = 1.0
    block: int = 3
    independent_first_frame: bool = False
    window: int | None = None
    sink_frames: int = 0
    context_noise: float = 0.0

    def __post_init__(self):
        check_sampler(self)
        if self.block < 1:
            raise ValueError(f"block={self.block} is not a positive number of frames; Self-Forcing uses 3.")
        if self.window is not None and self.window < self.block + self.sink_frames:
            raise ValueError(
                f"window={self.window} frames has no room for a block of {self.block} and sink_frames="
                f"{self.sink_frames}; use at least {self.block + self.sink_frames}."
            )
        if self.sink_frames and self.window is None:
            raise ValueError(f"sink_frames={self.sink_frames} needs a window, for example window=21.")

    def table(self) -> SamplerTable:
        """The sampler."""
        return sampler_table(self.sampler, steps=self.steps, shift=self.shift)

    def noise(self, key: Key[Array, ""], shape: tuple[int, ...], *, given: int = 0) -> Noise:
        """The noise that `autoregressive` draws of a key, to take it elsewhere.

        Examples:
            >>> noise = Rollout().noise(jax.random.key(0), (1, 6, 4, 8, 16), given=3)
            >>> noise.first.shape, noise.fresh.shape
            ((1, 3, 4, 8, 16), (3, 1, 3, 4, 8, 16))

        Args:
            key: As there.
            shape: Of the whole video's latents, [B, F, H, W, C].
            given: Leading frames that are given and need none.

        Returns:
            The noise of the new frames.
        """
        parts, frame, noisy = [], 0, self.table().noisy
        for count in self.blocks(shape[1]):
            if frame >= given:
                of_block = jax.random.fold_in(key, frame)
                first = block_noise(of_block, (shape[0], count, *shape[2:]))
                draw = fresh_noise(of_block, first)
                parts.append(Noise(first, jnp.stack([draw(int(n)) for n in noisy]) if len(noisy) else None))
            frame += count
        return joined(parts)

    def blocks(self, frames: int) -> list[int]:
        """Sizes of the blocks that make `frames` latent frames.

        Examples:
            >>> Rollout().blocks(9), Rollout(independent_first_frame=True).blocks(7)
            ([3, 3, 3], [1, 3, 3])

        Raises:
            ValueError: If they do not make whole blocks.
        """
        return block_sizes(frames, self.block, independent_first_frame=self.independent_first_frame)


@partial(
    jax.jit, static_argnames=("graph", "rollout", "shape"), donate_argnames="cache", compiler_options=LIBRARY_PRODUCTS
)
def generate_block(
    graph: nnx.GraphDef,
    params: Any,
    cache: WanCache,
    key: Key[Array, ""],
    frame: Array,
    given: Noise | None = None,
    *,
    rollout: Rollout,
    shape: tuple[int, ...],
) -> tuple[Float[Array, "B F H W C"], WanCache]:
    """Denoises one block and rewrites it in the cache: the whole of a block, in one program.

    Args:
        graph: Of `nnx.split(model)`.
        params: Of `nnx.split(model)`, or `Layers`.
        cache: Of `start_cache`; it is donated.
        key: Of the whole video; a block's noise depends on it and `frame` only.
        frame: Index of the block's first frame, of which the noise is drawn: int32 [2], absolute and in the cache.
        given: The block's noise; what is None of it is drawn.
        rollout: Settings.
        shape: Of the block, [B, F, H, W, C].

    Returns:
        The finished latents, float32, and the cache.
    """
    network = merged(graph, params)
    key = jax.random.fold_in(key, frame[0])
    noise = block_noise(key, shape) if given is None else given.first
    table = rollout.table()
    fresh = None if given is None else given.by_step(table, rows=table.steps + 1)
    draw = fresh_noise(key, noise) if table.stochastic and fresh is None else None

    def step(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        (state, cache), (row, times, number, added) = carry, xs
        added = added if draw is None else draw(number)
        flow, cache = _flow(network, state.x, row.timesteps, cache, frame, number, rollout, times)
        return (solver_step(state, row, flow, added), cache), None

    each = rows(table.with_rewrite(rollout.context_noise))
    times = None
    if table.steps <= FEW:  # of all calls at once: each would read as many bytes of their weights as a layer's
        times = jax.tree.map(lambda x: x[0], network[0].embed_times(each.timesteps[None]))
    scanned = each, times, jnp.arange(table.steps + 1), fresh
    (state, cache), _ = jax.lax.scan(step, (SolverState.init(noise), cache), scanned)
    return constrain(state.x, "batch", *(None,) * (len(shape) - 1)), cache


@partial(jax.jit, static_argnames=("graph", "rollout"), donate_argnames="cache", compiler_options=LIBRARY_PRODUCTS)
def write_block(
    graph: nnx.GraphDef,
    params: Any,
    cache: WanCache,
    latents: Float[Array, "B F H W C"],
    frame: Array,
    timestep: Array | float = 0.0,
    *,
    rollout: Rollout,
) -> WanCache:
    """Puts finished latents, such as a given image or clip, into the cache. Arguments as `generate_block`.

    The network is told `timestep`: 0 of what is given, and of its own blocks the `context_noise`.
    """
    return _flow(merged(graph, params), latents, jnp.float32(timestep), cache, frame, rollout.table().steps, rollout)[1]


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def write_text(graph: nnx.GraphDef, params: Any, cache: WanCache, text: Float[Array, "B L E"]) -> WanCache:
    """Another text for the blocks that follow; `text` as in `start_cache`, of as many rows."""
    model, layers = merged(graph, params)
    return dataclasses.replace(cache, cross=cross_keys_values(model, text, layers=layers))


def _flow(
    network: tuple[Any, Any],
    x: Array,
    t: Array,
    cache: WanCache,
    frame: Array,
    step: int | Array,
    rollout: Rollout,
    times: tuple[Array, Array] | None = None,
) -> tuple[Array, WanCache]:
    """The flow at the block; a cache of twice the batch has the negative text's half after the prompt's.

    `times` is the timestep's embedding, [D], and its projection, [6, D], if they are known.
    """
    model, layers = network
    guides = cache.shape.batch == 2 * x.shape[0]
    x = paired(x, x) if guides else x
    number = -(-frame[0] // rollout.block)  # also where the first frame is a block of its own
    flow, cache = cached_forward(
        model,
        x,
        jnp.broadcast_to(t, x.shape[:1]),
        cache,
        frame=frame[1],
        step=step,
        block=number,
        in_place=True,
        layers=layers,
        times=times and tuple(jnp.broadcast_to(y, (x.shape[0], 1, *y.shape)) for y in times),
    )
    return (unpair(flow, rollout.guidance) if guides else flow), cache


def block_noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B F H W C"]:
    """The noise that a block starts from."""
    return jax.random.normal(jax.random.fold_in(key, 2**31 - 1), shape)


@partial(jax.jit, static_argnames=("graph", "frames", "height", "width", "rollout"))
def start_cache(
    graph: nnx.GraphDef,
    params: Any,
    text: Float[Array, "B L E"],
    *,
    frames: int,
    height: int,
    width: int,
    rollout: Rollout,
) -> WanCache:
    """An empty cache; `text` is `paired` with the negative one for guidance. `frames` counts if there is no window."""
    model, layers = merged(graph, params)
    return init_cache(
        model,
        text,
        height=height,
        width=width,
        layers=layers,
        **cache_room(frames, rollout),
    )


def autoregressive(
    model: WanModel | UnrolledWan,
    text: Float[Array, "B L E"],
    *,
    frames: int | None,
    height: int,
    width: int,
    key: Key[Array, ""],
    rollout: Rollout,
    negative: Float[Array, "B M E"] | None = None,
    initial: Float[Array, "B K H W C"] | None = None,
    noise: Noise | None = None,
) -> Iterator[Float[Array, "B F H W C"]]:
    """Generates latents block by block; each is handed out as soon as it is under way (asynchronous dispatch).

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1, causal_block=3), rngs=nnx.Rngs(0))
        >>> blocks = autoregressive(
        ...     model, jnp.zeros((1, 8, 32)), frames=6, height=4, width=8, key=jax.random.key(0), rollout=Rollout()
        ... )
        >>> [block.shape for block in blocks]
        [(1, 3, 4, 8, 16), (1, 3, 4, 8, 16)]

    Args:
        model: A causal model, trained on blocks of `rollout.block` frames.
        text: Embedding of the prompt.
        frames: Latent frames in all, given ones included; None, with a window: without end.
        height: Of the latents.
        width: Of the latents.
        key: Of all noise. The first blocks do not depend on how many follow.
        rollout: Settings.
        negative: Embedding of the negative prompt, for guidance.
        initial: Finished latents that come first, such as an encoded image (one frame, which needs
            `independent_first_frame`) or clip. They are handed out too.
        noise: Of the new frames, instead of what the key gives (`Rollout.noise` is that); needs a number of frames.

    Yields:
        Latents of one block, float32.

    Raises:
        ValueError: If frames do not make whole blocks, or a size does not fit the model; before anything is computed.
    """
    video = LiveRollout(
        model, text, frames=frames, height=height, width=width, key=key, rollout=rollout, negative=negative
    )
    given = 0 if initial is None else initial.shape[1]
    if initial is not None:
        expected = (*video.shape[:1], given, *video.shape[1:])
        if initial.shape != expected:
            raise ValueError(
                f"initial has shape {initial.shape}; batch, height, width and channels should be {video.shape}."
            )
        rollout.blocks(given)
    if noise is not None:
        if frames is None:
            raise ValueError("noise is given, but frames=None is without end; give the number of frames.")
        noise.check(rollout.table(), (video.shape[0], max(0, frames - given), *video.shape[1:]))
    return _blocks(video, initial, noise)


def _blocks(video: "LiveRollout", initial: Array | None, noise: Noise | None) -> Iterator[Array]:
    given = 0 if initial is None else initial.shape[1]
    while count := video.next_count:
        frame = video.frame
        if initial is not None and frame < given:
            latents = jnp.asarray(initial[:, frame : frame + count], jnp.float32)
            video.write(latents)
        else:
            latents = video.generate(None if noise is None else noise.part(frame - given, count))
        yield latents


class LiveRollout:
    """A video in the making, a block at a call, of which the text and the past may be changed in between.

    Calls dispatch and do not wait. A block takes one program, the same for all videos of equal sizes and settings; a
    new text, rewriting the past and counting anew take one more each.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1, causal_block=3), rngs=nnx.Rngs(0))
        >>> video = LiveRollout(
        ...     model, jnp.zeros((1, 8, 32)), height=4, width=8, key=jax.random.key(0), rollout=Rollout(window=6)
        ... )
        >>> past = {video.frame: video.generate() for _ in range(3)}
        >>> video.set_text(jnp.ones((1, 8, 32)))
        >>> video.past_of(video.frame)  # what the next block will see: the window less the block itself
        [6]
        >>> video.recache(video.frame, past)  # as the new text has it
        >>> video.generate().shape, video.frame
        ((1, 3, 4, 8, 16), 12)

    Args:
        model: A causal model, trained on blocks of `rollout.block` frames; or `unroll_layers` of it, for speed.
        text: Embedding of the prompt.
        height: Of the latents.
        width: Of the latents.
        key: Of all noise. The first blocks do not depend on how many follow.
        rollout: Settings.
        frames: Latent frames in all, given ones included; None, with a window: without end.
        negative: Embedding of the negative prompt, for guidance.
        mesh: The devices that share the network's work, where its parameters are; None: the mesh that is set, if any.

    Attributes:
        frame: Index of the next block's first frame.
        key: As given; another one is for the blocks that follow.
        shape: Of a frame's latents with the batch, (B, H, W, C).

    Raises:
        ValueError: If frames do not make whole blocks, or a size does not fit the model; before anything is computed.
    """

    def __init__(
        self,
        model: WanModel | UnrolledWan,
        text: Float[Array, "B L E"],
        *,
        height: int,
        width: int,
        key: Key[Array, ""],
        rollout: Rollout,
        frames: int | None = None,
        negative: Float[Array, "B M E"] | None = None,
        mesh: Mesh | None = None,
    ):
        config = model.config
        if config.patch_size[0] != 1 or config.in_channels != config.out_channels:
            raise ValueError(
                f"model has patch_size={config.patch_size}, {config.in_channels} input and {config.out_channels} "
                f"output channels; this sampler needs a text-to-video model with patches of one frame."
            )
        if frames is None and rollout.window is None:
            raise ValueError("frames=None, without end, needs a window, for example Rollout(window=21, sink_frames=3).")
        if frames is not None:
            rollout.blocks(frames)
        if isinstance(model, UnrolledWan):
            plain, halves = model.model, (model.graph, model.params)
        else:
            plain = model.with_config(causal_block=None)  # blocks are seen one at a time
            halves = nnx.split(plain)
        for size in {rollout.block, 1} if rollout.independent_first_frame else {rollout.block}:
            check_size(plain, (text.shape[0], size, height, width, config.in_channels), cached=True)
        self.frame, self.key, self.shape = 0, key, (text.shape[0], height, width, config.out_channels)
        self._rollout, self._frames, self._head_dim = rollout, frames, config.head_dim
        self._graph, self._params = halves
        self._mesh = mesh
        self._text = self._context(text, negative)
        self._begin = partial(start_cache, frames=frames or 0, height=height, width=width, rollout=rollout)
        # what does not fit is found here, without the parameters: to trace with them would take a tenth of a block
        check_room(plain, self._text, frames=frames or 0, height=height, width=width, rollout=rollout)
        self._cache: WanCache | None = None
        self._begun = False  # and if there is no cache then, a call failed that it was donated to
        self._base = 0  # the absolute frame that the cache calls 0
        self._given = 0  # leading frames that were written, not generated

    @property
    def held(self) -> int:
        """Bytes that the cache of keys and values takes, on each device of a mesh."""
        with self._on_mesh():
            return bytes_on_each(jax.eval_shape(partial(self._begin, self._graph), self._params, self._text))

    @property
    def next_count(self) -> int:
        """Frames of the next block; 0 after the last."""
        rollout = self._rollout
        if self._frames is not None and self.frame >= self._frames:
            return 0
        return 1 if rollout.independent_first_frame and not self.frame else rollout.block

    def generate(self, noise: Noise | None = None) -> Float[Array, "B F H W C"]:
        """Makes the next block.

        Args:
            noise: The block's, instead of what the key gives; what is None of it is drawn.

        Returns:
            Its latents, float32.
        """
        shape = (self.shape[0], self.next_count, *self.shape[1:])
        with self._on_mesh():
            cache, where = self._room(), self._where()
            latents, self._cache = generate_block(
                self._graph, self._params, cache, self.key, where, noise, rollout=self._rollout, shape=shape
            )
        self.frame += shape[1]
        return latents

    def write(self, latents: Float[Array, "B F H W C"]) -> None:
        """Takes given latents, such as an image's or a clip's, as the next block."""
        with self._on_mesh():
            self._write(latents, 0.0)
        self._given = self.frame

    def set_text(self, text: Float[Array, "B L E"], negative: Float[Array, "B M E"] | None = None) -> None:
        """Takes another text for the blocks that follow, of as many rows as the first one.

        Raises:
            ValueError: If it has another shape, with which another program would have to be compiled.
        """
        context = self._context(text, negative)
        if context.shape != self._text.shape:
            raise ValueError(f"text has shape {context.shape}; the video began with {self._text.shape}.")
        self._text = context
        if self._cache is not None:
            with self._on_mesh():
                self._cache = write_text(self._graph, self._params, self._cache, context)

    def past_of(self, frame: int) -> list[int]:
        """First frames of the blocks that the block at `frame` can see, sinks and window, in order."""
        return self._past(frame)[0]

    def recache(self, frame: int, past: Mapping[int, Float[Array | np.ndarray, "B F H W C"]]) -> None:
        """Goes on at `frame`, earlier or the same, with keys and values recomputed from finished latents and the text.

        Positions are as they were; the network sees of the past what is within reach now, and of the frames before
        that nothing, not even through others.

        Args:
            frame: First frame of a block.
            past: Latents of at least the blocks of `past_of`, by first frame; on the host or a device.

        Raises:
            ValueError: If no block begins there, or the past lacks one.
        """
        starts, sinks, base = self._past(frame)
        if missing := [start for start in starts if start not in past]:
            raise ValueError(f"past lacks the blocks at frames {missing}; the block at frame={frame} sees {starts}.")
        if not starts or self._cache is None:  # from the beginning; or a block failed, and its cache was lost
            self._cache, self._begun = None, False
        self.frame, self._base = 0, 0
        with self._on_mesh():
            for number, start in enumerate(starts):
                if sinks and number == sinks and base and self._cache is not None:  # in between, frames are left out
                    self._cache = turn_cache(self._cache, frames=base, head_dim=self._head_dim)
                self.frame, self._base = start, base if number >= sinks else 0
                self._write(jnp.asarray(past[start]), 0.0 if start < self._given else self._rollout.context_noise)
        self.frame, self._base = frame, base

    def _past(self, frame: int) -> tuple[list[int], int, int]:
        """The blocks that are within reach, how many of them are sinks apart, and what is 0 in the cache then."""
        rollout = self._rollout
        first = 1 if rollout.independent_first_frame else rollout.block
        if frame < 0 or (frame and (frame < first or (frame - first) % rollout.block)):
            raise ValueError(
                f"frame={frame} is not the first of a block; blocks begin at 0 and {first} + {rollout.block} k."
            )
        starts = [0, *range(first, frame, rollout.block)] if frame else []
        end = frame + (rollout.block if frame else first)
        if rollout.window is None or end <= rollout.window:
            return starts, 0, 0
        oldest = max(start for start in starts if start <= end - (rollout.window - rollout.sink_frames))
        sinks = [start for start in starts if start < rollout.sink_frames]
        if sinks and oldest <= sinks[-1] + rollout.block:
            return starts, 0, 0
        return sinks + [start for start in starts if start >= oldest], len(sinks), oldest - rollout.sink_frames

    def _context(self, text: Array, negative: Array | None) -> Array:
        context = text if negative is None or self._rollout.guidance == 1.0 else paired(text, negative)
        return context if self._mesh is None else jax.device_put(context, NamedSharding(self._mesh, PartitionSpec()))

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Where calls are dispatched: a mesh is set for the thread that calls, and only meanwhile."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _write(self, latents: Array, timestep: float) -> None:
        self._cache = write_block(
            self._graph, self._params, self._room(), latents, self._where(), timestep, rollout=self._rollout
        )
        self.frame += latents.shape[1]

    def _room(self) -> WanCache:
        """The cache, made if there is none yet, and counted anew if the rotary table would end."""
        window = self._rollout.window
        cache, self._cache = self._cache, None  # it is donated
        if cache is None:
            if self._begun:
                raise RuntimeError("the video cannot go on: its cache was lost when a block failed")
            cache, self._begun = self._begin(self._graph, self._params, self._text), True
        if window is not None and self.frame - self._base + self.next_count > MAX_POSITIONS:
            rolls = window - self._rollout.sink_frames
            back = (self.frame - self._base - window) // rolls * rolls
            cache = rebase_cache(cache, frames=back, head_dim=self._head_dim)
            self._base += back
        return cache

    def _where(self) -> Array:
        """Where the next block is: absolute and in the cache."""
        return jnp.asarray(np.array([self.frame, self.frame - self._base], np.int32))


def check_sampler(settings: Any) -> None:
    """Raises ValueError unless sampler, steps and context noise of frozen settings suit; lists become tuples."""
    if isinstance(settings.steps, list):
        object.__setattr__(settings, "steps", tuple(settings.steps))
    settings.table()
    if not 0 <= settings.context_noise <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"context_noise={settings.context_noise} is not a timestep in 0...{NUM_TRAIN_TIMESTEPS}; 0 is clean."
        )


def check_room(model: WanModel, text: Array, *, frames: int, height: int, width: int, rollout: Rollout) -> None:
    """Raises ValueError unless the caches that `start_cache` makes suit model and text; computes nothing."""
    model.check_context(text.shape[0], text, None)
    room = cache_room(frames, rollout)
    shape = cache_shape(model.config, text.shape[0], height=height, width=width, **room)
    jax.eval_shape(partial(empty_runs, model.config, shape))


def cache_room(frames: int, rollout: Rollout) -> dict[str, Any]:
    """Frames of a cache, how it rolls, and the blocks it is written in."""
    rolling = rollout.window is not None
    block = None if rollout.independent_first_frame else rollout.block
    return dict(frames=rollout.window or frames, rolling=rolling, sink_frames=rollout.sink_frames, block=block)


def check_size(model: WanModel, shape: tuple[int, ...], *, cached: bool = False) -> None:
    """Raises ValueError unless latents of this shape, over a cache or not, suit the model; computes nothing."""

    def check(latents, timesteps):
        model.check_latents(latents, timesteps, cached=cached)
        return latents

    jax.eval_shape(check, jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.float32))
