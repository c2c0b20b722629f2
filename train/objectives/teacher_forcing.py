"""Teacher forcing: a causal student learns the flow of blocks that attend to the clean blocks before them.

Tokens are [clean; noisy], with equal positions. Clean block i attends to clean blocks up to i, noisy block i to itself
and to clean blocks before i. The timestep of the clean half is 0, and the loss, that of `flow`, is taken over the noisy
half. Diffusion forcing, where a block attends to the noisy blocks before it, costs half as much, but its inputs differ
from those in generation; Causal Forcing (arXiv:2602.02214) finds teacher forcing the better start of a distillation.

The clean half may be noised slightly, since generated blocks are never quite clean. Its levels and noise are drawn
separately. The published code differs: it reuses the noise of the noisy half, and its level is an index into a
decreasing list, so that the smallest setting is nearly pure noise.
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
    """Draws for a batch.

    Attributes:
        level: Index of the noise level of the noisy half, the same for all frames of a block.
        noise: Unit Gaussian noise of the noisy half.
        context: Noise level sigma of the clean half, the same for all frames of a block.
        context_noise: Unit Gaussian noise of the clean half.
    """

    level: Int[Array, "b f"]
    noise: Float32[Array, "b f h w c"]
    context: Float32[Array, "b f"]
    context_noise: Float32[Array, "b f h w c"]


class TeacherForcingObjective(FlowObjective):
    """Rectified flow of noisy blocks that attend to clean ones."""

    settings: TeacherForcingConfig

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, TeacherForcingDraws]:  # type: ignore[override]
        """Draws a noise level for each block, one for each block of the context, and noise for both."""
        shape = shapes.latents.shape
        flow_key, level_key, noise_key = jax.random.split(key, 3)
        level, noise = draw_noise(flow_key, shape, self.settings)
        runs = level_runs(self.settings, shape[1])
        context = jax.random.uniform(level_key, (shape[0], len(runs or ())), maxval=self.settings.context_sigma)
        context_noise = jax.random.normal(noise_key, shape, jnp.float32)
        return {"student": TeacherForcingDraws(level, noise, over_runs(context, runs), context_noise)}

    def velocity(self, network: Any, latents: Array, draws: TeacherForcingDraws | None) -> Velocity:
        """The flow prediction for noisy blocks that attend to the batch's own blocks, clean ones in an evaluation.

        Raises:
            UserError: If the network is not causal, or its blocks are not those of the objective.
        """
        settings = self.settings
        independent = settings.independent_first_frame
        check_blocks(network.config, settings.frames_per_level, independent=independent, name="frames_per_level")
        times = self.settings.num_train_timesteps
        clean, clean_timesteps = latents, None
        if draws is not None and self.settings.context_sigma:
            clean, clean_timesteps = add_noise(latents, draws.context_noise, draws.context), draws.context * times

        def velocity(noisy: Array, timesteps: Array, text: Array, *, step: Any = None) -> Array:
            return teacher_forced(network, noisy, timesteps, clean, text, clean_timesteps=clean_timesteps, step=step)

        return velocity

    def samplers(self) -> Mapping[str, Sampler]:
        """A held-out window in which each block is sampled from pure noise, given the true blocks before it."""
        levels = sampling_levels(self.settings, steps=20)

        def continued(network: Any, latents: Array, text: Array, noise: Array) -> Array:
            return euler_sample(self.velocity(network, latents, None), noise, text, levels=levels)

        return {"continued": continued}
