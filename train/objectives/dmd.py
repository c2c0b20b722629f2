"""DMD: a student of few steps learns to make samples that a teacher finds likely, followed by a critic.

The student makes a whole clip in the steps of its sampler and stops at a random one; only that last step is
differentiated (Self-Forcing, arXiv:2506.08009, Section 3.3). `monarchrt.train.objectives.scores` has the losses.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int, Key

from monarchrt.models.sampling.schedules import Schedule, few_step_schedule
from monarchrt.models.sampling.solve import flow_at
from monarchrt.train.data import Batch
from monarchrt.train.objectives.base import Metrics, Networks, Objective, Sampler
from monarchrt.train.objectives.flow import add_noise
from monarchrt.train.objectives.negative import negative_embedding
from monarchrt.train.objectives.scores import (
    Levels,
    ScoreDraws,
    collapse_checks,
    critic_loss,
    detached,
    draw_scores,
    levels_of,
    matching_gradient,
    matching_loss,
    sample_metrics,
    to_data,
)
from monarchrt.train.objectives.settings import DMDConfig
from monarchrt.train.watch import Check


class StudentDraws(NamedTuple):
    """What the student makes a clip of: the noise that it starts from, that of each further step, and its last step."""

    noise: Float32[Array, "b f h w c"]
    fresh: Float32[Array, "b n f h w c"]  # n: steps - 1
    last: Int[Array, ""]


class DMDDraws(NamedTuple):
    """What one update draws."""

    student: StudentDraws
    scores: ScoreDraws


class DMDObjective(Objective):
    """Distribution matching distillation: student, critic and teacher."""

    settings: DMDConfig

    @cached_property
    def schedule(self) -> Schedule:
        """The student's steps."""
        return few_step_schedule(self.settings.student_steps, self.settings.shift)

    @cached_property
    def negative(self) -> np.ndarray | None:
        """Embedding [M, D] of the negative prompt; None where the teacher is not guided.

        Raises:
            UserError: If the file cannot be read, or it is not clear which of its embeddings it is.
        """
        path = self.settings.negative
        return None if path is None or not self.settings.weight else negative_embedding(path)

    def due(self, step: int) -> tuple[str, ...]:
        """The critic at every step, the student at every `student_every`-th, from the first on."""
        student = (step - 1) % self.settings.student_every == 0
        return ("student", "critic") if student else ("critic",)

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, DMDDraws]:
        """Noise of the student's steps, its last step, a time and noise to compare at; for each role its own."""
        shape, keys = shapes.latents.shape, jax.random.split(key, len(self.settings.training))
        return {role: self._draw(key_of, shape) for role, key_of in zip(self.settings.training, keys, strict=True)}

    def _draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> DMDDraws:
        first, fresh, last, scores = jax.random.split(key, 4)
        steps = len(self.settings.student_steps)
        return DMDDraws(
            student=StudentDraws(
                noise=jax.random.normal(first, shape, jnp.float32),
                fresh=jax.random.normal(fresh, (shape[0], steps - 1, *shape[1:]), jnp.float32),
                last=jax.random.randint(last, (), 0, steps),
            ),
            scores=draw_scores(scores, shape),
        )

    def loss(self, role: str, networks: Networks, batch: Batch, draws: DMDDraws) -> tuple[Float32[Array, ""], Metrics]:
        """Distribution matching for the student, the flow of the student's samples for the critic."""
        text, noise = jnp.asarray(batch.text), self._scored(draws.scores.noise)
        if role == "critic":
            clip = lax.stop_gradient(self.samples(detached(networks["student"]), text, draws.student))
            levels = self._levels(draws.scores)
            loss, metrics = critic_loss(self._scored(clip), text, critic=networks["critic"], levels=levels, noise=noise)
            return loss, metrics | {"last_step": jnp.float32(draws.student.last)}
        clip = self.samples(networks["student"], text, draws.student)
        x = self._scored(clip)
        negative = None
        if self.negative is not None:
            negative = jnp.broadcast_to(jnp.asarray(self.negative), (text.shape[0], *self.negative.shape))
        g, metrics = matching_gradient(
            x,
            text,
            negative,
            critic=detached(networks["critic"]),
            teacher=detached(networks["teacher"]),
            guidance=self.settings.weight,
            levels=self._levels(draws.scores),
            noise=noise,
        )
        metrics |= self._metrics(clip) | {"last_step": jnp.float32(draws.student.last)}
        return matching_loss(x, g), metrics

    def _scored(self, clip: Float32[Array, "b f h w c"]) -> Float32[Array, "b scored h w c"]:
        """The frames of a clip that critic and teacher see."""
        return clip

    def samples(self, student: Any, text: Array, draws: StudentDraws) -> Float32[Array, "b f h w c"]:
        """Clips of the student, differentiable by its parameters through the last step alone."""
        early = detached(student)

        def advance(index: Array, z: Array) -> Array:
            data = self._denoise(early, z, text, index)
            following = self._sigma(index + 1, z.shape[0])
            noise = lax.dynamic_index_in_dim(draws.fresh, index, axis=1, keepdims=False)
            return add_noise(data, noise, following)

        z = lax.fori_loop(0, draws.last, advance, draws.noise)
        return self._denoise(student, lax.stop_gradient(z), text, draws.last)

    def checks(self) -> Sequence[Check]:
        """Of the student's clips and the critic's loss."""
        return collapse_checks()

    def samplers(self) -> Mapping[str, Sampler]:
        """A clip made of pure noise in the student's steps."""

        def sampled(network: Any, latents: Array, text: Array, noise: Array) -> Array:
            return self.samples(detached(network), text, self._fixed_draws(noise))

        return {"sampled": sampled}

    def _fixed_draws(self, noise: Array) -> Any:
        """All steps, with noise that follows from the first: rolled along the frames and channels."""
        count = len(self.settings.student_steps)
        rolled = [jnp.roll(noise, (n, n), axis=(1, -1)) for n in range(count)]
        return StudentDraws(noise, jnp.stack(rolled, axis=1)[:, 1:], jnp.int32(count - 1))

    def _metrics(self, x: Array) -> Metrics:
        return sample_metrics(x)

    def _sigma(self, index: Array, batch: int) -> Float32[Array, "b"]:
        """Noise level of a step, for each sample."""
        return jnp.broadcast_to(jnp.asarray(self.schedule.sigmas, jnp.float32)[index], (batch,))

    def _denoise(self, student: Any, z: Array, text: Array, index: Array) -> Array:
        """The clean clip that the student sees in z, at one of its steps."""
        batch = z.shape[:1]
        t = jnp.asarray(self.schedule.timesteps, jnp.float32)[index]
        return to_data(z, flow_at(student, z, jnp.full(batch, t), text, step=index), self._sigma(index, z.shape[0]))

    def _levels(self, draws: ScoreDraws) -> Levels:
        settings = self.settings
        return levels_of(
            draws.time, shift=settings.shift, low=settings.low, high=settings.high, conversion=settings.conversion
        )
