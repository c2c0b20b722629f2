"""Wan models from the settings of a run, and checks of pretrained parameters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarchrt.models.attention.notation import parse
from monarchrt.models.errors import UserError, user_input
from monarchrt.train.config import AUTO, DataConfig, ModelConfig

if TYPE_CHECKING:
    from flax import nnx

    from monarchrt.models.checkpoints.reading import Shardings
    from monarchrt.models.wan import Attention, WanConfig, WanModel
    from monarchrt.models.wan.checkpoints.source import Source


def attention_setting(config: ModelConfig) -> "Attention":
    """The self-attention setting of a config.

    Args:
        config: The model's settings.

    Returns:
        A setting for `monarchrt.models.wan.WanConfig.attention`.

    Raises:
        UserError: If the kind or one of its fields is unknown, or a value is invalid.
    """
    with user_input():
        return parse(config.attention_text())


def model_settings(
    config: ModelConfig, *, channels: int | None = None, precision: str = "fp32", frozen: bool = False
) -> "WanConfig":
    """The configuration of a network.

    Args:
        config: Preset, overrides and attention.
        channels: Latent channels of the data; None for the preset's.
        precision: Compute dtype, "fp32" or "bf16".
        frozen: Whether the network does not train; its parameters then have the compute dtype.

    Returns:
        The configuration.

    Raises:
        UserError: If the preset or a field is unknown, or a value is invalid.
    """
    from monarchrt.models.wan import wan_config

    reserved = {"attention", "in_channels", "out_channels", "dtype", "remat"} & set(config.override_values())
    if reserved:
        raise UserError(
            f"overrides names {', '.join(sorted(reserved))}, which follow from the data, attention, precision "
            f"and remat; set those instead"
        )
    with user_input():
        values: dict[str, Any] = {} if channels is None else {"in_channels": channels, "out_channels": channels}
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        if frozen and precision != "fp32":
            values["param_dtype"] = dtype
        return wan_config(
            config.preset,
            attention=attention_setting(config),
            dtype=dtype,
            remat="full" if config.remat == AUTO else config.remat,  # auto is replaced once a kind is chosen
            **values | config.override_values(),
        )


def build_model(
    config: ModelConfig, *, channels: int, seed: int, precision: str = "fp32", frozen: bool = False
) -> "WanModel":
    """Builds a model with random parameters.

    Args:
        config: Preset, overrides and attention.
        channels: Latent channels of the data.
        seed: Seed of the parameters.
        precision: Compute dtype, "fp32" or "bf16".
        frozen: Whether the network does not train; its parameters then have the compute dtype.

    Returns:
        A `monarchrt.models.wan.WanModel`.

    Raises:
        UserError: If a setting is invalid.
    """
    from flax import nnx

    from monarchrt.models.wan import WanModel

    settings = model_settings(config, channels=channels, precision=precision, frozen=frozen)
    # as one compiled program, which is faster than operation by operation
    return nnx.jit(lambda: WanModel(settings, rngs=nnx.Rngs(seed)))()


def check_frame_size(data: DataConfig, settings: "WanConfig") -> None:
    """Checks that frames of a video are whole tokens: multiples of the data's patch times the network's.

    Args:
        data: Size of the frames and patch of pixels.
        settings: Configuration of the network.

    Raises:
        UserError: If height or width is not a multiple; names the nearest that are.
    """
    if data.precomputed is not None:  # latents have the sizes they have
        return
    for name, patch in zip(("height", "width"), settings.patch_size[1:], strict=True):
        size, whole = getattr(data, name), data.patch * patch
        if size % whole:
            nearest = sorted({max(1, size // whole) * whole, (size // whole + 1) * whole})
            raise UserError(
                f"{name} is {size}, which is not a multiple of {whole}, the patch of {data.patch} pixels times the "
                f"network's of {patch} latents; the nearest that are: {' and '.join(map(str, nearest))}"
            )


def check_pretrained(path: Path, settings: "WanConfig") -> "Source":
    """Checks that a Wan checkpoint has the network's sizes, without reading tensors.

    Args:
        path: A folder or file, or the name of a Hugging Face repository.
        settings: Configuration of the network.

    Returns:
        The opened checkpoint, for `pretrained_parameters`.

    Raises:
        UserError: If the checkpoint cannot be read or has other sizes; names a preset that fits, if there is one.
    """
    from monarchrt.models.wan.checkpoints.load import check_sizes
    from monarchrt.models.wan.checkpoints.source import open_source

    hint = ""
    try:
        source = open_source(path, config=settings)
        hint = _how_to_fit(source.config, settings)
        check_sizes(source, settings)
        source.check()
    except ValueError as error:
        raise UserError(_not_ours(path, error) + hint) from error
    return source


def check_same_network(origin: Path, saved: Mapping[str, Any], config: ModelConfig) -> None:
    """Checks that another run has the same network, since shapes do not determine, for example, the number of heads.

    Args:
        origin: Folder of that run, for the message.
        saved: Identity of that run, from `monarchrt.train.run_folder.identity`.
        config: Model settings of this run; attention may differ.

    Raises:
        UserError: If another setting of the network differs; names both values.
    """
    from monarchrt.models.wan.checkpoints.load import POLICY

    there = model_settings(ModelConfig(preset=saved["preset"], overrides=tuple(saved["overrides"])))
    here = model_settings(ModelConfig(preset=config.preset, overrides=config.overrides))
    differ = [
        f"{field.name}={getattr(there, field.name)} (here: {getattr(here, field.name)})"
        for field in dataclasses.fields(here)
        if field.name not in POLICY and getattr(there, field.name) != getattr(here, field.name)
    ]
    if differ:
        raise UserError(
            f"init_from {origin} is of another network: {', '.join(differ)}; give its --preset and --overrides"
        )


def _how_to_fit(stored: "WanConfig", settings: "WanConfig") -> str:
    """Advice on how to give `settings` the sizes of the stored network, as far as options allow it."""
    from monarchrt.models.wan import PRESETS
    from monarchrt.models.wan.checkpoints.load import POLICY

    # a preset's channels are replaced by the data's
    both = {name: getattr(settings, name) for name in (*POLICY, "in_channels", "out_channels")}
    alike = dataclasses.replace(stored, **both)
    fitting = [name for name, preset in PRESETS.items() if dataclasses.replace(preset, **both) == alike]
    hint = f" Give --preset {fitting[0]}." if fitting and settings != alike else ""
    if stored.in_channels != settings.in_channels:
        hint += (
            f" The data has {settings.in_channels} channels; give --latents, a folder of latents from the model's own "
            f"VAE, which have {stored.in_channels}."
        )
    return hint


def _not_ours(path: Path, error: ValueError) -> str:
    reason = " ".join(str(error).split())
    return f"init_from {path} is not a run folder with checkpoints/, and cannot be used as a Wan model: {reason}"


def pretrained_parameters(
    path: Path, settings: "WanConfig", *, source: "Source | None" = None, sharding: "Shardings | None" = None
) -> "nnx.State":
    """Reads the parameters of a Wan checkpoint of any format.

    The attention stored with the weights may differ from that of `settings`, for which they are then finetuned.

    Args:
        path: A folder or file, or the name of a Hugging Face repository.
        settings: Configuration of the network, with the checkpoint's sizes.
        source: The checkpoint, if it is already open.
        sharding: Sharding of each parameter, by path and shape.

    Returns:
        The parameters, in the dtype of `settings`.

    Raises:
        UserError: If the checkpoint cannot be read or has other sizes.
    """
    from flax import nnx

    from monarchrt.models.wan.checkpoints import load_source, open_source

    try:
        source = source or open_source(path, config=settings)
        model = load_source(source, config=settings, sharding=sharding, override=True)
    except ValueError as error:
        raise UserError(_not_ours(path, error)) from error
    return nnx.state(model, nnx.Param)
