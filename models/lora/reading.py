"""Reading of LoRA files as changes of a Wan transformer's tensors, which are read lazily."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from monarchrt.models.checkpoints.json_files import parse_json
from monarchrt.models.checkpoints.reading import open_tensors, some, weights_file
from monarchrt.models.checkpoints.recognize import what_has
from monarchrt.models.checkpoints.scaled import check_finite
from monarchrt.models.checkpoints.tensor_files import TensorFile
from monarchrt.models.errors import printable
from monarchrt.models.lora.alphas import Pair, settle
from monarchrt.models.lora.names import UNSUPPORTED, Key, LoRAFormat, family, is_lora, layer_names, read_names
from monarchrt.models.wan.checkpoints.mapping import BLOCK, BLOCK_I2V, OUTER, OUTER_I2V, checkpoint_shape, tensors
from monarchrt.models.wan.checkpoints.settings import OWN_KEY
from monarchrt.models.wan.config import WanConfig

RANK = "lora_rank"  # our entry in a header
NAMES = {1536: "Wan 2.1 1.3B", 5120: "Wan 2.1 14B", 3072: "Wan 2.2 5B"}  # by `dim`
_PREFERRED = ("pytorch_lora_weights", "adapter_model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one tensor: scale * up @ down, a full difference, or both. Fields are names of tensors in the file.

    Attributes:
        down: Matrix [r, in]; for a convolution [r, in, t, h, w].
        up: Matrix [out, r]; for a convolution with further axes of size 1.
        scale: alpha / r, the factor of the product and of a bias of `up`.
        whole: A difference with the tensor's shape.
        bias: Bias of `up`, which is added to that of the layer.
        shape: Shape of the tensor in a checkpoint.
    """

    down: str | None = None
    up: str | None = None
    scale: float = 1.0
    whole: str | None = None
    bias: str | None = None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """A file of changes of a Wan transformer's weights.

    Attributes:
        path: The file.
        format: The format of its names.
        changes: Change by Wan's own name of the tensor, such as `blocks.0.self_attn.q.weight`.
        ranks: Rank by name of the layer, for layers changed by a pair of matrices.
        alphas: Alpha by name of the layer; the rank if the file has none.
        said: Source of alpha: "tensors", "header", "adapter_config.json", "ss_network_alpha", or "" if the file has
            none.
        settings: Training settings stored by `monarchrt`; {} for other files.
        file: The tensors.
    """

    path: Path
    format: LoRAFormat
    changes: dict[str, Change]
    ranks: dict[str, int]
    alphas: dict[str, float]
    said: str
    settings: dict[str, Any]
    file: TensorFile = dataclasses.field(repr=False, compare=False)

    def delta(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """The change of a checkpoint's tensor, in its layout; read from the file at each call.

        Raises:
            ValueError: If it contains NaN or infinity, or is stored in integers without a scale.
        """
        change = self.changes[name]
        total = np.zeros(change.shape, np.float32)
        if change.down is not None and change.up is not None:
            down, up = self._read(change.down), self._read(change.up)
            total += np.float32(change.scale) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(
                change.shape
            )
        if change.bias is not None:
            total += np.float32(change.scale) * self._read(change.bias).reshape(change.shape)
        if change.whole is not None:
            total += self._read(change.whole).reshape(change.shape)
        return total

    def _read(self, name: str) -> np.ndarray:
        array = self.file.read(name)
        if np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{self.path}: {printable(name)} is {array.dtype} without a scale; it should be a float.")
        return check_finite(array, name, self.path).astype(np.float32)

    @functools.cached_property
    def width(self) -> int | None:
        """Channels `dim` of the transformer that it is for, if a tensor shows it."""
        for name, change in self.changes.items():
            if re.search(r"(self_attn|cross_attn)\.[qo]\.weight$|ffn\.0\.weight$|time_projection", name):
                return change.shape[-1]
            if re.search(r"modulation$|norm_[qk]\.weight$|norm3\.|ffn\.2\.(weight|bias)$|_attn\.\w\.bias$", name):
                return change.shape[-1] if name.endswith(("modulation", "bias")) else change.shape[0]
        return None

    @functools.cached_property
    def blocks(self) -> int:
        """Index of the last block that it changes, plus one."""
        return 1 + max((int(name.split(".")[1]) for name in self.changes if name.startswith("blocks.")), default=-1)

    @property
    def is_i2v(self) -> bool:
        """Whether it changes layers that only image-to-video transformers have."""
        return any(re.search(r"_img\b|^img_emb\.", name) for name in self.changes)

    @property
    def model(self) -> str:
        """Description of the transformer that it is for."""
        width = [] if self.width is None else [f"width {self.width}"]
        kind = [*width, f"{self.blocks} blocks" if self.blocks else "", "image-to-video" if self.is_i2v else ""]
        return f"{NAMES.get(self.width or 0, 'a Wan transformer')} ({', '.join(filter(None, kind))})"

    @property
    def summary(self) -> str:
        """Rank, alpha and layers, in words: `rank 32, alpha 16, 300 layers`."""
        return ", ".join(filter(None, (_numbers("rank", self.ranks), _numbers("alpha", self.alphas), self._layers)))

    @property
    def _layers(self) -> str:
        whole = len(self.changes) - len(self.ranks)
        layers = f"{len(self.ranks)} layers" if self.ranks else ""
        return ", ".join(filter(None, (layers, f"{whole} tensors with differences of their own" if whole else "")))

    def check(self, config: WanConfig) -> None:
        """Checks that it is for a transformer.

        Raises:
            ValueError: If it changes a tensor that the transformer does not have, or that has another shape.
        """
        shapes = {tensor.official: checkpoint_shape(config, tensor) for tensor in tensors(config)}
        lacking = [name for name in self.changes if name not in shapes]
        other = [name for name, change in self.changes.items() if change.shape != shapes.get(name, change.shape)]
        if not lacking and not other:
            return
        if other:
            name = other[0]
            why = f"{name} is {list(shapes[name])}, and the file changes {list(self.changes[name].shape)}"
        else:
            why = f"it has no {some(lacking, 2)}"
        raise ValueError(f"{self.path} is a LoRA for {self.model}, but {describe(config)} is loaded: {why}.")


def _numbers(what: str, values: dict[str, Any]) -> str:
    """The range of the values of all layers: `rank 4`, `rank 4 to 64`."""
    numbers = sorted(set(values.values()))
    return f"{what} {' to '.join(f'{n:g}' for n in dict.fromkeys((numbers[0], numbers[-1])))}" if numbers else ""


def describe(config: WanConfig) -> str:
    """Description of a transformer.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> describe(wan_config("wan2.1-t2v-1.3b"))
        'Wan 2.1 1.3B (width 1536, 30 blocks, text-to-video)'
    """
    kind = {"t2v": "text-to-video", "i2v": "image-to-video"}[config.model_type]
    name = NAMES.get(config.dim, "a Wan transformer")
    return f"{name} (width {config.dim}, {config.num_layers} blocks, {kind})"


def lora_file(path: Path) -> Path | None:
    """The LoRA file at a path, which may be the file or a folder with it; None for other or unreadable files."""
    path = path.expanduser()
    if path.is_dir():
        stem = next((stem for stem in _PREFERRED if (path / f"{stem}.safetensors").is_file()), None)
        path = path / f"{stem}.safetensors"
    try:
        return path if path.is_file() and is_lora(open_tensors(path).infos) else None
    except ValueError:
        return None


def open_lora(path: str | Path, *, warn: Callable[[str], None] = lambda line: None) -> LoRA:
    """Opens a LoRA of a Wan transformer in any of the three formats; only names, shapes and alphas are read.

    Args:
        path: A file, or a folder with one.
        warn: Called with a line if the file has no alpha, so that the rank is used, or has inconsistent settings.

    Returns:
        The LoRA.

    Raises:
        ValueError: If it cannot be read, is not a LoRA or is one for other models, has a tensor that is not part of a
            LoRA, or lacks one matrix of a pair.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"lora {str(path)!r} does not exist; give a .safetensors file or a run folder.")
    where = weights_file(path, preferred=_PREFERRED) if path.is_dir() else path
    file = open_tensors(where)
    if (other := family(file.infos)) is not None:
        raise ValueError(f"{where} is for {other}, not for Wan 2.1: it holds {some(list(file.infos), 1)}.")
    if not is_lora(file.infos):
        raise ValueError(f"{where} is not a LoRA: it holds {some(list(file.infos), 2)}.")
    if (kind := what_has(file.infos, UNSUPPORTED)) is not None:
        raise ValueError(f"{where} holds {kind[0]}, which are not supported: {some(kind[1], 2)}.")
    names = read_names(file.infos)
    if names.unknown:
        raise ValueError(
            f"{where} holds {len(names.unknown)} of {len(file.infos)} tensors that belong to no part of a Wan "
            f"transformer: {some(names.unknown)}."
        )
    return _assemble(where, file, names.keys, names.format, warn)


def _assemble(
    path: Path, file: TensorFile, keys: dict[str, Key], format: LoRAFormat, warn: Callable[[str], None]
) -> LoRA:
    """Builds the LoRA from the meanings of its tensors."""
    modules: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        parts = modules.setdefault(key.module, {})
        if key.part in parts:
            raise ValueError(f"{path}: {printable(parts[key.part])} and {printable(name)} are the same part of a LoRA.")
        parts[key.part] = name
    ranks: dict[str, int] = {}
    for module, parts in modules.items():
        lacks = [part for part in ("down", "up") if part not in parts]
        if len(lacks) == 1 or (len(lacks) == 2 and parts.keys() & {"alpha", "up_bias"}):
            raise ValueError(
                f"{path} lacks the {lacks[0]} matrix of {module}, of which it has {printable(min(parts.values()))}."
            )
        if not lacks:
            ranks[module] = _rank(path, file, parts)
    own_alphas = {name: _alpha(path, file, parts["alpha"]) for name, parts in modules.items() if "alpha" in parts}
    pairs = {name: Pair(rank, own_alphas.get(name), layer_names(modules[name]["down"])) for name, rank in ranks.items()}
    alphas, scales, said = settle(pairs, path, file, format, warn)
    changes: dict[str, Change] = {}
    for module, parts in modules.items():
        _add(changes, path, file, module, parts, scales.get(module, 1.0))
    own = parse_json(file.metadata[OWN_KEY], "the file's header") if OWN_KEY in file.metadata else {}
    return LoRA(
        path=path, format=format, changes=changes, ranks=ranks, alphas=alphas, said=said, settings=own, file=file
    )  # fmt: skip


def _add(
    changes: dict[str, Change], path: Path, file: TensorFile, module: str, parts: dict[str, str], scale: float
) -> None:
    """Adds the changes of a module, by the names of its tensors."""
    leaves = _leaves(module)
    weight = module if "" in leaves else f"{module}.weight"
    if "down" in parts:
        if "linear" not in leaves.values() and "conv" not in leaves.values():
            raise ValueError(f"{path}: {printable(parts['down'])} is a matrix, but {module} has none.")
        down, up = file.infos[parts["down"]].shape, file.infos[parts["up"]].shape
        changes[weight] = Change(down=parts["down"], up=parts["up"], scale=scale, shape=(up[0], *down[1:]))
    if "diff" in parts:
        shape = file.infos[parts["diff"]].shape
        before = changes.get(weight, Change(shape=shape))
        if before.shape != shape:
            raise ValueError(
                f"{path}: {printable(parts['diff'])} is {list(shape)}, its matrices give {list(before.shape)}."
            )
        changes[weight] = dataclasses.replace(before, whole=parts["diff"])
    for part, field in (("diff_b", "whole"), ("up_bias", "bias")):
        if part not in parts:
            continue
        if "bias" not in leaves:
            raise ValueError(f"{path}: {printable(parts[part])} changes a bias, but {module} has none.")
        shape = file.infos[parts[part]].shape
        before = changes.get(f"{module}.bias", Change(shape=shape, scale=scale))
        changes[f"{module}.bias"] = dataclasses.replace(before, **{field: parts[part]})


@functools.cache
def _rules() -> dict[str, dict[str, str]]:
    """Layout of each array by its name in the module, by Wan's own name of the module."""
    return {
        rule.official: {theirs: layout for _, theirs, layout in rule.arrays}
        for rule in (*OUTER, *OUTER_I2V, *BLOCK, *BLOCK_I2V)
    }


def _leaves(module: str) -> dict[str, str]:
    return _rules()[re.sub(r"^blocks\.\d+\.", "blocks.{i}.", module)]


def _rank(path: Path, file: TensorFile, parts: dict[str, str]) -> int:
    """The rank of a pair of matrices; raises ValueError if their shapes do not match."""
    down, up = file.infos[parts["down"]].shape, file.infos[parts["up"]].shape
    whole = len(down) in (2, 5) and len(up) == len(down) and math.prod(up[2:]) == 1 and down[0] == up[1] > 0
    if not whole:
        raise ValueError(
            f"{path}: {printable(parts['down'])} is {list(down)} and {printable(parts['up'])} {list(up)}; they must be "
            f"[rank, in] and [out, rank]."
        )
    return down[0]


def _alpha(path: Path, file: TensorFile, name: str) -> float:
    if math.prod(file.infos[name].shape) != 1:
        raise ValueError(f"{path}: {printable(name)} is {list(file.infos[name].shape)}, not one number.")
    return float(check_finite(file.read(name), name, path).reshape(()))
