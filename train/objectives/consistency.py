"""Consistency distillation (Song et al. 2023, arXiv:2303.01469) along the teacher's flow, without stored pairs.

The frozen teacher, with guidance, moves a noised clip x_t one Euler step down the grid of noise levels, to x_s. The
student's prediction of the clean clip from x_t should equal that of its own moving average from x_s (sg: no gradient):

    x_s = x_t - (sigma_t - sigma_s) v_teacher,   f(x, t) = x - sigma_t v(x, 1000 sigma_t),
    loss = mean (f_student(x_t, t) - sg f_average(x_s, s))^2.

A causal student (Causal Forcing, arXiv:2602.02214) and its causal teacher are trained on all blocks at once, each of
which attends to the clean blocks before it. There are no roll-outs and no complete solver runs, which makes this the
cheapest distillation to few steps. The grid is that of the published training, even in u from 1 down, and shifted; t is
any of its levels except the last, after which s would be 0. The published code converts v to data with the nearest
level of another grid, of 1000, which is off by a few percent at low noise; `conversion="published"` does the same.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Key

from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS, uniform_schedule
from monarchrt.models.wan.teacher_forced import teacher_forced
from monarchrt.train.data import Batch
from monarchrt.train.objectives.base import Metrics, Networks, Sampler, average_of
from monarchrt.train.objectives.flow import Velocity, add_noise, check_blocks
from monarchrt.train.objectives.negative import GuidedObjective
from monarchrt.train.objectives.scores import in_bins, nearest_level, to_data
from monarchrt.train.objectives.self_forcing import few_step_samplers
from monarchrt.train.objectives.settings import ConsistencyConfig


class ConsistencyDraws(NamedTuple):
    """Draws for a batch: the index of each clip's noise level in the grid, and noise."""

    level: Int[Array, "b"]
    noise: Float32[Array, "b f h w c"]


class ConsistencyObjective(GuidedObjective):
    """Consistency of a student's predictions along the teacher's flow."""

    settings: ConsistencyConfig

    @cached_property
    def sigmas(self) -> Float32[np.ndarray, "n"]:
        """The grid of noise levels, from 1 down, without 0."""
        return uniform_schedule(self.settings.grid, self.settings.shift).sigmas[:-1].astype(np.float32)

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, ConsistencyDraws]:
        """Draws a noise level for each clip, any of the grid but the last, and noise."""
        level_key, noise_key = jax.random.split(key)
        shape = shapes.latents.shape
        level = jax.random.randint(level_key, shape[:1], 0, self.settings.grid - 1)
        return {"student": ConsistencyDraws(level, jax.random.normal(noise_key, shape, jnp.float32))}

    def loss(
        self, role: str, networks: Networks, batch: Batch, draws: ConsistencyDraws
    ) -> tuple[Float32[Array, ""], Metrics]:
        """Mean squared difference of the predictions of student and average at the two ends of the teacher's step."""
        settings, (latents, text) = self.settings, map(jnp.asarray, batch)
        sigmas, level = jnp.asarray(self.sigmas), jnp.asarray(draws.level)
        high, low = sigmas[level], sigmas[level + 1]
        noised = add_noise(latents, draws.noise, high)
        teacher = self._velocity(networks["teacher"], latents, options="teacher.")
        student, average = (self._velocity(networks[name], latents, options="") for name in (role, average_of(role)))
        flow = self._guided(teacher, noised, high * NUM_TRAIN_TIMESTEPS, text)
        moved = lax.stop_gradient(to_data(noised, flow, high - low))  # x - (sigma_t - sigma_s) v

        def end(velocity: Velocity, x: Array, sigma: Array) -> Array:
            t = sigma * NUM_TRAIN_TIMESTEPS
            converted = sigma if settings.conversion == "clean" else nearest_level(t, shift=settings.shift)
            return to_data(x, velocity(x, t, text), converted)

        target = lax.stop_gradient(end(average, moved, low))
        errors = jnp.mean(jnp.square(end(student, noised, high) - target), axis=(1, 2, 3, 4))
        return jnp.mean(errors), in_bins(errors, high * NUM_TRAIN_TIMESTEPS)

    def samplers(self) -> Mapping[str, Sampler]:
        """A sample from pure noise at the student's steps, block by block if it is causal."""
        return few_step_samplers(self.settings)

    def _velocity(self, network: Any, clean: Float[Array, "b f h w c"], *, options: str) -> Velocity:
        """The flow prediction of a network; blocks of a causal one attend to the clean blocks before them.

        Raises:
            UserError: If the blocks of the network are not those of the objective.
        """
        settings = self.settings
        check_blocks(
            network.config, settings.block, independent=settings.independent_first_frame, name="block", options=options
        )
        if settings.block is None:
            return network
        return lambda noisy, timesteps, text: teacher_forced(network, noisy, timesteps, clean, text)

    def _guided(self, teacher: Velocity, x: Array, timesteps: Array, text: Array) -> Array:
        """The teacher's flow with guidance g: v_negative + g (v_text - v_negative)."""
        flow = teacher(x, timesteps, text)
        if self.negative is None:
            return flow
        negative = jnp.broadcast_to(jnp.asarray(self.negative), (text.shape[0], *self.negative.shape))
        against = teacher(x, timesteps, negative)
        return against + self.settings.weight * (flow - against)
