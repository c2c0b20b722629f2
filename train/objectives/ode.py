"""ODE regression (CausVid, Yin et al. 2024, arXiv:2412.07772, Section 4.3) from a teacher's states to its result.

Pairs hold the states x_0 ... x_{n-1} of the teacher's solver at the student's n steps, and the end x_n of the
trajectory. For each block of frames, or for the whole clip of a bidirectional student, one state i is drawn. The
student gets it at its noise level and predicts the end:

    loss = mean over frames with i < n of (x_i - sigma_i v(x_i, 1000 sigma_i) - x_n)^2.

A block of a causal student may also be at the end, with timestep 0, as earlier blocks are in generation; it is left out
of the loss. Attention that depends on the sampling step uses that of the block's state. The noise levels must be those
with which the pairs were made.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key

from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.sampling.schedules import Schedule, few_step_schedule
from monarchrt.models.sampling.solve import flow_at
from monarchrt.train.config import DataConfig
from monarchrt.train.data import Batch, Source
from monarchrt.train.objectives.base import Metrics, Networks, Objective, Sampler
from monarchrt.train.objectives.flow import check_blocks, over_runs
from monarchrt.train.objectives.self_forcing import few_step_samplers
from monarchrt.train.objectives.settings import ODEConfig
from monarchrt.train.pair_folder import PairFolder


class ODEDraws(NamedTuple):
    """Index of the state of each frame, the same within a block; the number of steps stands for the end."""

    state: Int[Array, "b f"]


class ODEObjective(Objective):
    """Regression of the end of a teacher's trajectory from its states."""

    settings: ODEConfig

    @cached_property
    def schedule(self) -> Schedule:
        """Timesteps and noise levels of the student's steps, followed by level 0."""
        return few_step_schedule(self.settings.student_steps, self.settings.shift)

    def open_source(
        self,
        config: DataConfig,
        *,
        text_shape: tuple[int, int] = (1, 1),
        digests: Path | None = None,
        encode: bool = True,
    ) -> Source:
        """Opens pairs, which must have been made at the student's noise levels.

        Raises:
            UserError: If the data are no pairs, or their noise levels differ.
        """
        if config.latents is None or config.video is not None:
            raise UserError("ode learns from pairs; make them with `monarchrt pairs`, and give --latents PAIRS")
        source = PairFolder(config.latents, config, digests=digests)
        source.check(self.schedule.sigmas[:-1].tolist(), self.settings.shift)
        return source

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, ODEDraws]:
        """Draws a state for each block, including the end; without blocks, one for each clip, excluding the end."""
        settings = self.settings
        batch, frames = shapes.latents.shape[0], self._frames(shapes.latents.shape[1])
        steps = len(settings.student_steps)
        if settings.block is None:
            return {"student": ODEDraws(jnp.repeat(jax.random.randint(key, (batch, 1), 0, steps), frames, axis=1))}
        with user_input():
            runs = block_sizes(frames, settings.block, independent_first_frame=settings.independent_first_frame)
        return {"student": ODEDraws(over_runs(jax.random.randint(key, (batch, len(runs)), 0, steps + 1), runs))}

    def loss(self, role: str, networks: Networks, batch: Batch, draws: ODEDraws) -> tuple[Float32[Array, ""], Metrics]:
        """Mean squared error of the predicted end, over the frames whose state is not the end."""
        settings, student = self.settings, networks[role]
        independent = settings.independent_first_frame
        check_blocks(student.config, settings.block, independent=independent, name="block")
        trajectory, text = map(jnp.asarray, batch)
        frames = self._frames(trajectory.shape[1])
        states = trajectory.reshape(trajectory.shape[0], -1, frames, *trajectory.shape[2:])
        state = jnp.asarray(draws.state)
        seen = jnp.take_along_axis(states, state[:, None, :, None, None, None], axis=1)[:, 0]
        sigma = jnp.asarray(self.schedule.sigmas, jnp.float32)[state]
        timesteps = jnp.asarray(np.append(self.schedule.timesteps, 0.0), jnp.float32)[state]
        flow = flow_at(student, seen, timesteps, text, step=state).astype(jnp.float32)
        data = seen - sigma[..., None, None, None] * flow
        errors = jnp.mean(jnp.square(data - states[:, -1]), axis=(2, 3, 4))
        counts = state < len(settings.student_steps)
        metrics = {
            f"loss_at_{step}": jnp.sum(jnp.where(state == n, errors, 0.0)) / jnp.sum(state == n)
            for n, step in enumerate(settings.student_steps)
        }
        return jnp.sum(jnp.where(counts, errors, 0.0)) / jnp.maximum(jnp.sum(counts), 1), metrics

    def samplers(self) -> Mapping[str, Sampler]:
        """A sample from pure noise at the student's steps, block by block if it is causal."""

        def of_one(sampler: Sampler) -> Sampler:
            def sampled(network: Any, states: Array, text: Array, noise: Array) -> Array:
                frames = self._frames(states.shape[1])
                return sampler(network, states[:, -frames:], text, noise[:, -frames:])

            return sampled

        return {label: of_one(sampler) for label, sampler in few_step_samplers(self.settings).items()}

    def _frames(self, stacked: int) -> int:
        """The number of frames of a clip, from that of all its states stacked.

        Raises:
            UserError: If `stacked` is not a multiple of the number of states, one per step and the end.
        """
        states = len(self.settings.student_steps) + 1
        if stacked % states:
            raise UserError(f"latents have {stacked} frames, which are not {states} states of a clip; give pairs")
        return stacked // states
