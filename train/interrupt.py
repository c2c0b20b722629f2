"""Handling of Ctrl-C and SIGTERM between steps, so that a run can save before it ends."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

RESENT_AFTER = 0.02  # seconds, by which a callback has ended


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop; if possible, the run has saved.

    Attributes:
        code: Exit code of the process: 128 + signal number.
        step: Step of the saved state; None if none was saved.
    """

    def __init__(self, message: str, *, code: int = 130, step: int | None = None):
        super().__init__(message)
        self.code = code
        self.step = step


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets `signal`; a second one interrupts at once.

    Python handles signals in the main thread; in other threads this does nothing.

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
    """A context in which SIGINT and SIGTERM raise `Interrupted` in the main thread, and are never lost.

    Python drops exceptions raised in callbacks of garbage collection (JAX has one) and in finalizers; a signal that
    arrives there is sent again until it is raised elsewhere. Extension modules turn an exception during their import
    into an error of their own, which is converted back to `Interrupted`.

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
        reporting = True  # an exception raised in this hook would be lost too
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
    """A context that defers signals to its end, for imports, in which an exception may be lost or reported otherwise.

    Raises:
        Interrupted: At the end, if there was a signal.
    """
    with StopRequest() as stop:
        yield
    if stop.signal is not None:
        raise Interrupted("stopped", code=128 + stop.signal)
