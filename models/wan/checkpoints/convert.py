"""Inspection and conversion of checkpoints, for the command line and for scripts."""

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from monarchrt.models.attention.base import Attention
from monarchrt.models.checkpoints.reading import some
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.load import Progress, check_sizes, read_model, resolve_config
from monarchrt.models.wan.checkpoints.mapping import tensors
from monarchrt.models.wan.checkpoints.save import check_target, save_checkpoint, write_tensors
from monarchrt.models.wan.checkpoints.source import Source, open_source
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.kinds import own_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The contents of a checkpoint.

    Attributes:
        path: Path of the weights.
        format: "official", "diffusers", "torch" or "orbax".
        naming: Naming of its tensors, "official" or "diffusers".
        config: Configuration of the model, from `config.json` or from the tensors.
        config_path: The `config.json`, if there is one.
        attention: Description of the self-attention stored with the weights.
        parameters: Number of parameters in all tensors.
        dtypes: Number of tensors by dtype.
        tensors: Number of tensors in the file.
        expected: Number of tensors of the model.
        sets: Sets of tensors in a `.pt` file.
        weights: The set that was inspected, which would be loaded.
        missing: Tensors of the model that the file lacks.
        unexpected: Tensors in the file that the model does not have.
        wrong_shape: Sentences about tensors with a wrong shape.
        few_step: Whether the weights are distilled, to be sampled in few steps.
        trained: Settings of the training, if stored.
        float8: Number of weights stored in float8 with scales, and without.
        scheduler: Description of the `scheduler_config.json` of its pipeline, if there is one.
    """

    path: Path
    format: str
    naming: str
    config: WanConfig
    config_path: Path | None
    attention: str
    parameters: int
    dtypes: dict[str, int]
    tensors: int
    expected: int
    sets: tuple[str, ...]
    weights: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    few_step: bool = False
    trained: settings.Trained | None = None
    float8: tuple[int, int] = (0, 0)
    scheduler: str | None = None

    @property
    def complete(self) -> bool:
        """Whether it can be loaded."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def lines(self) -> list[str]:
        """A report with one line per fact."""
        c = self.config
        report = {
            "path": str(self.path),
            "format": f"{self.format}, {self.naming} names" if self.format == "torch" else self.format,
            "model": f"{c.model_type}, dim {c.dim}, {c.num_layers} layers, {c.num_heads} heads, ffn {c.ffn_dim}, "
            f"{c.in_channels} -> {c.out_channels} channels",
            "sizes from": "the tensors, which do not tell the heads (--num-heads, --head-dim)"
            if self.config_path is None
            else str(self.config_path),
            "attention": self.attention,
            "sampling": settings.describe_sampling(self.few_step, self.trained),
            "parameters": f"{self.parameters:,}",
            "dtype": ", ".join(f"{name} ({count} tensors)" for name, count in self.dtypes.items()),
            "tensors": f"{self.tensors} of {self.expected}",
        }
        kinds = ("with scales, read as float32", "without scales, read as bfloat16")
        for count, scales in zip(self.float8, kinds, strict=True):
            if count:
                report["dtype"] += f"; {count} are float8 {scales}"
        if self.trained is not None and self.trained.latents is not None:
            report["trained on"] = f"{' x '.join(map(str, self.trained.latents))} latents"
        if self.scheduler is not None:
            report["scheduler"] = self.scheduler
        if self.sets != ("",):
            report["sets"] = f"{some(list(map(repr, self.sets)), 9)}; used: {self.weights!r}"
        for name, items in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong shape", self.wrong_shape),
        ):
            report[name] = some(list(items), 5) if items else "none"
        return [f"{name:<12}{value}" for name, value in report.items()]


def inspect_checkpoint(
    path: str | Path,
    *,
    config: WanConfig | None = None,
    weights: str | None = None,
    revision: str | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> CheckpointInfo:
    """Inspects a checkpoint without loading tensors.

    Examples:
        >>> import tempfile
        >>> from flax import nnx
        >>> from monarchrt.models.wan import WanModel, wan_config
        >>> folder = tempfile.mkdtemp() + "/tiny"
        >>> _ = save_checkpoint(WanModel(wan_config("tiny"), rngs=nnx.Rngs(0)), folder, format="diffusers")
        >>> info = inspect_checkpoint(folder)
        >>> info.format, info.parameters, info.complete
        ('diffusers', 597152, True)

    Args:
        path: A folder of the official, diffusers or orbax format, a pipeline folder with `transformer/`, a safetensors
            or `.pt` file, or a Hugging Face repository `owner/name`.
        config: Sizes of the model, for files without `config.json` whose heads do not have 128 channels.
        weights: Name of the set in a `.pt` file.
        revision: Revision of a Hugging Face repository.
        num_heads: Number of attention heads, for files without `config.json` whose heads do not have 128 channels.
        head_dim: Channels of a head, likewise.

    Returns:
        The contents, also of an incomplete checkpoint.

    Raises:
        ValueError: If it cannot be read.
    """
    source = open_source(
        path, config=config, weights=weights, revision=revision, num_heads=num_heads, head_dim=head_dim
    )
    missing, unexpected, wrong = source.problems()
    infos = source.file.infos.values()
    return CheckpointInfo(
        path=source.path,
        format=source.format,
        naming=source.naming,
        config=source.config,
        config_path=source.config_path,
        attention=settings.describe_attention(source.config),
        parameters=sum(info.nbytes // info.dtype.itemsize for info in infos),
        dtypes=dict(collections.Counter(info.dtype.name for info in infos).most_common()),
        tensors=len(source.file.infos),
        expected=len(tensors(source.config)),
        sets=source.sets,
        weights=source.weights,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        wrong_shape=tuple(wrong),
        few_step=source.few_step,
        trained=source.trained,
        float8=(getattr(source.file, "scaled", 0), getattr(source.file, "plain", 0)),
        scheduler=None if source.scheduler is None else str(source.scheduler),
    )


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    config: WanConfig | None = None,
    attention: Attention | tuple[Attention, ...] | None = None,
    causal_block: int | None = None,
    weights: str | None = None,
    max_shard_bytes: int | None = None,
    override: bool = False,
    few_step: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> Path:
    """Converts a checkpoint to another format; between official and diffusers, tensors are copied bit by bit.

    Args:
        source: As in `inspect_checkpoint`.
        destination: A folder that does not exist or is empty; for torch, a file that does not exist.
        to: "official", "diffusers", "orbax" or "torch".
        dtype: Dtype of the tensors written; None keeps the file's.
        config: Sizes that the source must have.
        attention: Self-attention to store with the weights; None keeps the stored one.
        causal_block: Latent frames per causal block to store; None keeps the stored value.
        weights: Name of the set in a `.pt` file.
        max_shard_bytes: Size above which weights are split into numbered shards.
        override: Whether to allow an attention other than the one stored with the weights.
        few_step: Whether to store that the weights are distilled; this is always stored if the source says so or is a
            generator of Self-Forcing.
        progress: Called after each tensor with its name, bytes written so far, and bytes in total.
        revision: Revision of a Hugging Face repository.
        num_heads: As in `inspect_checkpoint`.
        head_dim: As in `inspect_checkpoint`.

    Returns:
        The folder, or the file for torch.

    Raises:
        ValueError: If the source cannot be read or is incomplete, or the destination is not empty.
    """
    check_target(to)
    opened = open_source(
        source, config=config, weights=weights, revision=revision, num_heads=num_heads, head_dim=head_dim
    )
    if config is not None:
        check_sizes(opened, config)
    return convert_source(
        opened,
        destination,
        to=to,
        dtype=dtype,
        attention=attention,
        causal_block=causal_block,
        max_shard_bytes=max_shard_bytes,
        override=override,
        few_step=few_step,
        progress=progress,
    )


def convert_source(
    opened: Source,
    destination: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    attention: Attention | tuple[Attention, ...] | None = None,
    causal_block: int | None = None,
    max_shard_bytes: int | None = None,
    override: bool = False,
    few_step: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Converts an opened checkpoint; arguments are as in `convert_checkpoint`.

    Args:
        opened: From `monarchrt.models.wan.checkpoints.source.open_source`.
        destination: The folder, or the file for torch.
        to: Format.
        dtype: Dtype of the tensors written.
        attention: Self-attention to store.
        causal_block: Frames per block to store.
        max_shard_bytes: Largest size of a file.
        override: Whether to allow another attention.
        few_step: Whether to store that the weights are distilled.
        progress: Called after each tensor.

    Returns:
        The folder, or the file.

    Raises:
        ValueError: If the source is incomplete, or the destination is not empty.
    """
    check_target(to)
    opened.check()
    chosen = resolve_config(opened, None, attention=attention, causal_block=causal_block, override=override)
    few_step = few_step or opened.few_step
    if to == "orbax" or own_shapes(chosen) != own_shapes(opened.config):
        if dtype is not None:
            chosen = dataclasses.replace(chosen, param_dtype=dtype)
        model = read_model(opened, chosen, progress=progress)
        return save_checkpoint(
            model,
            destination,
            format=to,
            max_shard_bytes=max_shard_bytes,
            few_step=few_step,
            trained=opened.trained,
        )
    return write_tensors(
        destination,
        chosen,
        to,
        info=opened.info,
        read=opened.read,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        few_step=few_step,
        trained=opened.trained,
        progress=progress,
    )


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Options of `monarchrt convert`.

    Attributes:
        src: A folder or file with weights, or a Hugging Face repository owner/name.
        dst: The folder to write, which must be new or empty; for torch a file, such as student.pt.
        to: Format: official, diffusers, orbax or torch (a .pt file with Self-Forcing's names and no settings); for a
            LoRA official (ComfyUI's), diffusers or musubi.
        lora: LoRAs to merge, FILE or FILE:SCALE, as in `monarchrt generate`.
        dtype: float32, bfloat16 or float16. Default: the file's own.
        weights: Which set in a .pt file: generator_ema, generator, critic or model.
        max_shard_gb: Split larger weights into numbered files of at most this many GB (10^9 bytes).
        few_step: Record that the model is distilled to a few steps; for Self-Forcing's .pt files this is known.
        revision: Revision of a Hugging Face repository.
        num_heads: Attention heads, for files without config.json whose heads do not have 128 channels.
        head_dim: Channels per head, likewise.
    """

    src: str
    dst: Path
    to: Literal["official", "diffusers", "orbax", "torch", "musubi"] = "official"
    lora: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    weights: str | None = None
    max_shard_gb: float | None = None
    few_step: bool = False
    revision: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None

    @property
    def max_shard_bytes(self) -> int | None:
        """`max_shard_gb` in bytes.

        Raises:
            ValueError: If it is not positive and finite.
        """
        if self.max_shard_gb is None:
            return None
        if not 0 < self.max_shard_gb < math.inf:
            raise ValueError(f"max_shard_gb={self.max_shard_gb} must be positive and finite, for example 5.")
        return int(self.max_shard_gb * 1e9)

    def run(
        self, progress: Progress | None = None, *, adapt: Callable[[Source], Source] = lambda source: source
    ) -> Path:
        """Converts; see `convert_checkpoint`.

        Args:
            progress: Called after each tensor.
            adapt: Applied to the opened checkpoint before it is written.

        Returns:
            The folder or file that was written.
        """
        check_target(self.to)
        opened = open_source(
            self.src, weights=self.weights, revision=self.revision, num_heads=self.num_heads, head_dim=self.head_dim
        )
        return convert_source(
            adapt(opened),
            self.dst,
            to=self.to,
            dtype=self.dtype,
            max_shard_bytes=self.max_shard_bytes,
            few_step=self.few_step,
            progress=progress,
        )


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Options of `monarchrt inspect`.

    Attributes:
        path: A folder or file with weights, or a Hugging Face repository owner/name.
        weights: Which set in a .pt file: generator_ema, generator, critic or model.
        revision: Revision of a Hugging Face repository.
        num_heads: Attention heads, for files without config.json whose heads do not have 128 channels.
        head_dim: Channels per head, likewise.
    """

    path: str
    weights: str | None = None
    revision: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None

    def run(self) -> CheckpointInfo:
        """Inspects; see `inspect_checkpoint`."""
        return inspect_checkpoint(
            self.path,
            weights=self.weights,
            revision=self.revision,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )
