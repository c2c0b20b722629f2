"""Parsing of a command's arguments into a dataclass of options."""

import contextlib
import dataclasses
import importlib.resources
import io
import itertools
import json
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import tyro

from monarchrt.models.errors import UserError
from monarchrt.models.files import decoded

POSITIONAL = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)


def parse[Config](kind: type[Config], arguments: Sequence[str], *, prefixes: bool = False, **options: Any) -> Config:
    """Parses options into a config dataclass, without prefixes: `--steps`, not `--run.steps`.

    Args:
        kind: The dataclass.
        arguments: The arguments of the subcommand.
        prefixes: Whether the annotations of `kind` already define prefixes and help texts (see `explain`).
        **options: Passed to `tyro.cli`.

    Returns:
        An instance of `kind`.

    Raises:
        UserError: If an option does not exist, or a value cannot be read or is out of range.
        SystemExit: After --help.
    """
    messages = io.StringIO()
    parsed: Any = kind
    arguments = _joined(kind, arguments)
    if not prefixes:
        explain(kind)
        parsed = tyro.conf.OmitArgPrefixes[kind]
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(parsed, args=list(arguments), **options)
    except SystemExit as stop:
        # tyro prints the error of a dataclass in a box and exits; the cause is the error itself
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__context__
        if stop.code:
            said = _one_line(messages.getvalue())
            raise UserError(_no_mesh(kind, arguments, options) or _no_option(kind, said) or said) from None
        raise


def _joined(kind: type, arguments: Sequence[str]) -> Sequence[str]:
    """Merges repeated options that take a list of values; the parser would use only the last one.

    The values of `--lora` and `--overrides` are concatenated; of several overrides of one name the last is kept.

    Raises:
        UserError: If another option that takes a list is given twice.
    """
    lists = set(_lists(kind))
    rest: list[str] = []
    found: dict[str, list[list[str]]] = {}
    values = rest
    for word in arguments:
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        if not word.startswith("--"):
            values.append(word)
        elif option.rpartition(".")[2].removeprefix("--") in lists:
            # without its option before it, a file name that starts with a dash would be parsed as an option
            values = [f"./{value}" if option == "--lora" and value.startswith("-") else value] if equals else []
            found.setdefault(option, []).append(values)
        else:
            rest.append(word)
            values = rest
    if all(len(groups) == 1 for groups in found.values()):
        return arguments
    for option, groups in found.items():
        name = option.removeprefix("--")
        if name.endswith("overrides"):
            groups = [
                [one for one in group if not any(_name(one) in map(_name, after) for after in groups[number + 1 :])]
                for number, group in enumerate(groups)
            ]
        elif name != "lora" and len(groups) > 1:
            raise UserError(f"{name} is given twice; give all values after one {option}, for example {option} ONE TWO")
        rest += [option, *itertools.chain(*groups)]
    return rest


def _name(override: str) -> str:
    return override.partition("=")[0]


def _lists(kind: type) -> Iterator[str]:
    """Names of the options of a dataclass, and of dataclasses nested in it, that take a list; without prefixes."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _lists(hint)
        parts = [hint] if typing.get_origin(hint) is tuple else typing.get_args(hint)
        ends = [typing.get_args(part)[-1:] for part in parts if typing.get_origin(part) is tuple]
        if (...,) in ends and int not in parts:  # an option of one number or several is replaced, like one of a number
            yield field.name.rstrip("_").replace("_", "-")


def _no_mesh(kind: type, arguments: Sequence[str], options: dict[str, Any]) -> str | None:
    """The message for `--mesh` or `--sharding` given to a command without these options; None otherwise."""
    given = next((word for word in arguments if word.partition("=")[0] in ("--mesh", "--sharding")), None)
    fields = dataclasses.fields(kind)
    if given is None or any(field.name == "mesh" or dataclasses.is_dataclass(field.type) for field in fields):
        return None
    option, command = given.partition("=")[0], options.get("prog", "this command")
    return f"{command} takes no {option}: it uses one device, also for networks trained on a mesh; leave {option} out"


def _no_option(kind: type, said: str) -> str | None:
    """The message for words that follow no option, such as a prompt without --prompt; None for other messages."""
    words = re.match(r"Unrecognized options: (?!-)([^;]*)", said)
    if words is None:
        return None
    name = "prompt" if " " in words[1] else "checkpoint"
    field = typing.get_type_hints(kind, include_extras=True).get(name)
    known = field is not None and tyro.conf.Suppress not in getattr(field, "__metadata__", ())
    hint = f", for example --{name} {shlex.quote(words[1])}" if known else ""
    return f"{words[1]!r} belongs to no option; give the option before it{hint}{said[words.end() :]}"


def last_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of the last `--option value` or `--option=value`; None if the option is not given."""
    value = None
    for position, word in enumerate(arguments):
        if word == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a settings file in TOML or JSON, according to its suffix, or settings of the package by name: `small`.

    Raises:
        UserError: If the file cannot be read, has another suffix, or holds no table.

    Examples:
        >>> read_settings(Path("small"))["data"]["patch"]
        4
    """
    own = importlib.resources.files("monarchrt.train.cli") / f"{path}.json"
    if path.suffix == "" and len(path.parts) == 1 and own.is_file():
        return json.loads(own.read_text(encoding="utf-8"))
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise UserError(f"config {path} ends in neither .toml nor .json; give a file of one of these formats, or small")
    try:
        values = readers[path.suffix](decoded(path.read_bytes(), name=f"config {path}"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"config {path} is not {path.suffix[1:].upper()}: {_one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise UserError(f'config {path} holds no settings by name, such as {{"steps": 500}}')
    return values


def explain(kind: type) -> None:
    """Annotates the fields of a dataclass, and of dataclasses nested in it, with their help texts.

    Without this, tyro keeps the line breaks of a field's docstring, and prints `{None}|INT` and `(default: None)` for
    an option whose docstring already says what its default means.
    """
    texts = {
        text.arg_name: text.description or ""
        for parent in reversed(kind.__mro__[:-1])
        for text in docstring_parser.parse_from_object(parent).params
    }
    fields = {item.name for item in dataclasses.fields(kind)}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if name not in fields:
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            explain(hint)
        elif name in texts and typing.get_origin(hint) is not Annotated:
            settings: dict[str, Any] = {"help": " ".join(texts[name].split())}
            if name.endswith("_"):  # a keyword of Python
                settings["name"] = name.rstrip("_")
            if getattr(kind, name, 0) == ():
                settings["help_behavior_hint"] = ""  # not "(default: )"
            if getattr(kind, name, 0) is None:
                settings |= {"help_behavior_hint": "", "metavar": _placeholder(hint)}
            kind.__annotations__[name] = Annotated[hint, tyro.conf.arg(**settings)]


def _placeholder(hint: Any) -> str:
    """The placeholder of an optional setting's value, as tyro writes it for one that is required: INT INT INT."""
    kind = [part for part in typing.get_args(hint) if part is not types.NoneType][-1]
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    parts = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    if parts[1:] == (...,):
        return f"{parts[0].__name__.upper()} [{parts[0].__name__.upper()} ...]"
    return " ".join(part.__name__.upper() for part in parts)


def _one_line(box: str) -> str:
    """The text of tyro's boxes with error messages, on one line and without the help text that they repeat."""
    rows = [row.strip().strip("│|").strip() for row in box.splitlines()]
    rows = [row for row in rows if not re.fullmatch(r"[╭+].*|[╰+].*", row)]
    sections = [" ".join(section.split()) for section in re.split("(?:─|-){4,}", "\n".join(rows))]
    kept = [section.rstrip(".") for section in sections if section and not section.startswith("Argument helptext")]
    if len(kept) > 1 and len(kept[0].split()) <= 2:  # a title, if the terminal's boxes have no corners
        del kept[0]
    text = re.sub(r"\[/?bold\]", "", "; ".join(kept) or " ".join(box.split()))
    if missing := re.fullmatch(r"Missing from .*?: (.*) \(required\); For full helptext, run: (.*)", text):
        return f"missing {' and '.join(map(_missing, missing[1].split(' (required) ')))}; see {missing[2]}"
    text = text.replace("For full helptext, run ", "see ").replace("For full helptext, see ", "see ")
    return _READ.sub(r"\1 cannot be read: \2", text)


def _missing(row: str) -> str:
    """An option that is missing, with its help text in parentheses, from tyro's row of both."""
    found = re.fullmatch(r"(--\S+(?: [A-Z]{2,}\b)*|[A-Z]{2,}|\{[^}]*\}) (.)(.*?)\.?", row)
    return row if found is None else f"{found[1]} ({found[2].lower()}{found[3]})"


# tyro's list of the types that it tried for an optional value; the last one is that of the value
_READ = re.compile(
    r"Error parsing (--\S+): no type matching .*Got errors: .*- (?:<class '\w+'>|tuple\[[\w., ]+\]): (.*)"
)
