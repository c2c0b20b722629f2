"""Sessions over the network, with aiohttp's client."""

import asyncio
import contextlib
import dataclasses
import errno
import gc
import importlib.util
import io
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.media.video import read_clip, write_mp4
from monarchrt.models.serve import Address, Limits, Server, uploads
from monarchrt.models.serve.uploads import Uploads
from monarchrt.models.web.encodings import ENCODINGS
from monarchrt.models.web.server import MOST_CLIENTS
from tests.untyped import there

EXAMPLE = Path(__file__).parents[3] / "examples" / "stream_client.py"
TOKEN = "0123456789abcdef"


def against(engine, talk, *, limits=None, **address):
    """Runs a conversation with a server: `talk(client, server)`."""

    async def run():
        server = Server(engine, address=Address(port=0, **address), limits=limits)
        async with TestClient(TestServer(server.app())) as client:
            return await asyncio.wait_for(talk(client, server), 30)

    return asyncio.run(run())


async def until(ws, type):
    """Events up to one of a type, and the frames before it."""
    events, frames = [], []
    async for message in ws:
        if message.type is aiohttp.WSMsgType.BINARY:
            frames.append(message.data)
            continue
        events.append(json.loads(message.data))
        if events[-1]["type"] == type:
            return events, frames
    raise AssertionError(f"closed with {ws.close_code} before {type}: {events}")


def test_a_whole_session(engine):
    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            hello = await ws.receive_json()
            assert (hello["type"], hello["height"], hello["width"], hello["block_frames"]) == ("hello", 8, 16, 3)
            await ws.send_json({"type": "start", "prompt": "a cat", "paused": True, "id": "a"})
            events, _ = await until(ws, "started")
            assert events[0]["id"] == "a"
            await ws.send_json({"type": "step", "blocks": 2})
            await until(ws, "stepping")
            await ws.send_json({"type": "prompt", "prompt": "a dog", "id": "b"})
            events, frames = await until(ws, "prompt")
            assert events[-1]["block"] <= 2
            await ws.send_json({"type": "step"})
            while len(frames) < 9:
                message = await ws.receive()
                frames += [message.data] if message.type is aiohttp.WSMsgType.BINARY else []
            assert [int.from_bytes(frame[:4], "big") for frame in frames] == list(range(9))
            assert Image.open(io.BytesIO(frames[0][8:])).size == (16, 8)
            await ws.send_json({"type": "save"})
            saved = (await until(ws, "saved"))[0][-1]
            video = await client.get(saved["url"])
            assert (video.status, len(await video.read())) == (200, saved["bytes"])
            assert (await client.get("/video/other.mp4")).status == 404
            await ws.send_json({"type": "stop"})
            assert (await until(ws, "ended"))[0][-1]["reason"] == "stopped"
            await ws.send_json({"type": "start", "prompt": "again", "frames": 3, "pace": False})  # on one connection
            events, frames = await until(ws, "ended")
            assert (events[-1]["reason"], len(frames)) == ("finished", 3)
            await ws.send_json({"type": "save"})
            assert (await until(ws, "saved"))[0][-1]["frames"] == 3
        health = await (await client.get("/healthz")).json()
        assert health == {"ok": True, "active": 0, "waiting": 0}
        text = await (await client.get("/metrics")).text()
        assert "monarchrt_block_seconds_count 4.0" in text
        assert "process_resident_memory_bytes" in text or not Path("/proc/self/stat").exists()
        assert 'monarchrt_sessions_ended_total{reason="finished"} 1.0' in text
        page = await client.get("/")
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert "<canvas" in await page.text()

    against(engine, talk)


def test_bad_messages_leave_the_session_alone(engine):
    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            for text, said in (
                ("{", "not JSON"),
                ('{"type": "pause"}', "there is no session; begin with start"),
                ('{"type": "start", "prompt": "a", "sise": 3}', 'field "sise" is unknown'),
                (json.dumps({"type": "start", "prompt": "x" * 10000}), "prompt has 10000 characters"),
                ('{"type": "start", "prompt": "a", "height": 720}', "would need another compiled program"),
            ):
                await ws.send_str(text)
                error = await ws.receive_json()
                assert error["type"] == "error"
                assert said in error["message"]
            await ws.send_bytes(b"\0")
            assert "not bytes" in (await ws.receive_json())["message"]
            await ws.send_json({"type": "start", "prompt": "a", "frames": 3, "pace": False})
            assert (await until(ws, "ended"))[0][-1]["reason"] == "finished"
            await ws.send_str("x" * 70000)  # ends the connection, and nothing else
            assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            assert ws.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        async with client.ws_connect("/session") as ws:
            assert (await ws.receive_json())["type"] == "hello"

    against(engine, talk)


def test_a_connection_without_a_session(engine):
    """A ping is answered, as a page that waits for its user sends them; one that says nothing makes room."""

    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            begin = time.monotonic()
            while time.monotonic() - begin < 1.5:
                await ws.send_json({"type": "ping", "id": "p"})
                assert await ws.receive_json() == {"type": "pong", "id": "p"}
                await asyncio.sleep(0.1)
            assert await ws.receive_json() == {"type": "error", "code": "idle", "message": "nothing was heard for 1 s"}
            assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            await ws.send_json({"type": "start", "prompt": "a", "paused": True})
            events, _ = await until(ws, "ended")  # of the session, and then of the connection
            assert events[-1]["reason"] == "idle"
            assert (await ws.receive_json())["code"] == "idle"

    against(engine, talk, limits=Limits(idle=1.0))


def test_who_may_come(engine):
    async def talk(client, server):
        for path in ("/session", "/metrics", "/video/a.mp4", "/nothing"):
            for more in ({}, {"headers": {"Authorization": "Bearer wrong"}}, {"params": {"token": "ü"}}):
                assert (await client.get(path, **more)).status == 401, path
        assert (await client.get("/healthz")).status == 200
        assert (await client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})).status == 200
        assert (await client.get("/metrics", params={"token": TOKEN})).status == 200
        async with client.ws_connect(f"/session?token={TOKEN}") as ws:
            assert (await ws.receive_json())["type"] == "hello"
        for headers in ({"Host": "rebound.example"}, {"Origin": "https://a.example"}):
            assert (await client.get("/", headers=headers)).status == 403

    against(engine, talk, token=TOKEN)


def test_many_come_and_go(engine):
    """Their sessions end, in whatever state they were."""

    async def talk(client, server):
        for number in range(9):
            async with client.ws_connect("/session") as ws:
                if number % 3:
                    await ws.receive_json()
                    await ws.send_json({"type": "start", "prompt": "a cat", "pace": bool(number % 2)})
                    if number % 3 == 2:
                        await until(ws, "block")
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            await ws.send_json({"type": "start", "prompt": "a cat", "frames": 3})
            assert (await until(ws, "ended"))[0][-1]["reason"] == "finished"
        while server.sessions.active or server.sessions.waiting or server._sockets:
            await asyncio.sleep(0.01)  # or the time is up

    against(engine, talk)


@pytest.mark.slow
@pytest.mark.parametrize("video", ["jpeg", "mp4"])
def test_a_client_that_stops_reading(engine, video, monkeypatch):
    """Frames are dropped, generation goes on, and in the end it is let go."""
    monkeypatch.setattr("monarchrt.models.web.server.PATIENCE", 0.5)
    large = dataclasses.replace(ENCODINGS[video], encode=lambda frames, index, fps: bytes(2**20))
    monkeypatch.setitem(ENCODINGS, video, large)

    async def talk(client, server):
        ws = await client.ws_connect("/session")
        transport = ws._conn.transport
        transport.pause_reading()
        await ws.send_json({"type": "start", "prompt": "a cat", "pace": False, "video": video})
        while not server._sockets or server.metrics.registry.get_sample_value("monarchrt_frames_total") < 60:
            await asyncio.sleep(0.01)
        while server._sockets:
            assert server.sessions.frames_waiting <= 8
            await asyncio.sleep(0.01)
        transport.abort()  # or closing the client would wait for 10 s for an answer that it does not read
        assert server.metrics.registry.get_sample_value("monarchrt_frames_dropped_total") > 0
        async with client.ws_connect("/session", max_msg_size=0) as other:
            await other.receive_json()
            await other.send_json({"type": "start", "prompt": "a cat", "frames": 3})
            assert (await until(other, "ended"))[0][-1]["reason"] == "finished"

    against(engine, talk, limits=Limits(frames=8))


@pytest.mark.parametrize("kind", ["text", "control"])
def test_who_says_very_much_is_heard_slowly(engine, kind, monkeypatch):
    """Or it would take the time of the others, who share a thread with it. Nothing of so little is lost."""
    monkeypatch.setattr("monarchrt.models.web.server.MESSAGES", 2)
    monkeypatch.setattr("monarchrt.models.web.server.AT_ONCE", 20)

    async def talk(client, server):
        async with client.ws_connect("/session") as ws:
            await ws.receive_json()
            begin = time.monotonic()
            for number in range(20):
                await ws.send_json({"type": "ping", "id": str(number)})
                assert (await ws.receive_json())["id"] == str(number)
            few = time.monotonic() - begin
            for _ in range(3):
                await (ws.ping() if kind == "control" else ws.send_json({"type": "ping"}))
            await ws.send_json({"type": "ping", "id": "last"})
            answers = [await ws.receive_json()]
            while answers[-1].get("id") != "last":
                answers.append(await ws.receive_json())
            return few, time.monotonic() - begin, len(answers)

    few, seconds, answers = against(engine, talk)
    assert few < 5  # 10 s without those at once
    assert seconds > 1.3  # at least 1.5 s, however slow the machine is
    assert answers == (1 if kind == "control" else 4)


def test_frames_are_not_compressed_again(engine):
    """It takes milliseconds for a JPEG, and makes it no smaller."""

    async def talk(client, server):
        async with client.ws_connect("/session", compress=15) as ws:
            return ws.compress

    assert against(engine, talk) == 0


def test_it_ends_cleanly(engine):
    """Sessions are told; the thread is over, and saved videos are gone."""

    async def run():
        server, stop, up = Server(engine, address=Address(port=0)), asyncio.Event(), asyncio.Event()
        server.listening = up.set
        task = asyncio.create_task(server.serve(stop))
        await asyncio.wait_for(up.wait(), 30)
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}session") as ws:
            await ws.receive_json()
            await ws.send_json({"type": "start", "prompt": "a cat"})
            await until(ws, "block")
            stop.set()
            events, _ = await until(ws, "ended")
            assert events[-1]["reason"] == "server stopped"
            assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        await asyncio.wait_for(task, 30)
        assert not server._thread.is_alive()

    asyncio.run(run())


def test_the_port_is_taken(engine):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = Server(engine, address=Address(port=port))
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be listened on"):
            asyncio.run(server.serve(asyncio.Event()))
    assert not server._thread.is_alive()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(host="0.0.0.0"), "host 0.0.0.0 can be reached from other machines; give a --token"),
        (dict(host=""), "can be reached from other machines"),
        (dict(token="short"), "token has 5 characters; give at least 16"),
        (dict(key=None, certificate="nothing.pem"), "certificate nothing.pem is not a file"),
    ],
)
def test_bad_addresses(values, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "certificate" in values:
        values["certificate"] = Path(values["certificate"])
    with pytest.raises(UserError, match=message):
        Address(**values)
    assert Address(host="0.0.0.0", token=TOKEN).port
    assert Limits().sessions + Limits().waiting < MOST_CLIENTS


def test_a_file_that_is_no_certificate(tmp_path):
    path = tmp_path / "a.pem"
    path.write_text("nothing")
    with pytest.raises(UserError, match=r"a\.pem cannot be used \(.*\); give a PEM file"):
        Address(certificate=path).context()


@contextlib.contextmanager
def running(engine, **more):
    """A server in a thread."""
    own = {name: more.pop(name, None) for name in ("limits", "ice")}
    server, up = Server(engine, address=Address(port=0, **more), **own), threading.Event()
    server.listening = up.set
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(stop)))
    thread.start()
    assert up.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def test_the_example(engine, tmp_path):
    """The client of the documentation, which is short: what it keeps can be played."""
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    spec = there(importlib.util.spec_from_file_location("stream_client", EXAMPLE))
    client = importlib.util.module_from_spec(spec)
    there(spec.loader).exec_module(client)
    path = tmp_path / "cat.mp4"

    async def talk(http, server):
        url = f"{http.make_url('/session')}?token={TOKEN}"
        with path.open("wb") as file:
            lost = asyncio.create_task(client.watch(url, io.BytesIO(), ["a cat"], paused=True))
            while not server._sockets:
                await asyncio.sleep(0.01)
            there(next(iter(server._sockets.values()))).abort()  # as if the server was killed
            assert await lost == {"type": "error", "message": "the connection is gone (1006)"}
            return await client.watch(url, file, ["a cat", "a dog"], blocks=2, seed=3, pace=False)

    ended = against(engine, talk, token=TOKEN)
    assert (ended["type"], ended["reason"]) == ("ended", "stopped")
    assert len(read_clip(path, height=8, width=16)) >= 3 * 4


def test_beginning_with_what_is_sent(engine, tmp_path):
    """A clip by its name, once; what is wrong with others is said, and nothing of them is kept."""
    clip = np.zeros((7, 8, 16, 3), np.uint8)
    clip[:, :, :5] = 200

    async def talk(client, server):
        async def send(body, status, **params):
            answer = await client.post("/upload", data=body, params=params)
            assert answer.status == status, await answer.text()
            return await answer.text()

        sent = json.loads(await send(write_mp4(tmp_path / "clip.mp4", clip, fps=30.0).read_bytes(), 200))
        assert sent["frames"] == 6
        for body, status, said in (
            (b"", 422, "the upload is empty; send the file as the body of the request\n"),
            (bytes(40_000), 413, "the upload has 40000 bytes or more; at most 30000 are taken\n"),
            (unmeasured(40_000), 413, "at most 30000 are taken\n"),
            (b"nothing", 422, "video upload is cut off, damaged or not a video"),
        ):
            assert said in await send(body, status)
        assert "frames is 'x'; it must be a number" in await send(b"nothing", 422, frames="x")
        assert (len(server.uploads), (await client.get("/upload")).status) == (1, 405)
        async with client.ws_connect("/session") as ws:
            hello = await ws.receive_json()
            assert (hello["begin_frames"], hello["limits"]["upload"]) == ([6], 30_000)
            begin = {"type": "start", "prompt": "a cat", "frames": 9, "pace": False, "begin": sent["upload"]}
            await ws.send_json(begin)
            events, frames = await until(ws, "ended")
            assert (events[-1]["reason"], len(frames)) == ("finished", 9)
            first = np.asarray(Image.open(io.BytesIO(frames[0][8:]))).astype(int)
            assert (np.abs(first - clip[0])[:, :3].mean(), np.abs(first - clip[0])[:, 8:].mean()) < (30, 30)
            await ws.send_json(begin)
            error = (await until(ws, "error"))[0][-1]
            assert (error["code"], error["message"][:47]) == (
                "no_upload",
                "start: begin names no upload that is there; sen",
            )

    against(engine, talk, limits=Limits(upload=30_000))


async def unmeasured(size):
    """A body without a length."""
    for _ in range(size // 1000):
        yield bytes(1000)


class TestUploads:
    """What waits for its session is bounded, in number and time."""

    def test_the_oldest_goes(self, engine, clock):
        uploads = Uploads(engine, limits=Limits(uploads=2), clock=clock)
        for name in "abc":
            uploads._kept[name] = clock.now, np.zeros((1, 8, 16, 3), np.uint8)
        assert uploads.get("a") is None
        assert uploads.get("c") is not None
        clock.now = 301.0
        assert uploads.get("c") is None
        assert len(uploads) == 0

    def test_a_full_disk(self, engine, monkeypatch):
        async def full(request, path, most):
            raise OSError(errno.ENOSPC, "No space left on device")

        async def talk(client, server):
            answer = await client.post("/upload", data=b"x")
            said = "the upload cannot be stored: the disk is full on the server\n"
            assert (answer.status, await answer.text()) == (507, said)

        monkeypatch.setattr(uploads, "_save", full)
        against(engine, talk)

    def test_one_that_is_broken_off(self, engine, caplog):
        """It is nobody's fault here: nothing is logged, and nothing is left of it."""
        head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        with running(engine) as server:
            with socket.create_connection((server.address.host, server.address.port)) as other:
                other.sendall(head + bytes(100))
                while not server.uploads._arriving:
                    time.sleep(0.01)
            while server.uploads._arriving:
                time.sleep(0.01)
            time.sleep(0.1)
        assert [record.getMessage() for record in caplog.records] == []

    def test_nowhere_to_begin(self, engine, monkeypatch):
        async def talk(client, server):
            answer = await client.post("/upload", data=b"x")
            assert (answer.status, await answer.text()) == (
                404, "this server starts no videos from images or clips: its --begin is 0\n"
            )  # fmt: skip

        monkeypatch.setattr(engine, "begins", ())
        against(engine, talk)


def test_over_tls(engine, tmp_path):
    """With a certificate of its own, which the client knows, and another that it does not."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2", "-nodes"]
    command = ["openssl", "req", "-x509", *kind, *names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)

    async def talk(url):
        known = ssl.create_default_context(cafile=certificate)
        async with aiohttp.ClientSession() as http:
            async with http.ws_connect(f"{url}session?token={TOKEN}", ssl=known) as ws:
                assert (await ws.receive_json())["type"] == "hello"
                await ws.send_json({"type": "start", "prompt": "a cat", "frames": 3, "video": "mp4"})
                events, pieces = await until(ws, "ended")
                assert (events[-1]["reason"], len(pieces)) == ("finished", 1)
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await http.get(url)
            with pytest.raises(aiohttp.ClientError):  # nothing is served without
                await http.get(url.replace("https", "http"))

    with running(engine, certificate=certificate, key=key, token=TOKEN) as server:
        assert server.url.startswith("https://127.0.0.1:")
        asyncio.run(asyncio.wait_for(talk(server.url), 30))


@pytest.mark.slow
def test_a_thousand_come_and_go(engine):
    """Files and memory are as they were; some start, some leave without a word, some break off an upload."""

    async def come(url, number):
        async with aiohttp.ClientSession() as http:
            if number % 5 == 4:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                    await asyncio.wait_for(http.post(f"{url}upload", data=unmeasured(5000)), 5)
                return
            async with http.ws_connect(f"{url}session") as ws:
                await ws.receive_json()
                if number % 5:
                    video = "mp4" if number % 2 else "jpeg"
                    await ws.send_json({"type": "start", "prompt": "a cat", "pace": False, "video": video})
                    if number % 5 > 1:
                        await until(ws, "block")
                if number % 5 == 3:
                    there(there(ws._response.connection).transport).abort()

    async def many(url, count):
        limit = asyncio.Semaphore(8)

        async def one(number):
            async with limit:
                await come(url, number)

        await asyncio.gather(*(one(number) for number in range(count)))

    def state():
        gc.collect()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        return len(os.listdir("/proc/self/fd")), threading.active_count(), memory

    with running(engine, limits=Limits(waiting=64)) as server:
        asyncio.run(many(server.url, 200))
        before = state()
        for _ in range(4):
            asyncio.run(many(server.url, 200))
        end = time.monotonic() + 30
        while (server.sessions.active or server.sessions.waiting or server._sockets) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1)
        after = state()
        print(before, after)
        assert after[0] <= before[0] + 2
        assert after[1] <= before[1] + 1
        assert after[2] - before[2] < 30 * 2**20
        assert len(server.uploads) == 0
