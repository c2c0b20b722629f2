"""A local page that plays one video while it is generated: the server of sessions, for watching only.

The server runs in its own thread, and generation never waits for a browser. One that connects late gets all frames that
are kept; one that is too slow for playback misses frames; one that reads nothing is disconnected.
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
    """Index of the next frame for a browser: the one after its last frame, unless it is too far behind.

    Examples:
        >>> next_frame(7, made=100, kept=100, played=20, fps=16.0)  # 13 frames behind: less than 5 seconds
        7
        >>> next_frame(7, made=100, kept=100, played=95, fps=16.0), next_frame(7, made=100, kept=10, played=8, fps=16.0)
        (15, 90)

    Args:
        sent: Number of frames that it received or missed.
        made: Number of frames generated; more than `sent`.
        kept: Number of the newest frames that are still kept.
        played: Number of frames that playback at full speed would have finished.
        fps: Frames per second of playback.
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
        port: TCP port; 0 for a free one.
        fps: Frames per second of playback.
        title: Shown above the picture.
        total: Total number of frames, if known.
        quality: Quality of the JPEGs, 1 to 95.
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
        """URL of the page."""
        return self._server.url

    @property
    def watched(self) -> int:
        """Number of browsers that have connected so far."""
        return self._video.watched

    def show(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Adds frames; encodes them in the calling thread and sends them in the background."""
        for frame in frames:
            encoded = jpeg(frame, quality=self._quality)
            self._loop.call_soon_threadsafe(self._video.add, self._blocks, encoded)
        self._blocks += 1

    def end(self, reason: str = "finished") -> None:
        """Tells browsers that no more frames will come."""
        self._loop.call_soon_threadsafe(self._video.end, reason)

    def wait(self, seconds: float) -> bool:
        """Waits until a browser has connected and all connected ones have received everything, for at most `seconds`.

        A browser that needs longer than some seconds after the end, or after it connected, is not waited for.

        Returns:
            Whether a browser has connected and none is still receiving.
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
    """The frames of a video and the browsers that watch it. Not thread-safe, except for `busy`.

    Args:
        fps: Frames per second of playback.
        title: Shown above the picture.
        total: Total number of frames, if known.
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
        """Marks the video as ended."""
        self.ended, self._ended_at = reason, time.monotonic()
        self._tell()

    def busy(self, now: float) -> bool:
        """Whether a browser is still receiving and should be waited for."""
        ended = now if self.ended is None else self._ended_at
        return any(max(ended, watcher.since) > now - GRACE for watcher in list(self.watchers))

    def watch(self, notify: Callable[[], None]) -> "Watcher":
        """Adds a browser, which gets all frames that are kept."""
        self.watched += 1
        self.watchers.append(Watcher(self, notify))
        return self.watchers[-1]

    def _tell(self) -> None:
        for watcher in self.watchers:
            watcher.notify()


class Watcher:
    """A connected browser, and what to send it next."""

    def __init__(self, video: Video, notify: Callable[[], None]):
        self._video, self.notify, self.since = video, notify, time.monotonic()
        self._first = self._sent = video.made - len(video.kept)
        self._greeted, self.over = False, False

    def take(self) -> dict[str, Any] | bytes | None:
        """The next message to send; None if there is none."""
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
        """Ignores messages of the browser."""

    def leave(self) -> None:
        """Removes the browser after it has disconnected."""
        self._video.watchers.remove(self)


class _Server(WebServer):
    """The web server of one video."""

    def __init__(self, address: Address, video: Video):
        super().__init__(address)
        self._video = video

    @property
    def most_clients(self) -> int:
        return MOST_BROWSERS

    def connect(self, notify: Callable[[], None]) -> Watcher:
        return self._video.watch(notify)
