"""Merging of LoRAs into weights: W' = W + s (alpha / r) B A, computed in float32 and rounded once, not in place."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from monarchrt.models.checkpoints.reading import to_ours
from monarchrt.models.checkpoints.tensor_files import TensorFile
from monarchrt.models.lora.reading import LoRA
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.mapping import tensors
from monarchrt.models.wan.checkpoints.source import Source
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel


class Scaled(NamedTuple):
    """A LoRA and its strength s."""

    lora: LoRA
    scale: float = 1.0


def parse_scaled(text: str) -> tuple[str, float]:
    """Parses `FILE` or `FILE:SCALE` into path and strength; if a file of the whole name exists, the strength is 1.

    Examples:
        >>> parse_scaled("styles/ink.safetensors:0.8"), parse_scaled("ink.safetensors")
        (('styles/ink.safetensors', 0.8), ('ink.safetensors', 1.0))

    Raises:
        ValueError: If the name of the file is empty, or the strength is not finite.
    """
    path, colon, number = text.rpartition(":")
    if colon and not Path(text).expanduser().exists():
        try:
            scale = float(number)
        except ValueError:
            return text, 1.0
        if not path or not np.isfinite(scale):
            raise ValueError(f"lora {text!r} has no file or no finite strength; write FILE or FILE:0.8.")
        return path, scale
    return text, 1.0


def merge_arrays(weight: np.ndarray, name: str, loras: Sequence[Scaled]) -> np.ndarray:
    """One tensor of a checkpoint, in its layout, with LoRAs merged.

    Args:
        weight: The tensor, which is not modified.
        name: Wan's own name for it.
        loras: LoRAs with their strengths.

    Returns:
        A new float32 array; the tensor itself if no LoRA changes it.
    """
    changing = [(lora, scale) for lora, scale in loras if name in lora.changes]
    if not changing:
        return weight
    merged = weight.astype(np.float32)  # a copy
    for lora, scale in changing:
        merged += np.float32(scale) * lora.delta(name)
    return merged


class MergedFile:
    """A checkpoint's tensors with LoRAs merged.

    Changed tensors are read in float32; `infos` has the dtype of the file, in which they should be stored.

    Args:
        file: The tensors.
        names: Wan's own name of each tensor, by its name in the file.
        loras: LoRAs for this model.
    """

    def __init__(self, file: TensorFile, names: dict[str, str], loras: Sequence[Scaled]):
        self._file, self._names, self._loras = file, names, tuple(loras)
        self.path, self.infos, self.metadata = file.path, file.infos, file.metadata

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, with LoRAs merged."""
        array = self._file.read(name)
        return merge_arrays(array, self._names[name], self._loras) if name in self._names else array


def with_loras(source: Source, loras: Sequence[Scaled]) -> Source:
    """An opened checkpoint as if it had been written with LoRAs merged.

    The attention and sampler recorded in a LoRA from `monarchrt train` take precedence; of several, the last one's.

    Args:
        source: The checkpoint, which is not modified.
        loras: LoRAs with their strengths.

    Returns:
        The checkpoint with LoRAs merged.

    Raises:
        ValueError: If a LoRA is for another model; names both.
    """
    if not loras:
        return source
    for lora, _ in loras:
        lora.check(source.config)
    stored = {t.name(source.naming): t.official for t in tensors(source.config)}
    names = {file_name: stored[name] for name, file_name in source.names.items() if name in stored}
    said = as_trained(AsTrained(source.config, source.few_step, source.trained), loras)
    file = MergedFile(source.file, names, loras)
    return dataclasses.replace(source, file=file, **said._asdict(), _checked=[])


class AsTrained(NamedTuple):
    """The attention that weights were trained for, and their settings for sampling."""

    config: WanConfig
    few_step: bool = False
    trained: settings.Trained | None = None


def as_trained(before: AsTrained, loras: Sequence[Scaled]) -> AsTrained:
    """Attention and sampling recorded in the last LoRA from `monarchrt train`; otherwise those given.

    Raises:
        ValueError: If the settings in a LoRA are invalid.
    """
    for lora, _ in loras:
        if lora.settings:
            where = f"the header of {lora.path}"
            stored = settings.attention_from_json(lora.settings, where=where)
            before = AsTrained(
                dataclasses.replace(before.config, **stored),
                settings.few_step_from_json(lora.settings),
                settings.trained_from_json(lora.settings, where=where) or before.trained,
            )
    return before


def merged(model: WanModel, loras: Sequence[Scaled]) -> WanModel:
    """A model with LoRAs merged into its weights.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0))
        >>> merged(model, []) is model
        True

    Args:
        model: The model, which is not modified.
        loras: LoRAs with their strengths.

    Returns:
        A new model, with the same dtypes and attention.

    Raises:
        ValueError: If a LoRA is for another model.
    """
    if not loras:
        return model
    for lora, _ in loras:
        lora.check(model.config)
    changed = {name for lora, _ in loras for name in lora.changes}
    graph, state = nnx.split(model)
    values = dict(nnx.to_flat_state(state))
    paths = {tuple(map(str, path)): path for path in values}
    fresh: dict[Any, np.ndarray] = {}
    for tensor in tensors(model.config):
        if tensor.official not in changed:
            continue
        path = paths[tensor.path]
        if path not in fresh:
            fresh[path] = np.array(values[path][...], np.float32)
        part = fresh[path] if tensor.layer is None else fresh[path][tensor.layer]
        for lora, scale in loras:
            if tensor.official in lora.changes:
                part += np.float32(scale) * np.asarray(to_ours(lora.delta(tensor.official), tensor.layout))
    for path, array in fresh.items():
        values[path] = values[path].replace(jnp.asarray(array, values[path][...].dtype))
    return nnx.merge(graph, nnx.from_flat_state(list(values.items())))
