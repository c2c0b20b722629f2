"""The network side of what can be watched: a page, a websocket per client, and who may come; aiohttp.

A client that reads nothing is let go, and none is ever waited for. Only those who are meant to may connect: requests
that name another host (a name that somebody points at this machine), or come from another site that is open in a
browser, are refused.
"""

import asyncio
import contextlib
import importlib.resources
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from monarchrt.models.web.access import Address, own_host, own_origin, refused

VERSION = 2  # of the protocol
PATIENCE = 10.0  # seconds for a client to read something, and to ask for something
CLOSING = 2.0  # seconds that saying goodbye may take
MOST_CLIENTS = 256  # websockets
MOST_CONNECTIONS = 320
MESSAGES, AT_ONCE = 50, 100  # of a client, a second, and at most at once; others are read later
OPEN_PATHS = ("/", "/healthz")  # without a token
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@runtime_checkable
class Client(Protocol):
    """What one connection gets and says."""

    def take(self) -> dict[str, Any] | bytes | None:
        """The next to be sent; None if there is nothing now."""
        ...

    def hear(self, said: str | bytes) -> None:
        """Takes a message, text or bytes."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing comes any more, so that the connection may end."""
        ...

    def leave(self) -> None:
        """The connection is gone."""
        ...


class WebServer:
    """Serves one page and its websocket while open.

    Args:
        address: Where to listen.
        message: Most bytes of a client's message.
    """

    def __init__(self, address: Address, *, message: int = 1024):
        self.address, self._message = address, message
        self._sockets = dict[web.WebSocketResponse, asyncio.BaseTransport | None]()
        self._busy = set[asyncio.BaseTransport]()
        self._listener: asyncio.Server | None = None
        self._runner: web.AppRunner | None = None

    # What a kind of server adds

    def connect(self, notify: Callable[[], None]) -> Client:
        """A new client; `notify` is called, in any thread, when there is something to take."""
        raise NotImplementedError

    def extend(self, app: web.Application) -> None:
        """Adds routes, and what begins and ends with the application."""

    def listening(self) -> None:
        """Called when it listens; replaced by who wants to know."""

    # The server

    @property
    def url(self) -> str:
        """Where the page is."""
        return self.address.url

    def app(self) -> web.Application:
        """The application, whose clients begin and end with it."""
        app = web.Application(middlewares=[self._guarded])
        app.router.add_get("/", self._page)
        app.router.add_get("/session", self._session)
        self.extend(app)
        app.on_shutdown.append(self._goodbye)
        return app

    async def open(self) -> None:
        """Listens.

        Raises:
            UserError: If the port is taken, or the address is not of this machine.
        """
        context = self.address.context()
        options: dict[str, Any] = dict(access_log=None, logger=request_log(), handle_signals=False)
        self._runner = web.AppRunner(self.app(), shutdown_timeout=CLOSING, keepalive_timeout=PATIENCE, **options)
        await self._runner.setup()
        loop, address = asyncio.get_running_loop(), self.address
        try:
            listener = await loop.create_server(self._connected, address.host, address.port, ssl=context, backlog=128)
        except OSError as error:
            await self._runner.cleanup()
            raise refused(address.host, address.port, error) from error
        self._listener, self.address = listener, address.at(listener.sockets[0].getsockname()[1])
        self.listening()

    async def close(self) -> None:
        """Says goodbye to all clients, and cuts off who does not answer."""
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.shutdown()
            for connection in self._runner.server.connections if self._runner.server else ():
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()

    async def serve(self, stop: asyncio.Event) -> None:
        """Listens until `stop` is set.

        Raises:
            UserError: If the port is taken, or the address is not of this machine.
        """
        await self.open()
        try:
            await stop.wait()
        finally:
            await self.close()

    def _connected(self) -> asyncio.Protocol:
        """A connection's handler; those that ask for nothing for a while are cut off."""
        server = self._runner and self._runner.server
        if server is None or len(server.connections) >= MOST_CONNECTIONS:
            return _Refused()
        handler = server()
        asyncio.get_running_loop().call_later(PATIENCE, self._cut_idle, handler)
        return handler

    def _cut_idle(self, handler: web.RequestHandler) -> None:
        transport = handler.transport  # None once it is closed
        if transport in self._busy:
            asyncio.get_running_loop().call_later(PATIENCE, self._cut_idle, handler)
        elif transport is not None:
            transport.abort()

    async def _goodbye(self, app: web.Application) -> None:
        closing = [asyncio.create_task(socket.close(code=WSCloseCode.GOING_AWAY)) for socket in list(self._sockets)]
        if closing:
            await asyncio.wait(closing, timeout=CLOSING)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        named, address = request.headers.get("Host"), self.address
        if not own_host(named, address.host):
            raise web.HTTPForbidden(text=f"this page is not served as {named}; open {self.url}\n")
        if not own_origin(request.headers.get("Origin"), named):
            raise web.HTTPForbidden(text=f"other sites may not watch; open {self.url}\n")
        if address.token is not None and request.path not in OPEN_PATHS and not address.admits(_token(request)):
            raise web.HTTPUnauthorized(text="the token is missing or wrong; it is the one of --token\n")
        transport = request.transport
        if transport is not None:
            self._busy.add(transport)
        try:
            return await handler(request)
        finally:
            self._busy.discard(transport)  # type: ignore[arg-type]

    async def _page(self, request: web.Request) -> web.Response:
        page = (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        return web.Response(text=page, content_type="text/html", headers=PAGE_HEADERS)

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        if len(self._sockets) >= self.most_clients:
            raise web.HTTPServiceUnavailable(text=f"{len(self._sockets)} clients are connected; try again later\n")
        # frames are compressed already
        how: Any = dict(heartbeat=10.0, timeout=CLOSING, compress=False, autoping=False)
        socket = web.WebSocketResponse(max_msg_size=self._message, **how)
        self._sockets[socket] = request.transport
        try:
            await socket.prepare(request)
            await self._talk(socket, request.transport)
        except ConnectionError:
            pass  # it is gone
        finally:
            del self._sockets[socket]
        return socket

    @property
    def most_clients(self) -> int:
        """Websockets at once."""
        return MOST_CLIENTS

    async def _talk(self, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None) -> None:
        """Sends and listens until one of the two is over."""
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is told any more
                loop.call_soon_threadsafe(news.set)

        client = self.connect(notify)
        tasks = [asyncio.create_task(_send(socket, client, news)), asyncio.create_task(_listen(socket, client))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if isinstance(transport, asyncio.WriteTransport) and any(
                isinstance(task.exception(), TimeoutError) for task in done
            ):  # it reads nothing
                transport.abort()
        finally:
            client.leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _send(socket: web.WebSocketResponse, client: Client, news: asyncio.Event) -> None:
    while not socket.closed:
        news.clear()
        while (item := client.take()) is not None:
            sent = socket.send_bytes(item) if isinstance(item, bytes) else socket.send_json(item)
            await asyncio.wait_for(sent, PATIENCE)
        if client.over:
            return
        await news.wait()


async def _listen(socket: web.WebSocketResponse, client: Client) -> None:
    """Hears a client, and one that says very much only as fast as is good for others: they share this thread's time."""
    loop = asyncio.get_running_loop()
    heard = loop.time()  # when all would have been said, at the most a second
    async for message in socket:
        if message.type is WSMsgType.PING:
            await socket.pong(message.data)
        elif message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            client.hear(message.data)
        elif message.type is not WSMsgType.PONG:
            break
        now = loop.time()
        heard = max(heard, now) + 1 / MESSAGES
        await asyncio.sleep(max(0.0, heard - now - AT_ONCE / MESSAGES))


def _token(request: web.Request) -> str:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else request.query.get("token", "")


class _Refused(asyncio.Protocol):
    """Of a connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.close()


def hello(**values: Any) -> dict[str, Any]:
    """What a client is told first."""
    return {"type": "hello", "version": VERSION} | values


def picture(index: int, block: int, encoded: bytes) -> bytes:
    """A binary message: the first frame's index, the block's number, both 4 bytes and big-endian, and the bytes."""
    return index.to_bytes(4, "big") + block.to_bytes(4, "big") + encoded


def offered(messages: Sequence[str], formats: Sequence[str]) -> dict[str, Any]:
    """What clients may say, and in which formats frames go out."""
    return {"messages": list(messages), "formats": list(formats)}


def request_log() -> logging.Logger:
    """Where aiohttp reports what goes wrong here; not what is wrong with a request, or with who broke it off."""
    log = logging.getLogger(__name__)
    log.addFilter(_is_ours)  # the same function is added once
    return log


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | ConnectionError))
