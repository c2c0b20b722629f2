"""Standard streams that a command can always write to: closed or broken ones lose lines, and nothing else."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Tolerant:
    """A text stream whose lines are lost, without an error, once its reader is gone or its disk is full.

    Examples:
        >>> import io
        >>> stream = Tolerant(io.StringIO())
        >>> print("a line", file=stream)
        >>> stream.getvalue()
        'a line\\n'
        >>> stream.close()
        >>> print("lost", file=stream)

    Args:
        stream: What is written to.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, or does not."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            self._leave()
            return len(text)

    def flush(self) -> None:
        """Hands on what was written, or does not."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._leave()

    def _leave(self) -> None:
        """What is still in the stream's buffer goes nowhere, or it would be tried again, and fail, at exit."""
        with contextlib.suppress(OSError, ValueError):
            to_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def to_nowhere(descriptor: int) -> None:
    """Makes an open file descriptor one of the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    if null != descriptor:
        os.close(null)


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """While active, there are standard streams that take anything.

    One that the parent closed (`2>&-`) becomes the null device: Python has None in its place, and the first file that
    is opened would get its descriptor, and with it what libraries print. Messages to a reader that is gone are lost,
    and the work goes on. Names of files that are not UTF-8 are printed as they are.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    before = sys.stdout, sys.stderr
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif sys.stdout is sys.__stdout__ and (change := getattr(sys.stdout, "reconfigure", None)):
        change(errors="surrogateescape")
    error: Any = open(os.devnull, "w", encoding="utf-8") if sys.stderr is None else sys.stderr  # noqa: SIM115
    sys.stderr = Tolerant(error)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before[0] is not None:
            sys.stdout = before[0]
        if before[1] is not None:
            sys.stderr = before[1]
