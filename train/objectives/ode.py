"""ODE regression (CausVid, Yin et al. 2024, arXiv:2412.07772, Section 4.3): from a state of the teacher to its end.

Pairs hold the states x_0 ... x_{n-1} of the teacher's solver at the student's n steps, and its end x_n. For each block
of frames, or the whole clip of a bidirectional student, one of them is drawn; the student sees it at its noise level
and learns the end,

    mean over frames that are not at the end yet of (x_i - sigma_i v(x_i, 1000 sigma_i) - x_n)^2.

A block of a causal student may also be at the end, told time 0: it is then what later blocks see in generation, and
counts nothing. Attention that depends on the sampling step is told that of the block's state. Noise levels are those
that the pairs were made with; a student that is told others learns wrong ones.
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
    """Which state each frame is in, the same for those of a block; the number of steps is the end."""

    state: Int[Array, "b f"]


class ODEObjective(Objective):
    """Regression of the end of the teacher's trajectory."""

    settings: ODEConfig

    @cached_property
    def schedule(self) -> Schedule:
        """The student's steps; the level after the last is 0."""
        return few_step_schedule(self.settings.student_steps, self.settings.shift)

    def open_source(
        self,
        config: DataConfig,
        *,
        text_shape: tuple[int, int] = (1, 1),
        digests: Path | None = None,
        encode: bool = True,
    ) -> Source:
        """Pairs, which must have been made at the student's noise levels.

        Raises:
            UserError: If there are none, or they were made at others.
        """
        if config.latents is None or config.video is not None:
            raise UserError("ode learns from pairs; make them with `monarchrt pairs`, and give --latents PAIRS")
        source = PairFolder(config.latents, config, digests=digests)
        source.check(self.schedule.sigmas[:-1].tolist(), self.settings.shift)
        return source

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, ODEDraws]:
        """A state for each block, the end included; without blocks one for each clip, without the end."""
        settings = self.settings
        batch, frames = shapes.latents.shape[0], self._frames(shapes.latents.shape[1])
        steps = len(settings.student_steps)
        if settings.block is None:
            return {"student": ODEDraws(jnp.repeat(jax.random.randint(key, (batch, 1), 0, steps), frames, axis=1))}
        with user_input():
            runs = block_sizes(frames, settings.block, independent_first_frame=settings.independent_first_frame)
        return {"student": ODEDraws(over_runs(jax.random.randint(key, (batch, len(runs)), 0, steps + 1), runs))}

    def loss(self, role: str, networks: Networks, batch: Batch, draws: ODEDraws) -> tuple[Float32[Array, ""], Metrics]:
        """Mean squared error of the end that the student sees, over frames that are not there yet."""
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
        """A clip made of pure noise in the student's steps, block by block if it is causal."""

        def of_one(sampler: Sampler) -> Sampler:
            def sampled(network: Any, states: Array, text: Array, noise: Array) -> Array:
                frames = self._frames(states.shape[1])
                return sampler(network, states[:, -frames:], text, noise[:, -frames:])

            return sampled

        return {label: of_one(sampler) for label, sampler in few_step_samplers(self.settings).items()}

    def _frames(self, stacked: int) -> int:
        """Frames of a clip, of those of all its states one after the other.

        Raises:
            UserError: If there are not as many states as steps, and an end.
        """
        states = len(self.settings.student_steps) + 1
        if stacked % states:
            raise UserError(f"latents have {stacked} frames, which are not {states} states of a clip; give pairs")
        return stacked // states
