"""The server of sessions: websocket, uploads, saved videos, health and metrics.

Generation never waits for a client: one that reads too slowly misses frames.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from monarchrt.models.errors import UserError
from monarchrt.models.files import temporary_folder
from monarchrt.models.serve.engine import Engine
from monarchrt.models.serve.limits import Limits
from monarchrt.models.serve.messages import MESSAGES, Ping, Refusal, Save, Start, Stop, parse_message
from monarchrt.models.serve.metrics import Metrics
from monarchrt.models.serve.outbox import Outbox
from monarchrt.models.serve.peers import INSTALL, MEDIA, WEBRTC, Ice, Peer, installed
from monarchrt.models.serve.session import Session
from monarchrt.models.serve.sessions import Sessions
from monarchrt.models.serve.uploads import Uploads
from monarchrt.models.web.access import Address
from monarchrt.models.web.encodings import ENCODINGS
from monarchrt.models.web.server import CLOSING, MOST_CLIENTS, WebServer, hello, offered

MOST_CONNECTIONS = MOST_CLIENTS
ENCODERS = 4  # threads

__all__ = ["Address", "Server", "run_server"]


class Server(WebServer):
    """Serves an engine's sessions. One thread generates; networking runs in the event loop in which it is opened.

    Args:
        engine: Generates the videos.
        address: Where to listen.
        limits: Limits for clients.
        title: Title of the page.
        ice: STUN and TURN servers, perhaps none; if given, frames can be sent over WebRTC.

    Raises:
        UserError: If `ice` is given, but the extra `webrtc` is not installed.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        address: Address,
        limits: Limits | None = None,
        title: str = "MonarchRT",
        ice: Ice | None = None,
    ):
        if ice is not None and not installed():
            raise UserError(f"WebRTC was asked for, but {INSTALL}")
        self.engine, self.limits, self._title, self.ice = engine, limits or Limits(), title, ice
        super().__init__(address, message=self.limits.message)
        self.metrics = Metrics()
        self._clients, self.peers = set[_Client](), set[asyncio.Task[None]]()
        self._stack = contextlib.ExitStack()

    def extend(self, app: web.Application) -> None:
        """Adds the routes; the sessions' thread starts and stops with the application."""
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/metrics", self._measured)
        app.router.add_get("/video/{name}", self._video)
        app.router.add_post("/upload", self._upload)
        app.cleanup_ctx.append(self._computing)

    def connect(self, notify: Callable[[], None]) -> "_Client":
        """A client of one connection, which can have several sessions, one after the other."""
        client = _Client(self, notify)
        self._clients.add(client)
        return client

    async def _computing(self, app: web.Application):
        folder = self._stack.enter_context(temporary_folder())
        pool = self._stack.enter_context(ThreadPoolExecutor(ENCODERS, "encode"))
        self.sessions = Sessions(
            self.engine, limits=self.limits, folder=folder, observed=self.metrics, submit=pool.submit
        )
        self.uploads = Uploads(self.engine, limits=self.limits)
        self._thread = threading.Thread(target=self.sessions.run, name="sessions", daemon=True)
        self._thread.start()
        yield
        self.sessions.shut("server stopped")
        await asyncio.to_thread(self._thread.join)
        if self.peers:
            await asyncio.wait(self.peers, timeout=CLOSING)
        self._stack.close()

    async def _goodbye(self, app: web.Application) -> None:
        """Ends all sessions after the current block and tells the clients."""
        self.sessions.shut("server stopped")
        await asyncio.to_thread(self._thread.join)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING):  # the last frames may still be being encoded
                while not all(client.told for client in self._clients):
                    await asyncio.sleep(0.01)
        await super()._goodbye(app)

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

    async def _upload(self, request: web.Request) -> web.Response:
        return await self.uploads.receive(request)

    def formats(self) -> list[str]:
        """Names of the encodings that clients can choose."""
        even = not any(side % 2 for side in self.engine.size)
        return self.engine.formats() + [WEBRTC] * (self.ice is not None and even)

    def check_format(self, start: Start) -> None:
        """Raises Refusal unless the server has the encoding that a client asks for; says which ones it has."""
        if start.video in (formats := self.formats()):
            return
        why = "cannot be made here" if start.video in ENCODINGS else "is unknown"
        if start.video == WEBRTC:
            why = "is not served here" if installed() else f"cannot be sent here: {INSTALL}"
        raise Refusal(f"start: video {start.video!a} {why}; there is {', '.join(formats)}", id=start.id)

    def peer(self, start: Start, outbox: Outbox) -> Peer:
        """The WebRTC connection for a client's video, before it is connected.

        Raises:
            Refusal: If the offer is missing or invalid.
        """
        if start.offer is None:
            raise Refusal(f"start: offer is missing, which video {WEBRTC!a} needs; give the client's SDP", id=start.id)
        engine, options = self.engine, dict(frames=self.limits.frames, host=self.address.host, ice=self.ice)
        try:
            return Peer(outbox, offer=start.offer, size=engine.size, fps=engine.fps, **options)  # type: ignore[arg-type]
        except UserError as error:
            raise Refusal(f"start: {error}", id=start.id) from error

    def hello(self) -> dict[str, Any]:
        """The first event for a client: sizes, encodings, attention settings and limits of this server."""
        engine, limits = self.engine, self.limits
        served = dict(height=engine.size[0], width=engine.size[1], fps=engine.fps, window=engine.window)
        served |= dict(sink_frames=engine.rollout.sink_frames, block_frames=engine.frames(2) - engine.frames(1))
        served |= dict(attentions=list(engine.models), begin_frames=list(engine.begins))
        most = dict(prompt=limits.prompt, message=limits.message, seconds=limits.seconds, idle=limits.idle)
        most |= dict(upload=limits.upload)
        if self.ice is not None:
            served |= dict(ice_servers=self.ice.described())
        return hello(title=self._title, **offered(list(MESSAGES), self.formats()), **served, limits=most)


class _Client:
    """One websocket connection and its current session; without a session, it is closed when idle for too long."""

    over = False

    def __init__(self, server: Server, notify: Callable[[], None]):
        self._server, self._session = server, None
        self._session: Session | None
        self._peer: Peer | None = None
        self._outbox = Outbox(frames=server.limits.frames, notify=notify)
        self._outbox.event(**server.hello())
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._looking = self._loop.call_later(server.limits.idle, self._look)

    def _look(self) -> None:
        """Closes the connection if it has no session and sent nothing for `limits.idle` seconds."""
        idle, now = self._server.limits.idle, self._loop.time()
        if self._active() is not None:
            self._heard = now
        if now - self._heard >= idle:
            self._outbox.event("error", code="idle", message=f"nothing was heard for {idle:.0f} s")
            self.over = True
        else:
            self._looking = self._loop.call_later(self._heard + idle - now, self._look)

    def _active(self) -> Session | None:
        """The session, unless it has ended."""
        return None if self._session is None or self._session.ended is not None else self._session

    def take(self) -> dict[str, Any] | bytes | None:
        """The next message to send; None if there is none."""
        return self._outbox.take()

    @property
    def told(self) -> bool:
        """Whether all messages were taken."""
        return self._outbox.empty

    def leave(self) -> None:
        """Ends the session, after the connection was closed."""
        self._server._clients.discard(self)
        self._looking.cancel()
        self._outbox.clear_frames()  # cancels their encoding
        self._leave_peer()
        if self._session is not None:
            self._server.sessions.close(self._session, "disconnected")

    def hear(self, said: str | bytes) -> None:
        """Handles a message of the client, or answers with an error."""
        try:
            self._hear(said)
        except Refusal as refusal:
            self._outbox.event("error", id=refusal.id, code=refusal.code, message=str(refusal))

    def _hear(self, said: str | bytes) -> None:
        self._heard = self._loop.time()
        if isinstance(said, bytes):
            raise Refusal("messages are JSON texts, not bytes; images and clips go to /upload")
        message = parse_message(said, longest_prompt=self._server.limits.prompt)
        if (session := self._active()) is not None:
            self._server.sessions.tell(session, message)
        elif isinstance(message, Start):
            self._session = self._begin(message)
        elif isinstance(message, Ping):
            self._outbox.event("pong", id=message.id)
        elif isinstance(message, Save) and self._session is not None:
            self._server.sessions.tell(self._session, message)
        elif not isinstance(message, Stop):
            raise Refusal(f"{message.type}: there is no session; begin with start", code="no_session", id=message.id)

    def _begin(self, message: Start) -> Session:
        sessions, uploads = self._server.sessions, self._server.uploads
        self._server.check_format(message)
        frames = None if message.begin is None else uploads.get(message.begin)
        if message.begin is not None and frames is None:
            raise Refusal(
                "start: begin names no upload that is there; send the image or clip to /upload, and say the name of "
                "the answer",
                code="no_upload",
                id=message.id,
            )
        if message.video == WEBRTC:
            peer = self._server.peer(message, self._outbox)
            session = sessions.open(message, peer.outbox, begin=frames, encoding=MEDIA)
            self._join(peer, session, message.id)
        else:
            session = sessions.open(message, self._outbox, begin=frames)
        if message.begin is not None:
            uploads.used(message.begin)
        return session

    def _join(self, peer: Peer, session: Session, id: str | None) -> None:
        """Starts the WebRTC connection of a session, which ends if the connection fails."""
        self._leave_peer()
        self._peer = peer

        def lost(why: str) -> None:
            self._outbox.event("error", id=id, code="no_peer", message=f"start: {why}")
            self._server.sessions.close(session, "disconnected")

        answered = functools.partial(self._outbox.event, "answer", id=id)
        task = asyncio.create_task(peer.run(answered=lambda sdp: answered(sdp=sdp), lost=lost))
        self._server.peers.add(task)
        task.add_done_callback(self._server.peers.discard)

    def _leave_peer(self) -> None:
        if self._peer is not None:
            self._peer.close()
        self._peer = None


def run_server(server: Server) -> None:
    """Serves until SIGINT or SIGTERM, then ends all sessions and closes."""
    import signal

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await server.serve(stop)

    asyncio.run(main())
