"""Writing of models and opened checkpoints, one tensor at a time; files appear complete or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from monarchrt.models.checkpoints.reading import Progress, some
from monarchrt.models.checkpoints.tensor_files import TensorInfo, total_bytes, write_sharded
from monarchrt.models.checkpoints.torch_writing import write_torch
from monarchrt.models.files import new_folder
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.mapping import Naming, Tensor, checkpoint_shape, tensors, to_theirs
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel

STEM = "diffusion_pytorch_model"
TARGETS = ("official", "diffusers", "orbax", "torch")


class ModelFile:
    """A model's parameters as the tensors of an official checkpoint.

    Attributes:
        infos: Shape and dtype by official name.
    """

    def __init__(self, model: WanModel):
        self._values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        self._tensors = {tensor.official: tensor for tensor in tensors(model.config)}
        known = {tensor.path for tensor in self._tensors.values()}
        if more := [".".join(map(str, path)) for path in self._values if tuple(map(str, path)) not in known]:
            raise ValueError(
                f"model has parameters that a checkpoint has no names for: {some(more)}; those of a LoRA are merged by "
                f"monarchrt.models.lora.layers.folded."
            )
        self.infos = {
            name: TensorInfo(checkpoint_shape(model.config, tensor), np.dtype(self._values[tensor.path].dtype))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Copies a tensor to the host."""
        tensor = self._tensors[name]
        value = self._values[tensor.path][...]
        return np.asarray(to_theirs(np.asarray(value if tensor.layer is None else value[tensor.layer]), tensor.layout))


def save_checkpoint(
    model: WanModel,
    path: str | Path,
    *,
    format: str = "official",
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    few_step: bool = False,
    trained: settings.Trained | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a model, with its attention, in the official, diffusers, orbax or torch format.

    Args:
        model: The model.
        path: A folder that does not exist or is empty; for torch, a file that does not exist.
        format: "official", "diffusers" (the `transformer` folder of a pipeline), "orbax", or "torch", a `.pt` file like
            Self-Forcing's, which has no settings.
        dtype: Dtype of the tensors; None keeps the parameters'.
        max_shard_bytes: Size above which weights are split into numbered shards; None writes one file.
        few_step: Whether to store that the weights are distilled, so that `monarchrt generate` samples them in few
            steps.
        trained: Settings of the training to store, which `monarchrt generate` uses as defaults.
        progress: Called after each tensor with its name, bytes written so far, and bytes in total.

    Returns:
        The folder, or the file for torch.

    Raises:
        ValueError: If the format is unknown or the folder is not empty.
    """
    check_target(format)
    if format == "orbax":
        from monarchrt.models.wan.checkpoints.orbax import save_orbax

        return save_orbax(model, path, dtype=dtype, few_step=few_step, trained=trained)
    file = ModelFile(model)
    return write_tensors(
        path,
        model.config,
        format,
        info=lambda tensor: file.infos[tensor.official],
        read=lambda tensor: file.read(tensor.official),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        few_step=few_step,
        trained=trained,
        progress=progress,
    )


def write_tensors(
    path: str | Path,
    config: WanConfig,
    format: str,
    *,
    info: Callable[[Tensor], TensorInfo],
    read: Callable[[Tensor], np.ndarray],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    few_step: bool = False,
    trained: settings.Trained | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the tensors of a model and, except for torch, its `config.json`.

    Args:
        path: As in `save_checkpoint`.
        config: Configuration of the model.
        format: "official", "diffusers" or "torch".
        info: Returns shape and dtype of a tensor.
        read: Returns a tensor in torch's layout.
        dtype: Dtype of the tensors written; None keeps it.
        max_shard_bytes: As in `save_checkpoint`.
        few_step: As in `save_checkpoint`.
        trained: As in `save_checkpoint`.
        progress: As in `save_checkpoint`.

    Returns:
        The folder, or the file for torch.

    Raises:
        ValueError: If the folder is not empty or the file exists, the dtype is not a float, or, for torch, the
            configuration cannot be read from the tensors.
    """
    cast = None if dtype is None else _float_dtype(dtype)
    if format == "torch":
        return _write_file(
            Path(path).expanduser(), config, info=info, read=read, cast=cast, few_step=few_step, progress=progress
        )
    naming: Naming = "official" if format == "official" else "diffusers"
    by_name = {tensor.name(naming): tensor for tensor in tensors(config)}
    infos = {name: TensorInfo(info(t).shape, cast or info(t).dtype) for name, t in by_name.items()}
    own = settings.own_to_json(config, few_step=few_step, trained=trained)
    metadata = {"format": "pt"} | ({settings.OWN_KEY: json.dumps(own)} if own else {})
    total, done = total_bytes(infos.values()), 0
    with new_folder(path) as folder:
        data = settings.config_to_json(config, naming, few_step=few_step, trained=trained)
        text = settings.dump_json(data)
        (folder / "config.json").write_text(text)
        for name, size in write_sharded(
            folder,
            STEM,
            infos,
            lambda name: read(by_name[name]).astype(infos[name].dtype, copy=False),
            max_bytes=max_shard_bytes,
            metadata=metadata,
        ):
            done += size
            if progress is not None:
                progress(name, done, total)
    return Path(path).expanduser()


def _write_file(
    path: Path,
    config: WanConfig,
    *,
    info: Callable[[Tensor], TensorInfo],
    read: Callable[[Tensor], np.ndarray],
    cast: np.dtype | None,
    few_step: bool,
    progress: Progress | None,
) -> Path:
    """Writes a `.pt` file with the names of Self-Forcing: a distilled model is stored as the averaged generator."""
    if path.exists():
        raise ValueError(f"path={str(path)!r} exists; name a new file.")
    if config.head_dim != settings.HEAD_DIM:
        raise ValueError(
            f"format='torch' holds no config.json, so that heads of {config.head_dim} channels could not be told: the "
            f"released models' have {settings.HEAD_DIM}; use 'official'."
        )
    by_name = {f"model.{tensor.official}": tensor for tensor in tensors(config)}
    infos = {name: TensorInfo(info(t).shape, cast or info(t).dtype) for name, t in by_name.items()}
    total, done = total_bytes(infos.values()), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, size in write_torch(path, "generator_ema" if few_step else "model", infos, lambda n: read(by_name[n])):
        done += size
        if progress is not None:
            progress(name, done, total)
    return path


def check_target(format: str) -> None:
    """Raises ValueError unless a format can be written."""
    if format not in TARGETS:
        raise ValueError(f"format={format!r} cannot be written; choices: {', '.join(map(repr, TARGETS))}.")


def _float_dtype(name: str) -> np.dtype:
    choices = ("float32", "bfloat16", "float16", "float64")
    if name not in choices:
        raise ValueError(f"dtype={name!r} is unknown; choices: {', '.join(map(repr, choices))}.")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
