"""Prefetching: computes the inputs of the next steps in a thread while the device works on the current one."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class _Made:
    pair: tuple[Any, Any] | None = None
    error: BaseException | None = None


def made_ahead[Key, T](
    make: Callable[[Key], T], keys: Iterable[Key], *, ahead: int
) -> Generator[tuple[Key, T], None, None]:
    """Computes a value for each key, in order, in a thread that is a few values ahead of the consumer.

    An error in the thread is raised in place of its value, after the values before it. Closing the generator ends the
    thread.

    Args:
        make: Called in the thread with one key at a time.
        keys: The keys, in the order in which values are consumed.
        ahead: Number of values that may wait; 0 computes each value when it is consumed, without a thread.

    Yields:
        Each key with its value.

    Raises:
        Exception: Any error of `make`.

    Examples:
        >>> list(made_ahead(lambda step: step**2, [1, 2, 3], ahead=2))
        [(1, 1), (2, 4), (3, 9)]
    """
    if ahead == 0:
        for key in keys:
            yield key, make(key)
        return
    waiting: queue.Queue[_Made] = queue.Queue(maxsize=ahead)
    over = threading.Event()

    def hand_over(made: _Made) -> None:
        while not over.is_set():
            try:
                return waiting.put(made, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for key in keys:
                hand_over(_Made(pair=(key, make(key))))
                if over.is_set():
                    return
        except BaseException as error:
            hand_over(_Made(error=error))
        else:
            hand_over(_Made())

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (made := waiting.get()).pair is not None:
            yield made.pair
        if made.error is not None:
            raise made.error
    finally:
        over.set()
        thread.join(timeout=10.0)  # a read that hangs does not block the end of the run
