"""The web server, on aiohttp: a page, a websocket for each client, and access control.

Nothing waits for a client, and one that reads nothing is disconnected. Requests for another host name (DNS rebinding),
or from the pages of other sites, are refused.
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
PATIENCE = 10.0  # seconds in which a client must read a message, and a connection must send a request
CLOSING = 2.0  # seconds that closing connections may take
MOST_CLIENTS = 256  # websockets
MOST_CONNECTIONS = 320
MESSAGES, AT_ONCE = 50, 100  # messages of a client that are read: per second, and in a burst
OPEN_PATHS = ("/", "/healthz")  # need no token
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@runtime_checkable
class Client(Protocol):
    """The application's side of a connection: messages to send, and a handler of received ones."""

    def take(self) -> dict[str, Any] | bytes | None:
        """Removes and returns the next message, an event or bytes; None if there is none."""
        ...

    def hear(self, said: str | bytes) -> None:
        """Handles a received message, text or bytes."""
        ...

    @property
    def over(self) -> bool:
        """Whether no more messages will come, so that the connection can be closed."""
        ...

    def leave(self) -> None:
        """Called after the connection was closed."""
        ...


class WebServer:
    """Serves the page and its websocket. Subclasses override `connect`, and `extend` for more routes.

    Args:
        address: Where to listen.
        message: Largest size in bytes of a client's message.

    Attributes:
        address: As given; once it listens, with the actual port.
    """

    def __init__(self, address: Address, *, message: int = 1024):
        self.address, self._message = address, message
        self._sockets = dict[web.WebSocketResponse, asyncio.BaseTransport | None]()
        self._busy = set[asyncio.BaseTransport]()
        self._listener: asyncio.Server | None = None
        self._runner: web.AppRunner | None = None

    # For subclasses

    def connect(self, notify: Callable[[], None]) -> Client:
        """Creates the client of a new connection.

        Args:
            notify: The client calls it, from any thread, when it has a message to send.
        """
        raise NotImplementedError

    def extend(self, app: web.Application) -> None:
        """Adds routes and start-up and clean-up handlers to the application."""

    def listening(self) -> None:
        """Called once it listens; does nothing by default."""

    # The server

    @property
    def url(self) -> str:
        """URL of the page."""
        return self.address.url

    def app(self) -> web.Application:
        """Creates the application."""
        app = web.Application(middlewares=[self._guarded])
        app.router.add_get("/", self._page)
        app.router.add_get("/session", self._session)
        self.extend(app)
        app.on_shutdown.append(self._goodbye)
        return app

    async def open(self) -> None:
        """Starts to listen.

        Raises:
            UserError: If the port is in use, or the address is not one of this machine.
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
        """Closes all websockets, and aborts the connections of clients that do not answer."""
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.shutdown()
            for connection in self._runner.server.connections if self._runner.server else ():
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()

    async def serve(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set.

        Raises:
            UserError: If the port is in use, or the address is not one of this machine.
        """
        await self.open()
        try:
            await stop.wait()
        finally:
            await self.close()

    def _connected(self) -> asyncio.Protocol:
        """The handler of a new connection, which is closed if it sends no request for `PATIENCE` seconds."""
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
        """Closes the websockets when the application shuts down."""
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
            pass  # the client has disconnected
        finally:
            del self._sockets[socket]
        return socket

    @property
    def most_clients(self) -> int:
        """Largest number of websockets at once."""
        return MOST_CLIENTS

    async def _talk(self, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None) -> None:
        """Sends and receives messages until either ends."""
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(news.set)

        client = self.connect(notify)
        tasks = [asyncio.create_task(_send(socket, client, news)), asyncio.create_task(_listen(socket, client))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if isinstance(transport, asyncio.WriteTransport) and any(
                isinstance(task.exception(), TimeoutError) for task in done
            ):  # the client reads nothing
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
    """Passes on a client's messages, at a limited rate: all clients share this thread."""
    loop = asyncio.get_running_loop()
    heard = loop.time()  # when all messages so far would have been read at the limited rate
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
    """Closes a connection at once, because there are too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.close()


def hello(**values: Any) -> dict[str, Any]:
    """The first event that a client receives."""
    return {"type": "hello", "version": VERSION} | values


def picture(index: int, block: int, encoded: bytes) -> bytes:
    """A binary message: index of the first frame, index of the block (4 bytes each, big-endian), encoded frames."""
    return index.to_bytes(4, "big") + block.to_bytes(4, "big") + encoded


def offered(messages: Sequence[str], formats: Sequence[str]) -> dict[str, Any]:
    """Values of the first event: the types of messages that clients may send, and the encodings of frames."""
    return {"messages": list(messages), "formats": list(formats)}


def request_log() -> logging.Logger:
    """The log of aiohttp's errors, without invalid requests and broken connections."""
    log = logging.getLogger(__name__)
    log.addFilter(_is_ours)  # the same function is added once
    return log


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | ConnectionError))
