"""Result folders of studies and evaluations: claiming a folder, writing JSON atomically, and a progress bar."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.models.files import growing


def claim_results(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Checks, before anything is computed, that results can be written, and creates the folder.

    Args:
        folder: Folder of the results.
        names: Names of the result files.
        overwrite: Whether existing results may be replaced.

    Raises:
        UserError: If the path is a file, the folder cannot be created, or it already has one of the result files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out {folder} is a file; give the path of a folder")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"out {folder} has {there[0]} already; give another --out, or --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {folder} cannot be created: {error.strerror}") from error


def write_json(path: Path, values: Any) -> Path:
    """Writes JSON atomically; numbers that are not finite become null.

    Raises:
        DiskFullError: If the disk is full.
    """
    with report_full_disk(path, then="free some space and try again"), growing(path) as part:
        part.write_text(json.dumps(_finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def progress(label: str, total: int, *, quiet: bool) -> Iterator[Any]:
    """Shows a progress bar on a terminal.

    Args:
        label: Name of the items.
        total: Number of items.
        quiet: Whether to show no bar.

    Yields:
        A function (done=1, words=None) that advances the bar and describes the current item.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        def advance(done: int = 1, words: str | None = None) -> None:
            bar.update(task, advance=done, description=label if words is None else f"{label}: {words}")

        yield advance
