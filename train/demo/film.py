"""The demo's film: each model continues the first frame of the held-out clip, shown next to the clip itself."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from monarchrt.models.media.video import write_mp4
from monarchrt.models.sampling.solve import flow_at
from monarchrt.models.wan import WanModel
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.objectives.flow import evaluation_noise
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.sample import sampling_levels
from monarchrt.train.state import as_velocity, split_model

STEPS = 16  # Euler steps from noise to frames
COLUMN = 560  # largest width in pixels to which frames are enlarged
CAPTION, MARGIN = 34, 6  # height of a caption and width of a margin, in pixels
HOLD = 12  # frames for which the last one is repeated


def make_continuation(graph: nnx.GraphDef, *, objective: FlowConfig) -> Callable[..., jax.Array]:
    """Makes a compiled sampler that keeps the first frame of a window and samples the others from noise.

    Args:
        graph: Structure of a network trained with a noise level per frame.
        objective: Settings of the objective, of which shift and scale of timesteps are used.

    Returns:
        (params, fixed, latents [B, F, h, w, C], text, noise) -> latents whose first frame is the given one.
    """
    levels = jnp.asarray(sampling_levels(objective, steps=STEPS))

    @jax.jit
    def sample(params: Any, fixed: Any, latents: jax.Array, text: jax.Array, noise: jax.Array) -> jax.Array:
        velocity = as_velocity(graph, params, fixed)
        batch, frames = latents.shape[:2]
        new = jnp.arange(frames) > 0
        mask = new[None, :, None, None, None]

        def step(x, pair):
            sigma, following, number = pair
            timesteps = jnp.broadcast_to(new * sigma * objective.num_train_timesteps, (batch, frames))
            return x + mask * (following - sigma) * flow_at(velocity, x, timesteps, text, step=number), None

        rows = levels[:-1], levels[1:], jnp.arange(STEPS)
        return jax.lax.scan(step, jnp.where(mask, noise, latents), rows)[0]

    return sample


def write_film(path: Path, models: Mapping[str, WanModel], source: ClipWindows, config: TrainConfig) -> Path:
    """Writes a video of the held-out clip and each model's continuation of its first frame, with the mean pixel error.

    A model gets one frame, and from then on continues its own last frame, window by window, so that errors accumulate
    as in a long video.

    Args:
        path: The mp4 file to write.
        models: Networks by label.
        source: The windows of the clip.
        config: Settings of the training run.

    Returns:
        The path.
    """
    new = source.latent_shape[0] - 1  # frames that a window adds
    windows = [source.held_out_window(index) for index in range(0, source.held_out, new)]
    clip = np.concatenate([windows[0][:1], *(window[1:] for window in windows)])
    made = {label: continue_clip(model, source, config, frames=len(clip)) for label, model in models.items()}
    zoom = max(1, COLUMN // clip.shape[2])
    panels = [labelled(clip, "the clip itself, not trained on", zoom)]
    for label, frames in made.items():
        error = np.abs(frames.astype(float) - clip).mean((1, 2, 3))
        panels.append(labelled(frames, [f"{label}: off by {value:.0f} of 255" for value in error], zoom))
    panels += [np.full_like(panels[0], 255)] * (len(panels) % 2)
    rows = [np.concatenate(panels[n : n + 2], axis=2) for n in range(0, len(panels), 2)]
    film = np.concatenate(rows, axis=1)
    return write_mp4(path, np.concatenate([film, *[film[-1:]] * HOLD]), fps=8.0)


def continue_clip(model: WanModel, source: ClipWindows, config: TrainConfig, *, frames: int) -> np.ndarray:
    """Generates a model's continuation of the first frame of the held-out clip.

    Args:
        model: A network trained with a noise level per frame.
        source: The windows of the clip.
        config: Settings of the training run.
        frames: Number of frames to return, including the given one.

    Returns:
        Frames, uint8 [frames, H, W, 3].
    """
    graph, params, fixed = split_model(model)
    sample = make_continuation(graph, objective=cast(FlowConfig, config.objective))
    latents, text = source.held_out_batch([0])
    window = np.asarray(latents)
    made = [window[0, :1]]
    while sum(map(len, made)) < frames:
        noise = evaluation_noise(len(made), 0, source.latent_shape)[None]
        window = np.asarray(sample(params, fixed, window, text, noise), np.float32)
        made.append(window[0, 1:])
        window = np.roll(window, 1, axis=1)  # the last frame is the first of the next window
    return source.transform.decode(np.concatenate(made)[None, :frames])[0]


def labelled(frames: np.ndarray, captions: str | Sequence[str], zoom: int) -> np.ndarray:
    """Enlarges frames by bicubic interpolation, and adds a caption above and a margin, uint8 [T, H', W', 3].

    Args:
        frames: Frames, uint8 [T, H, W, 3].
        captions: One caption for all frames, or one for each.
        zoom: Factor by which frames are enlarged.
    """
    height, width = frames.shape[1] * zoom, frames.shape[2] * zoom
    captions = [captions] * len(frames) if isinstance(captions, str) else captions
    panels = []
    for frame, caption in zip(frames, captions, strict=True):
        panel = Image.new("RGB", (width + 2 * MARGIN, height + CAPTION + MARGIN), "white")
        panel.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (MARGIN, CAPTION))
        ImageDraw.Draw(panel).text((MARGIN, 6), caption, fill="black", font=ImageFont.load_default(18))
        panels.append(np.asarray(panel))
    return np.stack(panels)


def subscribed(frames: np.ndarray, caption: str) -> np.ndarray:
    """Adds a caption below frames, uint8 [T, H + CAPTION, W, 3].

    Args:
        frames: Frames, uint8 [T, H, W, 3].
        caption: The caption of all frames.
    """
    panel = Image.new("RGB", (frames.shape[2], CAPTION), "white")
    ImageDraw.Draw(panel).text((MARGIN, 6), caption, fill="black", font=ImageFont.load_default(18))
    below = np.broadcast_to(np.asarray(panel), (len(frames), *np.asarray(panel).shape))
    return np.concatenate([frames, below], axis=1)
