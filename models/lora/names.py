"""Names of tensors in LoRA files for Wan transformers, in three formats, and the models that other LoRA files are for.

    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight; alpha in the header
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight (or lora_A), .alpha; Wan's own names
    musubi      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha; Wan's own names without dots

Besides pairs of matrices there may be full differences: `.diff` of a weight, `.diff_b` of a bias, `.diff_m` of a
modulation table.
"""

import functools
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from monarchrt.models.checkpoints.recognize import OTHERS, RELATIVES, what_has
from monarchrt.models.wan.checkpoints.mapping import BLOCK, BLOCK_I2V, OUTER, OUTER_I2V

type LoRAFormat = Literal["diffusers", "comfyui", "musubi"]
type Part = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b", "diff_m"]

PREFIXES: dict[str, str] = {"diffusers": "transformer.", "comfyui": "diffusion_model.", "musubi": "lora_unet_"}
# prefixes of trainers, of names with dots and of names without
_DOTTED = re.compile(r"(?:(?:base_model|pipe|model|diffusion_model|transformer|dit|unet|module)\.)+")
_FLAT = re.compile(r"(?:lora_unet|lora_transformer|lora_dit|lycoris(?:_unet)?)_")
# endings of keys by the part of the change; `.default` and the like are names of adapters in PEFT
_PARTS: dict[Part, re.Pattern[str]] = {
    "down": re.compile(r"(?:\.lora_(?:A|down)|[._]lora\.down)(?:\.(?!bias$|weight$)\w+)?(?:\.weight)?$"),
    "up": re.compile(r"(?:\.lora_(?:B|up)|[._]lora\.up)(?:\.(?!bias$|weight$)\w+)?(?:\.weight)?$"),
    "up_bias": re.compile(r"\.lora_(?:B|up)(?:\.\w+)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "diff": re.compile(r"\.(?:diff|w_norm)$"),
    "diff_b": re.compile(r"\.(?:diff_b|b_norm)$"),
    "diff_m": re.compile(r"\.diff_m$"),
}
# adapters whose change is not the product of two matrices
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.lokr_\w+$", "LoKr (Kronecker products)"),
    (r"\.hada_\w+$", "LoHa (Hadamard products)"),
    (r"\.(oft_\w+|boft_\w+)", "OFT (rotations)"),
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA (magnitudes beside directions)"),
    (r"\.glora_|\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
    (r"\.lora_mid\b|\.lora_embedding_", "LoRA in three factors, or of an embedding"),
    (r"\.(set_weight|reshape_weight)$", "weights that stand in for others"),
)
# families without dots in their names, as kohya's tools write them
_FLAT_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"^lora_unet_(double_blocks|single_blocks|single_transformer_blocks)_", "Flux or HunyuanVideo"),
    (r"^lora_unet_joint_blocks_", "Stable Diffusion 3"),
    (r"^lora_unet_(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_", "Stable Diffusion"),
    (r"^lora_te\d*_", "a text encoder"),
    (r"^lora_unet_(transformer_blocks|layers)_", "another diffusion transformer"),
)
_DIFFUSERS = re.compile(r"attn[12][._]|condition_embedder|proj_out|scale_shift_table|ffn[._]net")
_BLOCK = re.compile(r"^blocks([._])(\d+)[._](.+)$")


class Key(NamedTuple):
    """The meaning of a tensor in a file.

    Attributes:
        module: Wan's own name of the module, or of the array for tables of modulations: `blocks.0.self_attn.q`.
        part: Which part of the module's change the tensor is.
    """

    module: str
    part: Part


class Names(NamedTuple):
    """The parsed names of a file.

    Attributes:
        keys: The meaning of each tensor, by its name in the file.
        unknown: Names that belong to no module of a Wan transformer.
        format: The format of the names.
    """

    keys: dict[str, Key]
    unknown: list[str]
    format: LoRAFormat


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors with these names belong to a LoRA, of any model, rather than to a model.

    Examples:
        >>> is_lora(["lora_unet_blocks_0_self_attn_q.lora_down.weight"]), is_lora(["blocks.0.self_attn.q.weight"])
        (True, False)
    """
    return any(_split(name)[1] is not None or what_has([name], UNSUPPORTED) is not None for name in names)


def read_names(names: Iterable[str]) -> Names:
    """Parses the names of a file's tensors.

    Examples:
        >>> read_names(["transformer.blocks.3.attn2.to_out.0.lora_B.weight"]).keys.popitem()[1]
        Key(module='blocks.3.cross_attn.o', part='up')
    """
    split = {name: _split(name) for name in names}
    stems = [_DOTTED.sub("", stem, count=1) if _DOTTED.match(stem) else stem for stem, _ in split.values()]
    flat = any(_FLAT.match(stem) for stem in stems)
    diffusers = any(_DIFFUSERS.search(stem) for stem in stems)
    keys: dict[str, Key] = {}
    unknown = []
    for (name, (_, part)), stem in zip(split.items(), stems, strict=True):
        module = None if part is None else _module(stem, diffusers=diffusers, table=part == "diff_m")
        if module is None or part is None:
            unknown.append(name)
        else:
            keys[name] = Key(module, "diff" if part == "diff_m" else part)
    return Names(keys, unknown, "musubi" if flat else "diffusers" if diffusers else "comfyui")


def layer_names(name: str) -> tuple[str, ...]:
    """Possible names of a tensor's layer in the network that was trained, for matching PEFT's patterns.

    Examples:
        >>> layer_names("base_model.model.dit.blocks.3.attn2.to_q.lora_B.weight")
        ('dit.blocks.3.attn2.to_q', 'blocks.3.attn2.to_q')
    """
    stem = _split(name)[0]
    names = (stem.removeprefix("base_model.model.").removeprefix("transformer."), _DOTTED.sub("", stem, count=1))
    return tuple(dict.fromkeys(names))


def family(names: Iterable[str]) -> str | None:
    """The model that a LoRA with these names is for, if it is recognised and not Wan 2.1.

    Examples:
        >>> family(["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"])
        'Flux or HunyuanVideo'
    """
    names = list(names)
    if (kind := what_has(names, _FLAT_FAMILIES)) is not None:
        return kind[0]
    bare = [_DOTTED.sub("", name, count=1) if _DOTTED.match(name) else name for name in names]
    kind = what_has(bare, RELATIVES, OTHERS)
    return None if kind is None or kind[0] == "a Wan transformer" else kind[0]


def write_name(module: str, ending: str, format: str) -> str:
    """The name of a tensor in a format.

    Examples:
        >>> write_name("blocks.0.ffn.0", ".lora_up.weight", "musubi")
        'lora_unet_blocks_0_ffn_0.lora_up.weight'

    Args:
        module: Wan's own name of the module.
        ending: End of the key.
        format: "diffusers", "comfyui" or "musubi".

    Returns:
        The name.
    """
    if format == "diffusers":
        match = _BLOCK.match(module)
        rest, number = (match[3], match[2]) if match else (module, "")
        module = _tables()["theirs"][f"blocks.{{i}}.{rest}" if match else module].replace("{i}", number)
    return PREFIXES[format] + (module.replace(".", "_") if format == "musubi" else module) + ending


def _split(name: str) -> tuple[str, Part | None]:
    """The name without its ending, and the part that the ending stands for."""
    for part, pattern in _PARTS.items():
        if (match := pattern.search(name)) is not None:
            return name[: match.start()], part
    return name, None


def _module(stem: str, *, diffusers: bool, table: bool) -> str | None:
    """Wan's own name of a module, from its name in a file; None if there is no such module."""
    stem = _FLAT.sub("", stem, count=1) if _FLAT.match(stem) else stem
    match = _BLOCK.match(stem)
    if table and (bare := re.fullmatch(r"blocks[._](\d+)|head", stem)):  # .diff_m follows the name of the block itself
        return f"{stem.replace('_', '.')}.modulation" if bare[1] else "head.modulation"
    rest = f"blocks.{{i}}.{match[3]}" if match else stem
    template = _tables()["diffusers" if diffusers else "official"].get(rest)
    return None if template is None else template.replace("{i}", match[2] if match else "")


@functools.cache
def _tables() -> dict[str, dict[str, str]]:
    """Wan's own names by the names of each naming, with and without dots; and names of diffusers by Wan's own."""
    rules = (*OUTER, *OUTER_I2V, *BLOCK, *BLOCK_I2V)
    tables: dict[str, dict[str, str]] = {"theirs": {rule.official: rule.diffusers for rule in rules}}
    for naming in ("official", "diffusers"):
        table: dict[str, str] = {}
        for rule in rules:
            stem = getattr(rule, naming)
            block = "blocks.{i}." if stem.startswith("blocks.{i}.") else ""
            table |= dict.fromkeys((stem, block + stem.removeprefix(block).replace(".", "_")), rule.official)
        tables[naming] = table
    return tables
