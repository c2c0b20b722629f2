"""Opening of checkpoints: their format, names, settings, and missing or wrong tensors."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monarchrt.models.checkpoints.json_files import parse_json, read_json
from monarchrt.models.checkpoints.names import strip_prefixes
from monarchrt.models.checkpoints.reading import Entry, Problems, find_problems, match_names, open_tensors, some
from monarchrt.models.checkpoints.recognize import LORA, OTHERS, QUANTIZED, RELATIVES, SUPPORTED, what_has
from monarchrt.models.checkpoints.scaled import check_finite
from monarchrt.models.checkpoints.tensor_files import TensorFile, TensorInfo
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.locate import Format, Place, locate
from monarchrt.models.wan.checkpoints.mapping import Naming, Tensor, parameter_shapes, tensors
from monarchrt.models.wan.checkpoints.scheduler import SchedulerSettings, scheduler_settings
from monarchrt.models.wan.config import WanConfig

# sets in Self-Forcing's files; it evaluates the averaged generator
PREFERENCE = ("generator_ema", "generator", "model")
DISTILLED = "generator"  # prefix of the names of Self-Forcing's sets of distilled weights
ANCHORS = ("patch_embedding.weight",)  # the name in both the official and diffusers' format


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: Folder or file of the weights.
        format: Format of the checkpoint.
        naming: Naming of the tensors, without prefixes.
        config: Configuration of the model, from its `config.json` or else from its tensors.
        config_path: The `config.json`, if there is one.
        names: Name in the file by official or diffusers' name.
        file: The tensors.
        weights: The set of tensors in a `.pt` file; "" if there is only one.
        sets: All sets of a `.pt` file.
        few_step: Whether the weights are distilled, to be sampled in few steps: Self-Forcing's generators, and
            checkpoints made from them.
        trained: Settings of the training, if stored.
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
    trained: settings.Trained | None = None
    _checked: list[bool] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def info(self, tensor: Tensor) -> TensorInfo:
        """Shape and dtype of a tensor in the file."""
        return self.file.infos[self.names[tensor.name(self.naming)]]

    def read(self, tensor: Tensor) -> np.ndarray:
        """Reads a tensor in the checkpoint's own layout; raises ValueError if it has NaN or infinite values."""
        name = self.names[tensor.name(self.naming)]
        return check_finite(self.file.read(name), name, self.path)

    def entries(self) -> list[Entry]:
        """Every tensor of `config` with its name in the file, or in the format if the file lacks it."""
        return [
            Entry(tensor.path, tensor.layer, {self.naming: self.names.get(name, name)}, tensor.layout)
            for tensor in tensors(self.config)
            for name in (tensor.name(self.naming),)
        ]

    @property
    def scheduler(self) -> SchedulerSettings | None:
        """Settings from its pipeline's `scheduler_config.json`; None without one, or if the weights are distilled.

        Raises:
            ValueError: If the file cannot be read, or its scheduler is not supported.
        """
        return None if self.few_step else scheduler_settings(self.path)

    def problems(self) -> Problems:
        """Missing names, unexpected names, and sentences about wrong tensors."""
        return find_problems(
            self.file, self.entries(), parameter_shapes(self.config), naming=self.naming, ignore=self._elsewhere
        )

    @property
    def _elsewhere(self) -> set[str]:
        """Tensors of other parts of a pipeline in the same file, which are ignored."""
        return self.file.infos.keys() - self.names.values()

    def check(self) -> None:
        """Raises ValueError unless the file has exactly the tensors of `config`; checks only once."""
        if self._checked:
            return
        shapes = parameter_shapes(self.config)
        match_names(
            self.file,
            self.entries(),
            shapes,
            where=self.path,
            naming=self.naming,
            model="a Wan model",
            ignore=self._elsewhere,
        )
        self._checked.append(True)


def open_source(
    path: str | Path,
    *,
    config: WanConfig | None = None,
    weights: str | None = None,
    revision: str | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> Source:
    """Opens a checkpoint of any supported format, without reading tensors.

    Args:
        path: A folder of the official or the diffusers format (or a pipeline's, with `transformer/`), a safetensors
            file or its index, a `.pt` file, or a Hugging Face repository `owner/name` if no such path exists.
        config: Sizes of the model, for files without `config.json` whose heads do not have 128 channels.
        weights: Set of tensors in a `.pt` file, such as "generator_ema", "generator", "critic" or "model". None: the
            first of "generator_ema", "generator" and "model" that exists.
        revision: Revision of a Hugging Face repository.
        num_heads: Number of attention heads, for files without `config.json` whose heads do not have 128 channels.
        head_dim: Channels of a head, likewise.

    Returns:
        The opened checkpoint.

    Raises:
        ValueError: If it cannot be read, which the message explains, or has other heads than given.
    """
    heads = Heads(num_heads, head_dim)
    place = locate(path, revision)
    if place.format == "orbax":
        return heads.checked(_open_orbax(place))
    file = open_tensors(place.file, weights=weights, preference=PREFERENCE)
    sets, chosen = tuple(getattr(file, "sets", ("",))), getattr(file, "weights", "")
    names = strip_prefixes(file.infos, anchors=ANCHORS, where=place.path)
    naming = _naming(place.path, names)
    folder = place.file.parent
    config_path, data = folder / "config.json", {}
    # a config.json beside a .pt file need not describe it
    if config_path.is_file() and (place.format != "torch" or place.path.is_dir()):
        data = read_json(config_path)
    if settings.describes_model(data):
        described, _ = settings.config_from_json(data, where=str(config_path))
        own = data.get(settings.OWN_KEY)
    else:
        config_path = None
        header = file.metadata.get(settings.OWN_KEY)
        own = parse_json(header, "the file's header") if header else None
        described = _describe(names, file, naming, config, own, heads)
    if config is None:
        _refuse_relative(place.path, described)
    few_step = chosen.split(".")[-1].startswith(DISTILLED) or settings.few_step_from_json(own)
    trained = settings.trained_from_json(own, where=str(config_path or "the file's header"))
    format_: Format = "diffusers" if (place.format, naming) == ("official", "diffusers") else place.format
    return heads.checked(
        Source(place.path, format_, naming, described, config_path, names, file, chosen, sets, few_step, trained)
    )


class Heads(NamedTuple):
    """Attention heads given by the caller, since tensors do not determine them; None if not given."""

    number: int | None = None
    channels: int | None = None

    def of(self, dim: int, config: WanConfig | None) -> int | None:
        """Their number in a network with `dim` channels; None if nothing is given."""
        numbers = [n for n in range(1, dim // 6 + 1) if not dim % n and not dim // n % 2]
        sizes = [dim // n for n in reversed(numbers)]
        for name, value, good in (("num_heads", self.number, numbers), ("head_dim", self.channels, sizes)):
            if value is not None and value not in good:
                shown = ", ".join(map(str, good[:12])) + (", ..." if len(good) > 12 else "")
                raise ValueError(f"{name}={value} does not fit the network's width {dim}; choices: {shown}.")
        if self.number is None and self.channels is not None:
            return dim // self.channels
        return config.num_heads if self.number is None and config is not None else self.number

    def checked(self, source: Source) -> Source:
        """Returns the source; raises ValueError if it has other heads."""
        sizes = source.config
        for name, value, there in (
            ("num_heads", self.number, sizes.num_heads),
            ("head_dim", self.channels, sizes.head_dim),
        ):
            if value is not None and value != there:
                raise ValueError(
                    f"{name}={value}: {source.path} has {sizes.num_heads} heads of {sizes.head_dim} channels; "
                    f"leave {name} out."
                )
        return source


def _open_orbax(place: Place) -> Source:
    """Opens a checkpoint written by `save_orbax`."""
    from monarchrt.models.wan.checkpoints.orbax import OrbaxFile

    config_path = place.path / "config.json"
    data = read_json(config_path)
    config, _ = settings.config_from_json(data, where=str(config_path))
    extra = {name: data[name] for name in ("image_dim", "param_dtype") if name in data}
    try:
        config = dataclasses.replace(config, **extra)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: {error}") from error
    file = OrbaxFile(place.path, config)
    names = {tensor.official: tensor.official for tensor in tensors(config)}
    own = data.get(settings.OWN_KEY)
    few_step, trained = settings.few_step_from_json(own), settings.trained_from_json(own, where=str(config_path))
    return Source(place.path, "orbax", "official", config, config_path, names, file, few_step=few_step, trained=trained)


def _describe(
    names: dict[str, str],
    file: TensorFile,
    naming: Naming,
    config: WanConfig | None,
    own: dict[str, Any] | None,
    heads: Heads,
) -> WanConfig:
    """The configuration, read from the shapes of tensors."""
    official = names
    if naming == "diffusers":
        layers = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
        both = WanConfig(dim=6, ffn_dim=1, num_heads=1, num_layers=layers, model_type="i2v")
        official = {t.official: names[t.diffusers] for t in tensors(both) if t.diffusers in names}
    infos = {name: file.infos[stored] for name, stored in official.items()}
    patch = infos.get("patch_embedding.weight")
    number = heads.of(patch.shape[0], config) if patch is not None and patch.shape else None
    described = settings.config_from_shapes(infos, official, num_heads=number)
    stored = settings.attention_from_json(own, where="the file's header")
    kept = {} if config is None else {"text_len": config.text_len, "eps": config.eps}
    return dataclasses.replace(described, **kept, **stored)


def _naming(path: Path, names: dict[str, str]) -> Naming:
    """The naming of a Wan transformer's tensors; raises ValueError, which names the kind of file, for other models."""
    if (kind := what_has(names, QUANTIZED, LORA, RELATIVES)) is not None:
        what, examples = kind
        raise ValueError(f"{path} is {what}: it holds {some(examples, 2)}; {SUPPORTED}.")
    if any(re.match(r"blocks\.\d+\.attn1\.|condition_embedder\.", name) for name in names):
        return "diffusers"
    if any(re.match(r"blocks\.\d+\.self_attn\.[qkvo]\.", name) for name in names):
        return "official"
    kind = what_has(names, OTHERS)
    what = f"not a Wan transformer but {kind[0]}" if kind else "not a Wan transformer"
    raise ValueError(f"{path} is {what}: it holds {some(kind[1] if kind else list(names))}; {SUPPORTED}.")


def _refuse_relative(path: Path, config: WanConfig) -> None:
    """Raises ValueError for other models that have Wan 2.1's tensors but different channels."""
    channels = config.in_channels, config.out_channels
    what = None
    if channels == (48, 48) and config.dim == 3072:
        what = "Wan 2.2 TI2V-5B (48 channels, of another VAE)"
    elif channels == (36, 16) and config.model_type == "t2v":
        what = "one of the two networks of Wan 2.2 I2V-A14B (36 input channels, no image embedding)"
    elif config.out_channels == 16 and config.in_channels != (36 if config.model_type == "i2v" else 16):
        what = f"a Wan model with a control input, such as Fun Control ({config.in_channels} input channels)"
    if what is not None:
        raise ValueError(f"{path} is {what}; {SUPPORTED}.")
