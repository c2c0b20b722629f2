"""Whether work that was stopped goes on as it was begun."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.errors import UserError


def read_begun(path: Path) -> dict[str, Any]:
    """A JSON file of what was begun.

    Raises:
        UserError: If it is damaged.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); give another --out") from error


def check_begun(settings: Mapping[str, Any], begun: Mapping[str, Any], *, of: str) -> None:
    """Raises UserError, which names the setting, if one is not what it was.

    Examples:
        >>> check_begun({"seed": 0, "out": "b"}, {"seed": 0, "out": "a"}, of="the study in runs")

    Args:
        settings: As JSON has them; `out` is where the work is, and may be written in another way.
        begun: Those of before.
        of: What was begun, for the message.
    """
    for name, value in settings.items():
        if name != "out" and begun.get(name) != value:
            raise UserError(
                f"cannot resume: {name} is {value!a}, but {of} was started with {begun.get(name)!a}; use that value, "
                f"or another --out"
            )
