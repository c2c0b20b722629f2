"""Teacher forcing: a causal student learns the flow of blocks that see the clean blocks before them, as in generation.

Tokens are [clean; noisy], at equal positions. Clean block i sees clean blocks up to i, noisy block i sees clean blocks
before i and itself; the clean half is told time 0, and the loss, that of `flow`, is of the noisy half. Diffusion
forcing, where a block sees the noisy blocks before it, costs half as much; but a student of it never sees what it will
see in generation, and Causal Forcing (arXiv:2602.02214) finds teacher forcing the better beginning of a distillation.

The clean half may be noised a little, as what is generated is never quite clean. Its levels and noise are draws of
their own: the published code takes the noise of the target, and an index into a falling list as the level, so that its
smallest setting is nearly pure noise.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key

from monarchrt.models.wan.teacher_forced import teacher_forced
from monarchrt.train.data import Batch
from monarchrt.train.objectives.base import Sampler
from monarchrt.train.objectives.flow import (
    FlowObjective,
    Velocity,
    add_noise,
    check_blocks,
    draw_noise,
    euler_sample,
    level_runs,
    over_runs,
    sampling_levels,
)
from monarchrt.train.objectives.settings import TeacherForcingConfig


class TeacherForcingDraws(NamedTuple):
    """What one batch draws.

    Attributes:
        level: Index into the grid of noise levels, the same for the frames of a block.
        noise: Noise of the noisy half.
        context: Noise level of the clean half, the same for the frames of a block.
        context_noise: Its noise.
    """

    level: Int[Array, "b f"]
    noise: Float32[Array, "b f h w c"]
    context: Float32[Array, "b f"]
    context_noise: Float32[Array, "b f h w c"]


class TeacherForcingObjective(FlowObjective):
    """Rectified flow of blocks after clean ones."""

    settings: TeacherForcingConfig

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, TeacherForcingDraws]:  # type: ignore[override]
        """A noise level and noise for each block, and for the clean block that later ones see."""
        shape = shapes.latents.shape
        flow_key, level_key, noise_key = jax.random.split(key, 3)
        level, noise = draw_noise(flow_key, shape, self.settings)
        runs = level_runs(self.settings, shape[1])
        context = jax.random.uniform(level_key, (shape[0], len(runs or ())), maxval=self.settings.context_sigma)
        context_noise = jax.random.normal(noise_key, shape, jnp.float32)
        return {"student": TeacherForcingDraws(level, noise, over_runs(context, runs), context_noise)}

    def velocity(self, network: Any, latents: Array, draws: TeacherForcingDraws | None) -> Velocity:
        """The flow of noisy blocks after the batch's own, which are clean in an evaluation.

        Raises:
            UserError: If the network is not causal or has other blocks.
        """
        settings = self.settings
        independent = settings.independent_first_frame
        check_blocks(network.config, settings.frames_per_level, independent=independent, name="frames_per_level")
        times = self.settings.num_train_timesteps
        clean, told = latents, None
        if draws is not None and self.settings.context_sigma:
            clean, told = add_noise(latents, draws.context_noise, draws.context), draws.context * times

        def velocity(noisy: Array, timesteps: Array, text: Array, *, step: Any = None) -> Array:
            return teacher_forced(network, noisy, timesteps, clean, text, clean_timesteps=told, step=step)

        return velocity

    def samplers(self) -> Mapping[str, Sampler]:
        """A held-out window whose blocks are each made of pure noise after the true blocks before them."""
        levels = sampling_levels(self.settings, steps=20)

        def continued(network: Any, latents: Array, text: Array, noise: Array) -> Array:
            return euler_sample(self.velocity(network, latents, None), noise, text, levels=levels)

        return {"continued": continued}
