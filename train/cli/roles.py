"""The options of `monarchrt train` for an objective; those of a role are prefixed with it: `--ROLE.name`.

If only one role trains, the prefix of its options may be left out. If several train, it is required:
`--student.learning-rate`, `--critic.learning-rate`.
"""

import dataclasses
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from monarchrt.models.errors import UserError
from monarchrt.train.cli.parsing import explain, last_value, parse
from monarchrt.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RoleConfig,
    RunConfig,
    TrainConfig,
    of_role,
    with_objective,
)
from monarchrt.train.objectives.registry import ObjectiveSettings, objective_names

_EXPORTED_SETTINGS = ("init_from", "precision")  # settings of the run that belong to the exported network
_PLAN = {
    "plan": "Print the memory and time that the run would take, by role and by compiled step, without starting it.",
    "json": "With --plan: print only JSON to standard output.",
}
_HELP = "The training objective. Each has its own settings and roles, which `--objective NAME --help` shows."


def parse_roles(arguments: Sequence[str], *, default: TrainConfig, **options: Any) -> TrainConfig:
    """Parses the options of a training run.

    Args:
        arguments: The arguments of the subcommand; `--objective` among them determines the other options.
        default: Values of the settings that are not given.
        **options: Passed to `tyro.cli`.

    Returns:
        The settings.

    Raises:
        UserError: If an option does not exist, or a value cannot be read or is out of range.
    """
    # `--student.lora.rank` is another spelling of `--student.lora-rank`
    arguments = _with_remat([re.sub(r"^(--(?:\w+\.)?lora)\.", r"\1-", word) for word in arguments])
    asked = last_value(arguments, "--objective")
    if asked is not None:
        default = with_objective(default, asked)
    settings = type(default.objective)
    form = _form(settings)
    options |= {"prefixes": bool(settings().further), "default": _fill(form, default)}
    words = _with_overrides(_short(arguments, settings), default)
    try:
        return _config(parse(form, words, **options))
    except UserError as error:
        if (role := _role_of(str(error), form, words, settings, options)) is None:
            raise
        raise UserError(of_role(role, str(error))) from error


def _role_of(
    message: str, form: type, words: Sequence[str], settings: type[ObjectiveSettings], options: dict[str, Any]
) -> str | None:
    """The role whose options alone lead to the same error message; None if there is none."""
    for role in settings.roles:
        own, taken = [], False
        for word in words:
            taken = word.startswith(f"--{role}.") if word.startswith("--") else taken
            own += [word] * taken
        try:
            if own:
                parse(form, own, **options)
        except UserError as error:
            if str(error) == message and f"--{role}." not in message:
                return role
    return None


def _with_remat(arguments: Sequence[str]) -> list[str]:
    """Gives `--remat` and `--no-remat` without a value, which are flags of earlier versions, the values they stand for.

    Examples:
        >>> _with_remat(["--remat", "--student.remat", "auto", "--no-remat"])
        ['--remat', 'full', '--student.remat', 'auto', '--remat', 'none']
    """
    words: list[str] = []
    for word, after in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        if found := re.fullmatch(r"--(\w+\.)?(no-)?remat", word):
            words.append(f"--{found[1] or ''}remat")
            words += ["none"] if found[2] else ["full"] if after.startswith("--") else []
        else:
            words.append(word)
    return words


def _short(arguments: Sequence[str], settings: type[ObjectiveSettings]) -> list[str]:
    """Removes the prefix of the exported role from the arguments if it is the only role that trains.

    Raises:
        UserError: If an option that several roles have is given without a role.
    """
    training, exported = settings().training, settings.exported
    if len(training) == 1:
        return [f"--{word.removeprefix(f'--{exported}.')}" if word.startswith(f"--{exported}.") else word
                for word in arguments]  # fmt: skip
    names = {item.name for kind in (ModelConfig, OptimizerConfig) for item in dataclasses.fields(kind)}
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and option[2:].removeprefix("no-").replace("-", "_") in names | set(
            _EXPORTED_SETTINGS
        ):
            name = option[2:].removeprefix("no-").replace("-", "_")
            every = name in _EXPORTED_SETTINGS or any(item.name == name for item in dataclasses.fields(ModelConfig))
            given = [f"--{role}.{option[2:]}" for role in (settings.roles if every else training)]
            raise UserError(f"{option} is an option of each role of {settings.name}; give {' or '.join(given)}")
    return list(arguments)


def _with_overrides(words: Sequence[str], default: TrainConfig) -> list[str]:
    """Puts the overrides of the defaults before the given ones, which take precedence by name once they are joined.

    `--overrides` without a value removes all overrides, including those of the defaults.

    Examples:
        >>> small = TrainConfig(model=ModelConfig(overrides=("dim=64", "num_layers=5")))
        >>> _with_overrides(["--overrides", "num_layers=2"], small)
        ['--overrides', 'dim=64', 'num_layers=5', '--overrides', 'num_layers=2']
    """
    stored: dict[str, tuple[str, ...]] = {}
    for word, after in itertools.zip_longest(words, words[1:], fillvalue="--"):
        found = re.fullmatch(r"(--(?:(\w+)\.)?overrides)(=.+)?", word)
        if found is None or not (found[3] or not after.startswith("--")):
            continue
        role = found[2] or default.objective.exported
        if role in default.objective.roles:
            stored[found[1]] = default.role(role).model.overrides
    return [word for option, values in stored.items() if values for word in (option, *values)] + list(words)


def _form(settings: type[ObjectiveSettings]) -> type:
    """A dataclass whose fields are the options for an objective."""
    for kind in (DataConfig, ModelConfig, OptimizerConfig, RunConfig, RoleConfig, settings):
        explain(kind)
    further, several = settings().further, len(settings().training) > 1
    plain = tyro.conf.arg(name="") if further else None

    def unnamed(kind: Any) -> Any:
        return kind if plain is None else Annotated[kind, plain]

    names = typing.cast(Any, Literal)[objective_names()]
    fields: list[tuple[str, Any]] = [("chosen", Annotated[names, tyro.conf.arg(name="objective", help=_HELP)])]
    fields += [(name, Annotated[bool, tyro.conf.arg(name=name, help=text)]) for name, text in _PLAN.items()]
    fields.append(("data", unnamed(DataConfig)))
    if several:
        fields.append((settings.exported, _role_form(trains=True)))
        run = _part("Run", RunConfig, without=_EXPORTED_SETTINGS)
    else:
        fields += [("model", unnamed(ModelConfig)), ("optimizer", unnamed(OptimizerConfig))]
        run = RunConfig
    fields += [("objective", unnamed(settings)), ("run", unnamed(run))]
    fields += [(role, _role_form(trains=settings.roles[role].trains)) for role in further]
    return dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)


def _role_form(*, trains: bool) -> Any:
    """A dataclass of the options of one role, with those of an optimizer only if it trains."""
    nested: list[tuple[str, Any]] = [("model", Annotated[ModelConfig, tyro.conf.arg(name="")])]
    if trains:
        nested.append(("optimizer", Annotated[OptimizerConfig, tyro.conf.arg(name="")]))
    return _part("Role", RoleConfig, without=("model", "optimizer"), more=nested)


def _part(name: str, kind: type, *, without: Sequence[str], more: Sequence[tuple[str, Any]] = ()) -> type:
    """A dataclass with the fields of another except `without`, and with `more` before them."""
    hints = typing.get_type_hints(kind, include_extras=True)
    kept = [(item.name, hints[item.name]) for item in dataclasses.fields(kind) if item.name not in without]
    return dataclasses.make_dataclass(name, [*more, *kept], frozen=True, kw_only=True)


def _fill(form: type, config: TrainConfig) -> Any:
    """An instance of a form with the values of a config."""
    exported = config.objective.exported
    values: dict[str, Any] = {"chosen": config.objective.name} | dict.fromkeys(_PLAN, False)
    for item in dataclasses.fields(form):
        if item.name in config.roles or item.name == exported:
            values[item.name] = _copy(item.type, config.role(item.name))
        elif item.name == "run":
            kind = typing.get_type_hints(form)["run"]
            values["run"] = config.run if kind is RunConfig else _copy(kind, config.run)
        elif item.name not in values:
            values[item.name] = getattr(config, item.name)
    return form(**values)


def _copy(kind: Any, source: Any) -> Any:
    return kind(**{item.name: getattr(source, item.name) for item in dataclasses.fields(kind)})


def _config(parsed: Any) -> TrainConfig:
    """The settings that a filled-in form describes."""
    objective = parsed.objective
    run = {item.name: getattr(parsed.run, item.name) for item in dataclasses.fields(parsed.run)}
    exported = getattr(parsed, objective.exported, parsed)
    if exported is not parsed:
        run |= {name: getattr(exported, name) for name in _EXPORTED_SETTINGS}
    roles = {
        name: RoleConfig(
            model=role.model,
            optimizer=getattr(role, "optimizer", None),
            init_from=role.init_from,
            precision=role.precision,
        )
        for name in objective.further
        if (role := getattr(parsed, name))
    }
    return TrainConfig(
        data=parsed.data,
        model=exported.model,
        objective=objective,
        optimizer=exported.optimizer,
        run=RunConfig(**run),
        roles=roles,
    )
