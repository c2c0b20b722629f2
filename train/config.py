"""The settings of a training run: frozen dataclasses, each field documented where it is defined.

`monarchrt train --help` is made from these docstrings. Nothing here imports JAX, so that help is quick.
"""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from monarchrt.models.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on: windows of one clip, or a folder of precomputed latents."""

    video: Path | None = None
    """A video file. Its frames are read once, resized to cover height x width, cropped in the middle and cut into
    windows."""

    latents: Path | None = None
    """Instead of a video: a folder of .safetensors files, each with `latents` [F, H, W, C] and `text` [L, D]."""

    frames: int = 9
    """Frames in one training window."""

    height: int = 64
    """Height of a frame in pixels; a multiple of the patch."""

    width: int = 112
    """Width of a frame in pixels; a multiple of the patch."""

    stride: int = 1
    """Take every n-th frame of the video."""

    patch: int = 8
    """Side of the pixel blocks that become one latent position with 3*patch*patch channels (an orthonormal cosine
    transform; there is no VAE)."""

    whitening: float = 0.5
    """From 0 (latents as the orthonormal transform gives them) to 1 (every channel scaled to about unit variance,
    as natural images have it)."""

    held_out: float = 0.2
    """Fraction of the frames (or of the latent files) at the end that is never trained on."""

    gap: int = 4
    """Frames left out between the training part and the held-out part of a clip."""

    crop: float = 1.0
    """Read the video this much larger than height x width and train on random crops of it; 1 turns it off.
    Held-out windows are always cropped in the middle."""

    flip: bool = False
    """Mirror half of the training windows left to right."""

    def __post_init__(self) -> None:
        _require(self.frames >= 1, f"frames is {self.frames}; it must be at least 1")
        _require(self.stride >= 1, f"stride is {self.stride}; it must be at least 1")
        _require(self.gap >= 0, f"gap is {self.gap}; it must be at least 0")
        _require(self.patch >= 1, f"patch is {self.patch}; it must be at least 1, for example 4 or 8")
        _require(0 < self.held_out < 1, f"held_out is {self.held_out}; it must lie between 0 and 1, for example 0.2")
        _require(0 <= self.whitening <= 1, f"whitening is {self.whitening}; it must lie in [0, 1]")
        _require(1 <= self.crop <= 4, f"crop is {self.crop}; it must lie in [1, 4]")
        for name in ("height", "width"):
            size = getattr(self, name)
            _require(
                size >= self.patch and size % self.patch == 0,
                f"{name} is {size}, which is not a positive multiple of patch {self.patch}; "
                f"the nearest that is: {max(1, round(size / self.patch)) * self.patch}",
            )
        for name in ("frames", "height", "width", "stride", "patch", "whitening", "gap", "crop", "flip"):
            value = getattr(self, name)
            _require(
                self.latents is None or self.video is not None or value == getattr(type(self), name),
                f"{name} is {value}, but latents are taken as they are in {self.latents}; leave {name} out",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its attention."""

    preset: str = "tiny"
    """Name of the Wan configuration: tiny, wan2.1-t2v-1.3b or wan2.1-t2v-14b."""

    overrides: tuple[str, ...] = ()
    """Fields of the preset to change: `--overrides num_layers=2 dim=96 patch_size=[1,2,2]`."""

    attention: Literal["dense", "monarch"] = "monarch"
    """Self-attention of every block: exact softmax attention, or tiled MonarchAttention."""

    tile: tuple[int, int, int] | None = None
    """Tile of MonarchAttention in tokens (frames, height, width), for example `--tile 1 4 7`. Each must divide the
    token grid. Default: one frame, (1, h, w)."""

    blocks: str = "fh,w"
    """Which token axes form the rows and the columns of a tile: fh,w  w,fh  f,hw  hw,f  fw,h  h,fw."""

    num_iters: int = 1
    """Refinement steps of MonarchAttention; the paper uses 1."""

    implementation: str | None = None
    """Backend of MonarchAttention: reference, xla, ...; the default picks the fastest that can do it."""

    keep_intermediates: bool = False
    """Let MonarchAttention keep more of the forward pass for the backward pass, on Hopper: a little faster, and up to
    4 GB more per block of the network at 81 frames of 480p; with remat, of one block at a time."""

    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _require(self.num_iters >= 1, f"num_iters is {self.num_iters}; it must be at least 1")
        for name in ("tile", "blocks", "num_iters", "implementation", "keep_intermediates"):
            value = getattr(self, name)
            _require(
                self.attention == "monarch" or value == getattr(type(self), name),
                f"{name} is {value} but attention is {self.attention!r}; {name} needs attention 'monarch'",
            )
        self.override_values()

    def override_values(self) -> dict[str, Any]:
        """The overrides by name; values are read as JSON, or else taken as text.

        Example:
            >>> ModelConfig(overrides=("dim=96", "remat=dots")).override_values()
            {'dim': 96, 'remat': 'dots'}
        """
        values: dict[str, Any] = {}
        for override in self.overrides:
            name, equals, text = override.partition("=")
            _require(bool(equals and name), f"overrides has {override!r}; write name=value, for example num_layers=2")
            try:
                value = json.loads(text)
                values[name] = tuple(value) if isinstance(value, list) else value
            except json.JSONDecodeError:
                values[name] = text
        return values


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The rectified-flow objective."""

    shift: float = 5.0
    """Timestep shift s: sigma = s*u / (1 + (s-1)*u). Larger means more training at high noise."""

    weighting: Literal["gaussian", "uniform"] = "gaussian"
    """Weight of a noise level in the loss: a bell around t = 500 with mean 1, or 1 everywhere."""

    num_train_timesteps: int = 1000
    """Number of noise levels; the network sees t = num_train_timesteps * sigma."""

    frames_per_level: int | None = None
    """Frames that share a noise level. Default: the whole window. 1 or more: each run of so many frames draws a level
    of its own (diffusion forcing); 3 is what Self-Forcing trains causal models with."""

    def __post_init__(self) -> None:
        _require(0 < self.shift < math.inf, f"shift is {self.shift}; it must be positive and finite, for example 5.0")
        _require(
            self.num_train_timesteps >= 2,
            f"num_train_timesteps is {self.num_train_timesteps}; it must be at least 2, for example 1000",
        )
        _require(
            self.frames_per_level is None or self.frames_per_level >= 1,
            f"frames_per_level is {self.frames_per_level}; it must be at least 1, for example 3, or None",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rate over time, and the moving average of the parameters."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the gradient's moving average."""

    beta2: float = 0.99
    """Decay of the squared gradient's moving average."""

    eps: float = 1e-8
    """Added to the denominator of the update."""

    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (no biases, norms or modulation tables)."""

    clip_norm: float | None = 10.0
    """Clip the gradient to this global L2 norm; None turns it off."""

    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up: constant, or down to 0 at `decay_steps`."""

    decay_steps: int | None = None
    """Step at which a cosine or linear schedule reaches 0. Default: the number of steps of the run."""

    accumulation: int = 1
    """Split each batch into this many parts and add up their gradients: less memory, the same mathematics."""

    ema_decay: float | None = 0.99
    """Decay of the moving average of the parameters, which is what gets evaluated; None turns it off."""

    ema_start: int = 0
    """Step at which the average starts, as a copy of the parameters."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{name} is {value}; it must be positive and finite")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            _require(0 <= beta < 1, f"{name} is {beta}; it must lie in [0, 1)")
        _require(
            0 <= self.weight_decay < math.inf, f"weight_decay is {self.weight_decay}; it must be at least 0, and finite"
        )
        _require(self.clip_norm is None or self.clip_norm > 0, f"clip_norm is {self.clip_norm}; it must be positive")
        _require(self.warmup >= 0, f"warmup is {self.warmup}; it must be at least 0")
        _require(self.accumulation >= 1, f"accumulation is {self.accumulation}; it must be at least 1")
        _require(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"ema_decay is {self.ema_decay}; it must lie in [0, 1) or be None",
        )
        _require(self.ema_start >= 0, f"ema_start is {self.ema_start}; it must be at least 0")
        _require(
            self.decay_steps is None or self.decay_steps > self.warmup,
            f"decay_steps is {self.decay_steps}; it must be larger than warmup ({self.warmup})",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, how long it is, and what it writes."""

    folder: Path = Path("runs/train")
    """Run folder: config.json, log.jsonl, tensorboard/, checkpoints/, samples/."""

    resume: bool = False
    """Continue from the newest readable checkpoint of the folder. Settings that are not given come from its
    config.json; model, tile and data must be the checkpoint's."""

    init_from: Path | None = None
    """Start from the parameters of another run folder (their moving average, if it has one), for example to
    finetune a dense model with MonarchAttention; or from a Wan checkpoint, as `monarchrt inspect` takes it."""

    steps: int = 200
    """Optimizer steps in all."""

    batch: int = 4
    """Windows per step."""

    seed: int = 0
    """Seed of the initial parameters, the noise and the order of the data."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type of the network; parameters, optimizer, softmax and loss stay in fp32."""

    sharding: Literal["replicated", "fsdp"] = "replicated"
    """With several devices, each takes an equal part of the batch, and holds the whole state (replicated) or a part of
    it (fsdp)."""

    log_every: int = 1
    """Write loss, gradient norm and learning rate every this many steps."""

    eval_every: int = 50
    """Measure the held-out loss every this many steps, and at the end."""

    eval_windows: int = 4
    """Held-out windows to measure on, spread over the held-out part."""

    eval_timesteps: int = 8
    """Noise levels to measure at, spread evenly over the training distribution."""

    sample_every: int = 0
    """Every this many steps, write an mp4 of a held-out window, of what the network restores from it at noise level
    0.6, and of what it makes from pure noise. 0: never."""

    checkpoint_every: int = 50
    """Save a checkpoint every this many steps, and at the end."""

    keep: int = 3
    """Checkpoints to keep, newest first."""

    wandb: str | None = None
    """Also log to this project of Weights & Biases (`pip install wandb`; with WANDB_MODE=offline its files stay in
    the run folder). log.jsonl and TensorBoard are always written."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "eval_every", "eval_windows", "eval_timesteps", "keep"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        _require(self.checkpoint_every >= 1, f"checkpoint_every is {self.checkpoint_every}; it must be at least 1")
        _require(self.sample_every >= 0, f"sample_every is {self.sample_every}; it must be at least 0")
        _require(self.wandb is None or bool(self.wandb.strip()), "wandb is empty; give the name of a project")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in [0, 2**32)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Finetune, or train from scratch, a Wan-shaped video diffusion transformer on a clip."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        accumulation, batch = self.optimizer.accumulation, self.run.batch
        _require(
            batch % accumulation == 0,
            f"accumulation is {accumulation}, which does not divide batch {batch}; "
            f"it could be {', '.join(str(n) for n in range(1, batch + 1) if batch % n == 0)}",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Turns a config into plain JSON values: paths become strings, tuples lists.

    Example:
        >>> to_dict(ModelConfig(tile=(1, 2, 4)))["tile"]
        [1, 2, 4]
    """
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def replace_settings(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """A config with some settings changed.

    Args:
        config: Where the other settings come from.
        values: Settings under their names, or in tables of that of a part, as `to_dict` makes them.

    Returns:
        The config.

    Raises:
        UserError: If a setting is unknown or named twice, or a value is of another kind or out of range.

    Example:
        >>> config = replace_settings(TrainConfig(), {"steps": 5, "model": {"tile": [1, 2, 3]}})
        >>> config.run.steps, config.model.tile
        (5, (1, 2, 3))
    """
    parts = {part.name: set(typing.get_type_hints(part.default_factory)) for part in dataclasses.fields(TrainConfig)}
    found: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in values.items():
        if name in parts:
            _require(isinstance(value, dict), f"{name} is {_shown(value)}; it must be a table of settings")
        owner = name if name in parts else next((part for part in parts if name in parts[part]), None)
        if owner is None:
            known = sorted(set().union(*parts.values()))
            near = difflib.get_close_matches(name, known, n=3)
            raise UserError(
                f"there is no setting {name}; "
                + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}")
            )
        for setting, given in value.items() if name in parts else [(name, value)]:
            _require(setting not in found[owner], f"{setting} is given twice")
            found[owner][setting] = given
    merged = to_dict(config)
    return from_dict(TrainConfig, {part: merged[part] | found[part] for part in parts})


def from_dict(kind: type, values: Any) -> Any:
    """Builds a config of type `kind` from what `to_dict` made; fields that are missing keep their default.

    Args:
        kind: One of the config dataclasses.
        values: A dict of plain JSON values.

    Returns:
        An instance of `kind`.

    Raises:
        UserError: If a field is unknown, or a value is of another kind or out of range.

    Example:
        >>> from_dict(ModelConfig, {"tile": [1, 2, 3]}).tile
        (1, 2, 3)
    """
    _require(isinstance(values, dict), f"{kind.__name__} is {_shown(values)}; it must be a table of settings")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
    make: Any = kind
    return make(**{name: _revive(name, hints[name], value) for name, value in values.items()})


def _revive(name: str, hint: Any, value: Any) -> Any:
    """The value of a setting from what JSON has for it."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        # optional fields only: the first kind that is not None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        _require(value in choices, f"{name} is {_shown(value)}; choose from {', '.join(map(str, choices))}")
        return value
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        _require(isinstance(value, list | tuple), f"{name} is {_shown(value)}; it must be a list")
        if Ellipsis not in parts:
            _require(len(value) == len(parts), f"{name} is {_shown(value)}; it must have {len(parts)} entries")
        return tuple(_revive(name, parts[0], part) for part in value)
    accepted = {Path: (str, Path), float: (float, int)}.get(hint, (hint,))
    fits = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    fits = fits and not (hint is float and abs(value) > sys.float_info.max and value not in (math.inf, -math.inf))
    _require(fits, f"{name} is {_shown(value)}; it must be {_KINDS[hint]}")
    return typing.cast(Any, hint)(value)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def _shown(value: Any) -> str:
    """A value as a message shows it, short however large it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
