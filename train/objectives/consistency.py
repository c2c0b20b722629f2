"""Consistency distillation (Song et al. 2023, arXiv:2303.01469) along the teacher's flow, without stored pairs.

A noised clip x_t is moved one Euler step down the grid of noise levels by the frozen teacher, with guidance; what the
student makes of x_t is to be what its own moving average makes of x_s, the end of that step:

    x_s = x_t - (sigma_t - sigma_s) v_teacher,   f(x, t) = x - sigma_t v(x, 1000 sigma_t),
    loss = mean (f_student(x_t, t) - sg f_average(x_s, s))^2.

A causal student (Causal Forcing, arXiv:2602.02214) is taught on all blocks at once, each after the clean blocks before
it, as is its causal teacher; nothing is rolled out and no solver is run to its end, so that this is the cheapest way to
few steps. The grid is that of the published training, even in u from 1 down, shifted; t is any of its levels but the
last, where s would be the end. The published code turns v into data with the nearest level of another grid, of 1000,
which at low noise is off by some percent; it is there by name, and off.
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
    """What one batch draws: the level that each clip is noised to, an index into the grid, and noise."""

    level: Int[Array, "b"]
    noise: Float32[Array, "b f h w c"]


class ConsistencyObjective(GuidedObjective):
    """A student whose predictions agree along the teacher's flow."""

    settings: ConsistencyConfig

    @cached_property
    def sigmas(self) -> Float32[np.ndarray, "n"]:
        """The grid of noise levels, from 1 down; 0 is not among them."""
        return uniform_schedule(self.settings.grid, self.settings.shift).sigmas[:-1].astype(np.float32)

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, ConsistencyDraws]:
        """A level of the grid for each clip, the last left out, and noise."""
        level_key, noise_key = jax.random.split(key)
        shape = shapes.latents.shape
        level = jax.random.randint(level_key, shape[:1], 0, self.settings.grid - 1)
        return {"student": ConsistencyDraws(level, jax.random.normal(noise_key, shape, jnp.float32))}

    def loss(
        self, role: str, networks: Networks, batch: Batch, draws: ConsistencyDraws
    ) -> tuple[Float32[Array, ""], Metrics]:
        """Mean squared difference of what the student and its average make of the two ends of the teacher's step."""
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
        """A clip made of pure noise in the student's steps, block by block if it is causal."""
        return few_step_samplers(self.settings)

    def _velocity(self, network: Any, clean: Float[Array, "b f h w c"], *, options: str) -> Velocity:
        """The flow prediction of a network, of a causal one after the clean blocks.

        Raises:
            UserError: If it sees clips in other blocks.
        """
        settings = self.settings
        check_blocks(
            network.config, settings.block, independent=settings.independent_first_frame, name="block", options=options
        )
        if settings.block is None:
            return network
        return lambda noisy, timesteps, text: teacher_forced(network, noisy, timesteps, clean, text)

    def _guided(self, teacher: Velocity, x: Array, timesteps: Array, text: Array) -> Array:
        """The teacher's flow, v_negative + g (v_text - v_negative)."""
        flow = teacher(x, timesteps, text)
        if self.negative is None:
            return flow
        negative = jnp.broadcast_to(jnp.asarray(self.negative), (text.shape[0], *self.negative.shape))
        against = teacher(x, timesteps, negative)
        return against + self.settings.weight * (flow - against)
