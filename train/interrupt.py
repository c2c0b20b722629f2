"""Ctrl-C and SIGTERM, taken between steps so that the run can save before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved if it could.

    Attributes:
        code: Exit code of the process: 128 + signal number.
        step: Of the state that was saved; None if none was.
    """

    def __init__(self, message: str, *, code: int = 130, step: int | None = None):
        super().__init__(message)
        self.code = code
        self.step = step


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets a flag; a second one interrupts at once.

    Signals reach the main thread only; elsewhere this does nothing.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     stop.signal
        2
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted("stopped without saving", code=128 + number)
        self.signal = number

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """A signal stops the program at the end of the block: inside an import it may get lost, leaving a traceback.

    Raises:
        Interrupted: At the end, if there was a signal.
    """
    with StopRequest() as stop:
        yield
    if stop.signal is not None:
        raise Interrupted("stopped", code=128 + stop.signal)
