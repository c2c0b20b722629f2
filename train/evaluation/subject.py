"""The subject of a study or an evaluation: a network, its held-out examples, and their noise."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import load_material, open_checkpoint, wan_defaults
from monarchrt.models.generate.material import Material, Opened
from monarchrt.models.generate.run_checkpoint import RunCheckpoint
from monarchrt.models.wan import WanConfig, WanModel
from monarchrt.train.config import DataConfig
from monarchrt.train.data import Source
from monarchrt.train.objectives.flow import add_noise, evaluation_noise
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.run_folder import read_config
from monarchrt.train.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and its examples.

    Attributes:
        opened: The opened checkpoint.
        checkpoint: Path or name of the checkpoint.
        model: The network, with the stored attention.
        source: The data, of which the held-out examples are used.
        objective: Noise levels and weights of the flow loss, those of the training if they are known.
    """

    opened: Opened
    checkpoint: str
    model: WanModel
    source: Source
    objective: FlowConfig

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (F, h, w) of an example."""
        return self.model.config.token_grid(*self.source.latent_shape[:3])


def open_subject(
    checkpoint: str | None, *, video: Path | None = None, latents: Path | None = None, option: str = "checkpoint"
) -> Subject:
    """Opens a run folder with its own data, or any checkpoint with a folder of latents.

    Examples:
        >>> subject = open_subject("runs/demo/dense")  # doctest: +SKIP
        >>> subject.grid  # doctest: +SKIP
        (4, 8, 14)

    Args:
        checkpoint: A run folder or a Wan checkpoint, as for `monarchrt generate`.
        video: A clip to use instead of the run's own.
        latents: A folder written by `monarchrt encode`; required for Wan checkpoints.
        option: Name of the checkpoint's option, for messages.

    Returns:
        The subject.

    Raises:
        UserError: If checkpoint or data are missing, cannot be used, or do not fit each other.
    """
    if checkpoint is None:
        raise UserError(f"no {option} was given; give a run folder, such as runs/demo/dense, or a Wan checkpoint")
    if video is not None and latents is not None:
        raise UserError(f"video is {video} and latents is {latents}; give one of them")
    config = GenerateConfig(checkpoint=checkpoint)
    opened = open_checkpoint(config)
    sizes = opened.sizes
    data, objective = _data_and_objective(opened, checkpoint, video, latents, sizes)
    try:
        source = open_source(data, text_shape=(1, sizes.text_dim))
    except UserError as error:
        if video is not None or latents is not None:
            raise
        raise UserError(
            f"the clip of {option} {checkpoint} cannot be used ({error}); give another with --video"
        ) from error
    with user_input():
        sizes.token_grid(*source.latent_shape[:3])
    if source.latent_shape[3] != sizes.in_channels:
        raise UserError(
            f"examples have {source.latent_shape[3]} channels, and {option} {checkpoint} takes {sizes.in_channels}; "
            f"give latents of its own VAE"
        )
    return Subject(
        opened=opened, checkpoint=checkpoint, model=opened.network(config), source=source, objective=objective
    )


def _data_and_objective(
    opened: Opened, checkpoint: str, video: Path | None, latents: Path | None, sizes: WanConfig
) -> tuple[DataConfig, FlowConfig]:
    if not isinstance(opened, RunCheckpoint):
        if latents is None:
            raise UserError(
                f"checkpoint {checkpoint} is not a run folder, so its clips are not known; give --latents, a folder of "
                f"`monarchrt encode`"
            )
        shift = wan_defaults(cast(Any, opened).source).shift
        return DataConfig(latents=latents), FlowConfig(shift=shift)
    run = opened.run
    config = read_config(run.path)
    if latents is not None:
        data = DataConfig(latents=latents, held_out=run.data.held_out)
    else:
        own = {field.name: getattr(run.data, field.name) for field in dataclasses.fields(run.data)}
        data = DataConfig(**own)
    if video is not None:
        data = dataclasses.replace(data, video=video)
    objective = getattr(config, "objective", None)
    if not isinstance(objective, FlowConfig):
        objective = FlowConfig(
            shift=run.generation.shift, frames_per_level=1 if run.generation.level_per_frame else None
        )
    return data, objective


def video_of(config: GenerateConfig, clip: Path | None) -> Material:
    """Loads what is needed to generate a video; `clip` conditions it unless the mode is bidirectional.

    Args:
        config: Settings of the video.
        clip: A clip to start from; None for the run's own.

    Returns:
        The material.

    Raises:
        UserError: If a setting or the clip cannot be used.
    """
    if clip is None:
        return load_material(config)
    try:
        return load_material(dataclasses.replace(config, condition=str(clip)))
    except UserError:
        if config.mode not in ("auto", "bidirectional"):
            raise
        material = load_material(config)
        if material.plan.config.mode != "bidirectional":
            raise
        return material


def noisy_example(
    subject: Subject, index: int, level: float
) -> tuple[Float[Array, "1 F h w C"], Float[Array, "1 F"], Float[Array, "1 L D"]]:
    """A held-out example at a noise level, like the inputs of the network during sampling.

    If the network is not causal and was trained with a noise level per frame, the first frame or block is clean.

    Args:
        subject: The network and its examples.
        index: Index of the held-out example.
        level: Noise level sigma, from 0 to 1.

    Returns:
        Latents, timesteps of the frames, and text embeddings.
    """
    latents, text = (jnp.asarray(x) for x in subject.source.held_out_batch([index]))
    noise = jnp.asarray(evaluation_noise(index, 0, latents.shape[1:]))[None]
    frames = latents.shape[1]
    clean = subject.objective.frames_per_level if subject.model.config.causal_block is None else None
    sigma = jnp.where(jnp.arange(frames) < min(clean or 0, frames - 1), 0.0, level)[None].astype(jnp.float32)
    patch = subject.model.config.patch_size[0]
    timesteps = sigma[:, ::patch] * subject.objective.num_train_timesteps
    return add_noise(latents, noise, sigma), timesteps, text


def check_example(subject: Subject, count: int) -> list[int]:
    """Indices of `count` held-out examples, spread over all.

    Raises:
        UserError: If there are fewer.
    """
    there = subject.source.held_out
    if count > there:
        raise UserError(f"windows is {count}, but only {there} examples are held out; use at most {there}")
    return sorted({round(float(x)) for x in np.linspace(0, there - 1, count)})


def probed_call(model: nnx.Module) -> Any:
    """The model's call, compiled."""
    return nnx.jit(lambda model, *inputs: model(*inputs))
