"""Output of a run: a JSON-lines log, TensorBoard files, and a progress bar on a terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from monarchrt.models.errors import report_full_disk
from monarchrt.train.sinks import Sink

LOG_NAME = "log.jsonl"
DROPPED_NAME = "log_dropped.jsonl"
TENSORBOARD_NAME = "tensorboard"


def read_log(path: Path) -> list[dict]:
    """Reads a JSON-lines log; invalid lines, such as a truncated last one, are skipped.

    Args:
        path: The log, or a run folder.

    Returns:
        A dict for each line, with "step" and the scalars of the line.
    """
    path = path / LOG_NAME if path.is_dir() else path
    return [record for line in path.read_bytes().splitlines() if (record := _record(line))]


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _summary_writer() -> type:
    """Imports tensorboardX without PyTorch, which it would import if installed; that takes seconds for nothing."""
    absent: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(absent)  # with None, importing it fails as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in absent:
            del sys.modules[name]
    return SummaryWriter


class RunLog:
    """Writes scalars to `log.jsonl` and `tensorboard/` of a run folder.

    Each line is a JSON object with "step" and the scalars. NaN and infinity are written as strings, since JSON does not
    have them, and are left out of TensorBoard. Every line is flushed, so that none is lost if the run is killed. When a
    run is resumed, lines after the checkpoint's step move to `log_dropped.jsonl`, so that the log has every step once.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with RunLog(folder, step=0) as log:
        ...     log.write(1, {"loss": 0.5})
        >>> read_log(folder)
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, folder: Path, *, step: int, kept: str | Callable[[], str] = "", sinks: Sequence[Sink] = ()):
        """Opens the log.

        Args:
            folder: Run folder.
            step: Step of the checkpoint from which the run is resumed, -1 for none; later lines are moved.
            kept: Text for the message of a full disk that says which checkpoint is kept, or a function that returns it.
            sinks: Further destinations of the scalars, which are closed with the log.
        """
        self.path = folder / LOG_NAME
        self._sinks = sinks
        self._kept = kept
        with report_full_disk(self.path, kept=kept):
            if self.path.exists():
                self._truncate(step)
            self._file = self.path.open("a", encoding="utf-8")
            purge = step + 1 if (folder / TENSORBOARD_NAME).exists() else None
            self._board = _summary_writer()(str(folder / TENSORBOARD_NAME), purge_step=purge, flush_secs=10)

    def _truncate(self, step: int) -> None:
        """Moves lines after `step`, and invalid ones, from the log to `log_dropped.jsonl`."""
        kept, dropped = [], []
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _record(line)
            (kept if record and record["step"] <= step and line.endswith(b"\n") else dropped).append(line)
        if not dropped:
            return
        with self.path.with_name(DROPPED_NAME).open("ab") as file:
            file.write(b"".join(line.rstrip(b"\n") + b"\n" for line in dropped))
        unfinished = self.path.with_suffix(".part")
        unfinished.write_bytes(b"".join(kept))
        os.replace(unfinished, self.path)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line.

        Args:
            step: Step, counted from 1; 0 before the first.
            scalars: Values by name.

        Raises:
            DiskFullError: If the disk is full.
        """
        record: dict[str, float | int | str] = {"step": step}
        for name, value in scalars.items():
            # JSON has only finite numbers
            record[name] = float(value) if abs(value) < float("inf") else str(float(value))
        with report_full_disk(self.path, kept=self._kept):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in scalars.items():
                if math.isfinite(value):  # TensorBoard would print a warning for others
                    self._board.add_scalar(name, value, step)
        for sink in self._sinks:
            sink.write(step, scalars)

    def close(self, *, failed: bool = False) -> None:
        """Closes the logs and the sinks; `failed` tells the sinks whether the run failed."""
        self._file.close()
        self._board.close()
        for sink in self._sinks:
            sink.close(failed=failed)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


class NoLog(RunLog):
    """A log that writes nothing, for all processes of a run but the first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self, *, failed: bool = False) -> None:
        """Does nothing."""


class Progress:
    """Shows progress on standard error: a bar on a terminal, and elsewhere a line from time to time."""

    def __init__(self, total: int, *, start: int = 0, quiet: bool | None = None, every: float = 30.0):
        """Sets up the bar, which `with` shows.

        Args:
            total: Number of steps of the run.
            start: Number of completed steps.
            quiet: True to show neither bar nor lines, False for the bar, None for the bar on a terminal and lines
                elsewhere.
            every: Seconds between two lines.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        hidden = not sys.stderr.isatty() if quiet is None else quiet
        self._quiet, self._lines = bool(quiet), hidden and not quiet
        self._total, self._start, self._every = total, start, every
        self._began = self._said = time.monotonic()
        self._compiled = self._began  # time after the first step, which includes compilation
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=hidden,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, state="compiling")

    def update(self, step: int, state: str) -> None:
        """Moves the bar to `step` and shows `state` next to it; without a bar, prints a line if one is due."""
        self._bar.update(self._task, completed=step, state=state)
        now = time.monotonic()
        first = step == self._start + 1
        if first:
            self._compiled = now
        if self._lines and (first or now - self._said >= self._every) and step < self._total:
            self._said = now
            if first:
                pace = f"the first step took {now - self._began:.1f} s, mostly to compile"
            else:
                rate = (now - self._compiled) / (step - self._start - 1)
                pace = f"{rate:.3g} s/step, {duration(rate * (self._total - step))} left"
            self.note(f"step {step}/{self._total}: {state}; {pace}")

    def measured(self, step: int, text: str) -> None:
        """Prints a measurement at `step`, unless a bar is shown."""
        if self._lines:
            self.note(f"step {step}/{self._total}: {text}")

    def header(self, lines: Sequence[str]) -> None:
        """Prints the summary of the run, unless `quiet`."""
        if not self._quiet:
            for line in lines:
                self.note(line)

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """A duration in words, such as 1 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
