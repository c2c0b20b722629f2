"""JSON that others wrote: one object, bounded in size and depth, and nothing in it that JSON does not have.

Python's own reader takes NaN and Infinity, and of two equal keys the last, so that two programs may read two things.
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # of a config.json, an index or a header; those of the largest public models have a tenth
MAX_CONTAINERS = 1_000_000  # objects and lists, which take far more memory than text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, in UTF-8 (with a byte-order mark or without), UTF-16 or UTF-32.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ValueError: If it cannot be read as one; nothing is read of a file that is too large.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes; as JSON, at most {MAX_BYTES} are read.")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return parse_json(data, str(path))


def parse_json(data: bytes | str, where: str) -> dict[str, Any]:
    """The object in a text.

    Examples:
        >>> parse_json('{"shift": 3.0}', "scheduler_config.json")
        {'shift': 3.0}
        >>> parse_json('{"a": 1, "a": 2}', "config.json")
        Traceback (most recent call last):
        ...
        ValueError: config.json is not JSON: the key 'a' is there twice.

    Args:
        data: The text, or its bytes.
        where: What it is, for messages.

    Returns:
        The object.

    Raises:
        ValueError: If it is not JSON object: also with NaN, Infinity, numbers beyond float64, keys that repeat, halves
            of surrogate pairs, deep nesting, or a million of objects and lists.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        text = text.removeprefix("\ufeff")
        if text.count("[") + text.count("{") > MAX_CONTAINERS:
            raise ValueError(f"it has more than {MAX_CONTAINERS} objects and lists")
        settings = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(settings, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is not an object of settings.")
    return settings


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return unique
