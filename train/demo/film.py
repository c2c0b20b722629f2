"""The demo's film: each model continues the held-out clip, window by window, next to the clip itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monarchrt.models.media.video import side_by_side, write_mp4
from monarchrt.models.wan import WanModel
from monarchrt.train.config import ObjectiveConfig, TrainConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.objectives.flow import evaluation_noise
from monarchrt.train.sample import sampling_levels
from monarchrt.train.state import as_velocity, split_model

STEPS = 16  # Euler steps from noise to frames


def make_continuation(graph: nnx.GraphDef, *, objective: ObjectiveConfig) -> Callable[..., jax.Array]:
    """Makes a compiled sampler that keeps the first frame of a window and draws the others from noise.

    Args:
        graph: Structure of a network trained with a noise level for each frame.
        objective: Shift and timestep scale.

    Returns:
        (params, fixed, latents [B, F, h, w, C], text, noise) -> latents with frames 1 and on made by the network.
    """
    levels = jnp.asarray(sampling_levels(objective, steps=STEPS))

    @jax.jit
    def sample(params: Any, fixed: Any, latents: jax.Array, text: jax.Array, noise: jax.Array) -> jax.Array:
        velocity = as_velocity(graph, params, fixed)
        batch, frames = latents.shape[:2]
        new = jnp.arange(frames) > 0
        mask = new[None, :, None, None, None]

        def step(x, pair):
            sigma, following = pair
            timesteps = jnp.broadcast_to(new * sigma * objective.num_train_timesteps, (batch, frames))
            return x + mask * (following - sigma) * velocity(x, timesteps, text), None

        return jax.lax.scan(step, jnp.where(mask, noise, latents), (levels[:-1], levels[1:]))[0]

    return sample


def write_film(path: Path, models: Mapping[str, WanModel], source: ClipWindows, config: TrainConfig) -> Path:
    """Writes the held-out clip next to what each model makes of it: of each window it sees the first frame only.

    Args:
        path: The mp4.
        models: Label -> network.
        source: The clip.
        config: Settings of the training run.

    Returns:
        The path.
    """
    new = source.latent_shape[0] - 1  # frames that a window adds
    indices = list(range(0, source.held_out, new))
    latents, text = source.held_out_batch(indices)
    noise = np.stack([evaluation_noise(index, 0, source.latent_shape) for index in indices])
    clips = [np.concatenate([source.held_out_window(index)[1:] for index in indices])]
    for model in models.values():
        graph, params, fixed = split_model(model)
        continuation = make_continuation(graph, objective=cast(ObjectiveConfig, config.objective))
        sampled = continuation(params, fixed, latents, text, noise)
        frames = source.transform.decode(np.asarray(sampled, np.float32))  # [B, F, H, W, 3]
        clips.append(frames[:, 1:].reshape(-1, *frames.shape[2:]))
    return write_mp4(
        path, side_by_side(clips, labels=["clip", *models], zoom=max(1, 320 // clips[0].shape[2])), fps=8.0
    )
