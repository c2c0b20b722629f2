"""Sampling: the learned flow followed from noise to data with Euler steps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from monarchrt.models.media.video import side_by_side, write_mp4
from monarchrt.models.sampling import Schedule, euler, guided, sample, uniform_schedule
from monarchrt.train.data import ClipWindows
from monarchrt.train.objectives.base import Sampler
from monarchrt.train.objectives.flow import Velocity, add_noise, evaluation_noise
from monarchrt.train.objectives.settings import FlowConfig


def sampling_levels(config: FlowConfig, *, steps: int, start: float = 1.0) -> Float32[np.ndarray, "steps_plus_1"]:
    """Noise levels of a sampler: even in u, shifted like those of training, from `start` down to 0.

    Args:
        config: Its shift is used.
        steps: Euler steps.
        start: First noise level sigma in (0, 1]; below 1 a noised clip is restored rather than a new one made.

    Returns:
        sigma, decreasing, float32 [steps + 1].

    Example:
        >>> [round(float(sigma), 3) for sigma in sampling_levels(FlowConfig(shift=5.0), steps=4)]
        [1.0, 0.938, 0.833, 0.625, 0.0]
    """
    return uniform_schedule(steps, config.shift, start=start).sigmas.astype(np.float32)


def euler_sample(
    velocity: Velocity,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    *,
    levels: Float[np.ndarray, "steps_plus_1"],
    num_train_timesteps: int = 1000,
) -> Float[Array, "b f h w c"]:
    """Follows dx/dsigma = v from the first noise level to the last.

    Args:
        velocity: The network.
        latents: x at the first level: unit Gaussian noise for sigma = 1, or a noised clip.
        text: Text embeddings.
        levels: Decreasing noise levels, from `sampling_levels`.
        num_train_timesteps: The network is told t = num_train_timesteps * sigma.

    Returns:
        x at the last level.

    Example:
        >>> straight = lambda latents, timesteps, text: jnp.ones(latents.shape)
        >>> x = jnp.full((1, 1, 1, 1, 1), 3.0)
        >>> float(euler_sample(straight, x, jnp.zeros((1, 1, 1)), levels=np.array([1.0, 0.5, 0.0]))[0, 0, 0, 0, 0])
        2.0
    """

    sigmas = np.asarray(levels, float)
    return sample(guided(velocity, text), latents, euler(Schedule(sigmas, num_train_timesteps * sigmas[:-1])))


def flow_sampler(config: FlowConfig, *, steps: int = 20, start: float = 1.0) -> Sampler:
    """A sampler that starts from clean latents noised to level `start`.

    Args:
        config: Shift and timestep scale.
        steps: Euler steps.
        start: First noise level; at 1 nothing of the clean latents is left.

    Returns:
        (network, latents, text, noise) -> sampled latents.
    """
    levels = sampling_levels(config, steps=steps, start=start)

    def sampler(network: Velocity, latents: Array, text: Array, noise: Array) -> Array:
        first = jnp.full((latents.shape[0],), start, jnp.float32)
        noised = add_noise(latents, noise, first)
        return euler_sample(network, noised, text, levels=levels, num_train_timesteps=config.num_train_timesteps)

    return sampler


def make_sampler(graph: nnx.GraphDef, sampler: Sampler) -> Callable[..., Array]:
    """Compiles a sampler for a network that was split.

    Args:
        graph: Structure of the network.
        sampler: What an objective's `samplers` holds.

    Returns:
        (params, frozen, latents, text, noise) -> sampled latents.
    """
    return jax.jit(lambda params, frozen, *arrays: sampler(nnx.merge(graph, params, frozen), *arrays))


def write_held_out_sample(
    path: Path,
    samplers: Mapping[str, Callable[..., Array]],
    params: Any,
    frozen: Any,
    source: ClipWindows,
    *,
    index: int = 0,
    zoom: int = 1,
) -> Path:
    """Writes an mp4 of a held-out window next to what each sampler makes of it.

    Args:
        path: The file.
        samplers: Label -> sampler, from `make_sampler`.
        params: Parameters.
        frozen: The network's other variables.
        source: A clip; its transform turns latents into pixels.
        index: Held-out window.
        zoom: Enlarge each pixel.

    Returns:
        The path.
    """
    latents, text = source.held_out_batch([index])
    noise = evaluation_noise(index, 0, latents.shape)
    clips = [source.held_out_window(index)]
    for sampler in samplers.values():
        sampled = np.asarray(sampler(params, frozen, latents, text, noise), np.float32)
        clips.append(source.transform.decode(sampled[0]))
    return write_mp4(path, side_by_side(clips, labels=["clip", *samplers], zoom=zoom))
