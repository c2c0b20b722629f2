"""Writing of LoRAs in the three formats that other programs read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.lora.alphas import HEADER
from monarchrt.models.lora.names import write_name
from monarchrt.models.lora.reading import LoRA
from monarchrt.models.wan.checkpoints.settings import OWN_KEY

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# endings of the names of the two matrices
_ENDINGS: dict[str, tuple[str, str]] = {
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "comfyui": (".lora_down.weight", ".lora_up.weight"),
    "musubi": (".lora_down.weight", ".lora_up.weight"),
}


class Factors(NamedTuple):
    """The change of one layer, (alpha / r) B A."""

    down: Float32[np.ndarray, "r ..."]  # A
    up: Float32[np.ndarray, "out r ..."]  # B
    alpha: float


def write_lora(
    path: str | Path,
    factors: Mapping[str, Factors],
    *,
    format: str = "comfyui",
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    whole: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a LoRA; the file appears complete or not at all.

    Alpha is stored in tensors or, for diffusers, in the header, as one number for most layers and a pattern for each
    other one.

    Args:
        path: The file, which must not exist and must end in .safetensors.
        factors: The matrices by Wan's own name of the layer, such as `blocks.0.self_attn.q`.
        format: "comfyui", "diffusers" or "musubi".
        dtype: "float32", "bfloat16" or "float16".
        settings: Training settings to store, for `monarchrt generate`.
        whole: Full differences of tensors by Wan's own name, which the format "diffusers" cannot store.

    Returns:
        The path.

    Raises:
        ValueError: If the file exists, the format or dtype is unknown, or the format cannot store `whole`.
        UserError: If it cannot be written.
    """
    path = Path(path).expanduser()
    if format not in _ENDINGS:
        raise ValueError(f"format={format!r} is unknown; choices: {', '.join(map(repr, _ENDINGS))}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choices: {', '.join(map(repr, DTYPES))}.")
    if path.exists():
        raise ValueError(f"{path} exists; give another name.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors, as files of LoRAs do.")
    if whole and format == "diffusers":
        raise ValueError(
            f"format='diffusers' has no names for differences of whole tensors, such as {next(iter(whole))}; use "
            f"'comfyui' (--to official) or 'musubi'."
        )
    kind, arrays = DTYPES[dtype], {}
    down_ending, up_ending = _ENDINGS[format]
    for module, one in factors.items():
        arrays[write_name(module, down_ending, format)] = one.down.astype(kind)
        arrays[write_name(module, up_ending, format)] = one.up.astype(kind)
        if format != "diffusers":
            arrays[write_name(module, ".alpha", format)] = np.asarray(one.alpha, np.float32)
    for tensor, array in (whole or {}).items():
        module, ending = tensor.removesuffix(".weight"), ".diff"
        if tensor.endswith(".bias"):
            module, ending = tensor.removesuffix(".bias"), ".diff_b"
        arrays[write_name(module, ending, format)] = array.astype(kind)
    metadata = {"format": "pt"} | ({} if settings is None else {OWN_KEY: json.dumps(settings)})
    if format == "diffusers":
        metadata[HEADER] = json.dumps(_header(factors))
    write_arrays(path, arrays, metadata=metadata)
    return path


def rewrite_lora(lora: LoRA, path: str | Path, *, format: str, dtype: str | None = None) -> Path:
    """Writes an opened LoRA in another format.

    Args:
        lora: The LoRA.
        path: The file, which must not exist.
        format: As in `write_lora`.
        dtype: As in `write_lora`; None keeps the file's, or float32 if it is mixed or not one of these.

    Returns:
        The path.

    Raises:
        ValueError: As in `write_lora`.
        UserError: As in `write_lora`.
    """
    factors, whole = {}, {}
    for name, change in lora.changes.items():
        module = name.removesuffix(".weight")
        if change.down is not None and change.up is not None:
            rank = lora.ranks[module]
            down, up = (lora.file.read(x).astype(np.float32) for x in (change.down, change.up))
            factors[module] = Factors(down, up, change.scale * rank)
            if change.whole is not None:
                whole[name] = lora.file.read(change.whole).astype(np.float32)
        else:
            whole[name] = lora.delta(name)
    stored = {lora.file.infos[c.down].dtype.name for c in lora.changes.values() if c.down is not None}
    kept = stored.pop() if len(stored) == 1 else "float32"
    chosen = dtype or (kept if kept in DTYPES else "float32")
    return write_lora(path, factors, format=format, dtype=chosen, settings=lora.settings or None, whole=whole or None)


def _header(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """diffusers' entry of the header: fields of PEFT's `LoraConfig`, prefixed with the part of the pipeline."""
    names = {module: write_name(module, "", "diffusers").removeprefix("transformer.") for module in factors}
    ranks = {names[module]: len(one.down) for module, one in factors.items()}
    alphas = {names[module]: one.alpha for module, one in factors.items()}
    rank, alpha = _most(list(ranks.values())), _most(list(alphas.values()))
    data = {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "lora_bias": False,
        "use_rslora": False,
        "use_dora": False,
    }
    return {f"transformer.{name}": value for name, value in data.items()}


def _most[T](values: list[T]) -> T:
    return max(values, key=values.count)
