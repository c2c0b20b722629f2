"""Roles, the base class of settings, and the table of objectives. Does not import JAX."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from monarchrt.models.errors import UserError
from monarchrt.models.generate.runs import Generation

if TYPE_CHECKING:
    from monarchrt.train.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class Role:
    """One network of an objective.

    Attributes:
        trains: Whether it has an optimizer. A network that does not train is not saved in checkpoints: resuming reads
            it from its source again.
        random: Whether it may start from random parameters; otherwise `init_from` is required.
        starts_as: Role whose `init_from` it uses if it has none of its own.
        own_batch: Whether its updates use a batch of their own instead of the one that the other roles share.
        averaged: Whether losses use its moving average too, which it must then have.
        defaults: Settings that differ from the defaults of a run with one network, by their names without prefix.

    Examples:
        >>> Role(defaults={"attention": "dense", "learning_rate": 1e-4}).trains
        True
    """

    trains: bool = True
    random: bool = True
    starts_as: str | None = None
    own_batch: bool = False
    averaged: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Base class of the settings of an objective: a frozen dataclass with a name and roles.

    Attributes:
        name: Name of the objective in `--objective` and config.json.
        roles: The networks, in the order in which one step updates them.
        exported: The role whose network `generate`, `convert` and `init_from` of other runs use. Its options need no
            prefix if no other role trains.
        needs_clips: Whether it learns from clips; otherwise prompts are enough.
    """

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]] = {"student": Role()}
    exported: ClassVar[str] = "student"
    needs_clips: ClassVar[bool] = True

    @property
    def generation(self) -> Generation:
        """How the exported network is sampled."""
        return Generation()

    @property
    def training(self) -> tuple[str, ...]:
        """The roles that train."""
        return tuple(name for name, role in self.roles.items() if role.trains)

    @property
    def further(self) -> tuple[str, ...]:
        """The roles other than the exported one."""
        return tuple(name for name in self.roles if name != self.exported)


_SETTINGS: dict[str, type[ObjectiveSettings]] = {}
_MAKERS: dict[str, "Callable[[Any], Objective] | str"] = {}


def register(settings: type[ObjectiveSettings], objective: "Callable[[Any], Objective] | str") -> None:
    """Adds an objective to the table.

    Args:
        settings: Class of its settings.
        objective: Class of the objective, called with an instance of the settings; or "module:Class", which is
            imported only when a run needs it.

    Raises:
        ValueError: If another objective has the name, `exported` is not a role that trains, or a role starts as one
            that does not exist.
    """
    name, roles = settings.name, settings.roles
    if _SETTINGS.get(name, settings) is not settings:
        raise ValueError(f"name {name!r} is taken by {_SETTINGS[name].__name__}; give the objective another")
    if settings.exported not in roles or not roles[settings.exported].trains:
        raise ValueError(f"exported is {settings.exported!r}; it must be a role of {name} that trains")
    for role in roles.values():
        if role.starts_as is not None and role.starts_as not in roles:
            raise ValueError(f"starts_as is {role.starts_as!r}, which is not a role of {name}: {', '.join(roles)}")
    _SETTINGS[name], _MAKERS[name] = settings, objective


def objective_names() -> tuple[str, ...]:
    """The names of all objectives in the table.

    Examples:
        >>> from monarchrt.train.objectives import settings
        >>> "flow" in objective_names()
        True
    """
    return tuple(_SETTINGS)


def settings_class(name: str) -> type[ObjectiveSettings]:
    """The settings class of an objective.

    Raises:
        UserError: If the objective is unknown.
    """
    if name not in _SETTINGS:
        raise UserError(f"objective is {name!r}; choose from {', '.join(_SETTINGS)}")
    return _SETTINGS[name]


def make_objective(settings: ObjectiveSettings) -> "Objective":
    """Makes the objective with these settings."""
    maker = _MAKERS[settings.name]
    if isinstance(maker, str):
        module, _, name = maker.partition(":")
        maker = getattr(importlib.import_module(module), name)
    return maker(settings)
