"""Generation block by block with a cache of earlier blocks (Self-Forcing, arXiv:2506.08009, algorithm 1).

After a block is denoised, its keys and values are rewritten from the finished latents at time 0. All network calls use
one compiled program, the same for every step and block, with the cache donated.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from monarchrt.models.attention.base import CacheShape
from monarchrt.models.compiling import LIBRARY_PRODUCTS
from monarchrt.models.sampling.noise import Noise
from monarchrt.models.sampling.settings import Rollout, block_noise
from monarchrt.models.sampling.solve import SolverState, fresh_noise, paired, rows, solver_step, unpair
from monarchrt.models.sharding import constrain
from monarchrt.models.wan import WanConfig, WanModel
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

FEW = 64  # with at most this many calls, timesteps are embedded once per video


@partial(jax.jit, static_argnames=("graph", "rollout"), donate_argnames="cache", compiler_options=LIBRARY_PRODUCTS)
def call_network(
    graph: nnx.GraphDef,
    params: Any,
    cache: WanCache,
    state: SolverState,
    number: Array,
    key: Key[Array, ""],
    frame: Array,
    times: tuple[Array, Array] | None = None,
    fresh: Float[Array, "B F H W C"] | None = None,
    *,
    rollout: Rollout,
) -> tuple[SolverState, WanCache]:
    """One call of the network on a block, which also writes the block into the cache; all calls are of this form.

    Args:
        graph: From `nnx.split(model)`.
        params: From `nnx.split(model)`, or `Layers`.
        cache: From `start_cache`; it is donated.
        state: From `begin_block` or the previous call.
        number: int32 row of `Rollout.calls`: a step of the sampler, or a call that rewrites the cache.
        key: Key of the whole video; a block's noise depends only on it and `frame`.
        frame: Index of the block's first frame, int32 [2]: absolute, which selects the noise, and within the cache.
        times: From `embed_calls`, or None to embed them here.
        fresh: Noise that this step adds; None: drawn.
        rollout: Settings.

    Returns:
        The state after the call, with unchanged latents if the row is not a step, and the cache.
    """
    table = rollout.calls()
    row = jax.tree.map(lambda x: x[number], rows(table))
    if table.stochastic and fresh is None:
        fresh = fresh_noise(jax.random.fold_in(key, frame[0]), state.x)(number)
    own = None if times is None else (times[0][number], times[1][number])
    step = jnp.minimum(number, rollout.table().steps)
    flow, cache = _flow(merged(graph, params), state.x, row.timesteps, cache, frame, step, rollout, own)
    state = solver_step(state, row, flow, fresh)
    return state._replace(x=constrain(state.x, "batch", *(None,) * (state.x.ndim - 1))), cache


@partial(jax.jit, static_argnames="shape")
def begin_block(
    key: Key[Array, ""], frame: Array, first: Array | None = None, *, shape: tuple[int, ...]
) -> SolverState:
    """The state from which a block starts: noise, or given latents `first`. Other arguments as in `call_network`."""
    noise = block_noise(jax.random.fold_in(key, frame[0]), shape) if first is None else first.astype(jnp.float32)
    return SolverState.init(noise)


@partial(jax.jit, static_argnames=("graph", "rollout"))
def embed_calls(graph: nnx.GraphDef, params: Any, *, rollout: Rollout) -> tuple[Array, Array] | None:
    """Embeddings of the timesteps of all calls, [calls, D] and [calls, 6, D]; None if there are too many.

    Without them, each call would read as many bytes of float32 weights for the embedding as for a layer.
    """
    table = rollout.calls()
    if table.steps > FEW:
        return None
    time, projection = merged(graph, params)[0].embed_times(rows(table).timesteps[None])
    return time[0], projection[0]


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def write_text(graph: nnx.GraphDef, params: Any, cache: WanCache, text: Float[Array, "B L E"]) -> WanCache:
    """Sets another text for the following blocks; `text` as in `start_cache`, with the same number of rows."""
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
    """The flow of a block; with guidance, the cache has twice the batch, and the second half is for the negative text.

    `times` is the embedding of the timestep, [D], and its projection, [6, D], if they were computed before.
    """
    model, layers = network
    guides = cache.shape.batch == 2 * x.shape[0]
    x = paired(x, x) if guides else x
    number = -(-frame[0] // rollout.block)  # also correct if the first frame is a block of its own
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
        times=None if times is None else (_per_sample(times[0], x), _per_sample(times[1], x)),
    )
    return (unpair(flow, rollout.guidance) if guides else flow), cache


def _per_sample(of_one: Array, x: Array) -> Array:
    """Broadcasts an array to the samples of a batch, [B, 1, ...], for all frames."""
    return jnp.broadcast_to(of_one, (x.shape[0], 1, *of_one.shape))


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
    """Creates the cache of a video, empty except for the text.

    Args:
        graph: From `nnx.split(model)`.
        params: From `nnx.split(model)`, or `Layers`.
        text: Embedding of the prompt; for guidance, `paired` with the negative one.
        frames: Number of latent frames of the video, which is the capacity without a window.
        height: Height of the latents.
        width: Width of the latents.
        rollout: Settings.

    Returns:
        The cache.
    """
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
    """Generates latents block by block; blocks are yielded when they are dispatched, before they are computed.

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
        frames: Total number of latent frames, including given ones; None, with a window: endless.
        height: Height of the latents.
        width: Width of the latents.
        key: Key of all noise. A block does not depend on the number of blocks after it.
        rollout: Settings.
        negative: Embedding of the negative prompt, for guidance.
        initial: Finished latents at the start, such as an encoded image (one frame, which needs
            `independent_first_frame`) or clip. They are yielded too.
        noise: Noise of the new frames, instead of the key's, which is `Rollout.noise`; needs a number of frames.

    Yields:
        Latents of one block, float32.

    Raises:
        ValueError: If frames are not whole blocks, or a size does not fit the model; before anything is computed.
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
            raise ValueError("noise is given, but frames=None is endless; give the number of frames.")
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
    """A video that is generated one block per call, and whose text and past can be changed between calls.

    Calls dispatch work and do not wait. All network calls use one compiled program, which is shared by all videos of
    equal sizes and settings; setting a text and renumbering frames need one more program each. The call that rewrites a
    finished block in the cache is dispatched with the next operation, so that the block's frames do not wait for it; it
    is not made after the last block.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1, causal_block=3), rngs=nnx.Rngs(0))
        >>> video = LiveRollout(
        ...     model, jnp.zeros((1, 8, 32)), height=4, width=8, key=jax.random.key(0), rollout=Rollout(window=6)
        ... )
        >>> past = {video.frame: video.generate() for _ in range(3)}
        >>> video.set_text(jnp.ones((1, 8, 32)))
        >>> video.past_of(video.frame)  # the next block sees the window, which includes the block itself
        [6]
        >>> video.recache(video.frame, past)  # recomputes keys and values with the new text
        >>> video.generate().shape, video.frame
        ((1, 3, 4, 8, 16), 12)

    Args:
        model: A causal model, trained on blocks of `rollout.block` frames; or `unroll_layers` of it, for speed.
        text: Embedding of the prompt.
        height: Height of the latents.
        width: Width of the latents.
        key: Key of all noise. A block does not depend on the number of blocks after it.
        rollout: Settings.
        frames: Total number of latent frames, including given ones; None, with a window: endless.
        negative: Embedding of the negative prompt, for guidance.
        mesh: The devices that share the network's work and hold its parameters; None: the current mesh, if any.

    Attributes:
        frame: Index of the next block's first frame.
        key: As given; setting another one affects the following blocks.
        shape: Shape of a frame's latents with the batch, (B, H, W, C).

    Raises:
        ValueError: If frames are not whole blocks, or a size does not fit the model; before anything is computed.
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
            raise ValueError("frames=None, an endless video, needs a window, as Rollout(window=21, sink_frames=3).")
        if frames is not None:
            rollout.blocks(frames)
        if isinstance(model, UnrolledWan):
            plain, halves = model.model, (model.graph, model.params)
        else:
            plain = model.with_config(causal_block=None)  # the model sees one block at a time
            halves = nnx.split(plain)
        for size in {rollout.block, 1} if rollout.independent_first_frame else {rollout.block}:
            check_size(plain, (text.shape[0], size, height, width, config.in_channels), cached=True)
        self.frame, self.key, self.shape = 0, key, (text.shape[0], height, width, config.out_channels)
        self._rollout, self._frames, self._head_dim = rollout, frames, config.head_dim
        self._graph, self._params = halves
        self._mesh = mesh
        self._text = self._context(text, negative)
        self._begin = partial(start_cache, frames=frames or 0, height=height, width=width, rollout=rollout)
        # checks without the parameters: tracing with them would take a tenth of the time of a block
        check_room(plain, self._text, frames=frames or 0, height=height, width=width, rollout=rollout)
        self._cache: WanCache | None = None
        self._begun = False  # if True and there is no cache, a call to which it was donated has failed
        self._base = 0  # absolute index of the frame that has index 0 in the cache
        self._given = 0  # number of leading frames that were written, not generated
        self._times: tuple[Array, Array] | None = None
        self._unwritten: Any = None  # arguments for rewriting the newest block, before the next operation

    @property
    def held(self) -> int:
        """Bytes of the cache of keys and values, on each device of a mesh."""
        with self._on_mesh():
            return bytes_on_each(jax.eval_shape(partial(self._begin, self._graph), self._params, self._text))

    @property
    def next_count(self) -> int:
        """Frames of the next block; 0 after the last."""
        rollout = self._rollout
        if self._frames is not None and self.frame >= self._frames:
            return 0
        return 1 if rollout.independent_first_frame and not self.frame else rollout.block

    def generate(
        self, noise: Noise | None = None, *, meanwhile: Callable[[], object] | None = None
    ) -> Float[Array, "B F H W C"]:
        """Generates the next block.

        Args:
            noise: The block's noise, instead of the key's; parts that are None are drawn.
            meanwhile: Called after the block's first network call is dispatched, when the caller should wait for
                earlier results: dispatching all calls can take as long as computing them, since the device's queue may
                be shorter than a block.

        Returns:
            Its latents, float32.
        """
        shape, table = (self.shape[0], self.next_count, *self.shape[1:]), self._rollout.table()
        with self._on_mesh():
            cache, where = self._room(), self._where()
            state = begin_block(self.key, where, None if noise is None else noise.first, shape=shape)
            fresh = None if noise is None else noise.by_step(table, rows=table.steps + 1)
            for number in range(table.steps):
                state, cache = self._call(cache, state, number, where, None if fresh is None else fresh[number])
                if number == 0 and meanwhile is not None:
                    meanwhile()
        self._cache, self._unwritten = cache, (state, where, None if fresh is None else fresh[-1])
        self.frame += shape[1]
        return state.x

    def write(self, latents: Float[Array, "B F H W C"]) -> None:
        """Uses given latents, such as those of an image or a clip, as the next block."""
        with self._on_mesh():
            self._write(latents, given=True)
        self._given = self.frame

    def set_text(self, text: Float[Array, "B L E"], negative: Float[Array, "B M E"] | None = None) -> None:
        """Sets another text for the following blocks, with the same number of rows.

        Raises:
            ValueError: If it has another shape, which would need another compiled program.
        """
        context = self._context(text, negative)
        if context.shape != self._text.shape:
            raise ValueError(f"text has shape {context.shape}; the video began with {self._text.shape}.")
        self._text = context
        if self._cache is not None:
            with self._on_mesh():
                self._rewrite()
                self._cache = write_text(self._graph, self._params, self._cache, context)

    def past_of(self, frame: int) -> list[int]:
        """First frames of the blocks that the block at `frame` sees, including sinks, in order."""
        return self._past(frame)[0]

    def recache(self, frame: int, past: Mapping[int, Float[Array | np.ndarray, "B F H W C"]]) -> None:
        """Continues from `frame`, the current or an earlier one, with keys and values recomputed from latents and text.

        Positions stay the same. Keys and values depend only on the past within the window; earlier blocks have no
        influence, not even indirectly.

        Args:
            frame: First frame of a block.
            past: Latents of at least the blocks in `past_of`, by first frame, on the host or a device.

        Raises:
            ValueError: If no block starts there, or a block of the past is missing.
        """
        starts, sinks, base = self._past(frame)
        if missing := [start for start in starts if start not in past]:
            raise ValueError(f"past lacks the blocks at frames {missing}; the block at frame={frame} sees {starts}.")
        self._unwritten = None  # its latents are in `past`, or outside the window
        if not starts or self._cache is None:  # starts from scratch, also if a block failed and its cache was lost
            self._cache, self._begun = None, False
        self.frame, self._base = 0, 0
        with self._on_mesh():
            for number, start in enumerate(starts):
                if sinks and number == sinks and base and self._cache is not None:  # skips frames after the sinks
                    self._cache = turn_cache(self._cache, frames=base, head_dim=self._head_dim)
                self.frame, self._base = start, base if number >= sinks else 0
                self._write(jnp.asarray(past[start]), given=start < self._given)
        self.frame, self._base = frame, base

    def _past(self, frame: int) -> tuple[list[int], int, int]:
        """First frames of the visible blocks, how many of these are separate sinks, and the frame of index 0."""
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
        """A context in which the mesh, if any, is set for the calling thread."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _call(self, cache: WanCache, state: SolverState, number: int, where: Array, fresh: Array | None) -> Any:
        return call_network(
            self._graph,
            self._params,
            cache,
            state,
            np.int32(number),
            self.key,
            where,
            self._times,
            fresh,
            rollout=self._rollout,
        )

    def _write(self, latents: Array, *, given: bool) -> None:
        """Writes finished latents into the cache as the next block."""
        cache, where = self._room(), self._where()
        state = begin_block(self.key, where, latents, shape=latents.shape)
        self._cache = self._call(cache, state, self._rollout.table().steps + given, where, None)[1]
        self.frame += latents.shape[1]

    def _rewrite(self) -> None:
        """Rewrites the newest block in the cache, now that its latents are finished."""
        if self._unwritten is not None:
            cache: Any = self._cache
            state, where, fresh = self._unwritten
            self._cache = None
            self._unwritten = None
            self._cache = self._call(cache, state, self._rollout.table().steps, where, fresh)[1]

    def _room(self) -> WanCache:
        """Takes the cache; creates it if necessary, and renumbers its frames if the rotary table would be exceeded."""
        self._rewrite()
        window = self._rollout.window
        cache, self._cache = self._cache, None  # it is donated
        if cache is None:
            if self._begun:
                raise RuntimeError("the video cannot continue: its cache was lost when a block failed")
            cache, self._begun = self._begin(self._graph, self._params, self._text), True
            self._times = embed_calls(self._graph, self._params, rollout=self._rollout)
        if window is not None and self.frame - self._base + self.next_count > MAX_POSITIONS:
            cache = self._counted_anew(cache, window)
        return cache

    def count_anew(self) -> None:
        """Renumbers positions from the beginning of the window, as happens automatically before the rotary table ends.

        That is after hundreds of blocks and needs a program of its own; an early call compiles it in advance.
        """
        if self._cache is not None and (window := self._rollout.window) is not None:
            with self._on_mesh():
                self._rewrite()
                cache, self._cache = self._cache, None
                self._cache = self._counted_anew(cache, window)

    def _counted_anew(self, cache: WanCache, window: int) -> WanCache:
        rolls = window - self._rollout.sink_frames
        back = max(0, self.frame - self._base - window) // rolls * rolls
        self._base += back
        return rebase_cache(cache, frames=back, head_dim=self._head_dim)

    def _where(self) -> Array:
        """Index of the next block's first frame, absolute and in the cache, int32 [2]."""
        return jnp.asarray(np.array([self.frame, self.frame - self._base], np.int32))


def check_room(model: WanModel, text: Array, *, frames: int, height: int, width: int, rollout: Rollout) -> None:
    """Raises ValueError unless the cache of `start_cache` is valid for model and text; computes nothing.

    Args:
        model: The model.
        text: Output of the text encoder, [B, L, E].
        frames: Latent frames of the video.
        height: Height of the latents.
        width: Width of the latents.
        rollout: Settings of the roll-out.

    Raises:
        ValueError: As above.
    """
    model.check_context(text.shape[0], text, None)
    room = cache_room(frames, rollout)
    _check_runs(model.config, cache_shape(model.config, text.shape[0], height=height, width=width, **room))


@lru_cache(maxsize=64)
def _check_runs(config: WanConfig, shape: CacheShape) -> None:
    """Raises ValueError unless caches of all runs of layers can be created; results are memoised, as this traces."""
    jax.eval_shape(partial(empty_runs, config, shape))


def cache_room(frames: int, rollout: Rollout) -> dict[str, Any]:
    """The fields of `CacheShape` that a roll-out determines: frames, rolling, sinks and block."""
    rolling = rollout.window is not None
    block = None if rollout.independent_first_frame else rollout.block
    return dict(frames=rollout.window or frames, rolling=rolling, sink_frames=rollout.sink_frames, block=block)


def check_size(model: WanModel, shape: tuple[int, ...], *, cached: bool = False) -> None:
    """Raises ValueError unless latents of this shape, over a cache or not, fit the model; computes nothing."""
    latents, timesteps = (jax.ShapeDtypeStruct(x, jnp.float32) for x in (shape, shape[:1]))
    model.check_latents(latents, timesteps, cached=cached)
