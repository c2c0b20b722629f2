"""What a run says: a JSON-lines log, TensorBoard, and a progress bar on a terminal."""

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
    """Reads a JSON-lines log; lines that are none, such as a last one that was cut off, are left out.

    Args:
        path: The log, or a run folder.

    Returns:
        One dict per line, each with "step".
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
    """tensorboardX's class. The module imports torch where that is installed, for seconds; nothing here needs it."""
    absent: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(absent)  # None: an import fails as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in absent:
            del sys.modules[name]
    return SummaryWriter


class RunLog:
    """Writes scalars to `log.jsonl` and `tensorboard/` of a run folder.

    Each line is one JSON object with "step" and the scalars; NaN and infinity are written as strings, since JSON has
    none, and left out of TensorBoard. Lines are flushed one by one, so that a killed run has them all. On resume, what
    lies after the checkpoint's step first goes to `log_dropped.jsonl`, so that every step is in the log once.

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
            step: Step of the checkpoint that the run goes on from, -1 for none; later lines go aside.
            kept: Says what is safe if the disk is full.
            sinks: Take the same scalars; closed with the log.
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
        """Takes the lines after `step`, and those that are none, out of the log; they are kept beside it."""
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
        """Adds one line.

        Args:
            step: Optimizer step, counted from 1.
            scalars: Names and values.

        Raises:
            DiskFullError: If there is no room.
        """
        record: dict[str, float | int | str] = {"step": step}
        for name, value in scalars.items():
            # only finite numbers exist in JSON
            record[name] = float(value) if abs(value) < float("inf") else str(float(value))
        with report_full_disk(self.path, kept=self._kept):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in scalars.items():
                if math.isfinite(value):  # it would print a warning of its own
                    self._board.add_scalar(name, value, step)
        for sink in self._sinks:
            sink.write(step, scalars)

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes the logs, and the sinks as of a run that failed or did not."""
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
    """Writes nothing: of the processes of a run, one has the log."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self, *, failed: bool = False) -> None:
        """Nothing."""


class Progress:
    """A bar on a terminal, elsewhere a line every so often; notes go to stderr as plain lines either way."""

    def __init__(self, total: int, *, start: int = 0, quiet: bool | None = None, every: float = 30.0):
        """Shows a bar if stderr is a terminal, and lines if it is not.

        Args:
            total: Steps in all.
            start: Steps already done.
            quiet: True shows neither, False the bar; None: the bar on a terminal, lines elsewhere.
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
        self._compiled = self._began  # when the first step, which compiles, was done
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
        """Moves the bar to `step` and shows a few words next to it; without a bar, a line if one is due."""
        self._bar.update(self._task, completed=step, state=state)
        now = time.monotonic()
        first = step == self._start + 1
        if first:
            self._compiled = now
        if self._lines and (first or now - self._said >= self._every) and step < self._total:
            self._said = now
            if first:
                pace = f"the first step took {now - self._began:.1f} s, most of it to compile"
            else:
                rate = (now - self._compiled) / (step - self._start - 1)
                pace = f"{rate:.3g} s/step, {duration(rate * (self._total - step))} left"
            self.note(f"step {step}/{self._total}: {state}; {pace}")

    def measured(self, step: int, text: str) -> None:
        """Says what was measured at `step`, where there is no bar."""
        if self._lines:
            self.note(f"step {step}/{self._total}: {text}")

    def header(self, lines: Sequence[str]) -> None:
        """Prints what the run is, unless it is to be quiet."""
        if not self._quiet:
            for line in lines:
                self.note(line)

    def note(self, text: str) -> None:
        """Prints one line above the bar."""
        self._console.print(text, markup=False)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """A time to wait, such as 1 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
