"""Frames over WebRTC: aiortc as the client, and a browser where there is one."""

import asyncio
import contextlib
import io

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.serve import Address, Outbox, Server, peers
from monarchrt.models.serve.peers import Ice, MediaOutbox, read_offer, yuv420
from tests.models.serve.test_browser import CHROMIUM, browser_page
from tests.models.serve.test_server import running, until

aiortc = pytest.importorskip("aiortc", reason="aiortc is not installed (pip install 'monarchrt[webrtc]')")


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    """aioice finds two addresses, of this machine alone; nobody takes a server of others that nobody named."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda **_: ["127.0.0.1", "127.0.0.2"])
    monkeypatch.delattr(aiortc.RTCIceGatherer, "getDefaultIceServers")


def against(engine, talk, *, ice=None, limits=None):
    """Runs a conversation with a server: `talk(client, server)`; nothing of it is left."""

    async def run():
        server = Server(engine, address=Address(port=0), limits=limits, ice=ice or Ice())
        async with TestClient(TestServer(server.app())) as client:
            await asyncio.wait_for(talk(client, server), 30)
        assert not server.peers

    asyncio.run(run())


class Viewer:
    """A client's connection, and its first track."""

    def __init__(self):
        self.connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        self.connection.addTransceiver("video", direction="recvonly")
        self.connection.on("track", self._take)

    def _take(self, track):
        self.track = track

    async def offer(self):
        await self.connection.setLocalDescription()
        return self.connection.localDescription.sdp

    async def accept(self, event):
        await self.connection.setRemoteDescription(aiortc.RTCSessionDescription(sdp=event["sdp"], type="answer"))

    async def frames(self, count):
        return [(await self.track.recv()).to_ndarray(format="rgb24") for _ in range(count)]

    async def gone(self):
        while self.connection.connectionState != "closed":
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def watching(client, **start):
    """A session that is connected."""
    viewer = Viewer()
    async with client.ws_connect("/session") as ws:
        hello = await ws.receive_json()
        assert hello["formats"][-1] == "webrtc"
        offer = await viewer.offer()
        await ws.send_json({"type": "start", "prompt": "a cat", "video": "webrtc", "offer": offer, "id": "a"} | start)
        events, _ = await until(ws, "answer")
        assert {event["id"] for event in events if "id" in event} == {"a"}
        await viewer.accept(events[-1])
        try:
            yield ws, viewer, events
        finally:
            await viewer.connection.close()


def test_a_whole_video(engine):
    """Its frames are those of JPEG, as far as a codec for films has them; then the connection is over."""

    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            await ws.send_json({"type": "start", "prompt": "a cat", "frames": 6, "pace": False})
            _, pictures = await until(ws, "ended")
        async with watching(client, frames=6) as (ws, viewer, events):
            seen = await viewer.frames(5)
            assert seen[0].shape == (8, 16, 3)
            expected = np.asarray(Image.open(io.BytesIO(pictures[0][8:]))).astype(int)
            near, far = (np.abs(seen[0] - picture).mean() for picture in (expected, 255 - expected))
            assert near < 0.5 * far
            if events[-1]["type"] != "ended":
                await until(ws, "ended")
            await viewer.gone()
            assert [event["video"] for event in events if event["type"] == "started"] == ["webrtc"]

    against(engine, talk)


def test_a_prompt_and_the_end(engine):
    """The picture goes on over a change and a second video of one connection; frames stop when the video is stopped."""

    async def talk(client, server):
        async with watching(client) as (ws, viewer, _):
            await viewer.frames(2)
            await ws.send_json({"type": "prompt", "prompt": "a dog", "id": "b"})
            events, messages = await until(ws, "prompt")
            assert (events[-1]["id"], messages) == ("b", [])
            await viewer.frames(3)
            await ws.send_json({"type": "stop"})
            assert (await until(ws, "ended"))[0][-1]["reason"] == "stopped"
            await viewer.gone()
            again = Viewer()
            start = {"type": "start", "prompt": "a", "video": "webrtc", "offer": await again.offer()}
            await ws.send_json(start)
            await again.accept((await until(ws, "answer"))[0][-1])
            await again.frames(1)
            await again.connection.close()  # who watches is gone, and so is the session
            events, _ = await until(ws, "ended")
            assert events[-1]["reason"] == "disconnected"
            assert [e["code"] for e in events if e["type"] == "error"] == ["no_peer"]

    against(engine, talk)


def test_a_client_that_goes(engine):
    """Without a word: its connection is closed, and what waits for it is let go."""

    async def talk(client, server):
        async with watching(client) as (ws, viewer, _):
            await viewer.frames(1)
            (peer,) = (client._peer for client in server._clients)
            ws._response.connection.transport.abort()
            await viewer.gone()
            while server.peers or server.sessions.active or not peer.outbox.over:  # the session ends in another thread
                await asyncio.sleep(0.01)
            assert len(peer.outbox) == 0

    against(engine, talk)


def test_only_the_address_that_is_served(engine):
    """Frames leave from there, and no address that a client names is tried, nor a server of others asked."""

    async def talk(client, server):
        async with watching(client, paused=True) as (ws, _, events):
            candidates = [line for line in events[-1]["sdp"].splitlines() if line.startswith("a=candidate:")]
            assert [line.split()[4] for line in candidates] == ["127.0.0.1"]
            await ws.send_json({"type": "stop"})
            await until(ws, "ended")

    against(engine, talk)


OFFER = """v=0
o=- 1 1 IN IP4 127.0.0.1
s=-
t=0 0
m=video 9 UDP/TLS/RTP/SAVPF 96
c=IN IP4 0.0.0.0
a=mid:0
a=recvonly
a=rtpmap:96 VP8/90000
a=rtcp-mux
a=setup:actpass
a=ice-ufrag:abcd
a=ice-pwd:eeeeeeeeeeeeeeeeeeeeee
a=fingerprint:sha-256 AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB:AB
a=candidate:1 1 udp 1 192.0.2.7 4000 typ host
a=candidate:2 1 udp 1 somewhere.local 4000 typ host
a=candidate:3 1 tcp 1 192.0.2.7 9 typ host
a=end-of-candidates
"""


def test_what_is_tried_of_an_offer():
    assert "192.0.2.7" not in read_offer(OFFER, "localhost")
    tried = [line for line in read_offer(OFFER, "0.0.0.0").splitlines() if line.startswith("a=candidate")]
    assert tried == ["a=candidate:1 1 udp 1 192.0.2.7 4000 typ host"]
    many = "".join(f"a=candidate:{n} 1 udp 1 192.0.2.8 {4000 + n} typ host\r\n" for n in range(100))
    assert read_offer(OFFER + many, "0.0.0.0").count("a=candidate") == 16


@pytest.mark.parametrize(
    ("start", "code", "message"),
    [
        ({}, "invalid", "start: offer is missing, which video 'webrtc' needs"),
        ({"offer": ""}, "invalid", "start: offer has 0 media; it must be SDP that receives one video"),
        ({"offer": "m=video x"}, "invalid", "start: offer is not SDP"),
        ({"offer": OFFER + "m=audio 9 RTP 0\r\n"}, "invalid", "start: offer has 2 media (video, audio)"),
        ({"offer": OFFER.replace("m=video", "m=audio")}, "invalid", "start: offer has 1 media (audio)"),
        ({"offer": OFFER.replace("a=ice-pwd", "a=x")}, "invalid", "start: offer lacks a=ice-ufrag, a=ice-pwd or a=fi"),
        ({"offer": OFFER.replace("VP8", "XYZ")}, "no_peer", "start: offer cannot be answered"),
        ({"offer": OFFER.replace("a=recvonly", "a=sendonly")}, "no_peer", "start: offer receives no video"),
        ({"offer": "x" * 40000}, "invalid", "start: offer has 40000 characters; at most 32768 are taken"),
        ({"offer": OFFER, "video": "jpeg"}, "invalid", "start: offer has no effect with video 'jpeg'; leave it out"),
        ({"video": "webm"}, "invalid", "start: video 'webm' is unknown; there is jpeg, mp4, webrtc"),
        ({"offer": OFFER, "height": 720}, "other_program", "would need another compiled program"),
    ],
)
def test_bad_offers(engine, start, code, message):
    """Each is said, and the connection goes on."""

    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            await ws.send_json({"type": "start", "prompt": "a", "video": "webrtc", "id": "a"} | start)
            error = (await until(ws, "error"))[0][-1]
            assert (error["code"], error["id"]) == (code, "a")
            assert message in error["message"]
            assert len(error["message"]) < 300
            if code == "no_peer":
                assert (await until(ws, "ended"))[0][-1]["reason"] == "disconnected"
            await ws.send_json({"type": "start", "prompt": "a", "frames": 3, "pace": False})
            assert (await until(ws, "ended"))[0][-1]["reason"] == "finished"

    against(engine, talk)


def test_nobody_at_the_other_end(engine, monkeypatch):
    """What does not come about within some seconds is over, and the client is told what to take."""
    monkeypatch.setattr(peers, "CONNECTING", 0.2)

    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            await ws.send_json({"type": "start", "prompt": "a", "video": "webrtc", "offer": OFFER})
            events, _ = await until(ws, "ended")
            assert [event["message"] for event in events if event["type"] == "error"] == [
                "start: no connection over UDP came about within 0 s; take video mp4 or jpeg"
            ]
            await ws.send_json({"type": "start", "prompt": "a", "video": "webrtc", "offer": OFFER})
            await ws.send_json({"type": "stop"})
            await until(ws, "ended")
            while server.peers:
                await asyncio.sleep(0.01)
            await ws.send_json({"type": "ping"})
            events, _ = await until(ws, "pong")
            assert {event["type"] for event in events} <= {"answer", "pong"}  # nothing is missed

    against(engine, talk)


class TestWithout:
    """Where it cannot be had."""

    @pytest.mark.parametrize("there", [True, False])
    def test_it_is_not_offered(self, engine, there, monkeypatch):
        async def run():
            server = Server(engine, address=Address(port=0))
            monkeypatch.setattr("monarchrt.models.serve.server.installed", lambda: there)
            async with TestClient(TestServer(server.app())) as client, client.ws_connect("/session") as ws:
                assert "webrtc" not in (await ws.receive_json())["formats"]
                await ws.send_json({"type": "start", "prompt": "a", "video": "webrtc", "offer": OFFER})
                return (await ws.receive_json())["message"]

        how = (
            "is not served here"
            if there
            else "cannot be sent here: aiortc is not installed (pip install 'monarchrt[web"
        )
        assert asyncio.run(run()).startswith(f"start: video 'webrtc' {how}")

    def test_not_installed(self, engine, monkeypatch):
        monkeypatch.setattr("monarchrt.models.serve.server.installed", lambda: False)
        with pytest.raises(UserError, match=r"WebRTC was asked for, but aiortc is not installed \(pip install 'monar"):
            Server(engine, address=Address(port=0), ice=Ice())


def test_ice():
    ice = Ice(servers=("stun:a.example:3478", "turn:b.example"), username="u", credential="c")
    assert ice.described() == [
        {"urls": "stun:a.example:3478"},
        {"urls": "turn:b.example", "username": "u", "credential": "c"},
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(servers=("a.example",)), "ice_servers has 'a.example'; give stun:HOST:PORT, turn:HOST:PORT or"),
        (dict(servers=("stun:a:99999",)), "ice_servers has 'stun:a:99999'; give stun:HOST:PORT"),
        (dict(servers=("http://a",)), "ice_servers has 'http://a'; give stun"),
        (dict(servers=("stuns:a",)), "ice_servers has 'stuns:a'; give stun"),
        (dict(servers=("stun:a?transport=udp",)), "stun takes no transport"),
        (
            dict(servers=("stun:a", "stun:b")),
            "ice_servers are stun:a, stun:b; give one of stun and one of turn at most",
        ),
        (dict(servers=("turn:a",)), "give --ice-username and --ice-credential too"),
        (dict(servers=("turns:a?transport=udp",), username="u", credential="c"), "turns goes over tcp"),
        (dict(username="u"), "ice_username has no effect without a TURN server"),
        (dict(credential="u"), "ice_credential has no effect without a TURN server"),
    ],
)
def test_bad_ice(values, message):
    with pytest.raises(UserError) as caught:
        Ice(**values)
    assert message in str(caught.value)


def test_frames_that_wait():
    """The newest few; the client is told of the others, and has its events apart."""
    events, woken = Outbox(frames=8), []
    box = MediaOutbox(events, frames=2, notify=lambda: woken.append(1))
    for index in range(4):
        box.frame(index, 0, bytes([index]))
    box.event("block", block=0)
    assert [box.next_frame(), box.next_frame(), box.next_frame()] == [
        bytes([0, 0, 0, 2, 0, 0, 0, 0, 2]), bytes([0, 0, 0, 3, 0, 0, 0, 0, 3]), None
    ]  # fmt: skip
    assert [events.take(), events.take()] == [
        {"type": "block", "block": 0}, {"type": "dropped", "frames": 2, "total": 2}
    ]  # fmt: skip
    box.frame(4, 1, b"")
    box.event("ended", reason="finished")
    assert (len(box), box.over) == (1, True)
    box.event("ended", reason="stopped")
    assert len(box) == 0


def test_planes():
    """Brightness of BT.601 in [16, 235], and colours at half the resolution."""
    frame = np.zeros((1, 4, 6, 3), np.uint8)
    frame[:, :, 2:] = 255
    planes = np.frombuffer(yuv420(frame), np.uint8)
    assert planes.size == 4 * 6 * 3 // 2
    np.testing.assert_allclose(planes[:24].reshape(4, 6)[:, [0, 4]], [[16, 235]] * 4, atol=1)
    np.testing.assert_allclose(planes[24:], 128, atol=1)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser(engine, monkeypatch):
    """Start, see frames, change the prompt, stop, and start again as JPEG."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with running(engine, ice=Ice()) as server, playwright.sync_playwright() as driver:
        browser, tab = browser_page(driver)
        tab.goto(server.url)
        tab.wait_for_function("!document.getElementById('go').disabled")
        tab.fill("#prompt", "a cat")
        tab.select_option("#format", "webrtc")
        tab.click("#go")
        tab.wait_for_function("Number(document.body.dataset.shown) >= 20", timeout=20000)
        assert tab.is_visible("#film")
        assert tab.evaluate("document.getElementById('film').videoWidth") == 16
        tab.fill("#prompt", "a dog")
        tab.click("#go")
        tab.wait_for_function("Number(document.body.dataset.block) >= Number(document.body.dataset.prompts)")
        tab.click("#pause")
        tab.wait_for_function("document.body.dataset.playing === 'no'")
        tab.click("#pause")
        tab.click("#stop")
        tab.wait_for_function("document.body.dataset.ended === 'stopped'")
        tab.select_option("#format", "jpeg")
        tab.click("#go")
        tab.wait_for_selector("#screen", state="visible")
        tab.wait_for_function("Number(document.body.dataset.shown) >= 3")
        browser.close()
    assert not server.peers
