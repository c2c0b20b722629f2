"""One block of frames after another with a cache of what came before (Self-Forcing, arXiv:2506.08009, algorithm 1).

A block is denoised and its keys and values are then rewritten from the finished latents at time 0. All of that is one
compiled program, the same for every block: a scan over the sampler's rows and one more, with the cache donated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.sampling.noise import Noise, joined
from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS
from monarchrt.models.sampling.solve import SolverState, fresh_noise, paired, rows, solver_step, unpair
from monarchrt.models.sampling.tables import SamplerTable, sampler_table
from monarchrt.models.wan import WanModel
from monarchrt.models.wan.causal import WanCache, cached_forward, init_cache, rebase_cache
from monarchrt.models.wan.rope import MAX_POSITIONS


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


@partial(jax.jit, static_argnames=("graph", "rollout", "shape"), donate_argnames="cache")
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
        params: Of `nnx.split(model)`.
        cache: Of `start_cache`; it is donated.
        key: Of the whole video; a block's noise depends on it and `frame` only.
        frame: Index of the block's first frame, of which the noise is drawn: int32 [2], absolute and in the cache.
        given: The block's noise; what is None of it is drawn.
        rollout: Settings.
        shape: Of the block, [B, F, H, W, C].

    Returns:
        The finished latents, float32, and the cache.
    """
    model: Any = nnx.merge(graph, params)
    key = jax.random.fold_in(key, frame[0])
    noise = block_noise(key, shape) if given is None else given.first
    table = rollout.table()
    fresh = None if given is None else given.by_step(table, rows=table.steps + 1)
    draw = fresh_noise(key, noise) if table.stochastic and fresh is None else None

    def step(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        (state, cache), (row, number, given) = carry, xs
        flow, cache = _flow(model, state.x, row.timesteps, cache, frame, number, rollout)
        return (solver_step(state, row, flow, draw(number) if draw else given), cache), None

    scanned = rows(table.with_rewrite(rollout.context_noise)), jnp.arange(table.steps + 1), fresh
    (state, cache), _ = jax.lax.scan(step, (SolverState.init(noise), cache), scanned)
    return state.x, cache


@partial(jax.jit, static_argnames=("graph", "rollout"), donate_argnames="cache")
def write_block(
    graph: nnx.GraphDef, params: Any, cache: WanCache, latents: Float[Array, "B F H W C"], frame: Array, *, rollout
) -> WanCache:
    """Puts finished latents, such as a given image or clip, into the cache at time 0. Arguments as `generate_block`."""
    model: Any = nnx.merge(graph, params)
    return _flow(model, latents, jnp.float32(0), cache, frame, rollout.table().steps, rollout)[1]


def _flow(
    model: Any, x: Array, t: Array, cache: WanCache, frame: Array, step: int | Array, rollout: Rollout
) -> tuple[Array, WanCache]:
    """The flow at the block; a cache of twice the batch has the negative text's half after the prompt's."""
    guides = cache.shape.batch == 2 * x.shape[0]
    x = paired(x, x) if guides else x
    number = -(-frame[0] // rollout.block)  # also where the first frame is a block of its own
    flow, cache = cached_forward(
        model,
        x,
        jnp.broadcast_to(t, x.shape[:2]),
        cache,
        frame=frame[1],
        step=step,
        block=number,
        in_place=True,
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
    return init_cache(
        nnx.merge(graph, params),
        text,
        frames=rollout.window or frames,
        height=height,
        width=width,
        rolling=rollout.window is not None,
        sink_frames=rollout.sink_frames,
    )


def autoregressive(
    model: WanModel,
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
    config = model.config
    if config.patch_size[0] != 1 or config.in_channels != config.out_channels:
        raise ValueError(
            f"model has patch_size={config.patch_size}, {config.in_channels} input and {config.out_channels} output "
            f"channels; this sampler needs a text-to-video model with patches of one frame."
        )
    if frames is None and rollout.window is None:
        raise ValueError("frames=None, without end, needs a window, for example Rollout(window=21, sink_frames=3).")
    if initial is not None:
        given = (text.shape[0], height, width, config.out_channels)
        if (initial.shape[0], *initial.shape[2:]) != given:
            raise ValueError(f"initial has shape {initial.shape}; batch, height, width and channels should be {given}.")
        rollout.blocks(initial.shape[1])
    if frames is not None:
        rollout.blocks(frames)
    if noise is not None:
        if frames is None:
            raise ValueError("noise is given, but frames=None is without end; give the number of frames.")
        new = max(0, frames - (0 if initial is None else initial.shape[1]))
        noise.check(rollout.table(), (text.shape[0], new, height, width, config.out_channels))
    model = model.with_config(causal_block=None)  # blocks are seen one at a time
    for size in {rollout.block, 1} if rollout.independent_first_frame else {rollout.block}:
        check_size(model, (text.shape[0], size, height, width, config.in_channels))
    context = text if negative is None or rollout.guidance == 1.0 else paired(text, negative)
    begin = partial(start_cache, frames=frames or 0, height=height, width=width, rollout=rollout)
    graph, params = nnx.split(model)
    jax.eval_shape(partial(begin, graph), params, context)  # what does not fit is found here
    shape = (text.shape[0], frames, height, width, config.out_channels)
    return _blocks(model, partial(begin, graph, params, context), shape, key, rollout, initial, noise)


def check_sampler(settings: Any) -> None:
    """Raises ValueError unless sampler, steps and context noise of frozen settings suit; lists become tuples."""
    if isinstance(settings.steps, list):
        object.__setattr__(settings, "steps", tuple(settings.steps))
    settings.table()
    if not 0 <= settings.context_noise <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"context_noise={settings.context_noise} is not a timestep in 0...{NUM_TRAIN_TIMESTEPS}; 0 is clean."
        )


def check_size(model: WanModel, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a block of this shape suits the model; computes nothing."""

    def check(latents, timesteps):
        model.check_latents(latents, timesteps)
        return latents

    jax.eval_shape(check, jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.float32))


def _blocks(model, begin, shape, key, rollout, initial, noise) -> Iterator[Array]:
    graph, params = nnx.split(model)
    cache = begin()
    frame, base = 0, 0  # the block's first frame, and the absolute frame that the cache calls 0
    given = 0 if initial is None else initial.shape[1]
    for count in _sizes(rollout, shape[1]):
        if rollout.window is not None and frame - base + count > MAX_POSITIONS:
            rolls = rollout.window - rollout.sink_frames
            back = (frame - base - rollout.window) // rolls * rolls
            cache = rebase_cache(cache, frames=back, head_dim=model.config.head_dim)
            base += back
        where = jnp.asarray([frame, frame - base], jnp.int32)
        if initial is not None and frame < given:
            latents = jnp.asarray(initial[:, frame : frame + count], jnp.float32)
            cache = write_block(graph, params, cache, latents, where, rollout=rollout)
        else:
            block = shape[0], count, *shape[2:]
            part = None if noise is None else noise.part(frame - given, count)
            latents, cache = generate_block(graph, params, cache, key, where, part, rollout=rollout, shape=block)
        yield latents
        frame += count


def _sizes(rollout: Rollout, frames: int | None) -> Iterator[int]:
    if frames is not None:
        yield from rollout.blocks(frames)
        return
    if rollout.independent_first_frame:
        yield 1
    while True:
        yield rollout.block
