"""Partial results of a study in a file beside its results, so that a stopped study can be resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from monarchrt.models.errors import UserError
from monarchrt.train.resuming import check_unchanged, read_stored
from monarchrt.train.studies.results import write_json

_NOT_COMPARED = ("out", "overwrite", "resume", "quiet")


class Partial:
    """Measured values by key, written to a file one by one; `done` removes the file."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool = False) -> None:
        """Starts a study, or resumes one with the same settings.

        Args:
            path: The file.
            settings: Settings of the study, as JSON values.
            resume: Whether to use the values in the file.
            overwrite: Whether to discard the values in the file.

        Raises:
            UserError: If the file exists but neither `resume` nor `overwrite` is set, or if it has other settings or is
                damaged.
        """
        self._path = path
        self._values: dict[str, Any] = {}
        self._settings = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
        if not path.is_file() or (overwrite and not resume):
            return
        if not resume:
            raise UserError(
                f"out {path.parent} holds a study that was stopped; give --resume to continue it, or --overwrite"
            )
        stored = read_stored(path)
        before, values = stored.get("settings"), stored.get("values")
        if not isinstance(before, dict) or not isinstance(values, dict):
            raise UserError(f"{path} is not of a study; give --overwrite, or another --out")
        check_unchanged(self._settings, before, of=f"the study in {path.parent}")
        self._values = values

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of a key, which is measured and written if it is not there yet."""
        if key not in self._values:
            self._values[key] = measure()
            write_json(self._path, {"settings": self._settings, "values": self._values})
        return self._values[key]

    def done(self) -> None:
        """Removes the file, after the results are written."""
        self._path.unlink(missing_ok=True)
