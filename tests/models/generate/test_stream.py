"""The live page: over a websocket, and in a real browser where there is one."""

import asyncio
import contextlib
import io
import shutil
import socket
import threading
import time

import aiohttp
import numpy as np
import pytest
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.generate.stream import LivePage, Video, check_port, own_host

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40]], np.uint8)


def frames(count=4, height=32, width=48):
    """One plain colour each."""
    return np.broadcast_to(COLOURS[np.arange(count) % 4, None, None], (count, height, width, 3)).copy()


def watch(url, *, leave_after=None):
    """What a browser gets: (texts, mean colours); frames are counted from the first that is kept."""

    async def run():
        texts, colours = [], []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}session") as ws:
            async for message in ws:
                if message.type is aiohttp.WSMsgType.TEXT:
                    texts.append(message.json())
                else:
                    picture = np.asarray(Image.open(io.BytesIO(message.data[8:])))
                    colours.append(picture.reshape(-1, 3).mean(0))
                if leave_after is not None and len(colours) >= leave_after:
                    break
        return texts, np.array(colours)

    return asyncio.run(run())


def test_a_browser_gets_everything_in_order_also_if_it_comes_late():
    with LivePage(port=0, fps=8.0, title="a cat", total=4) as page:
        page.show(frames()[:2])
        early = []
        thread = threading.Thread(target=lambda: early.append(watch(page.url)))
        thread.start()
        time.sleep(0.3)
        page.show(frames()[2:])
        page.end("finished")
        thread.join(timeout=20)
        late = watch(page.url)
        assert page.wait(10.0)
    for texts, colours in [*early, late]:
        hello, ended = texts
        assert (hello["type"], hello["fps"], hello["title"], hello["frames"]) == ("hello", 8.0, "a cat", 4)
        assert (hello["messages"], hello["formats"]) == ([], ["jpeg"])
        assert ended == {"type": "ended", "reason": "finished"}
        assert np.abs(colours - COLOURS).max() < 12
    assert len(early) == 1


def test_frames_say_which_they_are():
    async def headers(url):
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}session") as ws:
            data = [message.data async for message in ws if message.type is aiohttp.WSMsgType.BINARY]
            return [(int.from_bytes(each[:4], "big"), int.from_bytes(each[4:8], "big")) for each in data]

    with LivePage(port=0) as page:
        page.show(frames(2))
        page.show(frames(3))
        page.end()
        assert asyncio.run(headers(page.url)) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]


def test_a_closed_browser_disturbs_nobody():
    with LivePage(port=0) as page:
        page.show(frames(2))
        watch(page.url, leave_after=1)
        page.show(frames(40))
        page.end()
        assert len(watch(page.url)[1]) == 42
        assert page.wait(20.0)


def test_old_frames_are_dropped(monkeypatch):
    monkeypatch.setattr("monarchrt.models.generate.stream.KEPT", 3)
    with LivePage(port=0) as page:
        page.show(frames(7))
        page.end()
        time.sleep(0.2)
        assert len(watch(page.url)[1]) == 3


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        reason = r"\(Address already in use\); give another --port, or 0 for a free one$"
        taken = f"port {port} of 127.0.0.1 cannot be listened on {reason}"
        with pytest.raises(UserError, match=taken), LivePage(port=port):
            pass
        with pytest.raises(UserError, match=taken):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(("host", "reason"), [("no.such.host.invalid", "[^()]*"), ("192.0.2.1", "Cannot assign .*")])
def test_a_host_that_is_not_this_machine(host, reason):
    refused = (
        rf"^host {host} cannot be listened on \({reason}\); give an address of this machine, such as 127\.0\.0\.1$"
    )
    with pytest.raises(UserError, match=refused):
        check_port(host, 8765)
    with pytest.raises(UserError, match=refused), LivePage(host=host, port=0):
        pass


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_address_of_ipv6():
    check_port("::1", 0)
    with LivePage(host="::1", port=0) as page:
        page.show(frames(2))
        page.end()
        assert page.url.startswith("http://[::1]:")
        assert len(watch(page.url)[1]) == 2


def test_waiting_ends_without_browsers():
    with LivePage(port=0) as page:
        page.end()
        assert not page.wait(0.2)


class TestStrangers:
    """Who may not watch, and who may not disturb."""

    def get(self, page, path="", **headers):
        """Status and text."""
        port = page.url.rstrip("/").rpartition(":")[2]
        with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
            lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            client.sendall("\r\n".join([f"GET /{path} HTTP/1.1", *lines, "Connection: close", "", ""]).encode())
            answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]

    def websocket(self, page, **headers):
        upgrade = {"Upgrade": "websocket", "Sec_WebSocket_Version": 13, "Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        port = page.url.rstrip("/").rpartition(":")[2]
        client = socket.create_connection(("127.0.0.1", int(port)), timeout=10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        headers = {"Host": f"127.0.0.1:{port}"} | headers | upgrade | {"Connection": "Upgrade"}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        client.sendall("\r\n".join(["GET /session HTTP/1.1", *lines, "", ""]).encode())
        return client

    def status(self, client):
        return int(client.recv(64).split()[1])

    @pytest.mark.parametrize("path", ["", "session", "nothing"])
    @pytest.mark.parametrize(
        "host", ["rebound.example", "127.0.0.1.example:80", "192.0.2.7", "localhost.example", "", "["]
    )
    def test_names_that_somebody_points_at_this_machine(self, path, host):
        with LivePage(port=0) as page:
            status, text = self.get(page, path, Host=host)
        assert (status, text) in [(403, f"this page is not served as {host}; open {page.url}\n"), (400, text)]

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "[::1]:80", "LOCALHOST"])
    def test_names_of_this_machine(self, host):
        with LivePage(port=0) as page:
            assert self.get(page, Host=host)[0] == 200

    @pytest.mark.parametrize(
        "origin", ["https://a.example", "null", "http://127.0.0.1:1", "http://localhost", "file://", "http://127.0.0.1"]
    )
    def test_other_sites(self, origin):
        with LivePage(port=0) as page:
            page.show(frames(2))
            with self.websocket(page, Origin=origin) as client:
                assert self.status(client) == 403
            with self.websocket(page, Origin=page.url.rstrip("/")) as client:
                assert self.status(client) == 101

    @pytest.mark.parametrize(
        "request_", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n", b"GET /" + b"a" * 10**5]
    )
    def test_what_is_no_request_fills_no_terminal(self, request_, caplog):
        with LivePage(port=0) as page:
            port = page.url.rstrip("/").rpartition(":")[2]
            with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
                client.sendall(request_)
                assert b" 400 " in client.recv(100)
        assert not caplog.records

    def test_a_page_beyond_this_machine_is_called_by_any_address(self):
        assert own_host("192.0.2.7:8765", "0.0.0.0")
        assert own_host(f"{socket.gethostname()}:8765", "0.0.0.0")
        assert own_host("studio.example", "studio.example")
        assert not own_host("rebound.example:8765", "0.0.0.0")

    def test_a_limit_on_browsers_and_connections(self, monkeypatch):
        monkeypatch.setattr("monarchrt.models.generate.stream.MOST_BROWSERS", 2)
        monkeypatch.setattr("monarchrt.models.web.server.MOST_CONNECTIONS", 6)
        with LivePage(port=0) as page, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.websocket(page)) for _ in range(2)]
            assert [self.status(client) for client in clients] == [101, 101]
            assert self.status(stack.enter_context(self.websocket(page))) == 503
            for _ in range(8):
                stack.enter_context(socket.create_connection(clients[0].getpeername(), timeout=10))
            time.sleep(0.2)
            assert stack.enter_context(socket.create_connection(clients[0].getpeername(), timeout=10)).recv(1) == b""

    def test_stalled_browsers_do_not_hold_the_exit(self, monkeypatch):
        """Some that take nothing, some that say nothing; one that watches gets everything meanwhile."""
        monkeypatch.setattr("monarchrt.models.web.server.PATIENCE", 1.0)
        monkeypatch.setattr("monarchrt.models.generate.stream.GRACE", 2.0)
        noise = np.random.default_rng(0).integers(0, 255, (120, 240, 320, 3), np.uint8)
        with contextlib.ExitStack() as stack:
            with LivePage(port=0, fps=100.0) as page:
                stalled = [stack.enter_context(self.websocket(page)) for _ in range(10)]
                stack.enter_context(socket.create_connection(stalled[0].getpeername()))
                page.show(noise)
                page.end()
                assert len(watch(page.url)[1]) == 120
                begin = time.monotonic()
                page.wait(60.0)
                assert time.monotonic() - begin < 10
                begin = time.monotonic()
            assert time.monotonic() - begin < 10

    def test_a_slow_browser_misses_frames(self, monkeypatch):
        """One that takes 30 ms for a frame of 5, by a clock that only it moves."""
        now = [0.0]
        monkeypatch.setattr("monarchrt.models.generate.stream.time.monotonic", lambda: now[0])
        monkeypatch.setattr("monarchrt.models.generate.stream.BEHIND", 1.0)
        video, taken = Video(fps=200.0), []
        for _ in range(1000):
            video.add(0, b"")
        video.end("finished")
        browser = video.watch(lambda: None)
        assert browser.take() == video.hello
        while isinstance(item := browser.take(), bytes):
            now[0] += 0.03
            taken.append(int.from_bytes(item[:4], "big"))
        whole = next(n for n in range(1000) if taken[n + 1] != taken[n] + 1)
        assert 38 <= whole <= 42  # nothing is missed until 200 frames behind: 6 - 1 are lost per frame taken
        assert 160 < len(taken) < 210  # 5 s of play and 1 s of patience, in steps of 30 ms
        assert taken == sorted(set(taken))
        assert taken[-1] == 999  # the last is not missed
        assert (item, browser.over, browser.take()) == ({"type": "ended", "reason": "finished"}, True, None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser():
    """Frames are drawn while more are made; a tab that is closed does not matter."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with LivePage(port=0, fps=20.0, title="a cat", total=8) as page, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        closed, tab = browser.new_page(), browser.new_page()
        for each in (closed, tab):
            each.goto(page.url)
        page.show(frames(4))
        tab.wait_for_function("Number(document.body.dataset.shown) === 4")
        assert "the next are being made" in tab.inner_text("#status")
        colour = tab.evaluate(
            "Array.from(document.querySelector('canvas').getContext('2d').getImageData(9,9,1,1).data)"
        )
        assert np.abs(np.array(colour[:3]) - COLOURS[3]).max() < 12
        closed.close()
        page.show(frames(4))
        page.end("finished")
        tab.wait_for_function("document.body.dataset.ended === 'finished'")
        assert tab.inner_text("#status") == "8 frames; finished"
        assert tab.inner_text("#title") == "a cat"
        assert tab.evaluate("document.querySelector('canvas').width") == 48
        assert page.wait(10.0)
        browser.close()
