"""The live page: over a websocket, and in a real browser where there is one."""

import asyncio
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
from monarchrt.models.generate.stream import LivePage, check_port

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40]], np.uint8)


def frames(count=4, height=32, width=48):
    """One plain colour each."""
    return np.broadcast_to(COLOURS[np.arange(count) % 4, None, None], (count, height, width, 3)).copy()


def watch(url, *, leave_after=None):
    """What a browser gets: (texts, mean colours)."""

    async def run():
        texts, colours = [], []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}frames") as ws:
            async for message in ws:
                if message.type is aiohttp.WSMsgType.TEXT:
                    texts.append(message.json())
                else:
                    picture = np.asarray(Image.open(io.BytesIO(message.data)))
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
        assert texts == [{"fps": 8.0, "title": "a cat", "total": 4}, {"ended": "finished"}]
        assert np.abs(colours - COLOURS).max() < 12
    assert len(early) == 1


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
        tab.wait_for_function("document.body.dataset.ended === 'yes'")
        assert tab.inner_text("#status") == "8 frames; finished"
        assert tab.inner_text("#title") == "a cat"
        assert tab.evaluate("document.querySelector('canvas').width") == 48
        assert page.wait(10.0)
        browser.close()
