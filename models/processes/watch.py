"""Heartbeats of the processes of a run: a process without them ends the others."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable

import jax

from monarchrt.models.processes.agreement import get_all, put

BEAT = 1.0  # seconds between two heartbeats
PATIENCE = 30.0  # seconds without a heartbeat after which a process is lost
GRACE = 2.0  # seconds that a process has to report an error itself, once another one has reported it
_DONE = "done"


class Silence:
    """Seconds since the last heartbeat of each other process; time in which this process was suspended is not counted.

    Args:
        others: Indices of the other processes.
        now: Current time in seconds, of a monotonic clock.

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
        """Updates with the newest heartbeat of each process, by its index, at a time in seconds."""
        passed = min(now - self._now, 2 * BEAT)  # this process may have been suspended itself
        self._now = now
        for process, last in self._last.items():
            sign = signs.get(process, "")
            fresh = sign != last or sign == _DONE
            self._silent[process] = 0.0 if fresh else self._silent[process] + passed
            self._last[process] = sign

    def lost(self, seconds: float = PATIENCE) -> list[int]:
        """Indices of the processes without a heartbeat for longer than this."""
        return [process for process, silent in self._silent.items() if silent > seconds]


class Watch:
    """Sends heartbeats, and ends this process if another one is lost or has failed, or the coordinator is unreachable.

    Args:
        process: Index of this process.
        processes: Number of processes.
        end: Called in a thread with an error line and an exit code; must not return.
    """

    def __init__(self, process: int, processes: int, *, end: Callable[[str, int], None]):
        self._own, self._count, self._end = process, processes, end
        self._over = threading.Event()
        self._heard = time.monotonic()  # when the coordinator last answered
        self._silence = Silence([n for n in range(processes) if n != process], now=self._heard)
        names = {"signs of life": self._signs, "coordinator": self._coordinator}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in names.items()]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stops the threads, and tells the others that this process is done."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=GRACE)
        self._say_in_time(_DONE)

    def failed(self, line: str) -> None:
        """Tells the others why this process ends."""
        self._over.set()
        self._say_in_time(json.dumps({"failed": line}))

    def suspects(self) -> list[int]:
        """Indices of the processes that have missed four heartbeats."""
        return self._silence.lost(4 * BEAT)

    def _say_in_time(self, text: str) -> None:
        """Stores this process's state; gives up after 2 seconds, as the coordinator may not answer."""
        thread = threading.Thread(target=self._say, args=(text,), daemon=True)
        thread.start()
        thread.join(timeout=GRACE)

    def _say(self, text: str) -> bool:
        """Stores this process's state; returns whether the coordinator took it."""
        try:
            put(f"alive/{self._own}", text, again=True)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _signs(self) -> None:
        """Thread that sends heartbeats and reads those of the others."""
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            if not self._say(str(beat)):
                continue
            try:
                signs = {int(process): text for process, text in get_all("alive/").items()}
            except jax.errors.JaxRuntimeError:
                continue
            self._heard = time.monotonic()
            self._silence.heard(signs, now=self._heard)
            for process in self._silence.lost():
                self._end(f"process {process} of {self._count} has given no sign of life for {PATIENCE:.0f} s", 1)
            for process, text in signs.items():
                if process != self._own and text.startswith("{"):
                    if not self._over.wait(GRACE):  # this process may be about to report the same error
                        self._end(f"process {process} of {self._count} has ended: {json.loads(text)['failed']}", 1)
                    return

    def _coordinator(self) -> None:
        """Thread that notices a coordinator that does not answer, for which `_signs` may wait forever."""
        silent, before = 0.0, time.monotonic()
        while not self._over.wait(BEAT):
            now = time.monotonic()
            silent = 0.0 if self._heard > before else silent + min(now - before, 2 * BEAT)
            before = now
            if silent > PATIENCE:
                self._end("the coordinator, which process 0 started, cannot be reached", 1)


def leave(line: str, code: int) -> None:
    """Prints a line to stderr and exits at once: threads that wait in a collective cannot be interrupted."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
