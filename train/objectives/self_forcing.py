"""Self-Forcing (arXiv:2506.08009): distribution matching of clips that a causal student made block by block.

The student sees its own earlier blocks, as in generation. Nothing is differentiated through what it reads from the
cache, so the gradient of a roll-out is the sum over blocks of one step's gradient at the finished cache:

    1. roll out without gradients: keep the input z of each block's last step, the clip x, and the cache;
    2. compare x with the teacher: g;
    3. for each block run that last step again, with its part of the cache, and differentiate <g, block>.

A cache that holds a window of the clip has lost, at its end, what earlier blocks saw. It is filled again along with 3,
one pass a block, so that a clip may be many times as long as what is kept of it.

Memory is that of one block, however long the clip. `monarchrt.train.objectives.scores` has the losses.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int, Key

from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS, shifted
from monarchrt.models.wan.causal import WanCache, cached_forward, cross_keys_values, init_cache
from monarchrt.models.wan.layers import computed_dtype
from monarchrt.models.wan.rope import MAX_POSITIONS
from monarchrt.train.data import Batch
from monarchrt.train.objectives.base import Metrics, Networks, Sampler
from monarchrt.train.objectives.by_blocks import sum_over_blocks
from monarchrt.train.objectives.dmd import DMDDraws, DMDObjective
from monarchrt.train.objectives.flow import add_noise, check_blocks
from monarchrt.train.objectives.scores import detached, draw_scores, sample_metrics, to_data
from monarchrt.train.objectives.settings import ConsistencyConfig, DMDConfig, ODEConfig, SelfForcingConfig


class RolloutDraws(NamedTuple):
    """What a roll-out is made of.

    Attributes:
        noise: What each frame starts from.
        fresh: Noise of each further step.
        context: Noise of the finished frames in the cache.
        last: The step that every block stops at.
        first: Number of the first block that is scored; None: the last ones are.
    """

    noise: Float32[Array, "b f h w c"]
    fresh: Float32[Array, "b n f h w c"]
    context: Float32[Array, "b f h w c"]
    last: Int[Array, ""]
    first: Int[Array, ""] | None = None


class RolledOut(NamedTuple):
    """A roll-out.

    Attributes:
        x: The finished clip.
        inputs: The input of each block's last step.
        kept: The finished blocks as the cache has them, with their noise.
        cache: With all blocks; or, if it holds a window, as it was before the first block that is scored.
    """

    x: Float32[Array, "b f h w c"]
    inputs: Float32[Array, "b f h w c"]
    kept: Float32[Array, "b f h w c"]
    cache: WanCache


class SelfForcingObjective(DMDObjective):
    """DMD of a causal student on its own roll-outs."""

    rolls_out = True
    settings: SelfForcingConfig

    def draw_role(self, key: Key[Array, ""], shape: tuple[int, ...]) -> DMDDraws:
        """As `DMDObjective.draw_role`, with the noise that finished blocks get in the cache."""
        first, fresh, context, last, scores = jax.random.split(key, 5)
        steps = len(self.settings.student_steps)
        student = RolloutDraws(
            noise=jax.random.normal(first, shape, jnp.float32),
            fresh=jax.random.normal(fresh, (shape[0], steps - 1, *shape[1:]), jnp.float32),
            context=jax.random.normal(context, shape, jnp.float32),
            last=jax.random.randint(last, (), 0, steps),
            first=self._draw_first(jax.random.fold_in(last, 1), shape[1]),
        )
        return DMDDraws(student, draw_scores(scores, shape))  # type: ignore[arg-type]

    def _fixed_draws(self, noise: Array) -> RolloutDraws:
        """All steps, with noise that follows from the first; that of the context is too little to show."""
        first, fresh, last = super()._fixed_draws(noise)
        return RolloutDraws(first, fresh, jnp.zeros_like(noise), last)

    def cache(self, role: str, networks: Networks, batch: Batch) -> Any:
        """The student's keys and values of the whole clip or window; the critic's samples are made with one too."""
        _, frames, height, width, _ = batch.latents.shape
        student = networks["student"].with_config(causal_block=None)
        return self._empty(student, jnp.asarray(batch.text), (frames, height, width))

    def samples(self, student: Any, text: Array, draws: Any) -> Float32[Array, "b f h w c"]:
        """Clips of the student, differentiable by its parameters through each block's last step alone."""
        rolled = self.roll_out(detached(student), text, draws)
        return self.replay(student, text, rolled, draws.last, draws.first)

    def roll_out(self, student: Any, text: Array, draws: RolloutDraws) -> RolledOut:
        """A clip block by block, each from noise through the student's steps up to the last that was drawn.

        Args:
            student: Causal Wan.
            text: Embeddings.
            draws: Noise and last step.

        Returns:
            The clip and what `replay` needs. After the last frame that is scored it is 0.

        Raises:
            UserError: If the frames are not whole blocks, or do not fit the window.
        """
        shape = batch, frames, height, width, _ = draws.noise.shape
        sizes = self.block_sizes(student, frames)
        (number, _), scored = self._place(sizes, draws.first)
        end = number + len(scored)
        student = computed_dtype(student.with_config(causal_block=None))  # blocks are seen one at a time

        def block(number: Any, carry: Any, size: int) -> Any:
            cache, made = carry
            frame = _first_frame(sizes, jnp.int32(number))
            noise, context = (lax.dynamic_slice_in_dim(x, frame, size, 1) for x in (draws.noise, draws.context))
            fresh = lax.dynamic_slice_in_dim(draws.fresh, frame, size, 2)

            def advance(index: Array, carry: tuple[Array, WanCache]) -> tuple[Array, WanCache]:
                z, cache = carry
                data, cache = self._denoise_block(student, z, cache, frame, number, index, in_place=True)
                following = self._sigma(index + 1, batch)
                return add_noise(data, lax.dynamic_index_in_dim(fresh, index, axis=1, keepdims=False), following), cache

            z = noise
            if draws.fresh.shape[1]:  # a student of one step has none before it
                z, cache = lax.fori_loop(0, draws.last, advance, (z, cache))
            data, cache = self._denoise_block(student, z, cache, frame, number, draws.last, in_place=True)
            kept = add_noise(data, context, jnp.full((batch,), self._context_sigma))
            cache = self._keep_block(student, kept, cache, frame, number, in_place=True)
            parts = zip(made, (data, z, kept), strict=True)
            return cache, tuple(lax.dynamic_update_slice_in_dim(whole, part, frame, 1) for whole, part in parts)

        def blocks(begin: Any, end: Any, carry: Any) -> Any:
            return lax.fori_loop(begin, end, lambda number, carry: block(number, carry, sizes[-1]), carry)

        empty = self._empty(student, text, (frames, height, width))
        carry, begin = (empty, (jnp.zeros(shape, jnp.float32),) * 3), 0
        if sizes[0] != sizes[-1]:
            carry, begin = block(jnp.int32(0), carry, sizes[0]), 1
        if self._window(frames) is None:
            past, made = blocks(begin, end, carry)
        elif draws.first is None and number == 0:
            past, (_, made) = empty, blocks(begin, end, carry)
        else:
            past, made = blocks(begin, number, carry)
            made = blocks(number, end, (past, made))[1]
        x, inputs, kept = made
        return RolledOut(x, inputs, kept, past)

    def replay(
        self, student: Any, text: Array, rolled: RolledOut, last: Array, first: Array | None = None
    ) -> Float32[Array, "b f h w c"]:
        """The same clip, differentiable by the student's parameters through the last steps, a block at a time.

        Blocks that are not scored are constants.

        Args:
            student: Causal Wan.
            text: Embeddings.
            rolled: Of `roll_out`.
            last: The step that was drawn.
            first: The first block that is scored, if it was drawn.
        """
        rolled, frames = lax.stop_gradient(rolled), rolled.inputs.shape[1]
        sizes, rolls = self.block_sizes(student, frames), self._window(frames) is not None
        graph, params = nnx.split(student.with_config(causal_block=None))
        cache = dataclasses.replace(rolled.cache, cross=None)

        def read(params: Any) -> Any:
            return nnx.split(computed_dtype(nnx.merge(graph, params)))[1]

        def share(params: Any, inputs: Any) -> Any:  # of the text: it is no part of the past
            return cross_keys_values(nnx.merge(graph, params), inputs[0])

        def block(params: Any, cross: Any, cache: Any, inputs: Any, number: Array, frame: Array, size: int) -> Array:
            _, z, _, last = inputs
            own = dataclasses.replace(cache, cross=cross, length=cache.length if rolls else frame)
            z = lax.dynamic_slice_in_dim(z, frame, size, 1)
            return self._denoise_block(nnx.merge(graph, params), z, own, frame, number, last)[0]

        def following(params: Any, cross: Any, cache: Any, inputs: Any, number: Array, frame: Array, size: int) -> Any:
            if not rolls:  # the finished cache has all
                return cache
            kept, full = lax.dynamic_slice_in_dim(inputs[2], frame, size, 1), dataclasses.replace(cache, cross=cross)
            new = self._keep_block(nnx.merge(graph, params), kept, full, frame, number)
            return dataclasses.replace(new, cross=None)

        inputs = (text, rolled.inputs, rolled.kept, last)
        place, scored = self._place(sizes, first)
        return sum_over_blocks(
            rolled.x, params, cache, inputs, share=share, block=block, following=following, sizes=scored, first=place,
            read=read,
        )  # fmt: skip

    def _place(self, sizes: list[int], first: Array | None) -> tuple[tuple[Any, Any], list[int]]:
        """Number and first frame of the first block that is scored, and frames of all that are."""
        if first is None:
            skipped = self._skipped(sizes)
            return (skipped, sum(sizes[:skipped])), sizes[skipped:]
        count = (self.settings.scored_frames or sum(sizes)) // sizes[-1]
        return (first, _first_frame(sizes, first)), sizes[-1:] * count

    def _draw_first(self, key: Key[Array, ""], frames: int) -> Int[Array, ""] | None:
        """The first block of a run that is scored; None: the last ones are.

        Raises:
            UserError: If there is no such run.
        """
        span = self._span(frames)
        return None if span is None else jax.random.randint(key, (), span[0], span[1] + 1)

    def typical(self, role: str, draws: DMDDraws) -> DMDDraws:
        """With a run of blocks in the middle, where it is drawn."""
        student = cast(RolloutDraws, draws.student)
        span = self._span(student.noise.shape[1])
        return draws if span is None else draws._replace(student=student._replace(first=sum(span) // 2))  # type: ignore

    def _span(self, frames: int) -> tuple[int, int] | None:
        """Between which numbers the first block that is scored is drawn; None where it is not."""
        settings = self.settings
        if not settings.scored_anywhere or settings.scored_frames is None:
            return None
        with user_input():
            sizes = block_sizes(frames, settings.block, independent_first_frame=settings.independent_first_frame)
        alone = 1 if settings.independent_first_frame else 0
        latest = len(sizes) - settings.scored_frames // settings.block
        if latest < alone:
            raise UserError(
                f"scored_frames is {settings.scored_frames}, but clips have {sum(sizes[alone:])} in blocks of "
                f"{settings.block}; give as many or fewer"
            )
        return alone, latest

    def _skipped(self, sizes: list[int]) -> int:
        """Blocks at the beginning of a clip that are not scored, of all blocks' frames.

        Raises:
            UserError: If what is scored are not whole blocks.
        """
        wanted, frames = self.settings.scored_frames, sum(sizes)
        if wanted is None:
            return 0
        starts = list(itertools.accumulate(sizes[:-1], initial=0))
        if frames - wanted not in starts:
            near = sorted((frames - start for start in starts), key=lambda count: abs(count - wanted))[:2]
            raise UserError(
                f"scored_frames is {wanted}, which are not whole blocks at the end of clips of {frames} frames; the "
                f"nearest that are: {' or '.join(map(str, sorted(near)))}"
            )
        return starts.index(frames - wanted)

    def _scored(self, clip: Float32[Array, "b f h w c"], draws: Any) -> Float32[Array, "b scored h w c"]:
        count = self.settings.scored_frames
        if count is None or draws.first is None:
            return clip if count is None else clip[:, -count:]
        sizes = block_sizes(
            clip.shape[1], self.settings.block, independent_first_frame=self.settings.independent_first_frame
        )
        return lax.dynamic_slice_in_dim(clip, _first_frame(sizes, draws.first), count, 1)

    def _empty(self, student: Any, text: Array, size: tuple[int, int, int]) -> WanCache:
        """The cache at the beginning of a clip of (F, h, w) latents."""
        frames, height, width = size
        window = self._window(frames)
        units = [setting.unit[0] for setting in student.config.layer_attention if setting.unit is not None]
        unit = math.lcm(*units) * student.config.patch_size[0]
        for name in () if window is None else ("window", "sink_frames"):
            if (count := getattr(self.settings, name)) % unit:
                near = " or ".join(str(n * unit) for n in (count // unit, count // unit + 1))
                raise UserError(
                    f"{name} is {count}, which are not whole tiles of {unit} frames; the nearest that are: {near}"
                )
        return init_cache(
            student, text, frames=window or frames, height=height, width=width, detach_past=True,
            rolling=window is not None, sink_frames=0 if window is None else self.settings.sink_frames,
        )  # fmt: skip

    def _window(self, frames: int) -> int | None:
        """Frames that the cache of a clip of so many holds, if that is not all of them."""
        window = self.settings.window
        return window if window is not None and window < frames else None

    def _keep_block(
        self, student: Any, kept: Array, cache: WanCache, frame: Array, number: Array, *, in_place: bool = False
    ) -> WanCache:
        """The cache with a finished block, which later ones see."""
        how: Any = dict(step=jnp.int32(len(self.settings.student_steps)), block=number, in_place=in_place)
        return cached_forward(student, kept, jnp.zeros(kept.shape[:2]), cache, frame=frame, **how)[1]

    def _denoise_block(
        self,
        student: Any,
        z: Array,
        cache: WanCache,
        frame: Array,
        number: Array,
        index: Array,
        *,
        in_place: bool = False,
    ) -> tuple[Array, WanCache]:
        """The clean block that the student sees in z after the cached ones, at one of its steps."""
        t = jnp.asarray(self.schedule.timesteps, jnp.float32)[index]
        how: Any = dict(step=index, block=number, in_place=in_place)  # in place for what is not differentiated
        flow, cache = cached_forward(student, z, jnp.full(z.shape[:2], t), cache, frame=frame, **how)
        return to_data(z, flow, self._sigma(index, z.shape[0])), cache

    def _metrics(self, clip: Array, draws: Any) -> Metrics:
        if draws.first is None:
            return sample_metrics(clip, block=self.settings.block)
        seen = self._scored(clip, draws)  # there is nothing after it
        return sample_metrics(seen, block=self.settings.block) | {"first_scored": jnp.float32(draws.first)}

    @property
    def _context_sigma(self) -> float:
        given = self.settings.context_sigma
        return shifted(1 / NUM_TRAIN_TIMESTEPS, self.settings.shift) if given is None else given

    def block_sizes(self, student: Any, frames: int) -> list[int]:
        """Frames of each block of a clip.

        Raises:
            UserError: If they are not whole blocks, or the student's are others.
        """
        settings = self.settings
        check_blocks(
            student.config,
            settings.block,
            independent=settings.independent_first_frame,
            name="block",
            options="student.",
        )
        if frames > MAX_POSITIONS:
            raise UserError(f"clips have {frames} latent frames; the network supports positions up to {MAX_POSITIONS}")
        with user_input():
            return block_sizes(frames, settings.block, independent_first_frame=settings.independent_first_frame)


def _first_frame(sizes: list[int], number: Array) -> Array:
    """The first frame of a block; all but the first are of one size."""
    return jnp.maximum(0, number * sizes[-1] - (sizes[-1] - sizes[0]))


def few_step_samplers(settings: ODEConfig | ConsistencyConfig) -> Mapping[str, Sampler]:
    """A clip made of pure noise in a student's steps, block by block if it is causal.

    Args:
        settings: Settings of the objective that trains it: steps, shift and blocks.
    """
    same = {"student_steps": settings.student_steps, "shift": settings.shift}
    if settings.block is None:
        return DMDObjective(DMDConfig(**same)).samplers()
    blocks = {"block": settings.block, "independent_first_frame": settings.independent_first_frame}
    return SelfForcingObjective(SelfForcingConfig(**same, **blocks)).samplers()
