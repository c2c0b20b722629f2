"""The adversarial term that one-step recipes add to distribution matching (One-Forcing, arXiv:2605.23458).

A discriminator D, a head on the critic's features, classifies clips of the student (fake) and of the data (real), with
the same noise at the same level. The losses of student and critic are means of

    student   softplus(-D(fake))                           relativistic: softplus(D(real) - D(fake))
    critic    softplus(D(fake)) + softplus(-D(real))       relativistic: softplus(D(fake) - D(real))

The regularizers R1, at real clips, and R2, at fake ones, are estimated by finite differences (APT, arXiv:2501.08316),
since second derivatives of attention are expensive: mean of ((D(x + s n) - D(x)) / s)^2 / 2 with unit noise n.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key

from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS
from monarchrt.train.objectives.base import Metrics

Logits = Callable[[Array], Float32[Array, "b"]]
"""Noisy clips -> logits; larger is more likely real."""


class GanDraws(NamedTuple):
    """Index 0...999 of each sample's time, the noise of both kinds of clips, and the noise that R1 and R2 add."""

    time: Int[Array, "b"]
    noise: Float32[Array, "b f h w c"]
    near_real: Float32[Array, "b f h w c"] | None
    near_fake: Float32[Array, "b f h w c"] | None


def draw_gan(key: Key[Array, ""], shape: tuple[int, ...], *, r1: bool, r2: bool) -> GanDraws:
    """Draws a time for each sample, uniform before the shift, and noise.

    Args:
        key: Random key.
        shape: Shape (B, F, h, w, C) of the latents.
        r1: Whether to draw noise for R1.
        r2: Whether to draw noise for R2.
    """
    keys = jax.random.split(key, 4)
    noise, real, fake = (jax.random.normal(each, shape, jnp.float32) for each in keys[1:])
    time = jax.random.randint(keys[0], shape[:1], 0, NUM_TRAIN_TIMESTEPS)
    return GanDraws(time, noise, real if r1 else None, fake if r2 else None)


def student_loss(fake: Float[Array, "b"], real: Float[Array, "b"] | None = None) -> Float32[Array, ""]:
    """Adversarial loss of the student.

    Args:
        fake: Logits of the student's clips.
        real: Logits of real clips, for the relativistic loss.

    Returns:
        Mean of softplus(-fake), or of softplus(real - fake).

    Examples:
        >>> round(float(student_loss(jnp.zeros(2))), 4), float(student_loss(jnp.array([-50.0]), jnp.array([50.0])))
        (0.6931, 100.0)
    """
    return jnp.mean(jax.nn.softplus(-fake if real is None else real - fake).astype(jnp.float32))


def discriminator_loss(
    fake: Float[Array, "b"], real: Float[Array, "b"], *, relativistic: bool = False
) -> Float32[Array, ""]:
    """Loss of the discriminator.

    Args:
        fake: Logits of the student's clips.
        real: Logits of real clips.
        relativistic: Whether to use the relativistic loss.

    Returns:
        Mean of softplus(fake) + softplus(-real), or of softplus(fake - real).

    Examples:
        >>> round(float(discriminator_loss(jnp.zeros(2), jnp.zeros(2))), 4)
        1.3863
    """
    apart = jax.nn.softplus(fake - real) if relativistic else jax.nn.softplus(fake) + jax.nn.softplus(-real)
    return jnp.mean(apart.astype(jnp.float32))


def flatness(there: Float[Array, "b"], near: Float[Array, "b"], *, sigma: float) -> Float32[Array, ""]:
    """R1 or R2 by a finite difference: half the mean of ((near - there) / sigma)^2.

    Args:
        there: Logits of noisy clips.
        near: Logits of the same clips with further noise of standard deviation `sigma`.
        sigma: That standard deviation.
    """
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
    """The weighted loss of the discriminator with its regularizers.

    Args:
        logits: The discriminator.
        fake: Noisy clips of the student.
        real: Noisy clips of the data.
        near_real: Unit noise that R1 adds to `real`, scaled by `sigma`; None for no R1.
        near_fake: Unit noise that R2 adds to `fake`, scaled by `sigma`; None for no R2.
        relativistic: Whether to use the relativistic loss, which compares fake and real clips in pairs.
        weight: Weight of the discriminator's loss.
        r1: Weight of R1.
        r2: Weight of R2.
        sigma: Standard deviation of the noise of R1 and R2.

    Returns:
        The loss, and scalars to log.
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
