"""Standard streams that can always be written to: output to closed or broken ones is dropped without an error."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Tolerant:
    """A text stream that drops its output, without an error, once its reader is gone or its disk is full.

    Examples:
        >>> import io
        >>> stream = Tolerant(io.StringIO())
        >>> print("a line", file=stream)
        >>> stream.getvalue()
        'a line\\n'
        >>> stream.close()
        >>> print("lost", file=stream)

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or drops it if that fails."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            self._leave()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream, or drops what is buffered if that fails."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._leave()

    def _leave(self) -> None:
        """Redirects the stream to the null device: Python would try, and fail, to flush it again at exit."""
        with contextlib.suppress(OSError, ValueError):
            to_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def to_nowhere(descriptor: int) -> None:
    """Redirects an open file descriptor to the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    if null != descriptor:
        os.close(null)


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Provides standard streams that never fail while the context is active.

    A stream that the parent process closed (`2>&-`) becomes the null device: Python has None in its place, and the
    first file opened would get its descriptor, and with it the output of libraries. Messages to a reader that is gone
    are dropped, and the command continues. File names that are not UTF-8 are printed unchanged.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
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
