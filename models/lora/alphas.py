"""The scale of each pair of matrices of a LoRA: from tensors, from the file's header, or from PEFT's file beside it."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monarchrt.models.checkpoints.json_files import parse_json, read_json
from monarchrt.models.checkpoints.tensor_files import TensorFile
from monarchrt.models.errors import printable
from monarchrt.models.lora.names import LoRAFormat

HEADER = "lora_adapter_metadata"  # diffusers' entry in a header: PEFT's settings as JSON
BESIDE = "adapter_config.json"  # PEFT's own file of settings
KOHYA_ALPHA, KOHYA_RANK = "ss_network_alpha", "ss_network_dim"  # kohya's and Musubi's entries
# settings of PEFT with which a layer is not W + s B A
_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layers that are repeated",
}
# initialisations that subtract something from W, so that the LoRA must be added to the changed W
_BEGINNINGS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


class Pair(NamedTuple):
    """The pair of matrices of a layer.

    Attributes:
        rank: Their rank.
        alpha: Alpha from a tensor beside them; None if there is none.
        called: The layer's names in the file, without and with a prefix.
    """

    rank: int
    alpha: float | None
    called: Sequence[str]


class _Pattern(NamedTuple):
    """A pattern of PEFT: layers whose name it matches, in full or after a dot, have the value."""

    expression: re.Pattern[str]
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """Stated alphas and ranks, which apply to layers without an alpha tensor.

    Attributes:
        where: "header", "adapter_config.json", "ss_network_alpha", or "" if nothing is stated.
        alpha: Alpha of layers that match no pattern.
        alphas: Patterns with other alphas; the first that matches applies.
        rank: Rank of layers that match no pattern.
        ranks: Patterns with other ranks; the first that matches applies.
        roots: Whether alpha is divided by the square root of the rank (rsLoRA).
    """

    where: str = ""
    alpha: float | None = None
    alphas: Sequence[_Pattern] = ()
    rank: float | None = None
    ranks: Sequence[_Pattern] = ()
    roots: bool = False


def settle(
    pairs: Mapping[str, Pair], path: Path, file: TensorFile, format: LoRAFormat, warn: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, float], str]:
    """Determines alpha and scale of each pair.

    Args:
        pairs: The pairs by Wan's own name of the layer.
        path: The file.
        file: The opened file, for its header.
        format: The format of its names.
        warn: Called with a line for each fact that the user should know.

    Returns:
        Alpha by layer; the factor of the product of the matrices by layer; and the source of alpha, "tensors",
        "header", "adapter_config.json", "ss_network_alpha", or "" if a layer has none.

    Raises:
        ValueError: If the settings are invalid, or of a kind of LoRA that is not supported.
    """
    silent = {name: pair for name, pair in pairs.items() if pair.alpha is None}
    stored = _of_header(path, file)
    why = ""
    if stored is None:
        stored, why = _of_kohya(silent, path, file, format) if silent else (_Stored(), "")
    alphas: dict[str, float] = {}
    scales: dict[str, float] = {}
    unsaid = []
    for name, pair in pairs.items():
        alpha = _first(stored.alphas, pair.called, stored.alpha) if pair.alpha is None else pair.alpha
        if alpha is None:
            unsaid.append(name)
        alphas[name] = float(pair.rank) if alpha is None else alpha
        scales[name] = alphas[name] / (math.sqrt(pair.rank) if stored.roots and name in silent else pair.rank)
    _note_ranks(silent, stored, path, warn)
    if zero := [name for name, alpha in alphas.items() if alpha == 0]:
        most = "nothing is changed there, where kohya's tools take 0 for the rank"
        warn(f"note: {path} has an alpha of 0 for {len(zero)} of {len(pairs)} layers, such as {zero[0]}; {most}")
    if unsaid:
        warn(f"note: {path} has no alpha; the rank is used, a scale of 1{why}")
        return alphas, scales, ""
    if silent and stored.where == KOHYA_ALPHA:
        warn(f"note: {path} has no alpha beside its matrices; {KOHYA_ALPHA} {stored.alpha:g} from its header is used")
    return alphas, scales, "tensors" if len(silent) < len(pairs) else stored.where


def _note_ranks(pairs: Mapping[str, Pair], stored: _Stored, path: Path, warn: Callable[[str], None]) -> None:
    """Notes matrices whose rank differs from the stated one."""
    said = {name: _first(stored.ranks, pair.called, stored.rank) for name, pair in pairs.items()}
    other = [name for name, rank in said.items() if rank not in (None, pairs[name].rank)]
    if other:
        name = other[0]
        warn(
            f"note: {path} states in its {stored.where} that the rank of {name} is {said[name]:g}, but its matrices "
            f"have {pairs[name].rank}, which is used{f'; likewise {len(other) - 1} more' if len(other) > 1 else ''}"
        )


def _of_header(path: Path, file: TensorFile) -> _Stored | None:
    """The settings in diffusers' entry of the header, or in PEFT's file beside; None without them."""
    if HEADER in file.metadata:
        data = parse_json(file.metadata[HEADER], f"{HEADER} in the header of {path}")
        # prefixes name the parts of a pipeline
        return _of_peft({name.removeprefix("transformer."): value for name, value in data.items()}, path, "header")
    if path.name.startswith("adapter_model") and (path.parent / BESIDE).is_file():
        return _of_peft(read_json(path.parent / BESIDE), path, BESIDE)
    return None


def _of_peft(data: dict[str, Any], path: Path, where: str) -> _Stored:
    for setting, kind in _KINDS.items():
        if data.get(setting):
            raise ValueError(f"{path} holds {kind} ({setting} in its {where}), which is not supported.")
    begun = data.get("init_lora_weights")
    for beginning, kind in _BEGINNINGS.items():
        if isinstance(begun, str) and begun.lower().startswith(beginning):
            raise ValueError(
                f"{path} began as {kind} (init_lora_weights in its {where}), which subtracts from the weights it "
                f"is added to; make it a plain LoRA by PEFT's save_pretrained, with "
                f"path_initial_model_for_weight_conversion."
            )
    roots = data.get("use_rslora")
    if roots is not None and not isinstance(roots, bool):
        raise ValueError(f"{path}: use_rslora in its {where} is {_shown(roots)}, not true or false.")
    alpha, rank = data.get("lora_alpha"), data.get("r")
    _check([] if alpha is None else [alpha], "lora_alpha", path, where)
    _check([] if rank is None else [rank], "r", path, where)
    return _Stored(
        where=where,
        alpha=None if alpha is None else float(alpha),
        alphas=_patterns(data.get("alpha_pattern"), "alpha_pattern", path, where),
        rank=None if rank is None else float(rank),
        ranks=_patterns(data.get("rank_pattern"), "rank_pattern", path, where),
        roots=bool(roots),
    )


def _of_kohya(pairs: Mapping[str, Pair], path: Path, file: TensorFile, format: LoRAFormat) -> tuple[_Stored, str]:
    """The settings in kohya's entries of the header, and the reason why they are not used, if so.

    Entries are text; "None" and 0 stand for the rank. Musubi's converter to other names multiplies alpha into the
    matrices but keeps the header.
    """
    found = {}
    for entry in (KOHYA_ALPHA, KOHYA_RANK):
        text = file.metadata.get(entry, "None").strip()
        try:
            found[entry] = 0.0 if text in ("None", "") else float(text)
        except ValueError:
            found[entry] = math.nan
        if not (math.isfinite(found[entry]) and found[entry] >= 0):
            raise ValueError(f"{path}: {entry} in its header is {_shown(text)}, not a number of 0 or more.")
    alpha, rank = found.values()
    if not alpha:
        return _Stored(), ""
    left_out = f"; {KOHYA_ALPHA} {alpha:g} in its header is left out: "
    if format != "musubi":
        return _Stored(), f"{left_out}Musubi's converter to such names multiplies it into the matrices"
    other = next((pair.rank for pair in pairs.values() if rank and pair.rank != rank), None)
    if other is not None:
        return _Stored(), f"{left_out}it is for rank {rank:g} ({KOHYA_RANK}), and there are matrices of rank {other}"
    return _Stored(where=KOHYA_ALPHA, alpha=alpha), ""


def _patterns(given: Any, setting: str, path: Path, where: str) -> tuple[_Pattern, ...]:
    if given is None:
        return ()
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {setting} in its {where} is {_shown(given)}, not names with a number each.")
    _check(given.values(), setting, path, where)
    found = []
    for text, value in given.items():
        try:
            expression = re.compile(rf"(.*\.)?({text})$")
        except re.error as error:
            raise ValueError(
                f"{path}: {setting} in its {where} has {_shown(text)}, which is not a valid regular "
                f"expression: {error}."
            ) from error
        found.append(_Pattern(expression, float(value)))
    return tuple(found)


def _check(values: Iterable[Any], setting: str, path: Path, where: str) -> None:
    """Raises ValueError unless the values are finite numbers, or for ranks integers of at least 1."""
    ranks = setting in ("r", "rank_pattern")
    for value in values:
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or (ranks and (value < 1 or value != int(value))):
            kind = "a whole number of at least 1" if ranks else "a number"
            raise ValueError(f"{path}: {setting} in its {where} has {_shown(value)}, not {kind}.")


def _first(patterns: Sequence[_Pattern], names: Sequence[str], general: float | None) -> float | None:
    for pattern in patterns:
        if any(pattern.expression.match(name) for name in names):
            return pattern.value
    return general


def _shown(value: Any) -> str:
    return printable(json.dumps(value))[:80]
