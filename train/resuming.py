"""Checks that interrupted work is resumed with the settings with which it was started."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.errors import UserError


def read_stored(path: Path) -> dict[str, Any]:
    """Reads the JSON file with the settings of interrupted work.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); give another --out") from error


def check_unchanged(settings: Mapping[str, Any], stored: Mapping[str, Any], *, of: str) -> None:
    """Checks that settings are equal to those with which the work was started.

    Examples:
        >>> check_unchanged({"seed": 0, "out": "b"}, {"seed": 0, "out": "a"}, of="the study in runs")

    Args:
        settings: The settings now, as JSON values. `out`, the folder of the work, is not compared: the same folder can
            be given by different paths.
        stored: The settings at the start.
        of: Name of the work for the message.

    Raises:
        UserError: If a setting differs; the message names it.
    """
    for name, value in settings.items():
        if name != "out" and stored.get(name) != value:
            raise UserError(
                f"cannot resume: {name} is {value!a}, but {of} was started with {stored.get(name)!a}; use that value, "
                f"or another --out"
            )
