"""Loading of models from checkpoints, one tensor at a time."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from monarchrt.models.attention.base import Attention
from monarchrt.models.checkpoints.reading import Progress, Shardings, fill_model, read_entries, stored_dtype
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.source import Source, open_source
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel
from monarchrt.models.wan.kinds import own_shapes

# fields that do not change tensors, which callers may choose independently of the checkpoint
POLICY = ("attention", "causal_block", "independent_first_frame", "param_dtype", "dtype", "remat", "unroll_layers")


def load_checkpoint(
    path: str | Path,
    *,
    config: WanConfig | None = None,
    attention: Attention | tuple[Attention, ...] | None = None,
    causal_block: int | None = None,
    param_dtype: str | None = None,
    dtype: str | None = None,
    remat: str | None = None,
    weights: str | None = None,
    sharding: jax.sharding.Sharding | Shardings | None = None,
    override: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> WanModel:
    """Loads a model from any supported format.

    Tensors are read one at a time, cast and placed; stacked parameters are allocated once on their devices and filled
    in place, so that the host needs memory for the model and one tensor at most.

    Examples:
        >>> import tempfile
        >>> from monarchrt.models.wan import wan_config
        >>> from monarchrt.models.wan.checkpoints import save_checkpoint
        >>> model = WanModel(wan_config("tiny"), rngs=nnx.Rngs(0))
        >>> folder = tempfile.mkdtemp() + "/tiny"
        >>> _ = save_checkpoint(model, folder)
        >>> load_checkpoint(folder, dtype="bfloat16").config.dtype
        'bfloat16'

    Args:
        path: As in `inspect_checkpoint`.
        config: Expected configuration, whose sizes must be the checkpoint's. Its policy fields (attention, dtypes,
            remat) are used for arguments below that are None.
        attention: Self-attention to use; None: the one stored with the weights, else dense.
        causal_block: Latent frames per causal block; None: the stored value.
        param_dtype: Dtype of the parameters; None keeps the file's (float32 if it is mixed).
        dtype: Compute dtype; None: float32.
        remat: As in `WanConfig`.
        weights: Name of the set in a `.pt` file.
        sharding: Sharding of the parameters: one for all, or a function of path and shape (layers are stacked on axis
            0, which must not be split).
        override: Whether to allow an attention other than the one stored with the weights.
        progress: Called after each tensor with its name, bytes read so far, and bytes in total.
        revision: Revision of a Hugging Face repository.
        num_heads: As in `inspect_checkpoint`.
        head_dim: As in `inspect_checkpoint`.

    Returns:
        The model.

    Raises:
        ValueError: If the checkpoint cannot be read, lacks tensors, does not fit `config`, or was trained with another
            attention.
    """
    source = open_source(
        path, config=config, weights=weights, revision=revision, num_heads=num_heads, head_dim=head_dim
    )
    return load_source(
        source,
        config=config,
        attention=attention,
        causal_block=causal_block,
        param_dtype=param_dtype,
        dtype=dtype,
        remat=remat,
        sharding=sharding,
        override=override,
        progress=progress,
    )


def load_source(
    source: Source,
    *,
    config: WanConfig | None = None,
    attention: Attention | tuple[Attention, ...] | None = None,
    causal_block: int | None = None,
    param_dtype: str | None = None,
    dtype: str | None = None,
    remat: str | None = None,
    sharding: jax.sharding.Sharding | Shardings | None = None,
    override: bool = False,
    progress: Progress | None = None,
) -> WanModel:
    """Loads a model from an opened checkpoint; arguments are as in `load_checkpoint`.

    Args:
        source: From `monarchrt.models.wan.checkpoints.source.open_source`.
        config: Expected configuration.
        attention: Self-attention to use.
        causal_block: Frames per block.
        param_dtype: Dtype of the parameters.
        dtype: Compute dtype.
        remat: As in `WanConfig`.
        sharding: Sharding of the parameters.
        override: Whether to allow an attention other than the one stored with the weights.
        progress: Called after each tensor.

    Returns:
        The model.

    Raises:
        ValueError: If the checkpoint lacks tensors, does not fit `config`, or was trained with another attention.
    """
    if config is not None:
        check_sizes(source, config)
    source.check()
    chosen = resolve_config(
        source,
        config,
        attention=attention,
        causal_block=causal_block,
        param_dtype=param_dtype,
        dtype=dtype,
        remat=remat,
        override=override,
    )
    return read_model(source, chosen, sharding=sharding, progress=progress)


def check_sizes(source: Source, config: WanConfig) -> None:
    """Raises ValueError if the checkpoint has other sizes than `config`."""
    stored = source.config
    if stored.model_type != config.model_type:
        raise ValueError(
            f"{source.path} is {_kind(stored)}; config says model_type={config.model_type!r}, {_kind(config)}."
        )
    fields = [field.name for field in dataclasses.fields(WanConfig) if field.name not in POLICY]
    differ = [
        f"{name}={getattr(stored, name)} (config: {getattr(config, name)})"
        for name in fields
        if getattr(stored, name) != getattr(config, name)
    ]
    if differ:
        raise ValueError(f"{source.path} is another model than config describes: {', '.join(differ)}.")


def resolve_config(source: Source, config: WanConfig | None, *, override: bool, **policy) -> WanConfig:
    """The checkpoint's sizes with the requested policy.

    Args:
        source: The checkpoint.
        config: Expected configuration, or None; see `load_checkpoint`.
        override: Whether to allow an attention other than the stored one.
        **policy: Policy fields of `WanConfig`; for None, those of `config`, or else of the checkpoint, are used.

    Returns:
        The configuration.

    Raises:
        ValueError: If the attention is not the stored one, unless `override`.
    """
    asked = {name: value for name, value in policy.items() if value is not None}
    if config is not None:
        asked = {name: getattr(config, name) for name in POLICY} | asked
    if "param_dtype" not in asked:
        asked["param_dtype"] = stored_dtype(source.file)
    chosen = dataclasses.replace(source.config, **asked)
    stored = settings.attention_to_json(source.config)
    if stored is not None and not settings.same_attention(chosen, source.config) and not override:
        raise ValueError(
            f"{source.path} was trained with {settings.describe_attention(source.config)}; requested was "
            f"{settings.describe_attention(chosen)}. Leave attention out to use the stored one, or pass override."
        )
    return chosen


def read_model(
    source: Source,
    config: WanConfig,
    *,
    sharding: jax.sharding.Sharding | Shardings | None = None,
    progress: Progress | None = None,
) -> WanModel:
    """Builds a model from a checkpoint that has been checked.

    If its attention has other parameters of its own than the stored one, they change as in `WanModel.with_attention`.

    Args:
        source: The checkpoint.
        config: Configuration of the model, with the checkpoint's sizes.
        sharding: As in `load_checkpoint`.
        progress: As in `load_checkpoint`.

    Returns:
        The model.
    """
    stored = dataclasses.replace(config, attention=source.config.attention, causal_block=source.config.causal_block)
    as_stored = own_shapes(stored) != own_shapes(config)
    model = nnx.eval_shape(lambda: WanModel(stored if as_stored else config, rngs=nnx.Rngs(0)))
    arrays = read_entries(source.file, source.entries(), source.naming, progress=progress)
    model = fill_model(model, arrays, dtype=jnp.dtype(config.param_dtype), sharding=sharding)
    return model.with_config(attention=config.attention, causal_block=config.causal_block) if as_stored else model


def _kind(config: WanConfig) -> str:
    image = "an image embedding" if config.model_type == "i2v" else "no image embedding"
    return f"{config.model_type} ({config.in_channels} input channels, {image})"
