"""Reading of umT5 encoders: Wan's `.pth`, and transformers' `text_encoder/` folder, sharded or not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from monarchrt.models.checkpoints.reading import (
    BareFile,
    Entry,
    Layout,
    Progress,
    Shardings,
    find_weights,
    load_part,
    open_tensors,
    settings_beside,
    some,
    stored_dtype,
)
from monarchrt.models.checkpoints.recognize import refuse
from monarchrt.models.checkpoints.tensor_files import TensorFile
from monarchrt.models.umt5.config import UMT5Config
from monarchrt.models.umt5.encoder import UMT5Encoder

# our name, official name, name in transformers, layout
type Rows = tuple[tuple[str, str, str, Layout], ...]
OUTER: Rows = (
    ("token_embedding", "token_embedding.weight", "shared.weight", "vector"),
    ("norm.scale", "norm.weight", "encoder.final_layer_norm.weight", "vector"),
)
P, A, F = "blocks.{i}", "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
BLOCK: Rows = (
    ("blocks.norm1.scale", f"{P}.norm1.weight", f"{A}.layer_norm.weight", "vector"),
    *((f"blocks.attn.{x}.kernel", f"{P}.attn.{x}.weight", f"{A}.SelfAttention.{x}.weight", "linear") for x in "qkvo"),
    (
        "blocks.attn.bias",
        f"{P}.pos_embedding.embedding.weight",
        f"{A}.SelfAttention.relative_attention_bias.weight",
        "vector",
    ),
    ("blocks.norm2.scale", f"{P}.norm2.weight", f"{F}.layer_norm.weight", "vector"),
    ("blocks.ffn.gate.kernel", f"{P}.ffn.gate.0.weight", f"{F}.DenseReluDense.wi_0.weight", "linear"),
    ("blocks.ffn.fc1.kernel", f"{P}.ffn.fc1.weight", f"{F}.DenseReluDense.wi_1.weight", "linear"),
    ("blocks.ffn.fc2.kernel", f"{P}.ffn.fc2.weight", f"{F}.DenseReluDense.wo.weight", "linear"),
)
TIED = "encoder.embed_tokens.weight"  # transformers may write the embedding under this name, also or instead
ANCHORS = ("token_embedding.weight", "encoder.final_layer_norm.weight")
FIXED = {
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


def umt5_entries(config: UMT5Config) -> list[Entry]:
    """Every tensor of an encoder's checkpoint, with its official and its transformers name.

    Examples:
        >>> from monarchrt.models.umt5 import umt5_config
        >>> len(umt5_entries(umt5_config("xxl")))
        242

    Args:
        config: The number of layers is used.

    Returns:
        One entry per tensor.
    """
    entries = [
        Entry(tuple(ours.split(".")), None, {"official": official, "transformers": theirs}, layout)
        for ours, official, theirs, layout in OUTER
    ]
    for layer in range(config.num_layers):
        for ours, official, theirs, layout in BLOCK:
            names = {
                "official": official.replace("{i}", str(layer)),
                "transformers": theirs.replace("{i}", str(layer)),
            }
            entries.append(Entry(tuple(ours.split(".")), layer, names, layout))
    return entries


def load_umt5(
    path: str | Path,
    *,
    config: UMT5Config | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | Shardings | None = None,
    progress: Progress | None = None,
) -> UMT5Encoder:
    """Loads an encoder, one tensor at a time; its sizes follow from the tensors.

    Examples:
        >>> encoder = load_umt5("Wan2.1-T2V-1.3B", param_dtype="bfloat16")  # doctest: +SKIP

    Args:
        path: `models_t5_umt5-xxl-enc-bf16.pth` or a folder with it, another file or folder with an encoder's weights,
            or diffusers' pipeline folder with `text_encoder/`.
        config: Expected sizes; None: those of the tensors.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters; None keeps the file's (float32 if it is mixed).
        sharding: Sharding of the parameters: one for all, or a function of path and shape (layers are stacked on axis
            0, which must not be split).
        progress: Called after each tensor with its name, bytes read so far, and bytes in total.

    Returns:
        The encoder.

    Raises:
        ValueError: If there is no such file, it lacks tensors or has others, or a tensor has another shape.
    """
    official = "models_t5_umt5-xxl-enc-bf16.pth"
    preferred = ("model", "pytorch_model")
    file_path = find_weights(path, official=official, pattern="models_t5*", folder="text_encoder", preferred=preferred)
    file = BareFile(open_tensors(file_path), anchors=ANCHORS)
    naming = _naming(file_path, file)
    config = config or _described(file_path, file, naming)
    _check_settings(file_path)
    entries = umt5_entries(config)
    ignore: tuple[str, ...] = ()
    if naming == "transformers" and TIED in file.infos:
        if "shared.weight" in file.infos:
            ignore = (TIED,)
        else:
            entries[0] = Entry(entries[0].path, None, {"transformers": TIED}, "vector")
    if param_dtype is None:
        param_dtype = stored_dtype(file)
    return load_part(
        file,
        entries,
        lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype),
        naming=naming,
        what="a umT5 encoder",
        dtype=param_dtype,
        sharding=sharding,
        progress=progress,
        ignore=ignore,
    )


def _naming(path: Path, file: TensorFile) -> str:
    if any(name.startswith("encoder.block.") for name in file.infos):
        if decoder := [name for name in file.infos if name.startswith("decoder.")]:
            raise ValueError(f"{path} is a whole umT5 with {some(decoder, 1)}; give an encoder alone.")
        return "transformers"
    if any(".pos_embedding." in name for name in file.infos):
        return "official"
    raise refuse(file.infos, path, "a umT5 encoder")


def _described(path: Path, file: TensorFile, naming: str) -> UMT5Config:
    """The configuration, read from the shapes of tensors."""
    layer = re.compile(r"(?:encoder\.block|blocks)\.(\d+)\.")
    layers = len({match[1] for name in file.infos if (match := layer.match(name))})

    def size(row: tuple[str, str, str, Layout], axis: int) -> int:
        name = row[1 if naming == "official" else 2].replace("{i}", "0")
        if name == "shared.weight" and name not in file.infos:
            name = TIED
        if name not in file.infos:
            raise ValueError(f"{path} lacks {name}, one of the tensors of a umT5 encoder.")
        shape = file.infos[name].shape
        if len(shape) != 2:
            raise ValueError(f"{path}: {name} has shape {shape}, not two axes.")
        return shape[axis]

    rows = {row[0]: row for row in OUTER + BLOCK}
    return UMT5Config(
        vocab_size=size(rows["token_embedding"], 0),
        dim=size(rows["token_embedding"], 1),
        attention_dim=size(rows["blocks.attn.q.kernel"], 0),
        ffn_dim=size(rows["blocks.ffn.gate.kernel"], 0),
        num_heads=size(rows["blocks.attn.bias"], 1),
        num_buckets=size(rows["blocks.attn.bias"], 0),
        num_layers=layers,
    )


def _check_settings(path: Path) -> None:
    """Raises ValueError if transformers' `config.json` beside the file has unsupported settings."""
    beside, settings = settings_beside(path)
    if "d_kv" not in settings:
        return  # the official folder's config.json is the transformer's
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{beside}: {name}={settings[name]!r} is not supported; umT5 has {value!r}.")
