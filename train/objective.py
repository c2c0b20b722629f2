"""The rectified-flow objective of Wan 2.1's training and of Self-Forcing's diffusion trainer.

A clean latent x0 and unit Gaussian noise eps are mixed at noise level sigma in (0, 1], x_t = (1 - sigma) x0 +
sigma eps, and the network learns the flow v = eps - x0. Noise levels come from a grid of N = 1000 values u = j/N,
shifted towards high noise, sigma = s u / (1 + (s - 1) u) (Esser et al. 2024, arXiv:2403.03206, section 5.3.2); the
network is told t = N sigma. The loss of a sample is weighted by a bell around t = N/2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from train.config import ObjectiveConfig

Velocity = Callable[[Float[Array, "b f h w c"], Float32[Array, "b"], Float[Array, "b l d"]], Float[Array, "b f h w c"]]
"""A flow prediction: (noisy latents, timesteps, text) -> v."""


class NoiseLevels(NamedTuple):
    """The grid of noise levels, from low to high noise: sigma [N] and the loss weight [N], float32."""

    sigma: Float32[np.ndarray, "n"]
    weight: Float32[np.ndarray, "n"]


def noise_levels(config: ObjectiveConfig) -> NoiseLevels:
    """Computes the grid of noise levels and their weights.

    The Gaussian weight is exp(-2 ((t - N/2)/N)^2) over the shifted timesteps t, less its minimum, scaled to mean 1.

    Args:
        config: Shift, weighting and size of the grid.

    Returns:
        The levels u = 1/N ... 1 after the shift, and their weights.

    Example:
        >>> levels = noise_levels(ObjectiveConfig(shift=5.0))
        >>> [round(float(x), 4) for x in (1000 * levels.sigma[0], levels.weight[0], levels.weight.max())]
        [4.9801, 0.0319, 2.0764]
    """
    count = config.num_train_timesteps
    u = np.arange(1, count + 1) / count
    sigma = config.shift * u / (1 + (config.shift - 1) * u)
    weight = np.ones(count)
    if config.weighting == "gaussian":
        bell = np.exp(-2 * (sigma - 0.5) ** 2)
        weight = bell - bell.min()
        weight /= weight.mean()
    return NoiseLevels(sigma.astype(np.float32), weight.astype(np.float32))


def add_noise(
    latents: Float[Array, "b f h w c"], noise: Float[Array, "b f h w c"], sigma: Float[Array, "b"]
) -> Float[Array, "b f h w c"]:
    """Mixes latents and noise: x_t = (1 - sigma) x0 + sigma eps, with one sigma for each sample.

    Example:
        >>> one = jnp.ones((1, 1, 1, 1, 1))
        >>> float(add_noise(one, -one, jnp.array([0.25]))[0, 0, 0, 0, 0])
        0.5
    """
    sigma = sigma[:, None, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def flow_errors(
    velocity: Velocity,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    noise: Float[Array, "b f h w c"],
    sigma: Float32[Array, "b"],
    *,
    num_train_timesteps: int = 1000,
) -> Float32[Array, "b"]:
    """Mean squared error of the flow prediction for each sample, in float32 and not weighted.

    Args:
        velocity: The network.
        latents: Clean latents x0.
        text: Text embeddings.
        noise: Unit Gaussian noise.
        sigma: Noise level of each sample.
        num_train_timesteps: The network is told t = num_train_timesteps * sigma.

    Returns:
        mean over (F, h, w, C) of (v - (eps - x0))^2, float32 [B].
    """
    predicted = velocity(add_noise(latents, noise, sigma), sigma * num_train_timesteps, text)
    error = predicted.astype(jnp.float32) - (noise - latents).astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=(1, 2, 3, 4))


def draw_noise(
    key: Key[Array, ""], shape: tuple[int, ...], config: ObjectiveConfig
) -> tuple[Int[Array, "b"], Float32[Array, "b f h w c"]]:
    """Draws what one training batch needs: an index into the grid of noise levels for each sample, and noise.

    Args:
        key: Random key.
        shape: Shape (B, F, h, w, C) of the latents.
        config: The objective; indices are uniform on its grid.

    Returns:
        Indices [B] and unit Gaussian noise of the given shape.
    """
    level_key, noise_key = jax.random.split(key)
    level = jax.random.randint(level_key, shape[:1], 0, config.num_train_timesteps)
    return level, jax.random.normal(noise_key, shape, jnp.float32)


def flow_loss(
    velocity: Velocity,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    *,
    level: Int[Array, "b"],
    noise: Float[Array, "b f h w c"],
    config: ObjectiveConfig,
) -> Float32[Array, ""]:
    """The training loss: weighted squared error of the predicted flow.

    Args:
        velocity: The network.
        latents: Clean latents x0.
        text: Text embeddings.
        level: Index of each sample's noise level, from `draw_noise`.
        noise: Unit Gaussian noise, from `draw_noise`.
        config: The objective.

    Returns:
        Mean over the batch of weight(t) * mean (v - (eps - x0))^2, a float32 scalar.

    Example:
        >>> config = ObjectiveConfig()
        >>> level, noise = draw_noise(jax.random.key(0), (2, 1, 4, 4, 3), config)
        >>> zeros = jnp.zeros(noise.shape)
        >>> perfect = lambda latents, timesteps, text: noise
        >>> float(flow_loss(perfect, zeros, jnp.zeros((2, 1, 1)), level=level, noise=noise, config=config))
        0.0
    """
    levels = noise_levels(config)
    errors = flow_errors(
        velocity,
        latents,
        text,
        noise,
        jnp.asarray(levels.sigma)[level],
        num_train_timesteps=config.num_train_timesteps,
    )
    return jnp.mean(jnp.asarray(levels.weight)[level] * errors)


def evaluation_levels(config: ObjectiveConfig, count: int) -> NoiseLevels:
    """Picks `count` levels evenly from the grid (the middles of `count` equal parts), for a loss without chance.

    Example:
        >>> [round(float(s), 3) for s in evaluation_levels(ObjectiveConfig(), 4).sigma]
        [0.419, 0.751, 0.893, 0.972]
    """
    levels = noise_levels(config)
    index = np.floor((np.arange(count) + 0.5) / count * config.num_train_timesteps).astype(int)
    index = np.clip(index, 0, config.num_train_timesteps - 1)
    return NoiseLevels(levels.sigma[index], levels.weight[index])


def evaluation_noise(index: int, level: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """The fixed noise for held-out example `index` at evaluation level `level`: the same for every model and run."""
    return np.random.default_rng([20, index, level]).standard_normal(shape, np.float32)
