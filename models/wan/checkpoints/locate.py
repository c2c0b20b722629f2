"""Finding the file with a transformer's weights from a path or name; recognises other models by their folders."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from monarchrt.models.checkpoints.hub import fetch, names_repository
from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.checkpoints.reading import PICKLES, weights_file
from monarchrt.models.checkpoints.recognize import SUPPORTED

type Format = Literal["official", "diffusers", "torch", "orbax"]
# Wan 2.2's two networks: folders in its official layout, and names of single files of one network
EXPERTS = ("high_noise_model", "low_noise_model")
_EXPERT = re.compile(r"(high|low)[ _.-]?noise", re.IGNORECASE)
PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline", "WanImageToVideoPipeline")


class Place(NamedTuple):
    """The location of weights: folder or file for messages, the file to open (or Orbax's folder), and the format."""

    path: Path
    file: Path
    format: Format


def locate(path: str | Path, revision: str | None = None) -> Place:
    """Finds the weights of one transformer.

    Args:
        path: As in `monarchrt.models.wan.checkpoints.source.open_source`.
        revision: Revision of a Hugging Face repository.

    Returns:
        The location.

    Raises:
        ValueError: If there are no weights, several without a preferred one, or the folders belong to another model,
            which the message names.
    """
    local = _local(path, revision)
    if local.is_file():
        _refuse_expert(local)
        return Place(local, local, "torch" if local.suffix in PICKLES else "official")
    _refuse_two_networks(local)
    if (local / "model_index.json").is_file() and (local / "transformer").is_dir():
        local = local / "transformer"
    else:
        _refuse_expert(local)
    if (local / ".metadata").is_file():
        raise ValueError(
            f"{local} is a torch distributed checkpoint; make one file of it first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {local} model.pt"
        )
    if (local / "params").is_dir() and (local / "config.json").is_file():
        return Place(local, local, "orbax")
    weights = weights_file(local, preferred=("diffusion_pytorch_model",))
    return Place(local, weights, "torch" if weights.suffix in PICKLES else "official")


def _refuse_two_networks(folder: Path) -> None:
    """Raises ValueError for a pipeline of two networks or of another model, by its folders and `model_index.json`."""
    index = folder / "model_index.json"
    data: dict[str, Any] = read_json(index) if index.is_file() else {}
    second = data.get("transformer_2")
    has_second = isinstance(second, list) and any(second)
    if (folder / "transformer_2").exists() or has_second or data.get("boundary_ratio") is not None:
        raise ValueError(
            f"{folder} is Wan 2.2 A14B, a pipeline of two networks, transformer for high noise and transformer_2 for "
            f"low (boundary_ratio={data.get('boundary_ratio')}); {SUPPORTED}."
        )
    if there := [name for name in EXPERTS if (folder / name).is_dir()]:
        raise ValueError(
            f"{folder} is Wan 2.2 A14B, two networks of which it holds {' and '.join(there)}; {SUPPORTED}."
        )
    kind = data.get("_class_name")
    if data.get("expand_timesteps") is True:
        raise ValueError(f"{folder} is Wan 2.2 TI2V-5B (expand_timesteps); {SUPPORTED}.")
    if kind is not None and kind not in PIPELINES:
        raise ValueError(f"{folder} is a pipeline of {kind!r}, not of Wan 2.1; {SUPPORTED}.")


def _refuse_expert(path: Path) -> None:
    """Raises ValueError for one of Wan 2.2's two networks, which only its name distinguishes from a whole model."""
    whole = path.parent
    if path.name in ("transformer", "transformer_2") and (whole / "model_index.json").is_file():
        _refuse_two_networks(whole)
    if path.name == "transformer_2" or _EXPERT.search(path.name) or whole.name in EXPERTS:
        raise ValueError(
            f"{path} is by its name one of the two networks of Wan 2.2 A14B, which is half a model; {SUPPORTED}. If it "
            f"is a whole model, give it another name."
        )


def _local(path: str | Path, revision: str | None) -> Path:
    """The path, or the local copy of a Hugging Face repository of that name."""
    local = Path(path).expanduser()
    try:
        there = local.exists()
    except (OSError, ValueError) as error:  # a name that is too long or has a null byte
        raise ValueError(f"path={str(path)[:200]!r} is not a path: {error}.") from error
    if there and not (local.is_file() or local.is_dir()):
        raise ValueError(f"path={str(path)!r} is a pipe or a device; save it as a file first.")
    if there:
        return local
    if not names_repository(path):
        raise ValueError(
            f"path={str(path)!r} does not exist; give a checkpoint's file or folder, a run folder, or a repository of "
            f"the Hugging Face hub, owner/name."
        )
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    patterns += ["model_index.json", *(f"transformer/{pattern}" for pattern in patterns)]
    # small files that identify pipelines of two networks
    patterns += ["scheduler/scheduler_config.json", "transformer_2/config.json", *(f"{e}/config.json" for e in EXPERTS)]
    return fetch(str(path), patterns, revision=revision)
