"""The description of a LoRA by `monarchrt inspect FILE`."""

import collections
import math
import re

from monarchrt.models.attention.notation import to_text
from monarchrt.models.checkpoints.reading import some
from monarchrt.models.lora.reading import LoRA
from monarchrt.models.wan.checkpoints import settings

FORMATS = {
    "diffusers": "diffusers (PEFT)",
    "comfyui": "ComfyUI (Wan's own names)",
    "musubi": "Musubi (kohya, names without dots)",
}


def report(lora: LoRA) -> list[str]:
    """Describes a LoRA, one line per fact.

    Raises:
        ValueError: If its training settings are invalid.
    """
    infos = lora.file.infos.values()
    dtypes = collections.Counter(info.dtype.name for info in infos).most_common()
    where = {"": "not said, taken to be the rank", "tensors": "a tensor for each layer"}.get(lora.said, lora.said)
    lines = {
        "path": str(lora.path),
        "format": f"a LoRA, {FORMATS[lora.format]}",
        "model": lora.model,
        "rank": _spread(lora.ranks) or "none, it has no pairs of matrices",
        "alpha": f"{_spread(lora.alphas)} ({where})" if lora.alphas else "none",
        "layers": _layers(lora) or "none",
        "differences": some(sorted(name for name, change in lora.changes.items() if change.down is None), 4) or "none",
        "parameters": f"{sum(math.prod(info.shape) for info in infos):,}",
        "dtype": ", ".join(f"{name} ({count} tensors)" for name, count in dtypes),
    }
    if lora.settings:
        stored = settings.attention_from_json(lora.settings, where=f"the header of {lora.path}")
        attention = stored.get("attention")
        lines["attention"] = to_text(attention) if attention is not None else "not said"
        trained = settings.trained_from_json(lora.settings, where=f"the header of {lora.path}")
        lines["sampling"] = settings.describe_sampling(settings.few_step_from_json(lora.settings), trained)
    return [f"{name:<12}{value}" for name, value in lines.items()]


def _spread(values: dict[str, int] | dict[str, float]) -> str:
    """The values with their numbers of layers, most common first."""
    counts = collections.Counter(values.values()).most_common()
    if len(counts) == 1:
        return f"{counts[0][0]:g}"
    shown = ", ".join(f"{value:g} ({count} layers)" for value, count in counts[:4])
    return shown + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")


def _layers(lora: LoRA) -> str:
    """The layers with pairs of matrices, grouped over blocks: `60: self_attn q k v o in blocks 0 to 14`."""
    groups: dict[tuple[str, ...], list[int]] = {}
    outer, blocks = [], collections.defaultdict[int, list[str]](list)
    for name in lora.ranks:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            outer.append(name)
        else:
            blocks[int(match[1])].append(match[2])
    for number, names in sorted(blocks.items()):
        groups.setdefault(tuple(sorted(names)), []).append(number)
    parts = []
    for names, numbers in groups.items():
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        which = f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else some(list(map(str, numbers)), 6)
        modules = collections.defaultdict[str, list[str]](list)
        for name in names:
            head, _, leaf = name.rpartition(".")
            modules[head].append(leaf)
        shown = ", ".join(f"{head} {' '.join(leaves)}" for head, leaves in modules.items())
        parts.append(f"{shown} in block{'s' if len(numbers) > 1 else ''} {which}")
    parts += [some(outer, 8)] if outer else []
    return f"{len(lora.ranks)}: {'; '.join(parts)}" if parts else ""
