"""The network side of sessions: a page, a websocket per session, health and metrics; aiohttp.

A client that reads too slowly misses frames, one that reads nothing is let go, and neither is ever waited for. Only
those who are meant to may connect: requests that name another host, or come from another site that is open in a
browser, are refused, and beyond this machine a token is needed.
"""

import asyncio
import contextlib
import hmac
import importlib.resources
import ssl
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.typedefs import Handler

from monarchrt.models.errors import UserError
from monarchrt.models.generate.stream import PAGE_HEADERS, is_loopback, own_host, own_origin, refused, request_log
from monarchrt.models.serve.engine import Engine
from monarchrt.models.serve.messages import MESSAGES, Refusal, Start, Stop, parse_message
from monarchrt.models.serve.metrics import Metrics
from monarchrt.models.serve.outbox import Outbox
from monarchrt.models.serve.session import Limits, Session
from monarchrt.models.serve.sessions import Sessions

VERSION = 1  # of the protocol
PATIENCE = 10.0  # seconds for a client to read something, and to say what it wants
CLOSING = 2.0  # seconds that saying goodbye may take
MOST_CONNECTIONS = 256
ENCODERS = 4  # threads
OPEN_PATHS = ("/", "/healthz")  # without a token


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and who may come.

    Attributes:
        host: Address to listen on.
        port: 0 takes a free one.
        token: That clients must have; needed beyond this machine.
        certificate: PEM file for TLS.
        key: Of the certificate, if it is in another file.

    Raises:
        UserError: If it can be reached from other machines, and there is no token.
    """

    host: str = "127.0.0.1"
    port: int = 8766
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self):
        if not is_loopback(self.host) and not self.token:
            raise UserError(
                f"host {self.host} can be reached from other machines; give a --token that clients must have"
            )
        if self.token is not None and len(self.token) < 16:
            raise UserError(f"token has {len(self.token)} characters; give at least 16")
        for name in ("certificate", "key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise UserError(f"{name} {path} is not a file; give a PEM file")
        if self.key is not None and self.certificate is None:
            raise UserError(f"key {self.key} is of no use without a certificate; give --certificate too")

    def context(self) -> ssl.SSLContext | None:
        """For TLS; None without a certificate."""
        if self.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            raise UserError(f"certificate {self.certificate} cannot be used ({error}); give a PEM file") from error
        return context


class Server:
    """Serves an engine's sessions while open: computing in one thread, the network in the loop that it is opened in.

    Args:
        engine: What makes videos.
        address: Where to listen.
        limits: For clients.
        title: Of the page.
    """

    def __init__(self, engine: Engine, *, address: Address, limits: Limits | None = None, title: str = "MonarchRT"):
        self.engine, self.address, self.limits, self._title = engine, address, limits or Limits(), title
        self.metrics, self._sockets = Metrics(), set[web.WebSocketResponse]()
        self._port = address.port
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return f"http{'s' if self.address.certificate else ''}://{host}:{self._port}/"

    def app(self) -> web.Application:
        """The application, whose sessions begin and end with it."""
        app = web.Application(middlewares=[self._guarded])
        routes = {"/": self._page, "/session": self._session, "/healthz": self._health, "/metrics": self._measured}
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        app.router.add_get("/video/{name}", self._video)
        app.cleanup_ctx.append(self._computing)
        app.on_shutdown.append(self._goodbye)
        return app

    async def _computing(self, app: web.Application):
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="monarchrt-")))
        pool = self._stack.enter_context(ThreadPoolExecutor(ENCODERS, "encode"))
        self.sessions = Sessions(
            self.engine, limits=self.limits, folder=folder, observed=self.metrics, encoded=pool.map
        )
        self._thread = threading.Thread(target=self.sessions.run, name="sessions", daemon=True)
        self._thread.start()
        yield
        self.sessions.shut("server stopped")
        await asyncio.to_thread(self._thread.join)
        self._stack.close()

    async def _goodbye(self, app: web.Application) -> None:
        """All sessions end after the block in the making; clients are told so."""
        self.sessions.shut("server stopped")
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)
        closing = [asyncio.create_task(socket.close(code=WSCloseCode.GOING_AWAY)) for socket in set(self._sockets)]
        if closing:
            await asyncio.wait(closing, timeout=CLOSING)

    async def serve(self, stop: asyncio.Event) -> None:
        """Listens until `stop` is set.

        Raises:
            UserError: If the port is taken, or the address is not of this machine.
        """
        context = self.address.context()
        runner = web.AppRunner(
            self.app(), access_log=None, logger=request_log(), handle_signals=False, shutdown_timeout=CLOSING
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.address.host, self.address.port, ssl_context=context)
            try:
                await site.start()
            except OSError as error:
                raise refused(self.address.host, self.address.port, error) from error
            self._port = runner.addresses[0][1]
            self.listening()
            await stop.wait()
        finally:
            await runner.cleanup()

    def listening(self) -> None:
        """Called when it listens; replaced by who wants to know."""

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        named = request.headers.get("Host")
        if not own_host(named, self.address.host):
            raise web.HTTPForbidden(text=f"this is not served as {named}; open {self.url}\n")
        if not own_origin(request.headers.get("Origin"), named):
            raise web.HTTPForbidden(text=f"other sites may not take part; open {self.url}\n")
        if self.address.token is not None and request.path not in OPEN_PATHS and not self._has_token(request):
            raise web.HTTPUnauthorized(text="the token is missing or wrong; it is the one of --token\n")
        return await handler(request)

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else request.query.get("token", "")
        return hmac.compare_digest(given.encode(errors="replace"), (self.address.token or "").encode())

    async def _page(self, request: web.Request) -> web.Response:
        page = (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        return web.Response(text=page, content_type="text/html", headers=PAGE_HEADERS)

    async def _health(self, request: web.Request) -> web.Response:
        alive = self._thread.is_alive()
        values = {"ok": alive, "active": self.sessions.active, "waiting": self.sessions.waiting}
        return web.json_response(values, status=200 if alive else 503)

    async def _measured(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.text(self.sessions), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _video(self, request: web.Request) -> web.StreamResponse:
        path = self.sessions.video(request.match_info["name"])
        if path is None:
            raise web.HTTPNotFound(text="there is no such video, or no longer\n")
        return web.FileResponse(path, headers={"Content-Type": "video/mp4", "Cache-Control": "no-store"})

    def hello(self) -> dict[str, Any]:
        """What a client is told first: what is served here, and the limits."""
        engine, limits = self.engine, self.limits
        served = dict(height=engine.size[0], width=engine.size[1], fps=engine.fps, window=engine.window)
        served |= dict(sink_frames=engine.rollout.sink_frames, block_frames=engine.frames(2) - engine.frames(1))
        most = dict(prompt=limits.prompt, message=limits.message, seconds=limits.seconds, idle=limits.idle)
        return (
            {"type": "hello", "version": VERSION, "title": self._title, "messages": list(MESSAGES)}
            | served
            | {"limits": most}
        )

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        if len(self._sockets) >= MOST_CONNECTIONS:
            raise web.HTTPServiceUnavailable(text=f"{MOST_CONNECTIONS} clients are connected; try again later\n")
        socket = web.WebSocketResponse(heartbeat=10.0, timeout=CLOSING, max_msg_size=self.limits.message)
        self._sockets.add(socket)
        try:
            await socket.prepare(request)
            await _Client(self, socket, request.transport).run()
        except ConnectionError:
            pass  # it is gone
        finally:
            self._sockets.discard(socket)
        return socket


class _Client:
    """A connection, and its sessions one after the other."""

    def __init__(self, server: Server, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None):
        self._server, self._socket, self._transport = server, socket, transport
        self._session: Session | None = None
        self._news, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._outbox = Outbox(frames=server.limits.frames, notify=self._notify)

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is told any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def run(self) -> None:
        """Sends and listens until one of the two is over."""
        self._outbox.event(**self._server.hello())
        sending = asyncio.create_task(self._send())
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait([sending, listening], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._session is not None:
                self._server.sessions.close(self._session, "disconnected")
            for task in (sending, listening):
                task.cancel()
            await asyncio.gather(sending, listening, return_exceptions=True)

    async def _send(self) -> None:
        try:
            while not self._socket.closed:
                self._news.clear()
                while (item := self._outbox.take()) is not None:
                    sent = self._socket.send_bytes(item) if isinstance(item, bytes) else self._socket.send_json(item)
                    await asyncio.wait_for(sent, PATIENCE)
                await self._news.wait()
        except TimeoutError:  # it reads nothing
            if isinstance(self._transport, asyncio.WriteTransport):
                self._transport.abort()

    async def _listen(self) -> None:
        async for message in self._socket:
            if message.type is WSMsgType.TEXT:
                self._hear(message.data)
            elif message.type is WSMsgType.BINARY:
                self._outbox.event("error", code="invalid", message="messages are JSON texts, not bytes")
            else:
                break

    def _hear(self, text: str) -> None:
        sessions = self._server.sessions
        try:
            message = parse_message(text, longest_prompt=self._server.limits.prompt)
            over = self._session is None or self._session.ended is not None
            if isinstance(message, Start) and over:
                self._session = sessions.open(message, self._outbox)
            elif self._session is None or over:
                if not isinstance(message, Stop):
                    raise Refusal(
                        f"{message.type}: there is no session; begin with start", code="no_session", id=message.id
                    )
            else:
                sessions.tell(self._session, message)
        except Refusal as refusal:
            self._outbox.event("error", id=refusal.id, code=refusal.code, message=str(refusal))


def run_server(server: Server) -> None:
    """Serves until SIGINT or SIGTERM, then ends cleanly."""
    import signal

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await server.serve(stop)

    asyncio.run(main())
