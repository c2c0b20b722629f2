"""A page on this machine that plays one video while it is made: the server of sessions, to watch only.

The server runs in a thread of its own. A browser that connects late gets all frames that are kept, one that closes is
forgotten, one too slow for the speed of play misses frames, one that takes nothing is let go, and generation never
waits for any.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.web.access import Address, check_port, is_loopback, own_host, own_origin
from monarchrt.models.web.encodings import JPEG_QUALITY, jpeg
from monarchrt.models.web.server import WebServer, hello, offered, picture

__all__ = ["LivePage", "check_port", "is_loopback", "next_frame", "own_host", "own_origin"]

KEPT = 4096  # frames, so that an endless video does not fill the memory
MOST_BROWSERS = 16  # that watch
BEHIND = 5.0  # seconds that a browser may be behind the speed of play
GRACE = 10.0  # seconds after the end, or after it came, in which a browser holds the page up


def next_frame(sent: int, *, made: int, kept: int, played: int, fps: float) -> int:
    """The index of the frame that a browser gets next: the one after what it has, unless it is too far behind.

    Examples:
        >>> next_frame(7, made=100, kept=100, played=20, fps=16.0)  # 13 frames behind: less than 5 seconds
        7
        >>> next_frame(7, made=100, kept=100, played=95, fps=16.0), next_frame(7, made=100, kept=10, played=8, fps=16.0)
        (15, 90)

    Args:
        sent: Frames that it was sent or that it missed.
        made: Frames that there are; more than `sent`.
        kept: The newest of them, which are still there.
        played: Frames that would be over at the speed of play.
        fps: The speed of play.
    """
    oldest = max(sent, made - kept)
    return max(oldest, min(played - int(BEHIND * fps), made - 1))  # the last is missed by none


class LivePage:
    """Serves the page while open.

    Examples:
        >>> import urllib.request
        >>> with LivePage(port=0, fps=8.0, title="a cat") as page:
        ...     page.show(np.zeros((2, 16, 16, 3), np.uint8))
        ...     body = urllib.request.urlopen(page.url).read()
        >>> b"<canvas" in body
        True

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        fps: Speed of play.
        title: Shown above the picture.
        total: Frames that there will be, if known.
        quality: Of the JPEGs, 1 to 95.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8765,
        fps: float = 16.0,
        title: str = "",
        total: int | None = None,
        quality: int = JPEG_QUALITY,
    ):
        self._quality, self._blocks = quality, 0
        self._video = Video(fps=fps, title=title, total=total)
        self._server = _Server(Address(host=host, port=port, watch_only=True), self._video)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live page", daemon=True)

    @property
    def url(self) -> str:
        """Where the page is."""
        return self._server.url

    @property
    def watched(self) -> int:
        """Browsers that have connected so far."""
        return self._video.watched

    def show(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Adds frames; they are encoded here and sent in the background."""
        for frame in frames:
            encoded = jpeg(frame, quality=self._quality)
            self._loop.call_soon_threadsafe(self._video.add, self._blocks, encoded)
        self._blocks += 1

    def end(self, reason: str = "finished") -> None:
        """Says that no more frames come."""
        self._loop.call_soon_threadsafe(self._video.end, reason)

    def wait(self, seconds: float) -> bool:
        """Waits until a browser has connected and all that have got everything, at most `seconds`.

        A browser that is not done some seconds after the end, or after it came, is not waited for.

        Returns:
            Whether one had connected, and none was still busy.
        """
        deadline = time.monotonic() + seconds
        while not self.watched or self._video.busy(time.monotonic()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return not self._video.watchers

    def __enter__(self) -> "LivePage":
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._server.open(), self._loop).result()
        except UserError:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        closing = asyncio.run_coroutine_threadsafe(self._server.close(), self._loop)
        with contextlib.suppress(TimeoutError):  # whoever is still connected then is cut off
            closing.result(timeout=20)
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


class Video:
    """Frames as they come, and who watches them; of one thread, but `busy`.

    Args:
        fps: Speed of play.
        title: Shown above the picture.
        total: Frames that there will be, if known.
    """

    def __init__(self, *, fps: float, title: str = "", total: int | None = None):
        self.fps, self.made, self.ended, self.watched = fps, 0, None, 0
        self.hello = hello(title=title, fps=fps, frames=total, **offered((), ("jpeg",)))
        self.kept: deque[bytes] = deque(maxlen=KEPT)
        self.watchers: list[Watcher] = []
        self.ended: str | None
        self._ended_at = 0.0

    def add(self, block: int, encoded: bytes) -> None:
        """Adds a frame."""
        self.kept.append(picture(self.made, block, encoded))
        self.made += 1
        self._tell()

    def end(self, reason: str) -> None:
        """No more frames come."""
        self.ended, self._ended_at = reason, time.monotonic()
        self._tell()

    def busy(self, now: float) -> bool:
        """Whether a browser is to be waited for."""
        ended = now if self.ended is None else self._ended_at
        return any(max(ended, watcher.since) > now - GRACE for watcher in list(self.watchers))

    def watch(self, notify: Callable[[], None]) -> "Watcher":
        """One more that watches, all frames that are kept."""
        self.watched += 1
        self.watchers.append(Watcher(self, notify))
        return self.watchers[-1]

    def _tell(self) -> None:
        for watcher in self.watchers:
            watcher.notify()


class Watcher:
    """A browser that watches: what it is sent next."""

    def __init__(self, video: Video, notify: Callable[[], None]):
        self._video, self.notify, self.since = video, notify, time.monotonic()
        self._first = self._sent = video.made - len(video.kept)
        self._greeted, self.over = False, False

    def take(self) -> dict[str, Any] | bytes | None:
        """The next to be sent; None if there is nothing now."""
        video = self._video
        if not self._greeted:
            self._greeted = True
            return video.hello
        if self._sent < video.made:
            played = self._first + int((time.monotonic() - self.since) * video.fps)
            at = next_frame(self._sent, made=video.made, kept=len(video.kept), played=played, fps=video.fps)
            self._sent = at + 1
            return video.kept[at - video.made]
        if video.ended is not None and not self.over:
            self.over = True
            return {"type": "ended", "reason": video.ended}
        return None

    def hear(self, said: str | bytes) -> None:
        """There is nothing to say."""

    def leave(self) -> None:
        """It is gone."""
        self._video.watchers.remove(self)


class _Server(WebServer):
    """Of one video."""

    def __init__(self, address: Address, video: Video):
        super().__init__(address)
        self._video = video

    @property
    def most_clients(self) -> int:
        return MOST_BROWSERS

    def connect(self, notify: Callable[[], None]) -> Watcher:
        return self._video.watch(notify)
