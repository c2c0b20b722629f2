"""Self-Forcing (arXiv:2506.08009): distribution matching of clips that a causal student generates block by block.

The student attends to its own earlier blocks, as in generation. No gradient flows through the cache, so the gradient of
a roll-out is the sum over blocks of the gradient of one step, given the cache:

    1. roll out without gradients, and keep the input z of each block's last step, the clip x, and the cache;
    2. compare x with the teacher, which gives g;
    3. for each block, run the last step again with its part of the cache, and differentiate <g, block>.

A cache that holds only a window of the clip has, at the end of the roll-out, dropped what earlier blocks attended to.
Step 3 then fills it again, with one more pass per block, so clips may be much longer than the window.

The backward pass needs the memory of one block, independent of the length of the clip. The losses are in
`monarchrt.train.objectives.scores`.
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
    """Draws of a roll-out.

    Attributes:
        noise: Initial noise of each frame.
        fresh: Noise of each further step; n is the number of steps - 1.
        context: Noise of the finished frames in the cache.
        last: Index of the step at which every block stops.
        first: Index of the first scored block, if it is drawn; None if the last blocks are scored.
    """

    noise: Float32[Array, "b f h w c"]
    fresh: Float32[Array, "b n f h w c"]
    context: Float32[Array, "b f h w c"]
    last: Int[Array, ""]
    first: Int[Array, ""] | None = None


class RolledOut(NamedTuple):
    """The result of a roll-out.

    Attributes:
        x: The finished clip.
        inputs: The input of each block's last step.
        kept: The finished blocks with the noise that they have in the cache.
        cache: The cache with all blocks; if it holds only a window, as it was before the first scored block.
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
        """The draws of one role, including the noise that finished blocks have in the cache."""
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
        """Draws for all steps, as in `DMDObjective`, without noise in the cache."""
        first, fresh, last = super()._fixed_draws(noise)
        return RolloutDraws(first, fresh, jnp.zeros_like(noise), last)

    def cache(self, role: str, networks: Networks, batch: Batch) -> Any:
        """The student's keys and values of the whole clip or window; the critic's loss generates with a cache too."""
        _, frames, height, width, _ = batch.latents.shape
        student = networks["student"].with_config(causal_block=None)
        return self._empty(student, jnp.asarray(batch.text), (frames, height, width))

    def samples(self, student: Any, text: Array, draws: Any) -> Float32[Array, "b f h w c"]:
        """Clips of the student, with gradients through the last step of each block only.

        Args:
            student: A causal `WanModel`.
            text: Text embeddings [B, L, D].
            draws: Draws of the roll-out.
        """
        rolled = self.roll_out(detached(student), text, draws)
        return self.replay(student, text, rolled, draws.last, draws.first)

    def roll_out(self, student: Any, text: Array, draws: RolloutDraws) -> RolledOut:
        """Generates a clip block by block, each from noise through the student's steps up to the drawn last one.

        Args:
            student: A causal `WanModel`.
            text: Text embeddings [B, L, D].
            draws: Noise and last step.

        Returns:
            The clip and the inputs of `replay`. The clip is 0 after the last scored frame.

        Raises:
            UserError: If the blocks of clip or network are not those of the objective, or attention does not fit the
                window.
        """
        shape = batch, frames, height, width, _ = draws.noise.shape
        sizes = self.block_sizes(student, frames)
        (number, _), scored = self._place(sizes, draws.first)
        end = number + len(scored)
        student = computed_dtype(student.with_config(causal_block=None))  # each call gets a single block

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
            if draws.fresh.shape[1]:  # a one-step student has no steps before its last
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
        """The clip of a roll-out, with gradients through the last step of each block, computed block by block.

        Blocks that are not scored are constants.

        Args:
            student: A causal `WanModel`.
            text: Text embeddings [B, L, D].
            rolled: The result of `roll_out`.
            last: Index of the last step, as drawn.
            first: Index of the first scored block, if it was drawn.
        """
        rolled, frames = lax.stop_gradient(rolled), rolled.inputs.shape[1]
        sizes, rolls = self.block_sizes(student, frames), self._window(frames) is not None
        graph, params = nnx.split(student.with_config(causal_block=None))
        cache = dataclasses.replace(rolled.cache, cross=None)

        def read(params: Any) -> Any:
            return nnx.split(computed_dtype(nnx.merge(graph, params)))[1]

        def share(params: Any, inputs: Any) -> Any:  # keys and values of the text, which all blocks share
            return cross_keys_values(nnx.merge(graph, params), inputs[0])

        def block(params: Any, cross: Any, cache: Any, inputs: Any, number: Array, frame: Array, size: int) -> Array:
            _, z, _, last = inputs
            own = dataclasses.replace(cache, cross=cross, length=cache.length if rolls else frame)
            z = lax.dynamic_slice_in_dim(z, frame, size, 1)
            return self._denoise_block(nnx.merge(graph, params), z, own, frame, number, last)[0]

        def following(params: Any, cross: Any, cache: Any, inputs: Any, number: Array, frame: Array, size: int) -> Any:
            if not rolls:  # the finished cache holds all blocks
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
        """Index and first frame of the first scored block, and the number of frames of each scored block."""
        if first is None:
            skipped = self._skipped(sizes)
            return (skipped, sum(sizes[:skipped])), sizes[skipped:]
        count = (self.settings.scored_frames or sum(sizes)) // sizes[-1]
        return (first, _first_frame(sizes, first)), sizes[-1:] * count

    def _draw_first(self, key: Key[Array, ""], frames: int) -> Int[Array, ""] | None:
        """Draws the index of the first scored block; None if the last blocks are scored.

        Raises:
            UserError: If clips have fewer frames than are scored.
        """
        span = self._span(frames)
        return None if span is None else jax.random.randint(key, (), span[0], span[1] + 1)

    def typical(self, role: str, draws: DMDDraws) -> DMDDraws:
        """Places the scored blocks in the middle of the clip, if they are drawn."""
        student = cast(RolloutDraws, draws.student)
        span = self._span(student.noise.shape[1])
        return draws if span is None else draws._replace(student=student._replace(first=sum(span) // 2))  # type: ignore

    def _span(self, frames: int) -> tuple[int, int] | None:
        """Smallest and largest index of the first scored block, if it is drawn; None otherwise."""
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
        """The number of blocks at the start of a clip that are not scored, from the frames of each block.

        Raises:
            UserError: If `scored_frames` is not a whole number of blocks.
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
        """The empty cache for a clip of (F, h, w) latents.

        Raises:
            UserError: If the window or its first frames are not whole tiles of the student's attention.
        """
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
        """Number of latent frames that the cache holds, if it is smaller than the clip; None otherwise."""
        window = self.settings.window
        return window if window is not None and window < frames else None

    def _keep_block(
        self, student: Any, kept: Array, cache: WanCache, frame: Array, number: Array, *, in_place: bool = False
    ) -> WanCache:
        """Adds a finished block to the cache."""
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
        """The student's prediction of a clean block from z, given the cached blocks, at one of its steps."""
        t = jnp.asarray(self.schedule.timesteps, jnp.float32)[index]
        how: Any = dict(step=index, block=number, in_place=in_place)  # in place only where no gradient is taken
        flow, cache = cached_forward(student, z, jnp.full(z.shape[:2], t), cache, frame=frame, **how)
        return to_data(z, flow, self._sigma(index, z.shape[0])), cache

    def _metrics(self, clip: Array, draws: Any) -> Metrics:
        if draws.first is None:
            return sample_metrics(clip, block=self.settings.block)
        seen = self._scored(clip, draws)  # later frames are not generated
        return sample_metrics(seen, block=self.settings.block) | {"first_scored": jnp.float32(draws.first)}

    @property
    def _context_sigma(self) -> float:
        given = self.settings.context_sigma
        return shifted(1 / NUM_TRAIN_TIMESTEPS, self.settings.shift) if given is None else given

    def block_sizes(self, student: Any, frames: int) -> list[int]:
        """The number of frames of each block of a clip.

        Raises:
            UserError: If the clip is not a whole number of blocks or too long, or the student's blocks are not those of
                the objective.
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
    """Index of the first frame of a block; all blocks but the first have the same size."""
    return jnp.maximum(0, number * sizes[-1] - (sizes[-1] - sizes[0]))


def few_step_samplers(settings: ODEConfig | ConsistencyConfig) -> Mapping[str, Sampler]:
    """Samplers from pure noise at a student's steps, block by block if it is causal.

    Args:
        settings: Settings of the student's objective, of which steps, shift and blocks are used.
    """
    same = {"student_steps": settings.student_steps, "shift": settings.shift}
    if settings.block is None:
        return DMDObjective(DMDConfig(**same)).samplers()
    blocks = {"block": settings.block, "independent_first_frame": settings.independent_first_frame}
    return SelfForcingObjective(SelfForcingConfig(**same, **blocks)).samplers()
