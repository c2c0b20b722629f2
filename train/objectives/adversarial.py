"""The adversarial term that one-step recipes add to distribution matching (One-Forcing, arXiv:2605.23458).

A discriminator D, a head on the critic's features, sees clips of the student and of the data, noised to one level by
one noise; the student makes clips that it takes for data:

    student   softplus(-D(fake))                           relativistic: softplus(D(real) - D(fake))
    critic    softplus(D(fake)) + softplus(-D(real))       relativistic: softplus(D(fake) - D(real))

R1 and R2 keep D from changing too fast around data and around samples, by finite differences (APT, arXiv:2501.08316),
as second derivatives of attention would be dear: mean of ((D(x + s n) - D(x)) / s)^2 / 2 with noise n.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key

from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS
from monarchrt.train.objectives.base import Metrics

Logits = Callable[[Array], Float32[Array, "b"]]
"""Noisy clips -> how real they look."""


class GanDraws(NamedTuple):
    """Index of a time 0...999 for each sample, the noise of both kinds of clips, and what R1 and R2 add to them."""

    time: Int[Array, "b"]
    noise: Float32[Array, "b f h w c"]
    near_real: Float32[Array, "b f h w c"] | None
    near_fake: Float32[Array, "b f h w c"] | None


def draw_gan(key: Key[Array, ""], shape: tuple[int, ...], *, r1: bool, r2: bool) -> GanDraws:
    """One time for each sample, uniform before the shift, and noise of the latents' shape.

    Args:
        key: Random key of the draws.
        shape: Shape of the latents.
        r1: Whether there is noise for R1.
        r2: For R2.
    """
    keys = jax.random.split(key, 4)
    noise, real, fake = (jax.random.normal(each, shape, jnp.float32) for each in keys[1:])
    time = jax.random.randint(keys[0], shape[:1], 0, NUM_TRAIN_TIMESTEPS)
    return GanDraws(time, noise, real if r1 else None, fake if r2 else None)


def student_loss(fake: Float[Array, "b"], real: Float[Array, "b"] | None = None) -> Float32[Array, ""]:
    """Of logits of the student's clips: softplus(-fake); beside those of real ones, softplus(real - fake).

    Examples:
        >>> round(float(student_loss(jnp.zeros(2))), 4), float(student_loss(jnp.array([-50.0]), jnp.array([50.0])))
        (0.6931, 100.0)
    """
    return jnp.mean(jax.nn.softplus(-fake if real is None else real - fake).astype(jnp.float32))


def discriminator_loss(
    fake: Float[Array, "b"], real: Float[Array, "b"], *, relativistic: bool = False
) -> Float32[Array, ""]:
    """Of logits of the student's clips and of real ones.

    Examples:
        >>> round(float(discriminator_loss(jnp.zeros(2), jnp.zeros(2))), 4)
        1.3863
    """
    apart = jax.nn.softplus(fake - real) if relativistic else jax.nn.softplus(fake) + jax.nn.softplus(-real)
    return jnp.mean(apart.astype(jnp.float32))


def flatness(there: Float[Array, "b"], near: Float[Array, "b"], *, sigma: float) -> Float32[Array, ""]:
    """R1 or R2 by a finite difference: half the mean of ((near - there) / sigma)^2."""
    return 0.5 * jnp.mean(jnp.square((near - there) / sigma).astype(jnp.float32))


def discriminate(
    logits: Logits,
    fake: Float[Array, "b f h w c"],
    real: Float[Array, "b f h w c"],
    near_real: Float[Array, "b f h w c"] | None,
    near_fake: Float[Array, "b f h w c"] | None,
    *,
    relativistic: bool,
    weight: float,
    r1: float,
    r2: float,
    sigma: float,
) -> tuple[Float32[Array, ""], Metrics]:
    """The discriminator's loss, weighted, with its regularisation.

    Args:
        logits: The discriminator.
        fake: Noisy clips of the student.
        real: Noisy clips of the data.
        near_real: Unit noise that R1 moves the latter by, sigma times; None: there is no R1.
        near_fake: That R2 moves the former by.
        relativistic: Whether logits are compared in pairs.
        weight: Weight of the discriminator's loss.
        r1: Weight of R1.
        r2: Weight of R2.
        sigma: How far they move.

    Returns:
        The loss, and what to log of it.
    """
    of_fake, of_real = logits(fake), logits(real)
    loss = discriminator_loss(of_fake, of_real, relativistic=relativistic)
    metrics = {
        "gan_loss": loss,
        "gan_fake": jnp.mean(of_fake),
        "gan_real": jnp.mean(of_real),
        "gan_told_apart": jnp.mean(of_real > of_fake, dtype=jnp.float32),
    }
    total = weight * loss
    for name, share, there, clip, near in (
        ("gan_r1", r1, of_real, real, near_real),
        ("gan_r2", r2, of_fake, fake, near_fake),
    ):
        if near is not None:
            metrics[name] = flatness(there, logits(clip + sigma * near), sigma=sigma)
            total = total + share * metrics[name]
    return total, metrics
