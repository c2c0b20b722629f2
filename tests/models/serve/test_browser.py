"""The page of the server in a browser, where there is one."""

import shutil

import numpy as np
import pytest

from monarchrt.models.media.video import read_clip, write_mp4
from monarchrt.models.serve import Limits
from tests.models.serve.test_server import running

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def browser_page(driver, **options):
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    return browser, browser.new_page(**options)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_video_in_a_browser(engine, tmp_path):
    """H.264 through Media Source Extensions: begun with a picture, played, changed, and gone on at the same speed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    clip = np.zeros((6, 8, 16, 3), np.uint8)
    clip[:, :, 8:] = 255
    path = write_mp4(tmp_path / "clip.mp4", clip, fps=30.0)
    with running(engine) as server, playwright.sync_playwright() as driver:
        browser, tab = browser_page(driver)
        tab.goto(server.url)
        tab.wait_for_function("!document.getElementById('go').disabled")
        tab.fill("#prompt", "a cat")
        tab.select_option("#format", "mp4")
        tab.select_option("#attention", "monarch(tile=(3,2,2))")
        (tmp_path / "bad.png").write_bytes(b"nothing")
        tab.set_input_files("#begin", tmp_path / "bad.png")
        tab.click("#go")
        tab.wait_for_function("document.getElementById('status').textContent.includes('not a video')")
        tab.set_input_files("#begin", path)
        tab.click("#go")
        tab.wait_for_function("Number(document.body.dataset.shown) >= 30", timeout=20000)
        assert tab.is_visible("#film")
        assert not tab.is_visible("#screen")
        assert tab.evaluate("document.getElementById('film').videoWidth") == 16
        shown = int(tab.evaluate("document.body.dataset.shown"))
        tab.wait_for_timeout(2000)
        more = int(tab.evaluate("document.body.dataset.shown")) - shown
        assert 30 < more < 90  # 60 at 30 frames a second
        tab.fill("#prompt", "a dog")
        tab.click("#go")
        tab.wait_for_function("document.body.dataset.prompts !== undefined")
        tab.click("#stop")
        tab.wait_for_function("document.body.dataset.ended === 'stopped'")
        tab.select_option("#format", "jpeg")  # and the other way once more
        tab.click("#go")
        tab.wait_for_selector("#screen", state="visible")
        tab.wait_for_function("Number(document.body.dataset.shown) >= 3")
        browser.close()


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
        with tab.expect_download() as download:  # after the end, too
            tab.click("#save")
        assert len(read_clip(download.value.path(), height=8, width=16)) >= 6
        assert tab.is_disabled("#pause")
        tab.reload()
        tab.wait_for_function("!document.getElementById('go').disabled")
        assert "frames/s seen" in other.inner_text("#numbers")
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_who_waits_in_a_browser(engine):
    """It may go again, cannot begin once more, and what is remembered is what was sent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with running(engine, limits=Limits(sessions=1, waiting=1)) as server, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        first, second = browser.new_page(), browser.new_page()
        for each in (first, second):
            each.goto(server.url)
            each.wait_for_function("!document.getElementById('go').disabled")
            each.fill("#prompt", "a cat")
            each.click("#go")
            said = "the first frames" if each is first else "waiting for a place, number 1"
            each.wait_for_function(f"document.getElementById('status').textContent.includes('{said}')")
        assert second.is_disabled("#go")
        second.fill("#prompt", "a dog")
        second.press("#prompt", "Control+Enter")
        second.click("#stop")
        second.wait_for_function("document.body.dataset.ended === 'stopped'")
        second.click("#go")
        second.wait_for_function("document.getElementById('go').disabled")
        second.fill("#prompt", "a bird")
        first.click("#stop")
        second.wait_for_function("document.body.dataset.on === 'yes'")
        assert second.inner_text("#history") == "block 0: a dog"
        browser.close()
