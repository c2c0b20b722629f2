"""Finding out what a path holds: format, names, settings, and what is missing or wrong."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from monarchrt.models.checkpoints.hub import fetch, names_repository
from monarchrt.models.checkpoints.json_files import parse_json, read_json
from monarchrt.models.checkpoints.reading import (
    PICKLES,
    Entry,
    Problems,
    find_problems,
    match_names,
    open_tensors,
    some,
    weights_file,
)
from monarchrt.models.checkpoints.tensor_files import TensorFile, TensorInfo
from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.mapping import Naming, Tensor, parameter_shapes, tensors
from monarchrt.models.wan.checkpoints.scheduler import SchedulerSettings, scheduler_settings
from monarchrt.models.wan.config import WanConfig

type Format = Literal["official", "diffusers", "torch", "orbax"]
PREFIXES = ("model.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Self-Forcing's files: the averaged generator is what it evaluates.
PREFERENCE = ("generator_ema", "generator", "model")
DISTILLED = "generator"  # what the names of Self-Forcing's sets of distilled weights begin with
LORA = re.compile(r"lora_(A|B|up|down)\b|\.lora\.|_lora\.|\.alpha$|\.diff_b?$")


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: Folder or file that the weights are in.
        format: What wrote it.
        naming: Whose names the tensors have, after `prefixes` are stripped.
        config: The model that its `config.json`, or else its tensors, describe.
        config_path: The `config.json`, if there is one.
        names: Official or diffusers name to the name in the file.
        file: The tensors.
        weights: Which set of tensors of a `.pt` file is used, "" where there is one only.
        sets: All sets of a `.pt` file.
        few_step: Whether the weights are distilled, to be sampled in few steps: Self-Forcing's generators, and what was
            made of them.
    """

    path: Path
    format: Format
    naming: Naming
    config: WanConfig
    config_path: Path | None
    names: dict[str, str]
    file: TensorFile
    weights: str = ""
    sets: tuple[str, ...] = ("",)
    few_step: bool = False

    def info(self, tensor: Tensor) -> TensorInfo:
        """Shape and dtype of a tensor that is there."""
        return self.file.infos[self.names[tensor.name(self.naming)]]

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor in the checkpoint's own layout."""
        return self.file.read(self.names[tensor.name(self.naming)])

    def entries(self) -> list[Entry]:
        """Every tensor of `config` under its name in the file, or the format's own if it is not there."""
        return [
            Entry(tensor.path, tensor.layer, {self.naming: self.names.get(name, name)}, tensor.layout)
            for tensor in tensors(self.config)
            for name in (tensor.name(self.naming),)
        ]

    @property
    def scheduler(self) -> SchedulerSettings | None:
        """What the `scheduler_config.json` of its pipeline says; None if it is in none, or the weights are distilled.

        Raises:
            ValueError: If that file cannot be read, or is of a scheduler that we have not.
        """
        return None if self.few_step else scheduler_settings(self.path)

    def problems(self) -> Problems:
        """Names that are missing, names that are unexpected, and sentences about wrong tensors."""
        return find_problems(self.file, self.entries(), parameter_shapes(self.config), naming=self.naming)

    def check(self) -> None:
        """Raises ValueError unless every tensor of `config` is there, in its shape, and no other."""
        shapes = parameter_shapes(self.config)
        match_names(self.file, self.entries(), shapes, where=self.path, naming=self.naming, model="a Wan model")


def open_source(
    path: str | Path, *, config: WanConfig | None = None, weights: str | None = None, revision: str | None = None
) -> Source:
    """Opens a checkpoint of any supported format, without reading tensors.

    Args:
        path: A folder of the official or the diffusers format (or a pipeline's, with `transformer/`), a safetensors
            file or its index, a `.pt` file, or a Hugging Face repository `owner/name` if no such path exists.
        config: The model's sizes, for files without `config.json` whose heads are not of 128 channels.
        weights: Set of tensors of a `.pt` file: "generator_ema", "generator", "critic", "model". None takes the first
            of the first two and the last that is there.
        revision: Of a Hugging Face repository.

    Returns:
        The opened checkpoint.

    Raises:
        ValueError: If there is nothing that can be read, with the reason.
    """
    path = _locate(path, revision)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        if (path / "model_index.json").is_file() and (path / "transformer").is_dir():
            path = folder = path / "transformer"
        file_path, format_ = _weights_file(path)
    else:
        file_path, format_ = path, "torch" if path.suffix in PICKLES else "official"
    if format_ == "orbax":
        from monarchrt.models.wan.checkpoints.orbax import open_orbax

        return open_orbax(path)
    file = open_tensors(file_path, weights=weights, preference=PREFERENCE)
    sets, chosen = (tuple(file.sets), file.weights) if isinstance(file, TorchFile) else (("",), "")
    names = strip_prefixes(file.infos)
    naming = _naming(path, names)
    config_path = folder / "config.json"
    # A .pt file beside a config.json is not necessarily described by it.
    if config_path.is_file() and (format_ != "torch" or path.is_dir()):
        data = read_json(config_path)
        described, _ = settings.config_from_json(data, where=str(config_path))
        own = data.get(settings.OWN_KEY)
    else:
        config_path = None
        header = getattr(file, "metadata", {}).get(settings.OWN_KEY)
        own = parse_json(header, "the file's header") if header else None
        described = _describe(names, file, naming, config, own)
    few_step = chosen.startswith(DISTILLED) or settings.few_step_from_json(own)
    if format_ == "official" and naming == "diffusers":
        format_ = "diffusers"
    return Source(path, format_, naming, described, config_path, names, file, chosen, sets, few_step)


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Bare name to name in the file; wrappers' prefixes are dropped wherever they stand."""
    bare: dict[str, str] = {}
    for name in names:
        short = name
        for wrapper in PREFIXES[1:]:
            short = short.replace(wrapper, "")
        short = short.removeprefix(PREFIXES[0])
        if short in bare:
            raise ValueError(f"two tensors are {short}: {bare[short]} and {name}; leave one of them in the file.")
        bare[short] = name
    return bare


def _describe(
    names: dict[str, str], file: TensorFile, naming: Naming, config: WanConfig | None, own: dict[str, Any] | None
) -> WanConfig:
    """The configuration read off the tensors' shapes."""
    official = names
    if naming == "diffusers":
        layers = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
        both = WanConfig(dim=6, ffn_dim=1, num_heads=1, num_layers=layers, model_type="i2v")
        official = {t.official: names[t.diffusers] for t in tensors(both) if t.diffusers in names}
    infos = {name: file.infos[stored] for name, stored in official.items()}
    described = settings.config_from_shapes(infos, official, num_heads=config.num_heads if config else None)
    stored = settings.attention_from_json(own, where="the file's header")
    kept = {} if config is None else {"text_len": config.text_len, "eps": config.eps}
    return dataclasses.replace(described, **kept, **stored)


def _naming(path: Path, names: dict[str, str]) -> Naming:
    if lora := [name for name in names if LORA.search(name)]:
        raise ValueError(f"{path} is a LoRA or a patch for a model, not a model: it holds {some(lora, 2)}.")
    if any(".attn1." in name or name.startswith("condition_embedder.") for name in names):
        return "diffusers"
    if any(".self_attn." in name for name in names):
        return "official"
    raise ValueError(f"{path} is not a Wan transformer: it holds {some(list(names))}.")


def _weights_file(folder: Path) -> tuple[Path, Format]:
    if (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder} is a torch distributed checkpoint; make one file of it first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
        )
    if (folder / "params").is_dir() and (folder / "config.json").is_file():
        return folder, "orbax"
    found = weights_file(folder, preferred=("diffusion_pytorch_model",))
    return found, "torch" if found.suffix in PICKLES else "official"


def _locate(path: str | Path, revision: str | None) -> Path:
    """The path, or the local copy of a Hugging Face repository of that name."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not names_repository(path):
        raise ValueError(f"path={str(path)!r} does not exist.")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    patterns += ["model_index.json", *(f"transformer/{pattern}" for pattern in patterns)]
    patterns += ["scheduler/scheduler_config.json"]
    return fetch(str(path), patterns, revision=revision)
