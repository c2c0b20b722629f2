"""A page on this machine that plays frames as they come: aiohttp, one websocket per browser, JPEG frames.

The server runs in a thread of its own. A browser that connects late gets all frames that are kept, one that closes is
forgotten, one too slow for the speed of play misses frames, one that takes nothing is let go, and generation never
waits for any. Only the page itself may watch: requests that name another host (a name that somebody points at this
machine), or come from another site that is open in the browser, are refused.
"""

import asyncio
import contextlib
import errno
import importlib.resources
import io
import ipaddress
import logging
import os
import socket
import threading
import time
from collections import deque
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from aiohttp import WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from jaxtyping import UInt8

from monarchrt.models.errors import UserError

KEPT = 4096  # frames, so that an endless video does not fill the memory
MOST_BROWSERS = 16  # that watch
MOST_CONNECTIONS = 64
PATIENCE = 5.0  # seconds for a browser to take a frame, and that one may be behind the speed of play
GRACE = 10.0  # seconds after the end, or after it came, in which a browser holds the page up
CLOSING = 1.0  # seconds that saying goodbye may take
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def check_port(host: str, port: int) -> None:
    """Raises UserError unless the address can be listened on; before anything is computed."""
    try:
        socket.getaddrinfo(host or None, port)  # an unknown name has an error of its own here, and not below
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise refused(host, port, error) from error


def refused(host: str, port: int, error: OSError) -> UserError:
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


def own_host(named: str | None, host: str) -> bool:
    """Whether a request's Host header names this page: no name that another could have pointed at this machine.

    Examples:
        >>> own_host("localhost:8765", "127.0.0.1"), own_host("rebound.example:8765", "127.0.0.1")
        (True, False)

    Args:
        named: The header.
        host: What the page listens on. Beyond this machine, it may be called by any address, or by the machine's name.
    """
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{named or ''}").hostname or ""
        local = {"localhost", "127.0.0.1", "::1", host.lower()} - {""}
        beyond = not is_loopback(host)
        return name in local or is_loopback(name) or (beyond and (_is_address(name) or name in _machine_names()))
    return False


def own_origin(origin: str | None, named: str | None) -> bool:
    """Whether a request comes from the page itself, or from no page at all.

    Examples:
        >>> own_origin("http://127.0.0.1:8765", "127.0.0.1:8765"), own_origin("https://a.example", "127.0.0.1:8765")
        (True, False)

    Args:
        origin: The Origin header, which every browser sends with a websocket.
        named: The Host header.
    """
    if origin is None:
        return True
    scheme, _, rest = origin.lower().partition("://")
    return scheme in ("http", "https") and rest == (named or "").lower()


def request_log() -> logging.Logger:
    """Where aiohttp reports what goes wrong here; what is wrong with a request its sender is told, and nobody else."""
    log = logging.getLogger(__name__)
    log.addFilter(_is_ours)  # the same function is added once
    return log


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


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
    return max(oldest, min(played - int(PATIENCE * fps), made - 1))  # the last is missed by none


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(name: str) -> bool:
    """Whether only this machine can reach a name or address."""
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _machine_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local", name.partition(".")[0]}


class _Refused(asyncio.Protocol):
    """Of a connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Watcher(NamedTuple):
    """A browser that watches, and since when."""

    browser: web.WebSocketResponse
    transport: asyncio.BaseTransport | None
    since: float


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
        quality: int = 88,
    ):
        self._host, self._port, self._quality = host, port, quality
        self._hello = {"fps": fps, "title": title, "total": total}
        self._frames: deque[bytes] = deque(maxlen=KEPT)
        self._made = 0
        self._ended: str | None = None
        self._ended_at = 0.0
        self._watchers: list[_Watcher] = []
        self._watched = 0
        self._server: asyncio.Server | None = None
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
        """Waits until a browser has connected and all that have got everything, at most `seconds`.

        A browser that is not done some seconds after the end, or after it came, is not waited for.

        Returns:
            Whether one had connected, and none was still busy.
        """
        deadline = time.monotonic() + seconds
        while not self._watched or self._busy():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return not self._watchers

    def _busy(self) -> bool:
        """Whether a browser is to be waited for."""
        now = time.monotonic()
        ended = now if self._ended is None else self._ended_at
        return any(max(ended, watcher.since) > now - GRACE for watcher in list(self._watchers))

    def __enter__(self) -> "LivePage":
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        except OSError as error:
            self._stop()
            raise refused(self._host, self._port, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        with contextlib.suppress(TimeoutError):  # whoever is still connected then is cut off
            closing.result(timeout=10 * CLOSING)
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _serve(self) -> None:
        self._changed = asyncio.Condition()
        app = web.Application(middlewares=[self._guarded])
        app.router.add_get("/", self._page)
        app.router.add_get("/frames", self._stream)
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=request_log(),
            handle_signals=False,
            shutdown_timeout=CLOSING,
            keepalive_timeout=PATIENCE,
        )
        await runner.setup()
        self._runner = runner
        try:
            self._server = await self._loop.create_server(self._connected, self._host, self._port, backlog=128)
        except OSError:
            await runner.cleanup()
            raise
        self._port = self._server.sockets[0].getsockname()[1]

    def _connected(self) -> asyncio.Protocol:
        """A connection's handler; those that ask for nothing for a while are cut off."""
        server = self._runner and self._runner.server
        if server is None or len(server.connections) >= MOST_CONNECTIONS:
            return _Refused()
        handler = server()
        self._loop.call_later(2 * PATIENCE, self._cut_idle, handler)
        return handler

    def _cut_idle(self, handler: web.RequestHandler) -> None:
        transport = handler.transport  # None once it is closed
        if transport is not None and transport not in [watcher.transport for watcher in self._watchers]:
            transport.abort()

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        goodbyes = [asyncio.create_task(watcher.browser.close()) for watcher in self._watchers]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=2 * CLOSING)
        if self._runner is not None:
            if self._runner.server is not None:
                for connection in self._runner.server.connections:
                    if connection.transport is not None:
                        connection.transport.abort()
            await self._runner.cleanup()

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets through what this page asks for."""
        named = request.headers.get("Host")
        if not own_host(named, self._host):
            raise web.HTTPForbidden(text=f"this page is not served as {named}; open {self.url}\n")
        if not own_origin(request.headers.get("Origin"), named):
            raise web.HTTPForbidden(text=f"other sites may not watch; open {self.url}\n")
        return await handler(request)

    def _add(self, jpeg: bytes) -> None:
        self._frames.append(jpeg)
        self._made += 1
        self._wake()

    def _finish(self, reason: str) -> None:
        self._ended, self._ended_at = reason, time.monotonic()
        self._wake()

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._loop.create_task(notify())

    async def _page(self, request: web.Request) -> web.Response:
        page = (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        return web.Response(text=page, content_type="text/html", headers=PAGE_HEADERS)

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        if len(self._watchers) >= MOST_BROWSERS:
            raise web.HTTPServiceUnavailable(text=f"{MOST_BROWSERS} browsers watch already; close one\n")
        browser = web.WebSocketResponse(heartbeat=10.0, timeout=CLOSING, max_msg_size=1024)
        watcher = _Watcher(browser, request.transport, time.monotonic())
        self._watchers.append(watcher)
        listener = None
        try:
            await browser.prepare(request)
            self._watched += 1
            listener = asyncio.create_task(self._listen(browser))
            await browser.send_json(self._hello)
            await self._send_all(browser)
        except ConnectionError:
            pass  # the browser was closed
        except TimeoutError:  # it takes nothing: it was put to sleep, or means harm
            if isinstance(watcher.transport, asyncio.WriteTransport):
                watcher.transport.abort()
        finally:
            if listener is not None:
                listener.cancel()
            self._watchers.remove(watcher)
        return browser

    async def _listen(self, browser: web.WebSocketResponse) -> None:
        """Notices that a browser goes away."""
        async for message in browser:
            if message.type is WSMsgType.ERROR:
                break
        async with self._changed:
            self._changed.notify_all()

    async def _send_all(self, browser: web.WebSocketResponse) -> None:
        first = sent = self._made - len(self._frames)
        begin = time.monotonic()
        while not browser.closed:
            if sent < self._made:
                played = first + int((time.monotonic() - begin) * self._hello["fps"])
                sent = next_frame(sent, made=self._made, kept=len(self._frames), played=played, fps=self._hello["fps"])
                await asyncio.wait_for(browser.send_bytes(self._frames[sent - self._made]), PATIENCE)
                sent += 1
            elif self._ended is not None:
                await asyncio.wait_for(browser.send_json({"ended": self._ended}), PATIENCE)
                return
            else:
                await self._news(sent, browser)

    async def _news(self, sent: int, browser: web.WebSocketResponse) -> None:
        """Waits for a frame after the `sent` first ones, for the end, or for the browser to go away."""
        async with self._changed:
            await self._changed.wait_for(lambda: sent < self._made or self._ended is not None or browser.closed)
