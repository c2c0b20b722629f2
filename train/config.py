"""The settings of a training run: frozen dataclasses, each field documented where it is defined.

`monarchrt train --help` is generated from these docstrings. This module does not import JAX, so that help is quick.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from monarchrt.models.attention.options import AttentionOptions
from monarchrt.models.attention.registry import SHORT
from monarchrt.models.bounds import check_bounds
from monarchrt.models.errors import UserError, require
from monarchrt.models.generate.runs import GENERATION, override_values
from monarchrt.train.bounds import WHOLE_NUMBERS
from monarchrt.train.data_settings import DataConfig
from monarchrt.train.lora_settings import LoRASettings
from monarchrt.train.objectives.registry import ObjectiveSettings, settings_class
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.run_settings import RunConfig

# what a backward pass recomputes, from the fastest to the one that needs the least memory
REMAT = ("none", "cheap", "dots", "attention", "full")
AUTO = "auto"


def remat_kind(value: Any) -> Any:
    """The name of a `remat` setting; runs and settings files of earlier versions have a flag in its place.

    Examples:
        >>> remat_kind(True), remat_kind(False), remat_kind("cheap")
        ('full', 'none', 'cheap')
    """
    return {False: "none", True: "full"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True, kw_only=True)
class ModelConfig(AttentionOptions):
    """The network and its attention."""

    attention_fields: ClassVar[Mapping[str, type]] = {
        "tile": tuple,
        "blocks": str,
        "num_iters": int,
        "implementation": str,
        "keep_intermediates": bool,
    }

    preset: str = "tiny"
    """Name of the Wan configuration: tiny, wan2.1-t2v-1.3b or wan2.1-t2v-14b."""

    overrides: tuple[str, ...] = ()
    """Fields of the preset to change: `--overrides num_layers=2 dim=96 patch_size=[1,2,2]`."""

    attention: str = SHORT
    """Self-attention: a kind, such as dense (exact softmax attention) or monarch (tiled MonarchAttention), with its
    fields, as in `monarch(tile=(3,30,52))`; or a combination such as `first_layers(2, dense, monarch)`, likewise
    first_steps and first_blocks, or `per_layer(2 * dense, 28 * monarch)`."""

    tile: tuple[int, int, int] | None = None
    """Tile of MonarchAttention in tokens (frames, height, width), for example `--tile 1 4 7`. Each must divide the
    token grid. Default: one frame, (1, h, w)."""

    blocks: str = "fh,w"
    """Which token axes form the rows and the columns of a tile: fh,w  w,fh  f,hw  hw,f  fw,h  h,fw."""

    num_iters: int = 1
    """Refinement steps of MonarchAttention; the paper uses 1."""

    implementation: str | None = None
    """Backend of MonarchAttention: reference, xla, ... Default: the fastest that supports the call."""

    keep_intermediates: bool = False
    """Let MonarchAttention keep more of the forward pass for the backward pass, on Hopper: slightly faster, but up to
    4 GB more per block of the network at 81 frames of 480p; with remat, only one block's at a time."""

    remat: Literal["none", "cheap", "dots", "attention", "full", "auto"] = "none"
    """What the backward pass recomputes in each block, to save memory: none; cheap, norms, activations and rotary
    embedding; dots, everything but products with weights; attention, everything but the outputs of attention kernels;
    full, everything, for about a third more time. auto: the least that fits the device's memory, according to the
    compiled program. `--remat` alone: full."""

    def __post_init__(self) -> None:
        self.normalize_attention()
        object.__setattr__(self, "remat", remat_kind(self.remat))
        require(self.remat in (*REMAT, AUTO), f"remat is {self.remat!r}; choose from {', '.join((*REMAT, AUTO))}")
        require(self.num_iters >= 1, f"num_iters is {self.num_iters}; it must be at least 1")
        self.override_values()

    def stored(self) -> dict[str, Any]:
        """The settings as JSON values by name, with the attention in its notation.

        Examples:
            >>> ModelConfig(tile=(3, 30, 52)).stored()["attention"]
            'monarch(tile=(3,30,52))'
        """
        return to_dict(self) | self.plain_options() | {"attention": self.attention_text()}

    def override_values(self) -> dict[str, Any]:
        """The overrides by name; values are parsed as JSON, or kept as text if they are not JSON.

        Examples:
            >>> ModelConfig(overrides=("dim=96", "remat=dots")).override_values()
            {'dim': 96, 'remat': 'dots'}
        """
        return override_values(self.overrides)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(LoRASettings):
    """AdamW, its learning-rate schedule, which parameters it trains, and their moving average."""

    trainable: tuple[str, ...] = ("all",)
    """Parameters to train: all, or patterns of names, for example `--trainable "blocks.self_attn.*" "head.*"`; the
    others are frozen. Names are those of `monarchrt.train.state.parameter_names`."""

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
    """Updates of the network over which the learning rate rises linearly from 0. A step makes at most one update."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """The learning rate after the warm-up: constant, or decreasing to 0 at `decay_steps`."""

    decay_steps: int | None = None
    """Update of the network at which a cosine or linear schedule reaches 0. Default: the number of its updates in the
    run, which is below the number of steps if not every step updates it."""

    accumulation: int = 1
    """Split each batch into this many parts and accumulate their gradients: less memory, the same result."""

    ema_decay: float | None = 0.99
    """Decay of the moving average of the parameters, which is what is evaluated; None turns it off."""

    ema_start: int = 0
    """Step at which the average starts, as a copy of the parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}; it must be positive and finite")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            require(0 <= beta < 1, f"{name} is {beta}; it must lie in [0, 1)")
        decay = self.weight_decay
        require(0 <= decay < math.inf, f"weight_decay is {decay}; it must be at least 0, and finite")
        require(self.clip_norm is None or self.clip_norm > 0, f"clip_norm is {self.clip_norm}; it must be positive")
        check_bounds(self, WHOLE_NUMBERS)
        average = self.ema_decay
        require(average is None or 0 <= average < 1, f"ema_decay is {average}; it must lie in [0, 1) or be None")
        require(
            self.decay_steps is None or self.decay_steps > self.warmup,
            f"decay_steps is {self.decay_steps}; it must be larger than warmup ({self.warmup})",
        )


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """The settings of a network other than the exported one: those that a run with a single network has."""

    model: ModelConfig = field(default_factory=ModelConfig)

    optimizer: OptimizerConfig | None = field(default_factory=OptimizerConfig)

    init_from: Path | None = None
    """Source of the initial parameters: a run folder, whose exported network is used, or a Wan checkpoint."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute dtype of the network; if it is not trained, also the dtype of its parameters."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Finetune, or train from scratch, a Wan-shaped video diffusion transformer on a clip.

    Attributes:
        data: The data to train on.
        model: The network that the run exports.
        objective: Settings of the objective; their class defines the roles.
        optimizer: Optimizer of the exported network.
        run: Settings of the run; `init_from` and `precision` are the exported network's.
        roles: The objective's other networks by role; omitted ones have the objective's defaults.

    Raises:
        UserError: If a role is unknown, settings of a role contradict the objective, or `accumulation` does not divide
            the batch.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveSettings = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    roles: Mapping[str, RoleConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        further = self.objective.further
        unknown = [name for name in self.roles if name not in further]
        require(
            not unknown,
            f"roles has {', '.join(unknown)}, but objective {self.objective.name!r} has "
            f"{', '.join(further) or 'no further ones'} beside {self.objective.exported}",
        )
        roles = {name: self.roles.get(name) or role_defaults(self.objective, name) for name in further}
        object.__setattr__(self, "roles", roles)
        for name in further:
            trains = self.objective.roles[name].trains
            require(
                trains or roles[name].optimizer is None, f"{name}.optimizer is given, but the {name} does not train"
            )
        for name in self.objective.training:
            require(
                not self.objective.roles[name].averaged or self.trained(name).ema_decay is not None,
                f"{self.option(name, 'ema_decay')} is None, but {self.objective.name} learns from the moving average "
                f"of the {name}; give it a decay, for example 0.99",
            )
            accumulation, batch = self.trained(name).accumulation, self.run.batch
            require(
                batch % accumulation == 0,
                f"{self.option(name, 'accumulation')} is {accumulation}, which does not divide batch {batch}; "
                f"it could be {', '.join(str(n) for n in range(1, batch + 1) if batch % n == 0)}",
            )

    def role(self, name: str) -> RoleConfig:
        """The settings of a role's network, which may be the exported one."""
        if name != self.objective.exported:
            return self.roles[name]
        run = self.run
        return RoleConfig(model=self.model, optimizer=self.optimizer, init_from=run.init_from, precision=run.precision)

    def trained(self, name: str) -> OptimizerConfig:
        """The optimizer settings of a role that trains."""
        return self.role(name).optimizer or OptimizerConfig()

    def origin(self, name: str) -> Path | None:
        """Source of a role's initial parameters: its own `init_from`, or that of the role that it starts as."""
        owner = self.origin_role(name)
        return self.role(name).init_from if owner == name else self.origin(owner)

    def origin_role(self, name: str) -> str:
        """The role whose `init_from` is the source of a role's initial parameters."""
        starts_as = self.objective.roles[name].starts_as
        return starts_as if self.role(name).init_from is None and starts_as is not None else name

    def option(self, name: str, setting: str) -> str:
        """The name of a role's setting in messages: with the role as a prefix, if there are several.

        Examples:
            >>> TrainConfig().option("student", "learning_rate")
            'learning_rate'
        """
        return setting if self._alone(name) else f"{name}.{setting}"

    def _alone(self, name: str) -> bool:
        """Whether the options of the role need no prefix."""
        return name == self.objective.exported and len(self.objective.training) == 1

    @contextlib.contextmanager
    def naming_role(self, name: str) -> Iterator[None]:
        """Adds the role to the messages of errors in its settings, if there are several roles.

        Examples:
            >>> config = with_objective(TrainConfig(), "dmd")
            >>> with config.naming_role("critic"):
            ...     raise UserError("tile is wrong")
            Traceback (most recent call last):
            ...
            monarchrt.models.errors.UserError: critic.tile is wrong
        """
        try:
            yield
        except UserError as error:
            if self._alone(name):
                raise
            raise UserError(of_role(name, str(error))) from error


def of_role(name: str, message: str) -> str:
    """Adds the name of a role to an error message about one of its settings.

    Examples:
        >>> of_role("critic", "tile is wrong"), of_role("critic", "no weights")
        ('critic.tile is wrong', 'critic: no weights')
    """
    known = {item.name for kind in (ModelConfig, OptimizerConfig, RoleConfig) for item in dataclasses.fields(kind)}
    return f"{name}.{message}" if re.split(r"\W", message, maxsplit=1)[0] in known else f"{name}: {message}"


def train_defaults(objective: type[ObjectiveSettings]) -> TrainConfig:
    """The default settings of a run with this objective."""
    settings = objective()
    exported = role_defaults(settings, settings.exported)
    run = RunConfig(init_from=exported.init_from, precision=exported.precision)
    return TrainConfig(
        objective=settings, model=exported.model, optimizer=exported.optimizer or OptimizerConfig(), run=run
    )


def with_objective(config: TrainConfig, name: str) -> TrainConfig:
    """Replaces the objective of a config; settings that are defaults become the new objective's defaults.

    Raises:
        UserError: If the objective is unknown.
    """
    if name == config.objective.name:
        return config
    plain, fresh = TrainConfig(), train_defaults(settings_class(name))
    kept = {
        part: getattr(fresh if getattr(config, part) == getattr(plain, part) else config, part)
        for part in ("data", "model", "optimizer", "run")
    }
    return TrainConfig(objective=fresh.objective, **kept)


def role_defaults(objective: ObjectiveSettings, name: str) -> RoleConfig:
    """The default settings of a role.

    Args:
        objective: Settings of the objective, or their class.
        name: Name of the role.

    Returns:
        The settings, without an optimizer if the role does not train.
    """
    role = objective.roles[name]
    left = dict(role.defaults)

    def take(kind: type) -> Any:
        names = [item.name for item in dataclasses.fields(kind) if item.name in left]
        return kind(**{name: left.pop(name) for name in names})

    model, optimizer = take(ModelConfig), take(OptimizerConfig) if role.trains else None
    return RoleConfig(model=model, optimizer=optimizer, **left)


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config into JSON values: paths become strings, tuples lists.

    Examples:
        >>> to_dict(ModelConfig(tile=(1, 2, 4)))["tile"]
        [1, 2, 4]
    """
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    parts = {
        name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if not (name == "roles" and not value)  # absent, as in runs of earlier versions
    }
    if isinstance(parts.get("roles"), Mapping):
        parts["roles"] = {name: to_dict(role) for name, role in parts["roles"].items()}
    if isinstance(config, ObjectiveSettings):
        parts = {"name": config.name, **parts}
    return json.loads(json.dumps(parts, default=str))


def replace_settings(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Replaces some settings of a config.

    Args:
        config: The config; its other settings are kept.
        values: New values by setting, at the top level or nested by part, as `to_dict` nests them.

    Returns:
        The changed config.

    Raises:
        UserError: If a setting is unknown or given twice, or a value has the wrong type or is out of range.

    Examples:
        >>> config = replace_settings(TrainConfig(), {"steps": 5, "model": {"tile": [1, 2, 3]}})
        >>> config.run.steps, config.model.tile
        (5, (1, 2, 3))
    """
    values = {name: value for name, value in values.items() if name != GENERATION}  # follows from the objective
    asked = values.get("objective")
    name = asked.get("name", config.objective.name) if isinstance(asked, dict) else asked
    if name is not None:
        require(isinstance(name, str), f"objective is {_shown(name)}; it must be a name, or a table with one")
        config = with_objective(config, str(name))
    if not isinstance(asked, dict):
        values = {key: value for key, value in values.items() if key != "objective"}
    merged = to_dict(config)
    _put(values, merged, config.objective.exported, set())
    return from_dict(TrainConfig, merged)


def _put(values: dict[str, Any], target: dict[str, Any], exported: str, given: set[tuple[int, str]]) -> None:
    """Changes settings in `target`, a result of `to_dict`, or in the tables nested in it, in place."""
    own = {name: part for name, part in target.items() if isinstance(part, dict) and name != "roles"}
    tables = {exported: target, "roles": target.get("roles", {})} | target.get("roles", {}) | own
    for name, value in values.items():
        if name in tables:
            require(isinstance(value, dict), f"{name} is {_shown(value)}; it must be a table of settings")
            _put(value, tables[name], exported, given)
            continue
        owner = next((part for part in (target, *own.values()) if name in part), None)
        if owner is None:
            known = sorted({name for part in (target, *own.values()) for name in part} - {"roles", "name"})
            near = difflib.get_close_matches(name, known, n=3)
            raise UserError(
                f"there is no setting {name}; "
                + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}")
            )
        require((id(owner), name) not in given, f"{name} is given twice")
        given.add((id(owner), name))
        owner[name] = value


def from_dict(kind: type, values: Any) -> Any:
    """Builds a config from a result of `to_dict`; missing fields have their defaults.

    Args:
        kind: One of the config dataclasses.
        values: A dict of JSON values.

    Returns:
        An instance of `kind`.

    Raises:
        UserError: If a field is unknown, or a value has the wrong type or is out of range.

    Examples:
        >>> from_dict(ModelConfig, {"tile": [1, 2, 3]}).tile
        (1, 2, 3)
    """
    require(isinstance(values, dict), f"{kind.__name__} is {_shown(values)}; it must be a table of settings")
    if kind is ObjectiveSettings:  # runs of earlier versions, which had only `flow`, have no name here
        kind = settings_class(str(values.get("name", FlowConfig.name)))
        values = {name: value for name, value in values.items() if name != "name"}
    hints = _fields(kind)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
    make: Any = kind
    if kind is TrainConfig:
        return make(**_revive_roles(hints, values))
    return make(**{name: _revive(name, hints[name], value) for name, value in values.items()})


def _revive_roles(hints: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `TrainConfig` from JSON values; error messages about a role's settings name the role."""
    objective = _revive("objective", hints["objective"], values.get("objective", {}))
    plain, roles = TrainConfig(objective=objective), values.get("roles", {})
    require(isinstance(roles, dict), f"roles is {_shown(roles)}; it must be a table")
    made: dict[str, Any] = {"objective": objective, "roles": {}}
    for name, value in values.items():
        if name in ("model", "optimizer"):
            with plain.naming_role(objective.exported):
                made[name] = _revive(name, hints[name], value)
        elif name not in made:
            made[name] = _revive(name, hints[name], value)
    for name, value in roles.items():
        with plain.naming_role(name):
            made["roles"][name] = from_dict(RoleConfig, value)
    return made


def _fields(kind: type) -> dict[str, Any]:
    """Names and types of a dataclass's fields."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _revive(name: str, hint: Any, value: Any) -> Any:
    """Converts a JSON value into the value of a setting of type `hint`; raises UserError if it has another type."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        # all unions are optional types: take the type that is not None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if typing.get_origin(hint) is Mapping:
        require(isinstance(value, dict), f"{name} is {_shown(value)}; it must be a table")
        return {key: _revive(key, typing.get_args(hint)[1], part) for key, part in value.items()}
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        value = remat_kind(value) if name == "remat" else value
        require(value in choices, f"{name} is {_shown(value)}; choose from {', '.join(map(str, choices))}")
        return value
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        require(isinstance(value, list | tuple), f"{name} is {_shown(value)}; it must be a list")
        if Ellipsis not in parts:
            require(len(value) == len(parts), f"{name} is {_shown(value)}; it must have {len(parts)} entries")
        return tuple(_revive(name, parts[0], part) for part in value)
    accepted = {Path: (str, Path), float: (float, int)}.get(hint, (hint,))
    fits = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    fits = fits and not (hint is float and abs(value) > sys.float_info.max and value not in (math.inf, -math.inf))
    require(fits, f"{name} is {_shown(value)}; it must be {_KINDS[hint]}")
    return typing.cast(Any, hint)(value)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def _shown(value: Any) -> str:
    """A value for an error message, at most 60 characters long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
