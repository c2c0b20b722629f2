"""Distribution matching distillation (DMD) of a few-step student, with a frozen teacher and a critic.

The student generates whole clips with its few-step sampler, which stops at a random step; gradients flow through that
last step only (Self-Forcing, arXiv:2506.08009, Section 3.3). The critic learns to denoise the student's samples; the
student moves towards the samples that the teacher finds more likely than the critic does. The losses are in
`monarchrt.train.objectives.scores`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int, Key

from monarchrt.models.errors import UserError
from monarchrt.models.sampling.schedules import Schedule, few_step_schedule
from monarchrt.models.sampling.solve import flow_at
from monarchrt.train.config import DataConfig
from monarchrt.train.data import Batch, Source
from monarchrt.train.objectives.adversarial import GanDraws, Logits, discriminate, draw_gan, student_loss
from monarchrt.train.objectives.base import Metrics, Networks, Sampler
from monarchrt.train.objectives.discriminator import logits_of, with_discriminator
from monarchrt.train.objectives.flow import add_noise
from monarchrt.train.objectives.negative import GuidedObjective
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
    """Draws of the student's sampler: initial noise, noise of each further step, and index of the last step."""

    noise: Float32[Array, "b f h w c"]
    fresh: Float32[Array, "b n f h w c"]  # n: steps - 1
    last: Int[Array, ""]


class DMDDraws(NamedTuple):
    """Draws of one update; `gan` is None without an adversarial term."""

    student: StudentDraws
    scores: ScoreDraws
    gan: GanDraws | None = None


class DMDObjective(GuidedObjective):
    """Distribution matching distillation: student, critic and teacher."""

    settings: DMDConfig

    @cached_property
    def schedule(self) -> Schedule:
        """Timesteps and noise levels of the student's steps."""
        return few_step_schedule(self.settings.student_steps, self.settings.shift)

    def due(self, step: int) -> tuple[str, ...]:
        """The critic at every step; the student at every `student_every`-th, starting with the first."""
        student = (step - 1) % self.settings.student_every == 0
        return ("student", "critic") if student else ("critic",)

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, DMDDraws]:
        """Draws the noise and the last step of the student's sampler, and time and noise of the comparison.

        Student and critic have draws of their own.
        """
        shape, keys = shapes.latents.shape, jax.random.split(key, len(self.settings.training))
        draws = {role: self.draw_role(key_of, shape) for role, key_of in zip(self.settings.training, keys, strict=True)}
        if not self.settings.adversarial:
            return draws
        r1, r2 = self.settings.gan_r1 > 0, self.settings.gan_r2 > 0
        also = {role: (r1 and role == "critic", r2 and role == "critic") for role in draws}
        return {
            role: draws[role]._replace(gan=draw_gan(jax.random.fold_in(key_of, 1), shape, r1=r1, r2=r2))
            for (role, (r1, r2)), key_of in zip(also.items(), keys, strict=True)
        }

    def draw_role(self, key: Key[Array, ""], shape: tuple[int, ...]) -> DMDDraws:
        """The draws of one role, for latents of shape (B, F, h, w, C)."""
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
        """The distribution matching loss of the student, or the critic's flow loss on the student's samples."""
        text, noise = jnp.asarray(batch.text), self._scored(draws.scores.noise, draws.student)
        if role == "critic":
            clip = lax.stop_gradient(self.samples(detached(networks["student"]), text, draws.student))
            levels = self.score_levels(draws.scores)
            x = self._scored(clip, draws.student)
            loss, metrics = critic_loss(x, text, critic=networks["critic"], levels=levels, noise=noise)
            metrics |= {"last_step": jnp.float32(draws.student.last)}
            if draws.gan is None:
                return loss, metrics
            term, more = self._discriminate(networks["critic"], x, batch, draws)
            return loss + term, metrics | more
        clip = self.samples(networks["student"], text, draws.student)
        x = self._scored(clip, draws.student)
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
            levels=self.score_levels(draws.scores),
            noise=noise,
        )
        metrics |= self._metrics(clip, draws.student) | {"last_step": jnp.float32(draws.student.last)}
        loss = matching_loss(x, g)
        if draws.gan is None:
            return loss, metrics
        term, more = self._deceive(detached(networks["critic"]), x, batch, draws)
        return loss + term, metrics | more

    def _deceive(self, critic: Any, x: Array, batch: Batch, draws: DMDDraws) -> tuple[Array, Metrics]:
        """The student's weighted adversarial loss, and metrics."""
        logits, mixed, scored = self._discriminator(critic, batch, draws)
        fake = logits(mixed(x))
        real = lax.stop_gradient(logits(mixed(scored(batch.latents)))) if self.settings.gan_relativistic else None
        loss = student_loss(fake, real)
        return self.settings.gan_weight * loss, {"gan_loss": loss, "gan_fake": jnp.mean(fake)}

    def _discriminate(self, critic: Any, x: Array, batch: Batch, draws: DMDDraws) -> tuple[Array, Metrics]:
        """The discriminator's weighted loss, and metrics."""
        logits, mixed, scored = self._discriminator(critic, batch, draws)
        settings, gan = self.settings, cast(GanDraws, draws.gan)
        real, fake = (noise if noise is None else scored(noise) for noise in (gan.near_real, gan.near_fake))
        return discriminate(
            logits, mixed(x), mixed(scored(batch.latents)), real, fake, relativistic=settings.gan_relativistic,
            weight=settings.critic_weight, r1=settings.gan_r1, r2=settings.gan_r2, sigma=settings.gan_sigma,
        )  # fmt: skip

    def _discriminator(self, critic: Any, batch: Batch, draws: DMDDraws) -> tuple[Logits, Any, Any]:
        """Three functions: logits of noisy clips, noising of clips, and selection of the scored frames."""
        gan = cast(GanDraws, draws.gan)

        def scored(clip: Any) -> Array:
            return self._scored(jnp.asarray(clip, jnp.float32), draws.student)

        levels, noise = self.score_levels(ScoreDraws(gan.time, gan.noise)), scored(gan.noise)
        text, layers = jnp.asarray(batch.text), self.settings.gan_layers
        return (
            lambda clip: logits_of(critic, clip, levels.timesteps, text, layers=layers),
            lambda clip: add_noise(clip, noise, levels.mixed),
            scored,
        )

    def extension(self, role: str) -> Callable[..., Any] | None:
        """Adds the discriminator to the critic if there is an adversarial term."""
        return with_discriminator if role == "critic" and self.settings.adversarial else None

    def open_source(
        self,
        config: DataConfig,
        *,
        text_shape: tuple[int, int] = (1, 1),
        digests: Path | None = None,
        encode: bool = True,
    ) -> Source:
        """Opens the data of a config; an adversarial term needs clips, not prompts alone."""
        if self.settings.adversarial and config.prompts is not None:
            raise UserError(
                f"gan_weight is {self.settings.gan_weight}, but prompts {config.prompts} are texts without clips, "
                f"which the discriminator compares the student's with; give --latents or --video, or --gan-weight 0"
            )
        return super().open_source(config, text_shape=text_shape, digests=digests, encode=encode)

    def _scored(self, clip: Float32[Array, "b f h w c"], draws: Any) -> Float32[Array, "b scored h w c"]:
        """The frames of a clip that critic and teacher score."""
        return clip

    def samples(self, student: Any, text: Array, draws: StudentDraws) -> Float32[Array, "b f h w c"]:
        """Clips of the student, with gradients through the last step only.

        Args:
            student: The student.
            text: Text embeddings [B, L, D].
            draws: Draws of the sampler.

        Raises:
            UserError: If the student is causal; `self-forcing` is the objective for such networks.
        """
        block = getattr(getattr(student, "config", None), "causal_block", None)
        if block is not None:
            raise UserError(
                f"the student's causal_block is {block}, but {self.settings.name} generates whole clips at once; give "
                f"--objective self-forcing, or a student without causal_block"
            )
        early = detached(student)

        def advance(index: Array, z: Array) -> Array:
            data = self._denoise(early, z, text, index)
            following = self._sigma(index + 1, z.shape[0])
            noise = lax.dynamic_index_in_dim(draws.fresh, index, axis=1, keepdims=False)
            return add_noise(data, noise, following)

        z = draws.noise
        if draws.fresh.shape[1]:  # a one-step student has no steps before its last
            z = lax.fori_loop(0, draws.last, advance, z)
        return self._denoise(student, lax.stop_gradient(z), text, draws.last)

    def parts(self, role: str) -> Mapping[str, Callable[[Networks, Batch, Any], Any] | None]:
        """Generation of the clips, and their scores by critic and teacher."""

        def roll_out(networks: Networks, batch: Batch, draws: Any) -> Array:
            return self.samples(detached(networks["student"]), jnp.asarray(batch.text), draws.student)

        return {"roll_out": roll_out, "scores" if role == "student" else "forward": None}

    def turns(self, role: str) -> float:
        """Mean number of steps before the last one, which is drawn uniformly."""
        return (len(self.settings.student_steps) - 1) / 2

    def checks(self) -> Sequence[Check]:
        """Checks of the student's clips and the critic's loss."""
        return collapse_checks()

    def samplers(self) -> Mapping[str, Sampler]:
        """A sample from pure noise at the student's steps."""

        def sampled(network: Any, latents: Array, text: Array, noise: Array) -> Array:
            return self.samples(detached(network), text, self._fixed_draws(noise))

        return {"sampled": sampled}

    def _fixed_draws(self, noise: Array) -> Any:
        """Draws for all steps; the noise of further steps is the initial noise, rolled along frames and channels."""
        count = len(self.settings.student_steps)
        rolled = [jnp.roll(noise, (n, n), axis=(1, -1)) for n in range(count)]
        return StudentDraws(noise, jnp.stack(rolled, axis=1)[:, 1:], jnp.int32(count - 1))

    def _metrics(self, clip: Array, draws: Any) -> Metrics:
        return sample_metrics(clip)

    def _sigma(self, index: Array, batch: int) -> Float32[Array, "b"]:
        """Noise level of a step, repeated for each sample."""
        return jnp.broadcast_to(jnp.asarray(self.schedule.sigmas, jnp.float32)[index], (batch,))

    def _denoise(self, student: Any, z: Array, text: Array, index: Array) -> Array:
        """The student's prediction of the clean clip from z at one of its steps."""
        batch = z.shape[:1]
        t = jnp.asarray(self.schedule.timesteps, jnp.float32)[index]
        return to_data(z, flow_at(student, z, jnp.full(batch, t), text, step=index), self._sigma(index, z.shape[0]))

    def score_levels(self, draws: ScoreDraws) -> Levels:
        """The noise levels at which critic and teacher are compared."""
        settings = self.settings
        return levels_of(
            draws.time, shift=settings.shift, low=settings.low, high=settings.high, conversion=settings.conversion
        )
