"""Sessions over the network: aiohttp's client, and a browser where there is one."""

import asyncio
import contextlib
import importlib.util
import io
import json
import shutil
import socket
import threading
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.serve import Address, Limits, Server
from monarchrt.models.serve.server import MOST_CONNECTIONS
from tests.untyped import there

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
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
        health = await (await client.get("/healthz")).json()
        assert health == {"ok": True, "active": 0, "waiting": 0}
        text = await (await client.get("/metrics")).text()
        assert "monarchrt_block_seconds_count 4.0" in text
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
                ('{"type": "start", "prompt": "a", "height": 720}', "would need another program"),
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
def test_a_client_that_stops_reading(engine, monkeypatch):
    """Frames are dropped, generation goes on, and in the end it is let go."""
    monkeypatch.setattr("monarchrt.models.serve.server.PATIENCE", 0.5)
    monkeypatch.setattr("monarchrt.models.serve.session.jpeg", lambda frame: bytes(2**20))

    async def talk(client, server):
        ws = await client.ws_connect("/session")
        ws._conn.transport.pause_reading()
        await ws.send_json({"type": "start", "prompt": "a cat", "pace": False})
        while not server._sockets or server.metrics.registry.get_sample_value("monarchrt_frames_total") < 60:
            await asyncio.sleep(0.01)
        while server._sockets:
            assert server.sessions.frames_waiting <= 8
            await asyncio.sleep(0.01)
        assert server.metrics.registry.get_sample_value("monarchrt_frames_dropped_total") > 0
        async with client.ws_connect("/session", max_msg_size=0) as other:
            await other.receive_json()
            await other.send_json({"type": "start", "prompt": "a cat", "frames": 3})
            assert (await until(other, "ended"))[0][-1]["reason"] == "finished"

    against(engine, talk, limits=Limits(frames=8))


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
    assert Limits().sessions + Limits().waiting < MOST_CONNECTIONS


def test_a_file_that_is_no_certificate(tmp_path):
    path = tmp_path / "a.pem"
    path.write_text("nothing")
    with pytest.raises(UserError, match=r"a\.pem cannot be used \(.*\); give a PEM file"):
        Address(certificate=path).context()


@contextlib.contextmanager
def running(engine, **more):
    """A server in a thread."""
    server, up = Server(engine, address=Address(port=0), **more), threading.Event()
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


def test_the_example(engine, tmp_path, capsys):
    """The client of the documentation, which is short."""
    assert len(EXAMPLE.read_text().splitlines()) < 60
    spec = there(importlib.util.spec_from_file_location("stream_client", EXAMPLE))
    client = importlib.util.module_from_spec(spec)
    there(spec.loader).exec_module(client)

    async def talk(http, server):
        url = str(http.make_url("/session"))
        return await client.watch(url, ["a cat", "a dog"], tmp_path, seconds=0.2, token=TOKEN)

    count = against(engine, talk, token=TOKEN)
    assert count >= 12
    assert {"00000.jpg", "00011.jpg"} <= {path.name for path in tmp_path.iterdir()}
    said = capsys.readouterr().out
    assert "'prompt': 'a dog', 'block': " in said
    assert "'reason': 'stopped'" in said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_two_browsers(engine):
    """Start, change the prompt, see the picture change, pause, stop, come again."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with running(engine) as server, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, other = browser.new_page(viewport={"width": 360, "height": 640}), browser.new_page()
        for each in (tab, other):
            each.goto(server.url)
            each.wait_for_function("!document.getElementById('go').disabled")
            each.fill("#prompt", "a cat")
            each.click("#go")
            each.wait_for_function("Number(document.body.dataset.shown) >= 6")
        look = "Array.from(document.querySelector('canvas').getContext('2d').getImageData(0,0,16,8).data)"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        before = np.array(tab.evaluate(look))
        tab.fill("#prompt", "a dog")
        tab.press("#prompt", "Control+Enter")
        tab.wait_for_function("document.body.dataset.prompts !== undefined")
        tab.wait_for_function("Number(document.body.dataset.block) >= Number(document.body.dataset.prompts)")
        assert np.abs(np.array(tab.evaluate(look)) - before).max() > 20
        assert tab.locator("#history li").count() == 2
        assert "a dog" in tab.inner_text("#history li:last-child")
        tab.click("#pause")
        tab.wait_for_function("document.body.dataset.playing === 'no'")
        tab.click("#pause")
        tab.wait_for_function("document.body.dataset.playing === 'yes'")
        tab.click("#stop")
        tab.wait_for_function("document.body.dataset.ended === 'stopped'")
        assert other.evaluate("document.body.dataset.on") == "yes"
        tab.reload()
        tab.wait_for_function("!document.getElementById('go').disabled")
        assert "frames/s seen" in other.inner_text("#numbers")
        browser.close()
