"""What waits to be sent to a client: never more than a few seconds of it, whether the client reads or not."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

MOST_EVENTS = 512
HEADER = 8  # bytes before a frame's JPEG: its index and its block's, big-endian unsigned 32-bit numbers


class Outbox:
    """Frames and events in order. If there are too many frames the oldest go, and the client is told how many.

    Examples:
        >>> box = Outbox(frames=2)
        >>> for index in range(3):
        ...     box.frame(index, 0, b"jpeg")
        >>> box.take()
        {'type': 'dropped', 'frames': 1, 'total': 1}
        >>> box.take()[:4], len(box)
        (b'\\x00\\x00\\x00\\x01', 1)

    Args:
        frames: That may wait.
        notify: Called, in any thread, when there is something to take.
    """

    def __init__(self, *, frames: int, notify: Callable[[], None] = lambda: None):
        self._limit, self._notify = frames, notify
        self._items: deque[dict[str, Any] | bytes] = deque()
        self._lock = threading.Lock()
        self._waiting = self._events = self._untold = 0
        self.dropped = 0

    def __len__(self) -> int:
        return self._waiting

    def event(self, type: str, **values: Any) -> None:
        """Adds an event; values that are None are left out."""
        with self._lock:
            if self._events >= MOST_EVENTS:  # it has not read for very long, and will be let go
                self._forget(dict)
            self._events += 1
            self._items.append({"type": type} | {name: value for name, value in values.items() if value is not None})
        self._notify()

    def frame(self, index: int, block: int, jpeg: bytes) -> None:
        """Adds a frame."""
        with self._lock:
            if self._waiting >= self._limit:
                self._forget(bytes)
                self.dropped += 1
                self._untold += 1
            self._waiting += 1
            self._items.append(index.to_bytes(4, "big") + block.to_bytes(4, "big") + jpeg)
        self._notify()

    def _forget(self, kind: type) -> None:
        """Lets the oldest of a kind go."""
        at = next(at for at, item in enumerate(self._items) if isinstance(item, kind))
        self._count(self._items[at])
        del self._items[at]

    def _count(self, item: dict[str, Any] | bytes) -> None:
        if isinstance(item, bytes):
            self._waiting -= 1
        else:
            self._events -= 1

    def clear_frames(self) -> None:
        """Lets all frames go that were not sent: after a seek they are of another past, and not missed."""
        with self._lock:
            self._items = deque(item for item in self._items if not isinstance(item, bytes))
            self._waiting = 0

    def take(self) -> dict[str, Any] | bytes | None:
        """The next to be sent; None if there is nothing."""
        with self._lock:
            if self._untold:
                told, self._untold = self._untold, 0
                return {"type": "dropped", "frames": told, "total": self.dropped}
            if not self._items:
                return None
            item = self._items.popleft()
            self._count(item)
            return item
