"""From the settings of a run to a Wan model."""

from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError, user_input
from train.config import ModelConfig

if TYPE_CHECKING:
    from flax import nnx

    from models.wan import DenseAttention, MonarchAttention, WanConfig, WanModel


def attention_setting(config: ModelConfig) -> "DenseAttention | MonarchAttention":
    """The self-attention that a config asks for.

    Args:
        config: The model's settings.

    Returns:
        A setting for `models.wan.WanConfig.attention`.

    Raises:
        UserError: If the tile, the layout or the number of iterations is invalid.
    """
    from models.wan import DenseAttention, MonarchAttention

    if config.attention == "dense":
        return DenseAttention()
    with user_input():
        return MonarchAttention(
            tile=config.tile, blocks=config.blocks, num_iters=config.num_iters, implementation=config.implementation
        )


def model_settings(config: ModelConfig, *, channels: int | None = None, precision: str = "fp32") -> "WanConfig":
    """The full settings of the network.

    Args:
        config: Preset, overrides and attention.
        channels: Latent channels of the data; None keeps the preset's.
        precision: "fp32" or "bf16", the compute type.

    Returns:
        The configuration.

    Raises:
        UserError: If the preset or a field is unknown or a value is invalid.
    """
    from models.wan import wan_config

    reserved = {"attention", "in_channels", "out_channels", "dtype", "remat"} & set(config.override_values())
    if reserved:
        raise UserError(
            f"overrides names {', '.join(sorted(reserved))}, which follow from the data, attention, precision "
            f"and remat; set those instead"
        )
    with user_input():
        sizes = {} if channels is None else {"in_channels": channels, "out_channels": channels}
        return wan_config(
            config.preset,
            attention=attention_setting(config),
            dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
            remat="full" if config.remat else "none",
            **sizes,
            **config.override_values(),
        )


def build_model(config: ModelConfig, *, channels: int, seed: int, precision: str = "fp32") -> "WanModel":
    """Builds a model with random parameters.

    Args:
        config: Preset, overrides and attention.
        channels: Latent channels of the data.
        seed: Seed of the parameters.
        precision: "fp32" or "bf16", the compute type.

    Returns:
        A `models.wan.WanModel`.

    Raises:
        UserError: If a setting is invalid.
    """
    from flax import nnx

    from models.wan import WanModel

    settings = model_settings(config, channels=channels, precision=precision)
    # one compiled program: faster than op by op
    return nnx.jit(lambda: WanModel(settings, rngs=nnx.Rngs(seed)))()


def pretrained_parameters(path: Path, settings: "WanConfig") -> "nnx.State":
    """Reads the parameters of a Wan checkpoint of any format.

    The attention that is stored with the weights may differ: finetuning is how weights come to another.

    Args:
        path: A folder or file, or the name of a Hugging Face repository.
        settings: The network that they are for; its sizes must be the checkpoint's.

    Returns:
        The parameters, in the dtype of `settings`.

    Raises:
        UserError: If the checkpoint cannot be read or is of another network.
    """
    from flax import nnx

    from models.wan.checkpoints import load_checkpoint

    try:
        model = load_checkpoint(path, config=settings, override=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"init_from {path} is not a run folder with checkpoints/, and as a Wan model: {reason}"
        ) from error
    return nnx.state(model, nnx.Param)
