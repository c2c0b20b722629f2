"""The queue of frames and events for a client, of bounded size whether the client reads or not."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from monarchrt.models.web.server import picture

MOST_EVENTS = 512


@dataclass(frozen=True)
class _Pictures:
    """Consecutive frames in one message, the first of which has this index; encoded, or a future of it."""

    index: int
    block: int
    frames: int
    encoded: bytes | Future[Any]

    @property
    def ready(self) -> bool:
        return isinstance(self.encoded, bytes) or self.encoded.done()


class Outbox:
    """A thread-safe queue of frames and events. If it is full, the oldest frames are dropped; an event says how many.

    Examples:
        >>> box = Outbox(frames=2)
        >>> for index in range(3):
        ...     box.frame(index, 0, b"jpeg")
        >>> box.take()
        {'type': 'dropped', 'frames': 1, 'total': 1}
        >>> box.take()[:4], len(box)
        (b'\\x00\\x00\\x00\\x01', 1)

    Args:
        frames: Frames that may wait; a single message may hold more.
        notify: Called, from any thread, when there is something to take.

    Attributes:
        dropped: Number of frames dropped so far.
    """

    def __init__(self, *, frames: int, notify: Callable[[], None] = lambda: None):
        self._limit, self._notify = frames, notify
        self._items: deque[dict[str, Any] | _Pictures] = deque()
        self._lock = threading.Lock()
        self._waiting = self._events = self._untold = 0
        self.dropped = 0

    def __len__(self) -> int:
        return self._waiting

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._items and not self._untold

    def event(self, type: str, **values: Any) -> None:
        """Adds an event of a type; values that are None are left out."""
        with self._lock:
            if self._events >= MOST_EVENTS:  # the client has not read for long, and will be disconnected
                self._forget(dict)
            self._events += 1
            self._items.append({"type": type} | {name: value for name, value in values.items() if value is not None})
        self._notify()

    def frame(self, index: int, block: int, encoded: bytes | Future[Any]) -> None:
        """Adds one frame."""
        self.pictures(index, block, encoded)

    def pictures(self, index: int, block: int, encoded: bytes | Future[Any], *, frames: int = 1) -> None:
        """Adds the frames of one message.

        Args:
            index: Index of the first frame in the video.
            block: Index of their block.
            encoded: The encoded frames, or a future of them.
            frames: How many they are.
        """
        with self._lock:
            while self._waiting and self._waiting + frames > self._limit:
                gone = self._forget(_Pictures)
                self.dropped += gone
                self._untold += gone
            self._waiting += frames
            self._items.append(_Pictures(index, block, frames, encoded))
        if isinstance(encoded, Future):
            encoded.add_done_callback(lambda _: self._notify())
        else:
            self._notify()

    def _forget(self, kind: type) -> int:
        """Removes the oldest item of a kind; returns its number of frames."""
        at = next(at for at, item in enumerate(self._items) if isinstance(item, kind))
        item = self._items[at]
        del self._items[at]
        return self._gone(item)

    def _gone(self, item: dict[str, Any] | _Pictures) -> int:
        """Updates the counts for an item that was removed; returns its number of frames."""
        if isinstance(item, dict):
            self._events -= 1
            return 0
        self._waiting -= item.frames
        if isinstance(item.encoded, Future):
            item.encoded.cancel()  # not needed any more; does nothing if it is running
        return item.frames

    def clear_frames(self) -> None:
        """Removes all frames without counting them as dropped, as after a seek."""
        with self._lock:
            for item in [item for item in self._items if isinstance(item, _Pictures)]:
                self._gone(item)
            self._items = deque(item for item in self._items if isinstance(item, dict))

    def take(self) -> dict[str, Any] | bytes | None:
        """Removes and returns the next message: an event, or the bytes of frames (`picture`).

        Returns:
            The message; None if there is none, or its frames are still being encoded.
        """
        with self._lock:
            if self._untold:
                told, self._untold = self._untold, 0
                return {"type": "dropped", "frames": told, "total": self.dropped}
            if not self._items:
                return None
            item = self._items[0]
            if isinstance(item, _Pictures) and not item.ready:
                return None
            self._items.popleft()
            self._gone(item)
        return item if isinstance(item, dict) else _sent(item)


def _sent(item: _Pictures) -> dict[str, Any] | bytes:
    """The message with the frames, or an error event if encoding failed."""
    encoded = item.encoded
    if isinstance(encoded, Future):
        if (error := encoded.exception()) is not None:
            said = f"frames from {item.index} on could not be encoded ({type(error).__name__}: {str(error)[:200]})"
            return {"type": "error", "code": "not_encoded", "message": said}
        encoded = encoded.result()
    return picture(item.index, item.block, encoded)
