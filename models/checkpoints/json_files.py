"""Strict reading of untrusted JSON: one object, limited in size and depth.

Python's own parser accepts NaN and Infinity, and keeps the last of equal keys, so that programs may read a file
differently.
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # limit on a config.json, an index or a header; the largest public models need a tenth
MAX_CONTAINERS = 1_000_000  # objects and lists, which take far more memory than text


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ValueError: If the file cannot be read, is too large (it is not read then), or as in `parse_json`.
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
    """Parses a JSON object.

    Examples:
        >>> parse_json('{"shift": 3.0}', "scheduler_config.json")
        {'shift': 3.0}
        >>> parse_json('{"a": 1, "a": 2}', "config.json")
        Traceback (most recent call last):
        ...
        ValueError: config.json is not JSON: the key 'a' is there twice.

    Args:
        data: The text, or its bytes.
        where: Name of the source, for messages.

    Returns:
        The object.

    Raises:
        ValueError: If it is not a JSON object, or has NaN, Infinity, numbers beyond float64, repeated keys, lone
            surrogates, deep nesting, or more than a million objects and lists.
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
