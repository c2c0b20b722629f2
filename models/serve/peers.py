"""Frames over WebRTC, one connection for each video; offer and answer go over the session's websocket.

Needs the extra `monarchrt[webrtc]` (aiortc). No STUN or TURN server is contacted unless `Ice` names one, and frames are
sent only from the address that the server listens on.
"""

import asyncio
import contextlib
import functools
import importlib.util
import ipaddress
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError, printable
from monarchrt.models.serve.outbox import Outbox
from monarchrt.models.web.access import is_loopback
from monarchrt.models.web.encodings import Encoding

if TYPE_CHECKING:
    from aiortc import RTCPeerConnection
    from aiortc.mediastreams import MediaStreamTrack

WEBRTC = "webrtc"  # value of `video` in `start`
INSTALL = "aiortc is not installed (pip install 'monarchrt[webrtc]')"
CONNECTING = 20.0  # seconds until a connection must be established
LINGERING = 0.5  # seconds for the last frame to arrive before the connection closes
CLOSING = 2.0  # seconds that closing a connection may take
MOST_CANDIDATES = 16  # candidates of an offer that are tried
CLOCK = 90_000  # ticks per second of RTP video
_ICE = re.compile(r"(?P<scheme>stun|turns?):(?P<host>[^\s:?/@]+)(:(?P<port>\d{1,5}))?(\?transport=(?P<over>udp|tcp))?")


def installed() -> bool:
    """Whether aiortc is installed."""
    return importlib.util.find_spec("aiortc") is not None


@dataclass(frozen=True, kw_only=True)
class Ice:
    """STUN and TURN servers, by which peers in different networks connect; none by default.

    Examples:
        >>> Ice(servers=("stun:stun.example.org",)).described()
        [{'urls': 'stun:stun.example.org'}]

    Attributes:
        servers: At most one `stun:HOST:PORT`, and one `turn:HOST:PORT` or `turns:HOST:PORT?transport=tcp`.
        username: User name for the TURN server.
        credential: Password for the TURN server. Clients get it too, since they use the same server.

    Raises:
        UserError: If an address is invalid, there are two of a kind, or a TURN server lacks user name or credential.
    """

    servers: tuple[str, ...] = ()
    username: str | None = None
    credential: str | None = None

    def __post_init__(self):
        kinds = []
        for server in self.servers:
            match = _ICE.fullmatch(server)
            if match is None or not 0 < int(match["port"] or 1) < 2**16:
                raise UserError(
                    f"ice_servers has {printable(server, 60)!r}; give stun:HOST:PORT, turn:HOST:PORT or "
                    f"turns:HOST:PORT?transport=tcp"
                )
            if match["scheme"] == "stun" and match["over"]:
                raise UserError(f"ice_servers has {server!r}; stun takes no transport: stun:HOST:PORT")
            if match["scheme"] == "turns" and match["over"] == "udp":
                raise UserError(f"ice_servers has {server!r}; turns goes over tcp: turns:HOST:PORT?transport=tcp")
            kinds.append(match["scheme"][:4])
        if len(set(kinds)) < len(kinds):
            raise UserError(f"ice_servers are {', '.join(self.servers)}; give one of stun and one of turn at most")
        given = self.username is not None, self.credential is not None
        if "turn" in kinds and not all(given):
            raise UserError("ice_servers has a TURN server; give --ice-username and --ice-credential too")
        if "turn" not in kinds and any(given):
            name = "ice_username" if given[0] else "ice_credential"
            raise UserError(f"{name} has no effect without a TURN server; give one with --ice-servers turn:HOST:PORT")

    def described(self) -> list[dict[str, str]]:
        """The servers in the form of `iceServers` in browsers, and of aiortc's `RTCIceServer`."""
        secret = {"username": self.username or "", "credential": self.credential or ""}
        return [{"urls": url} | (secret if url.startswith("turn") else {}) for url in self.servers]


class MediaOutbox(Outbox):
    """Queues frames for a WebRTC connection, and passes events on to the client's own outbox.

    Args:
        events: The client's outbox.
        frames: Frames that may wait.
        notify: As in `Outbox`, for frames and for the end of the video.

    Attributes:
        over: Whether the video has ended, so that no more frames come.
    """

    def __init__(self, events: Outbox, *, frames: int, notify: Callable[[], None]):
        super().__init__(frames=frames, notify=notify)
        self._told, self.over = events, False

    def event(self, type: str, **values: Any) -> None:
        """Adds an event to the client's outbox; "ended" ends the video, and drops its frames unless it was complete."""
        self._told.event(type, **values)
        if type == "ended":
            if values["reason"] not in ("finished", "longest"):
                self.clear_frames()
            self.over = True
            self._notify()

    def next_frame(self) -> bytes | None:
        """Removes and returns the next frame, None if none is ready; events before it go to the client."""
        while isinstance(item := self.take(), dict):
            self.event(**item)
        return item


def yuv420(frames: UInt8[np.ndarray, "t H W 3"], index: int = 0, fps: float = 0.0) -> bytes:
    """The first frame in planar YUV 4:2:0, the input format of video codecs; `index` and `fps` are not used.

    Examples:
        >>> len(yuv420(np.zeros((1, 8, 16, 3), np.uint8)))
        192
    """
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[0]), format="rgb24")
    return frame.reformat(format="yuv420p").to_ndarray().tobytes()


MEDIA = Encoding(WEBRTC, False, yuv420, lambda height, width, fps: None)


class Peer:
    """A WebRTC connection to one client, for the frames of one video.

    Frames are sent at the playback rate, however fast they are generated; if too many wait, the oldest are dropped and
    the client is told. The connection closes after the last frame of its video.

    Args:
        events: The client's outbox.
        offer: The client's SDP offer to receive one video.
        size: Height and width of the frames, both even.
        fps: Frame rate of playback.
        frames: Frames that may wait.
        host: Address that the server listens on.
        ice: STUN and TURN servers.

    Raises:
        UserError: If the offer is not one to receive one video.
    """

    def __init__(
        self, events: Outbox, *, offer: str, size: tuple[int, int], fps: float, frames: int, host: str, ice: Ice
    ):
        self._offer, self._host, self._ice = read_offer(offer, host), host, ice
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._connected, self._over = asyncio.Event(), asyncio.Event()
        self._closed = False
        self.outbox = MediaOutbox(events, frames=frames, notify=self._notify)
        self._shape, self._fps = (size[0] * 3 // 2, size[1]), fps
        self._began = self._due = time.monotonic()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        """Closes the connection now; `run` returns."""
        self._closed = True
        self._over.set()

    async def run(self, *, answered: Callable[[str], None], lost: Callable[[str], None]) -> None:
        """Connects and sends frames; returns when the connection is closed.

        Args:
            answered: Called with the SDP answer to the offer.
            lost: Called with the reason if connecting fails or the connection breaks.
        """
        from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection

        servers = [
            RTCIceServer(**each) for each in self._ice.described()
        ]  # without, aiortc would use a public STUN server
        connection = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        connection.on("connectionstatechange", lambda: self._changed(connection.connectionState))
        try:
            why = await self._last_as_long(connection, answered)
        except Exception as error:  # aiortc does not validate its input
            why = f"offer cannot be answered ({type(error).__name__}: {printable(str(error), 80)})"
        if why is not None and not self._closed:
            lost(why)
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING):
                await connection.close()
        self.outbox.clear_frames()

    async def _last_as_long(self, connection: "RTCPeerConnection", answered: Callable[[str], None]) -> str | None:
        """Connects and waits for the end; returns the reason if it ended too early, else None."""
        from aiortc import RTCSessionDescription

        transceiver = connection.addTransceiver(_track(self._picture), direction="sendonly")
        _listen_at(connection, _addresses(self._host))
        await connection.setRemoteDescription(RTCSessionDescription(sdp=self._offer, type="offer"))
        await connection.setLocalDescription()
        if transceiver.currentDirection != "sendonly":
            return "offer receives no video; give one with a=recvonly"
        if not self._closed:
            answered(connection.localDescription.sdp)
        waiting = [asyncio.create_task(event.wait()) for event in (self._connected, self._over)]
        try:
            done, _ = await asyncio.wait(waiting, timeout=CONNECTING, return_when=asyncio.FIRST_COMPLETED)
            if not done and not self.outbox.over:
                return f"no connection over UDP came about within {CONNECTING:.0f} s; take video mp4 or jpeg"
            if done:
                await waiting[1]
        finally:
            for task in waiting:
                task.cancel()
        return None if self._closed or self.outbox.over else "the connection over UDP is gone"

    def _changed(self, state: str) -> None:
        if state == "connected":
            self._connected.set()
        elif state in ("failed", "closed"):
            self._over.set()

    async def _picture(self) -> av.VideoFrame | None:
        """The next frame, when it is due; None after the last."""
        while (message := self.outbox.next_frame()) is None:
            if self.outbox.over and self.outbox.empty:
                await asyncio.sleep(LINGERING)
                self._over.set()
                return None
            self._news.clear()  # before waiting: a frame that comes now sets it again
            await self._news.wait()
        now = time.monotonic()
        await asyncio.sleep(max(0.0, self._due - now))
        now = max(now, self._due)
        self._due = max(self._due, now - 1 / self._fps) + 1 / self._fps
        frame = av.VideoFrame.from_ndarray(np.frombuffer(message[8:], np.uint8).reshape(self._shape), format="yuv420p")
        frame.pts, frame.time_base = round((now - self._began) * CLOCK), Fraction(1, CLOCK)
        return frame


def _track(picture: Callable[[], Awaitable[av.VideoFrame | None]]) -> "MediaStreamTrack":
    """A video track of aiortc, which asks for frames and encodes them.

    Args:
        picture: Returns the next frame when it is due; None after the last.
    """
    from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

    class Track(MediaStreamTrack):
        kind = "video"

        async def recv(self) -> av.VideoFrame:
            if (frame := await picture()) is None:
                raise MediaStreamError
            return frame

    return Track()


def read_offer(offer: str, host: str) -> str:
    """Validates an SDP offer and removes candidates that the server should not try.

    A server that only this machine can reach tries none, since clients connect to it. Others try at most 16, only over
    UDP, and no host names, which would have to be resolved.

    Examples:
        >>> read_offer("hello", "127.0.0.1")
        Traceback (most recent call last):
        monarchrt.models.errors.UserError: offer has 0 media; it must be SDP that receives one video

    Args:
        offer: The client's SDP.
        host: Address that the server listens on.

    Returns:
        The offer with the remaining candidates.

    Raises:
        UserError: If it is not an offer to receive one video.
    """
    lines = offer.splitlines()
    media = [line for line in lines if line.startswith("m=")]
    if len(media) != 1 or not media[0].startswith("m=video "):
        kinds = ", ".join(printable(line[2:].partition(" ")[0], 20) for line in media[:4])
        said = f"{len(media)} media ({kinds})" if media else "0 media"
        raise UserError(f"offer has {said}; it must be SDP that receives one video")
    from aiortc.sdp import SessionDescription

    most = 0 if is_loopback(host) else MOST_CANDIDATES
    tried = set([line for line in lines if line.startswith("a=candidate:") and _is_address(line)][:most])
    kept = [line for line in lines if not line.startswith(("a=candidate:", "a=end-of-candidates")) or line in tried]
    text = "\r\n".join(kept) + "\r\n"
    try:
        described = SessionDescription.parse(text).media[0]
    except Exception as error:  # the parser does not validate its input
        raise UserError(f"offer is not SDP ({type(error).__name__}: {printable(str(error), 80)})") from error
    ice, dtls = described.ice, described.dtls
    if ice is None or not ice.usernameFragment or not ice.password or dtls is None or not dtls.fingerprints:
        raise UserError("offer lacks a=ice-ufrag, a=ice-pwd or a=fingerprint; it must be SDP of a whole connection")
    return text


def _is_address(candidate: str) -> bool:
    """Whether a candidate is an IP address over UDP, not a host name; RFC 8839, section 5.1."""
    parts = candidate.split()
    try:
        return parts[2].lower() == "udp" and bool(ipaddress.ip_address(parts[4]))
    except (IndexError, ValueError):
        return False


def _addresses(host: str) -> list[str] | None:
    """Addresses that frames are sent from if the server listens on `host`; None for all of this machine."""
    if host in ("", "0.0.0.0", "::"):
        return None
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)))


def _listen_at(connection: "RTCPeerConnection", addresses: list[str] | None) -> None:
    """Restricts a connection to these local addresses; by default aioice uses all except the loopback address."""
    if addresses is None:
        return
    for transceiver in connection.getTransceivers():
        transport = transceiver.receiver.transport.transport.iceGatherer._connection
        gather = transport.get_component_candidates
        transport.get_component_candidates = functools.partial(_gather, gather, addresses)


async def _gather(gather: Callable[..., Any], ours: list[str], component: int, addresses: Any, timeout: int = 5) -> Any:
    return await gather(component=component, addresses=ours, timeout=timeout)
