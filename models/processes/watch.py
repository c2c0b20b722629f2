"""Signs of life of several processes: one that gives none ends the others."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable

import jax

from monarchrt.models.processes.agreement import put, said

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one
GRACE = 2.0  # seconds in which a process may say itself what another one said
_DONE = "done"


class Silence:
    """How long the others have been silent, by a clock that stands still while this process does.

    Args:
        others: Their numbers.
        now: Time in seconds.

    Examples:
        >>> silence = Silence([1, 2], now=0.0)
        >>> for second in range(1, 41):
        ...     silence.heard({1: str(second)}, now=float(second))
        >>> silence.lost()
        [2]
    """

    def __init__(self, others: list[int], *, now: float):
        self._last = dict.fromkeys(others, "")
        self._silent = dict.fromkeys(others, 0.0)
        self._now = now

    def heard(self, signs: dict[int, str], *, now: float) -> None:
        """Takes the newest sign of each."""
        passed = min(now - self._now, 2 * BEAT)  # this process may have been held up itself
        self._now = now
        for process, last in self._last.items():
            sign = signs.get(process, "")
            fresh = sign != last or sign == _DONE
            self._silent[process] = 0.0 if fresh else self._silent[process] + passed
            self._last[process] = sign

    def lost(self, seconds: float = PATIENCE) -> list[int]:
        """Those that were silent for longer."""
        return [process for process, silent in self._silent.items() if silent > seconds]


class Watch:
    """Gives signs of life, and ends this process if another one is lost, says that it failed, or cannot be reached.

    Args:
        process: Of this process.
        processes: How many there are.
        end: Called with a line and an exit code; does not return.
    """

    def __init__(self, process: int, processes: int, *, end: Callable[[str, int], None]):
        self._own, self._count, self._end = process, processes, end
        self._over = threading.Event()
        self._heard = time.monotonic()  # when the coordinator answered last
        self._silence = Silence([n for n in range(processes) if n != process], now=self._heard)
        names = {"signs of life": self._signs, "coordinator": self._coordinator}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in names.items()]

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends, as of a process that is done."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=GRACE)
        self._say_in_time(_DONE)

    def failed(self, line: str) -> None:
        """Tells the others why this process ends."""
        self._over.set()
        self._say_in_time(json.dumps({"failed": line}))

    def suspects(self) -> list[int]:
        """Those that have missed a few signs."""
        return self._silence.lost(4 * BEAT)

    def _say_in_time(self, text: str) -> None:
        """Says it, but does not wait for a coordinator that stands still."""
        thread = threading.Thread(target=self._say, args=(text,), daemon=True)
        thread.start()
        thread.join(timeout=GRACE)

    def _say(self, text: str) -> bool:
        try:
            put(f"alive/{self._own}", text, again=True)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _signs(self) -> None:
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            if not self._say(str(beat)):
                continue
            try:
                signs = {int(process): text for process, text in said("alive/").items()}
            except jax.errors.JaxRuntimeError:
                continue
            self._heard = time.monotonic()
            self._silence.heard(signs, now=self._heard)
            for process in self._silence.lost():
                self._end(f"process {process} of {self._count} has given no sign of life for {PATIENCE:.0f} s", 1)
            for process, text in signs.items():
                if process != self._own and text.startswith("{"):
                    if not self._over.wait(GRACE):  # it may be about to say the same
                        self._end(f"process {process} of {self._count} has ended: {json.loads(text)['failed']}", 1)
                    return

    def _coordinator(self) -> None:
        """By another thread, as what asks the coordinator may wait for its answer for ever."""
        silent, before = 0.0, time.monotonic()
        while not self._over.wait(BEAT):
            now = time.monotonic()
            silent = 0.0 if self._heard > before else silent + min(now - before, 2 * BEAT)
            before = now
            if silent > PATIENCE:
                self._end("the coordinator, which process 0 started, cannot be reached", 1)


def leave(line: str, code: int) -> None:
    """Ends this process at once, after a line: what waits for another process cannot be told to stop."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
