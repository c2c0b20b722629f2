"""A page on this machine that plays frames as they come: aiohttp, one websocket per browser, JPEG frames.

The server runs in a thread of its own. A browser that connects late gets all frames that are kept, one that closes is
forgotten, and generation never waits for any.
"""

import asyncio
import errno
import importlib.resources
import io
import os
import socket
import threading
import time
import weakref
from collections import deque
from types import TracebackType

import numpy as np
from aiohttp import WSMsgType, web
from jaxtyping import UInt8

from monarchrt.models.errors import UserError

KEPT = 4096  # frames, so that an endless video does not fill the memory


def check_port(host: str, port: int) -> None:
    """Raises UserError unless the address can be listened on; before anything is computed."""
    try:
        socket.getaddrinfo(host or None, port)  # an unknown name has an error of its own here, and not below
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise _refused(host, port, error) from error


def _refused(host: str, port: int, error: OSError) -> UserError:
    """What is wrong, and with which of the two."""
    name = isinstance(error, socket.gaierror)
    # the text of other errors repeats the address, as Python writes it
    reason = error.strerror if name or error.errno is None else os.strerror(error.errno)
    if name or error.errno == errno.EADDRNOTAVAIL:
        return UserError(
            f"host {host} cannot be listened on ({reason or error}); give an address of this machine, such as 127.0.0.1"
        )
    return UserError(
        f"port {port} of {host} cannot be listened on ({reason or error}); give another --port, or 0 for a free one"
    )


class LivePage:
    """Serves the page while open.

    Example:
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
        quality: int = 88,
    ):
        self._host, self._port, self._quality = host, port, quality
        self._hello = {"fps": fps, "title": title, "total": total}
        self._frames: deque[bytes] = deque(maxlen=KEPT)
        self._made = 0
        self._ended: str | None = None
        self._browsers: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()
        self._watching = 0
        self._watched = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live page", daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/"

    @property
    def watched(self) -> int:
        """Browsers that have connected so far."""
        return self._watched

    def show(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Adds frames; they are encoded here and sent in the background."""
        from PIL import Image

        for picture in frames:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=self._quality)
            self._loop.call_soon_threadsafe(self._add, buffer.getvalue())

    def end(self, reason: str = "finished") -> None:
        """Says that no more frames come."""
        self._loop.call_soon_threadsafe(self._finish, reason)

    def wait(self, seconds: float) -> bool:
        """Waits until a browser has connected and all that have got everything, at most `seconds`; returns whether."""
        deadline = time.monotonic() + seconds
        while self._watching or not self._watched:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def __enter__(self) -> "LivePage":
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        except OSError as error:
            self._stop()
            raise _refused(self._host, self._port, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(timeout=10)
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _serve(self) -> None:
        self._changed = asyncio.Condition()
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_get("/frames", self._stream)
        app.on_shutdown.append(self._close_browsers)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port)
        try:
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._port = runner.addresses[0][1]

    def _add(self, jpeg: bytes) -> None:
        self._frames.append(jpeg)
        self._made += 1
        self._wake()

    def _finish(self, reason: str) -> None:
        self._ended = reason
        self._wake()

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._loop.create_task(notify())

    async def _page(self, request: web.Request) -> web.Response:
        page = (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        return web.Response(text=page, content_type="text/html", headers={"Cache-Control": "no-store"})

    async def _close_browsers(self, app: web.Application) -> None:
        for browser in list(self._browsers):
            await browser.close()

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        browser = web.WebSocketResponse(heartbeat=10.0)
        await browser.prepare(request)
        self._browsers.add(browser)
        self._watching += 1
        self._watched += 1
        listener = asyncio.create_task(self._listen(browser))
        try:
            await browser.send_json(self._hello)
            await self._send_all(browser)
        except ConnectionError:
            pass  # the browser was closed
        finally:
            listener.cancel()
            self._watching -= 1
        return browser

    async def _listen(self, browser: web.WebSocketResponse) -> None:
        """Notices that a browser goes away."""
        async for message in browser:
            if message.type is WSMsgType.ERROR:
                break
        async with self._changed:
            self._changed.notify_all()

    async def _send_all(self, browser: web.WebSocketResponse) -> None:
        sent = self._made - len(self._frames)
        while not browser.closed:
            sent = max(sent, self._made - len(self._frames))  # what is not kept any more is skipped
            if sent < self._made:
                await browser.send_bytes(self._frames[sent - self._made])
                sent += 1
            elif self._ended is not None:
                await browser.send_json({"ended": self._ended})
                return
            else:
                await self._news(sent, browser)

    async def _news(self, sent: int, browser: web.WebSocketResponse) -> None:
        """Waits for a frame after the `sent` first ones, for the end, or for the browser to go away."""
        async with self._changed:
            await self._changed.wait_for(lambda: sent < self._made or self._ended is not None or browser.closed)
