"""The notation of attention settings, such as `monarch(tile=(3,30,52))`: parsing and printing.

    setting  = name | name(argument, ...)
    argument = value | field=value
    value    = a number, string, True, False, None, a tuple of these, a setting, or 3 * setting for three of them

A word that does not name a kind is a string: `monarch(implementation=xla)`. The notation is used on the command line
and in config.json, checkpoints and videos. Parsing text into a `Call` does not import JAX; building the setting imports
its kind.
"""

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from monarchrt.models.attention.registry import PER_LAYER, SHORT, kind_named, names
from monarchrt.models.errors import printable

if TYPE_CHECKING:
    from monarchrt.models.attention.base import Attention

DEEPEST = 20  # limit on nested settings
MOST = 1000  # limit on n in `n * setting`
MOST_IN_ALL = 10_000  # limit on all settings of a text, with repetitions
EXAMPLE = "monarch(tile=(3,30,52))"


@dataclasses.dataclass(frozen=True)
class Call:
    """A parsed setting whose kind has not been looked up.

    Attributes:
        name: Name of the kind.
        arguments: Values without a name.
        fields: Values by name.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()


def parse(text: str) -> "Attention":
    """Parses the text of a setting.

    Examples:
        >>> parse("first_layers(2, dense, monarch(tile=(3, 30, 52)))").after.tile
        (3, 30, 52)

    Args:
        text: In the notation.

    Returns:
        The setting.

    Raises:
        ValueError: If it cannot be parsed, a kind or field is unknown, or a value is invalid; the message lists the
            kinds or the kind's fields.
    """
    try:
        return _build(read(text))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith("attention=") else f"{_quoted(text)}: {message}") from error


def to_text(setting: "Attention | Sequence[Attention]") -> str:
    """Formats a setting, or one setting per layer, as one line of text.

    Fields with their default value are left out, except those with `base.ALWAYS_WRITTEN`.

    Examples:
        >>> to_text(parse("monarch( tile = [3, 30, 52], num_iters = 1 )"))
        'monarch(tile=(3,30,52))'
        >>> to_text([parse("dense")] * 3)
        'per_layer(3 * dense)'
        >>> to_text(parse("top_k"))
        'top_k(keep=0.1)'
    """
    if isinstance(setting, Sequence):
        return f"{PER_LAYER}({_repeated(setting)})"
    parts = [_printed(getattr(setting, name)) for name in setting.positional]
    if setting.repeated:
        parts.append(_repeated(getattr(setting, setting.repeated)))
    for field in dataclasses.fields(setting):
        value = getattr(setting, field.name)
        if field.name in (*setting.positional, setting.repeated):
            continue
        if value != field.default or field.metadata.get("written"):
            parts.append(f"{field.name}={_printed(value)}")
    return f"{setting.name}({', '.join(parts)})" if parts else setting.name


def from_json(data: Any, *, where: str) -> "Attention":
    """Reads a stored setting: its text, or the older JSON forms, which may be a list with one setting per layer.

    Args:
        data: The JSON value.
        where: Name of its source, for errors.

    Returns:
        The setting.

    Raises:
        ValueError: If it is not valid.
    """
    if isinstance(data, str):
        try:
            return parse(data)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if isinstance(data, list) and data:
        return kind_named(PER_LAYER)(settings=tuple(from_json(item, where=where) for item in data))  # type: ignore
    for name in names():
        if (setting := kind_named(name).from_old_json(data)) is not None:
            return setting
    raise ValueError(f"{where}: attention {data!r} cannot be read; write it as text, such as {EXAMPLE!r}.")


def with_options(text: str, options: Mapping[str, Any]) -> str:
    """Adds options of the command line, which are fields of the kind with a short form (`registry.SHORT`), to its text.

    Examples:
        >>> with_options("monarch", {"tile": (3, 30, 52), "num_iters": 2})
        'monarch(tile=(3,30,52), num_iters=2)'

    Args:
        text: A setting; if there are options, only the name of that kind.
        options: The given options, by field.

    Returns:
        The text with the options as fields.
    """
    return f"{text}({', '.join(f'{name}={_printed(value)}' for name, value in options.items())})" if options else text


def split_options(text: str, options: Mapping[str, Any], known: Mapping[str, type]) -> tuple[str, dict[str, Any]]:
    """The inverse of `with_options`: splits a text into the kind with a short form and its options, where possible.

    Examples:
        >>> known = {"tile": tuple, "num_iters": int}
        >>> split_options("monarch(tile=(3,30,52))", {"num_iters": 2}, known)
        ('monarch', {'tile': (3, 30, 52), 'num_iters': 2})
        >>> split_options("first_layers(2, dense, monarch)", {}, known)
        ('first_layers(2, dense, monarch)', {})

    Args:
        text: A setting.
        options: The given options, by field, which are added.
        known: The type of each possible option.

    Returns:
        The name of the kind with its options; or the unchanged text, without options, if the short form cannot express
        it.

    Raises:
        ValueError: If the text cannot be parsed, or the options do not apply to it.
    """
    call = read(text)
    if call.name not in names():
        word = printable(repr(call.name), 80)
        raise ValueError(f"{_quoted(text)}: {word} is not a kind of attention; kinds: {', '.join(names())}.")
    fields = {name: value.name if value == Call(getattr(value, "name", "")) else value for name, value in call.fields}
    short = call.name == SHORT and not call.arguments
    if short and all(type(value) is known.get(name) for name, value in fields.items()):
        for name, value in fields.items():
            if options.get(name, value) != value:
                raise ValueError(f"{name} is {options[name]!r}, but attention is {text!r}; leave one of them out")
        return SHORT, fields | dict(options)
    if options:
        name, value = next(iter(options.items()))
        raise ValueError(
            f"{name} is {value!r} but attention is {text!r}; {name} needs attention {SHORT!r}, or is written in it, "
            f"as in {EXAMPLE!r}"
        )
    return text, {}


def read(text: str) -> Call:
    """Parses a text into names and values, without looking up kinds.

    Raises:
        ValueError: If the text is not valid.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"attention={text!r} is empty; kinds: {', '.join(names())}; for example {EXAMPLE!r}.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "too long or not text"
        raise ValueError(
            f"{_quoted(text)} cannot be read ({reason}); write a kind with its fields, such as {EXAMPLE!r}."
        ) from error
    call = _value(tree, text, 0)
    if not isinstance(call, Call):
        raise ValueError(
            f"{_quoted(text)} is not a kind of attention; kinds: {', '.join(names())}; for example {EXAMPLE!r}."
        )
    if (count := _count(call)) > MOST_IN_ALL:
        raise ValueError(f"{_quoted(text)} stands for {count:.3g} settings; it should be at most {MOST_IN_ALL}.")
    return call


def _count(value: Any) -> int:
    """Number of settings in a value, with repetitions."""
    if isinstance(value, Repeat):
        return value.count * _count(value.item)
    if isinstance(value, Call):
        return 1 + sum(map(_count, value.arguments)) + sum(_count(item) for _, item in value.fields)
    return sum(map(_count, value)) if isinstance(value, tuple) else 0


def _quoted(text: str) -> str:
    """The text for a message, shortened if it is long."""
    return f"attention={text if len(text) <= 160 else text[:150] + '...'!r}"


def _value(node: ast.expr, text: str, depth: int) -> Any:
    """Converts a syntax tree to a literal, a `Call`, or a tuple of these."""
    if depth > DEEPEST:
        raise ValueError(f"{_quoted(text)} is nested more than {DEEPEST} deep.")
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name):
            return Call(name)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_value(item, text, depth + 1) for item in items)
        case ast.BinOp(left=ast.Constant(value=int() as count), op=ast.Mult(), right=item):
            if not 0 < count <= MOST:
                raise ValueError(f"{_quoted(text)}: {count} * ... is not from 1 to {MOST} settings.")
            return Repeat(count, _value(item, text, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords):
            fields = []
            for keyword in keywords:
                if keyword.arg is None or keyword.arg in dict(fields):
                    raise ValueError(
                        f"{_quoted(text)}: {keyword.arg or '**'} cannot be given there, or is given twice."
                    )
                fields.append((keyword.arg, _value(keyword.value, text, depth + 1)))
            return Call(name, tuple(_value(item, text, depth + 1) for item in arguments), tuple(fields))
    what = ast.get_source_segment(text.strip(), node) or type(node).__name__
    raise ValueError(
        f"{_quoted(text)}: {what[:60]!r} is not a number, a word, a tuple or a setting; for example {EXAMPLE!r}."
    )


@dataclasses.dataclass(frozen=True)
class Repeat:
    """`3 * setting`."""

    count: int
    item: Any


def _build(call: Call) -> "Attention":
    kind = kind_named(call.name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    arguments = [item for value in call.arguments for item in _unrolled(value)]
    if kind.repeated:
        if arguments or kind.repeated not in dict(call.fields):
            given[kind.repeated] = tuple(arguments)
    else:
        if len(arguments) > len(kind.positional):
            takes = f"takes {', '.join(kind.positional)} in this order" if kind.positional else "takes fields by name"
            raise ValueError(f"{call.name} {takes}, not {len(arguments)} values; {_described(kind)}.")
        given |= dict(zip(kind.positional, arguments, strict=False))
    for name, value in call.fields:
        if name not in fields:
            raise ValueError(f"{call.name} has no field {printable(repr(name), 80)}; {_described(kind)}.")
        if name in given:
            raise ValueError(f"{call.name}: {name} is given twice.")
        given[name] = value
    missing = [
        name
        for name, field in fields.items()
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{call.name} needs {', '.join(missing)}; {_described(kind)}.")
    hints = typing.get_type_hints(kind)
    values = {name: _argument(value, "Attention" in repr(hints[name])) for name, value in given.items()}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            shown = str(value) if dataclasses.is_dataclass(value) else repr(value)
            raise ValueError(f"{call.name}: {name}={shown} is not {_words(hints[name])}.")
    return kind(**values)


_NAMES = {int: "a whole number", float: "a number", str: "a word", bool: "True or False", types.NoneType: "None"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation, for the few forms that fields use."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if typing.get_origin(hint) is tuple:
        if Ellipsis in parts:
            return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    """An annotation in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_words, parts))
    if typing.get_origin(hint) is tuple:
        return "a tuple of any length" if Ellipsis in parts else f"({', '.join(map(_words, parts))})"
    return _NAMES.get(hint, "a kind of attention")


def _argument(value: Any, kinds: bool) -> Any:
    """Builds the value of a field; a word names a kind if the field holds kinds, else it is a string."""
    if isinstance(value, Call):
        if kinds or value.arguments or value.fields:
            return _build(value)
        return value.name
    if isinstance(value, Repeat):
        raise ValueError(f"{value.count} * ... stands only where a kind takes any number of settings, as per_layer.")
    if isinstance(value, tuple):
        return tuple(_argument(item, kinds) for item in value)
    return value


def _unrolled(value: Any) -> list[Any]:
    return [value.item] * value.count if isinstance(value, Repeat) else [value]


def _described(kind: "type[Attention]") -> str:
    """The names of a kind's fields, for messages."""
    listed = ", ".join(field.name for field in dataclasses.fields(kind))
    return f"its fields: {listed}" if listed else "it has no fields"


def _printed(value: Any) -> str:
    if isinstance(value, tuple):
        inside = ",".join(map(_printed, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else str(value)


def _repeated(settings: Sequence["Attention"]) -> str:
    """One setting per layer, with consecutive equal ones written as `n * setting`."""
    groups = [(setting, len(list(group))) for setting, group in groupby(settings)]
    return ", ".join(f"{count} * {setting}" if count > 1 else str(setting) for setting, count in groups)
