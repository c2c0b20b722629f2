"""Reading autoencoder checkpoints: `Wan2.1_VAE.pth`, and diffusers' `vae/` folder."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    stored_dtype,
)
from monarchrt.models.checkpoints.recognize import refuse
from monarchrt.models.checkpoints.tensor_files import TensorFile
from monarchrt.models.vae.config import VAEConfig, vae_config
from monarchrt.models.vae.vae import WanVAE

# our name, official name, diffusers' name, layout of the weight; convolutions also have a bias
type Rows = tuple[tuple[str, str, str, Layout], ...]
RESIDUAL: Rows = (
    ("norm1", "residual.0", "norm1", "flat"),
    ("conv1", "residual.2", "conv1", "conv"),
    ("norm2", "residual.3", "norm2", "flat"),
    ("conv2", "residual.6", "conv2", "conv"),
)
SHORTCUT: Rows = (("shortcut", "shortcut", "conv_shortcut", "conv"),)
ATTENTION: Rows = (
    ("norm", "norm", "norm", "flat"),
    ("to_qkv", "to_qkv", "to_qkv", "conv2d"),
    ("proj", "proj", "proj", "conv2d"),
)
RESAMPLE: Rows = (("conv", "resample.1", "resample.1", "conv2d"),)
TIME: Rows = (("time_conv", "time_conv", "time_conv", "conv"),)
OUTER: Rows = (
    ("conv1", "conv1", "quant_conv", "conv"),
    ("conv2", "conv2", "post_quant_conv", "conv"),
    *((f"{half}.conv1", f"{half}.conv1", f"{half}.conv_in", "conv") for half in ("encoder", "decoder")),
    *((f"{half}.head.norm", f"{half}.head.0", f"{half}.norm_out", "flat") for half in ("encoder", "decoder")),
    *((f"{half}.head.conv", f"{half}.head.2", f"{half}.conv_out", "conv") for half in ("encoder", "decoder")),
)
MIDDLE = (("0", "resnets.0", RESIDUAL), ("1", "attentions.0", ATTENTION), ("2", "resnets.1", RESIDUAL))
ANCHORS = ("decoder.conv1.weight", "decoder.conv_in.weight")
# fields of diffusers' config.json for which only one value is supported
FIXED = {"attn_scales": [], "is_residual": False, "patch_size": None, "in_channels": 3, "out_channels": 3}
FIELDS = {
    "base_dim": "dim",
    "dim_mult": "dim_mult",
    "z_dim": "z_dim",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}


def vae_entries(config: VAEConfig) -> list[Entry]:
    """Every tensor of an autoencoder's checkpoint, with its official and its diffusers name.

    Examples:
        >>> entries = vae_entries(VAEConfig())
        >>> len(entries), entries[0].names
        (194, {'official': 'conv1.weight', 'diffusers': 'quant_conv.weight'})

    Args:
        config: The sizes.

    Returns:
        One entry per tensor.
    """
    return [entry for block in _blocks(config) for entry in _entries(*block)]


def _blocks(config: VAEConfig) -> Iterator[tuple[str, str, str, Rows]]:
    """Our, the official and diffusers' prefix of each block, and its contents."""
    yield "", "", "", OUTER
    for half in ("encoder", "decoder"):
        for index, theirs, rows in MIDDLE:
            yield f"{half}.middle.{index}.", f"{half}.middle.{index}.", f"{half}.mid_block.{theirs}.", rows
    features, index = config.dim, 0
    for level, width in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            name = f"encoder.downsamples.{index}."
            yield name, name, f"encoder.down_blocks.{index}.", RESIDUAL + SHORTCUT * (features != width)
            features, index = width, index + 1
        if level < len(config.temporal_downsample):
            name = f"encoder.downsamples.{index}."
            rows = RESAMPLE + TIME * config.temporal_downsample[level]
            yield name, name, f"encoder.down_blocks.{index}.", rows
            index += 1
    features, index = config.widths[-1], 0
    temporal = config.temporal_downsample[::-1]
    for level, width in enumerate(config.widths[::-1]):
        for block in range(config.num_res_blocks + 1):
            name = f"decoder.upsamples.{index}."
            theirs = f"decoder.up_blocks.{level}.resnets.{block}."
            yield name, name, theirs, RESIDUAL + SHORTCUT * (features != width)
            features, index = width, index + 1
        if level < len(temporal):
            name = f"decoder.upsamples.{index}."
            yield name, name, f"decoder.up_blocks.{level}.upsamplers.0.", RESAMPLE + TIME * temporal[level]
            features, index = width // 2, index + 1


def _entries(ours: str, official: str, diffusers: str, rows: Rows) -> Iterator[Entry]:
    for our_name, official_name, diffusers_name, layout in rows:
        leaves: tuple[tuple[str, str, Layout], ...] = (("kernel", "weight", layout), ("bias", "bias", "vector"))
        if layout == "flat":
            leaves = (("gamma", "gamma", "flat"),)
        for our_leaf, their_leaf, leaf_layout in leaves:
            names = {
                "official": f"{official}{official_name}.{their_leaf}",
                "diffusers": f"{diffusers}{diffusers_name}.{their_leaf}",
            }
            yield Entry((*f"{ours}{our_name}".split("."), our_leaf), None, names, leaf_layout)


def load_vae(
    path: str | Path,
    *,
    config: VAEConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | Shardings | None = None,
    progress: Progress | None = None,
) -> WanVAE:
    """Loads an autoencoder, one tensor at a time.

    Examples:
        >>> vae = load_vae("Wan2.1-T2V-1.3B", dtype="bfloat16")  # doctest: +SKIP

    Args:
        path: `Wan2.1_VAE.pth` or a folder with it, another file or folder with an autoencoder's weights, or diffusers'
            pipeline folder with `vae/`.
        config: Sizes; None: those of diffusers' `config.json` beside the weights, or else the released ones.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters; None keeps the file's (float32 if it is mixed).
        sharding: Sharding of the parameters: one for all, or a function of path and shape.
        progress: Called after each tensor with its name, bytes read so far, and bytes in total.

    Returns:
        The autoencoder.

    Raises:
        ValueError: If there is no such file, it lacks tensors or has others, or a tensor has another shape.
    """
    file_path = find_weights(
        path, official="Wan2.1_VAE.pth", pattern="*VAE*", folder="vae", preferred=("diffusion_pytorch_model",)
    )
    file = BareFile(open_tensors(file_path), anchors=ANCHORS)
    naming = _naming(file_path, file)
    described = config or _described(file_path)
    entries = vae_entries(described)
    if param_dtype is None:
        param_dtype = stored_dtype(file)
    return load_part(
        file,
        entries,
        lambda: WanVAE(described, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype),
        naming=naming,
        what="a Wan VAE",
        dtype=param_dtype,
        sharding=sharding,
        progress=progress,
    )


def _naming(path: Path, file: TensorFile) -> str:
    if any(name.startswith("decoder.upsamples.") for name in file.infos):
        if any(".upsamples.0.upsamples." in name for name in file.infos):
            raise refuse(file.infos, path, "the VAE of Wan 2.1")
        return "official"
    if any(name.startswith("decoder.up_blocks.") for name in file.infos):
        return "diffusers"
    raise refuse(file.infos, path, "a Wan VAE")


def _described(path: Path) -> VAEConfig:
    """The configuration in diffusers' `config.json` beside the file, or the released one."""
    beside, settings = settings_beside(path)
    if settings.get("_class_name") != "AutoencoderKLWan":
        return vae_config("wan21")  # the official folder's config.json is the transformer's
    return config_from_diffusers(settings, where=str(beside))


def config_from_diffusers(settings: dict[str, Any], *, where: str = "config.json") -> VAEConfig:
    """Reads diffusers' `config.json` of an `AutoencoderKLWan`.

    Examples:
        >>> config_from_diffusers({"base_dim": 8, "num_res_blocks": 1}).widths
        (8, 16, 32, 32)

    Args:
        settings: Content of the file.
        where: Name of the file, for messages.

    Returns:
        The configuration.

    Raises:
        ValueError: If it describes another architecture, such as Wan 2.2's.
    """
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{where}: {name}={settings[name]!r} is not supported; Wan 2.1 has {value!r}.")
    if settings.get("decoder_base_dim") not in (None, settings.get("base_dim", 96)):
        raise ValueError(f"{where}: decoder_base_dim={settings['decoder_base_dim']} is not base_dim; Wan 2.1's is.")
    known = {ours: settings[theirs] for theirs, ours in FIELDS.items() if theirs in settings}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    try:
        return dataclasses.replace(VAEConfig(), **known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
