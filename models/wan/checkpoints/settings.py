"""Conversion between `WanConfig` and `config.json` in the official and diffusers formats, with our own settings."""

import dataclasses
import json
import math
from typing import Any

from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.notation import from_json, to_text
from monarchrt.models.attention.registry import exact
from monarchrt.models.checkpoints.recognize import SUPPORTED
from monarchrt.models.checkpoints.tensor_files import TensorInfo
from monarchrt.models.wan.checkpoints.mapping import Naming
from monarchrt.models.wan.config import WanConfig

OFFICIAL_CLASSES = ("WanModel", "CausalWanModel")
DIFFUSERS_CLASS = "WanTransformer3DModel"
OWN_KEY = "monarch"
HEAD_DIM = 128  # channels of a head in every released Wan model; tensors do not determine the heads
MAX_SIZE = 2**20  # limit on sizes in a config.json, since memory depends on them
MAX_LAYERS = 1000  # limit on layers
# values of model_type in official files of other models
OTHER_TYPES = {
    "ti2v": "Wan 2.2 TI2V-5B",
    "flf2v": "Wan 2.1 FLF2V (first and last frame)",
    "vace": "Wan VACE",
    "s2v": "Wan 2.2 S2V",
    "animate": "Wan 2.2 Animate",
}
# our field: official name, diffusers' name
SIZES = {
    "eps": ("eps", "eps"),
    "ffn_dim": ("ffn_dim", "ffn_dim"),
    "freq_dim": ("freq_dim", "freq_dim"),
    "in_channels": ("in_dim", "in_channels"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers", "num_layers"),
    "out_channels": ("out_dim", "out_channels"),
    "text_dim": ("text_dim", "text_dim"),
    "text_len": ("text_len", "text_len"),
    "patch_size": ("patch_size", "patch_size"),
}
# fields that the official config.json omits if they have these values
OFFICIAL_UNWRITTEN = {"text_dim": 4096, "patch_size": (1, 2, 2)}
# options that our model does not have: names and supported values
FIXED = {
    "official": {"qk_norm": (True,), "cross_attn_norm": (True,), "window_size": ([-1, -1],)},
    "diffusers": {
        "qk_norm": ("rms_norm_across_heads",),
        "cross_attn_norm": (True,),
        "pos_embed_seq_len": (None,),
        "rope_max_seq_len": (1024,),
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Settings of the training that matter for sampling, stored with the weights.

    Attributes:
        latents: Shape (F, h, w) of a training sample.
        shift: Shift of the noise levels.
        steps: For a few-step model, the list of its steps, such as (1000, 757, 522); in older files, the number of
            evenly spaced ones.
        window: Attention window of a causal model in latent frames, including the block; None: all frames.
        sink_frames: First latent frames, which the window never dropped.
    """

    latents: tuple[int, int, int] | None = None
    shift: float | None = None
    steps: int | tuple[int, ...] | None = None
    window: int | None = None
    sink_frames: int | None = None

    @property
    def rolling(self) -> str:
        """Description of the window; empty without one."""
        if self.window is None:
            return ""
        return f"window {self.window}" + (f" with {self.sink_frames} sink frames" if self.sink_frames else "")


def trained_from_json(data: dict[str, Any] | None, *, where: str) -> Trained | None:
    """Reads the settings of the training that `own_to_json` stored; None if there are none.

    Examples:
        >>> trained_from_json({"trained": {"latents": [21, 60, 104], "shift": 5.0}}, where="config.json")
        Trained(latents=(21, 60, 104), shift=5.0, steps=None, window=None, sink_frames=None)

    Raises:
        ValueError: If they are invalid.
    """
    stored = None if data is None else data.get("trained")
    if stored is None:
        return None
    known = stored if isinstance(stored, dict) else {"": stored}
    latents, shift, steps, window, sinks = (known.get(field.name) for field in dataclasses.fields(Trained))
    whole = latents is None or (
        isinstance(latents, list) and len(latents) == 3 and all(type(n) is int and 0 < n <= MAX_SIZE for n in latents)
    )
    number = shift is None or (type(shift) in (int, float) and 0 < shift < math.inf)
    count = steps is None or (type(steps) is int and 0 < steps <= 1000) or _falling(steps)
    room = window is None or (type(window) is int and 0 < window <= MAX_SIZE)
    kept = sinks is None or (type(sinks) is int and 0 <= sinks < (window or 1))
    if not (whole and number and count and room and kept and isinstance(stored, dict)):
        raise ValueError(f"{where}: the entry 'trained' of {OWN_KEY!r} cannot be read: {stored!r:.100}.")
    return Trained(
        latents=None if latents is None else tuple(latents),
        shift=shift,
        steps=tuple(steps) if isinstance(steps, list) else steps,
        window=window,
        sink_frames=sinks,
    )


def _falling(steps: object) -> bool:
    """Whether a JSON value is a decreasing list of integer steps from 1000 to 1."""
    if not isinstance(steps, list) or not steps or any(type(step) is not int for step in steps):
        return False
    return steps == sorted(set(steps), reverse=True) and steps[0] <= 1000 and steps[-1] > 0


def describes_model(data: dict[str, Any]) -> bool:
    """Whether a `config.json` describes a network: it has a class, sizes in either format, or our own settings.

    Examples:
        >>> describes_model({}), describes_model({"_class_name": "WanModel"}), describes_model({"in_dim": 16})
        (False, True, True)
    """
    return "_class_name" in data or "in_dim" in data or "num_attention_heads" in data or OWN_KEY in data


def config_from_json(data: dict[str, Any], *, where: str) -> tuple[WanConfig, Naming]:
    """Reads an official or a diffusers `config.json`.

    Args:
        data: Content of the file.
        where: Path of the file, for errors.

    Returns:
        The configuration, and the naming of the format.

    Raises:
        ValueError: If it describes another model, a size is missing, or an option has an unsupported value.
    """
    kind = data.get("_class_name")
    naming: Naming
    if kind in OFFICIAL_CLASSES or (kind is None and "in_dim" in data):
        naming = "official"
    elif kind == DIFFUSERS_CLASS or (kind is None and "num_attention_heads" in data):
        naming = "diffusers"
    else:
        expected = ", ".join((*OFFICIAL_CLASSES, DIFFUSERS_CLASS))
        raise ValueError(f"{where} describes a {kind!r}, not a Wan transformer ({expected}).")
    if isinstance(data.get("model_type"), str) and data["model_type"] in OTHER_TYPES:
        raise ValueError(f"{where} describes {OTHER_TYPES[data['model_type']]}; {SUPPORTED}.")
    for name, values in FIXED[naming].items():
        if name in data and data[name] not in values:
            raise ValueError(f"{where}: {name}={data[name]!r} is not supported; only {values[0]!r} is.")
    for name, value in data.items():
        limit = MAX_LAYERS if name == "num_layers" else MAX_SIZE
        if isinstance(value, int) and value > limit:
            raise ValueError(f"{where}: {name}={str(value)[:20]} is larger than any model's; at most {limit}.")
    fields: dict[str, Any] = {}
    for field, names in SIZES.items():
        name = names[naming == "diffusers"]
        if name in data:
            fields[field] = data[name]
        elif field in ("text_len", "eps", "text_dim", "patch_size", "freq_dim"):
            continue  # our default is that of the classes
        else:
            raise ValueError(f"{where} lacks {name!r}.")
    if naming == "official":
        fields["model_type"] = data.get("model_type", "t2v")
        fields["dim"] = data["dim"] if "dim" in data else _missing(where, "dim")
    else:
        i2v = data.get("image_dim") is not None
        fields["model_type"] = "i2v" if i2v else "t2v"
        fields |= {"image_dim": data["image_dim"]} if i2v else {}
        head_dim = data["attention_head_dim"] if "attention_head_dim" in data else _missing(where, "attention_head_dim")
    own = attention_from_json(data.get(OWN_KEY), where=where)
    try:
        if naming == "diffusers":
            fields["dim"] = head_dim * fields["num_heads"]
        fields["patch_size"] = tuple(fields.get("patch_size", (1, 2, 2)))
        return WanConfig(**fields, **own), naming
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def config_to_json(
    config: WanConfig, naming: Naming, *, few_step: bool = False, trained: Trained | None = None
) -> dict[str, Any]:
    """The inverse of `config_from_json`; the official form equals the released files, byte for byte when dumped.

    Args:
        config: Configuration of the model.
        naming: The format, "official" or "diffusers".
        few_step: Whether the weights are distilled.
        trained: Settings of the training.

    Returns:
        The content of `config.json`.
    """
    if naming == "official":
        data: dict[str, Any] = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": config.dim}
        written = {official: getattr(config, field) for field, (official, _) in SIZES.items()}
        for field, value in OFFICIAL_UNWRITTEN.items():
            if getattr(config, field) == value:
                del written[field]
        written["model_type"] = config.model_type
        data |= dict(sorted(written.items()))
    else:
        i2v = config.model_type == "i2v"
        written = {diffusers: getattr(config, field) for field, (_, diffusers) in SIZES.items()}
        if config.text_len == 512:
            del written["text_len"]
        written |= {
            "added_kv_proj_dim": config.dim if i2v else None,
            "image_dim": config.image_dim if i2v else None,
            "attention_head_dim": config.head_dim,
            "cross_attn_norm": True,
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        }
        data = {"_class_name": DIFFUSERS_CLASS, "_diffusers_version": "0.33.0", **dict(sorted(written.items()))}
    own = own_to_json(config, few_step=few_step, trained=trained)
    return data | ({OWN_KEY: own} if own else {})


def dump_json(data: dict[str, Any]) -> str:
    """The text of a `config.json`."""
    return json.dumps(data, indent=2) + "\n"


def attention_to_json(config: WanConfig) -> dict[str, Any] | None:
    """The attention to store with the weights; None if it is the default for files without one."""
    if config.causal_block is None and set(_layers(config)) == {exact()}:
        return None
    first = {"independent_first_frame": True} if config.causal_block and config.independent_first_frame else {}
    return {"attention": _stored_text(config), "causal_block": config.causal_block} | first


def _layers(config: WanConfig) -> list[Attention]:
    """The stored setting of each layer, without fields that select an implementation."""
    return [setting.stored() for setting in config.layer_attention]


def _stored_text(config: WanConfig) -> str:
    if isinstance(config.attention, Attention):
        return to_text(config.attention.stored())
    layers = _layers(config)
    return to_text(layers[0] if len(set(layers)) == 1 else layers)


def own_to_json(config: WanConfig, *, few_step: bool, trained: Trained | None = None) -> dict[str, Any] | None:
    """Our own settings in a `config.json`: attention, whether the weights are distilled, settings of the training."""
    own = attention_to_json(config)
    more: dict[str, Any] = {"few_step": True} if few_step else {}
    known = {} if trained is None else {k: v for k, v in dataclasses.asdict(trained).items() if v is not None}
    if known:
        more["trained"] = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    return (own or {"attention": to_text(exact()), "causal_block": None}) | more if more else own


def few_step_from_json(data: dict[str, Any] | None) -> bool:
    """Whether `own_to_json` stored that the weights are distilled."""
    return data is not None and data.get("few_step") is True


def describe_sampling(few_step: bool, trained: Trained | None) -> str:
    """Description of the sampling of weights: the steps of a few-step model, the window of a causal one.

    Examples:
        >>> describe_sampling(True, Trained(steps=(1000, 757, 522), window=21, sink_frames=3))
        'few-step, 1000 757 522, window 21 with 3 sink frames'
    """
    steps = None if trained is None else trained.steps
    listed = f", {' '.join(map(str, steps))}" if isinstance(steps, tuple) else ""
    rolling = f", {trained.rolling}" if trained is not None and trained.window is not None else ""
    return (f"few-step{listed}" if few_step else "many steps") + rolling


def attention_from_json(data: dict[str, Any] | None, *, where: str) -> dict[str, Any]:
    """Fields `attention`, `causal_block` and `independent_first_frame` of `WanConfig`; {} if nothing is stored.

    Raises:
        ValueError: If the stored settings are invalid.
    """
    if data is None:
        return {}
    try:
        first = {"independent_first_frame": True} if data.get("independent_first_frame") is True else {}
        attention = from_json(data["attention"], where=where)
        return {"attention": attention, "causal_block": data.get("causal_block")} | first
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: the entry {OWN_KEY!r} cannot be read: {data!r}.") from error


def describe_attention(config: WanConfig) -> str:
    """Description of the attention that is stored with the weights, in its notation."""
    if not config.causal_block:
        return _stored_text(config)
    first = " after the first frame" if config.independent_first_frame else ""
    return f"{_stored_text(config)}, causal_block={config.causal_block}{first}"


def config_from_shapes(infos: dict[str, TensorInfo], names: dict[str, str], *, num_heads: int | None) -> WanConfig:
    """The configuration of a model without `config.json`, from the shapes of its tensors.

    Args:
        infos: Shape and dtype by official name.
        names: Name in the file by official name, for errors.
        num_heads: Number of heads; None: heads have 128 channels.

    Returns:
        The configuration; `eps` and `text_len` are those of the released models.

    Raises:
        ValueError: If a tensor that determines a size is missing or has an unexpected shape.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in infos:
            raise ValueError(f"the tensor {names.get(name, name)} is missing, so the model's sizes are not known.")
        return infos[name].shape

    if len(shape("patch_embedding.weight")) != 5:
        raise ValueError(f"patch_embedding.weight has shape {shape('patch_embedding.weight')}, not five axes.")
    dim, in_channels, *patch_size = shape("patch_embedding.weight")
    if num_heads is None and dim % HEAD_DIM:
        raise ValueError(
            f"dim={dim} is not a multiple of {HEAD_DIM}, the released models' head size, so the number of heads is "
            f"not known; give num_heads or head_dim, or store it: monarchrt convert CHECKPOINT NEW --num-heads N."
        )
    # the number of layers is that of distinct indices, so that a gap shows as missing and unexpected tensors
    layers = len({name.split(".")[1] for name in infos if name.startswith("blocks.")})
    i2v = "img_emb.proj.0.weight" in infos
    patch = (patch_size[0], patch_size[1], patch_size[2])
    return WanConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        num_heads=num_heads or dim // HEAD_DIM,
        num_layers=layers,
        freq_dim=shape("time_embedding.0.weight")[1],
        text_dim=shape("text_embedding.0.weight")[1],
        patch_size=patch,
        in_channels=in_channels,
        out_channels=shape("head.head.weight")[0] // (patch[0] * patch[1] * patch[2]),
        model_type="i2v" if i2v else "t2v",
        image_dim=shape("img_emb.proj.0.weight")[0] if i2v else 1280,
    )


def _missing(where: str, name: str):
    raise ValueError(f"{where} lacks {name!r}.")


def same_attention(a: WanConfig, b: WanConfig) -> bool:
    """Whether the attention of both is the same, apart from fields that select an implementation."""
    blocks = ((x.causal_block, x.independent_first_frame and x.causal_block is not None) for x in (a, b))
    return _layers(a) == _layers(b) and next(blocks) == next(blocks)
