"""Ctrl-C and SIGTERM, taken between steps so that the run can save before it ends."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

RESENT_AFTER = 0.02  # seconds; a callback is over by then


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved if it could.

    Attributes:
        code: Exit code of the process: 128 + signal number.
        step: Step of the state that was saved; None if none was.
    """

    def __init__(self, message: str, *, code: int = 130, step: int | None = None):
        super().__init__(message)
        self.code = code
        self.step = step


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets a flag; a second one interrupts at once.

    Signals reach the main thread only; elsewhere this does nothing.

    Examples:
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
def stoppable() -> Iterator[None]:
    """While active, SIGINT and SIGTERM raise `Interrupted` in the main thread, and that cannot get lost.

    Python drops what is raised in callbacks of garbage collection (JAX has one) and in finalizers, where a signal may
    just find the program: then it is sent again, until it is raised somewhere else. Extensions that are just being
    imported turn it into an error of theirs, which is the signal still.

    Examples:
        >>> try:
        ...     with stoppable():
        ...         signal.raise_signal(signal.SIGTERM)
        ... except Interrupted as error:
        ...     print(error)
        stopped
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.main_thread()
    report = sys.unraisablehook
    active, reporting, asked = True, False, 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        raise Interrupted("stopped", code=128 + number)

    def again(number: int) -> None:
        time.sleep(RESENT_AFTER)
        while reporting:
            time.sleep(RESENT_AFTER)
        if active and main.ident is not None:
            signal.pthread_kill(main.ident, number)

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            report(unraisable)
            return
        nonlocal reporting
        reporting = True  # what is raised in here would get lost, too
        number = getattr(unraisable.exc_value, "code", 128 + signal.SIGINT) - 128
        threading.Thread(target=again, args=(number,), name="signal", daemon=True).start()
        reporting = False

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = hook
    try:
        yield
    except Exception as error:
        if asked:
            raise Interrupted("stopped", code=128 + asked) from error
        raise
    finally:
        active = False
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


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
