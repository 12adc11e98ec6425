"""The server's page in a real Chromium: its answers are the file's, and anyone can use it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import (
    articles,
    check_article,
    check_fits_and_is_readable,
    check_policy_blocks_other_hosts,
    check_tab_order,
    choose,
    emulate,
    headline,
    needs_chromium,
    open_details,
    open_page,
    requested_urls,
    severe_messages,
    webdriver,
)
from support.server import UNCERTAIN, card, encode, picture, serving, wait_until, write_model

import threefold
from threefold.serving import explain
from threefold.serving.limits import ServerLimits
from threefold.training.run import Run

pytestmark = needs_chromium

SEND = """
const [kind, data, target] = arguments;
const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
const options = { bubbles: true, cancelable: true };
const event = kind === "paste"
  ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
  : new DragEvent("drop", { ...options, dataTransfer: transfer });
document.querySelector(target).dispatchEvent(event);
return event.defaultPrevented;
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = write_model(tmp_path_factory.mktemp("model") / "m.onnx")
    with serving(path, ServerLimits(file_bytes=100_000)) as url:
        yield url


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Images with the names that people give them, and a file that is no image."""
    contents = {
        "red": ("my red flower.png", picture((200, 30, 30), (300, 200))),
        "green": ("ü <b>green.jpg", picture((30, 200, 30), (200, 300), "JPEG")),
        "blue": ("blue.tif", picture((30, 30, 200), (50, 50), "TIFF")),
        "bad": ("notes.png", b"not a picture"),
    }
    paths = {}
    for key, (name, content) in contents.items():
        paths[key] = tmp_path / name
        paths[key].write_bytes(content)
    return paths


def test_real_images_get_the_answers_of_the_file(browser: Any, finished: Run) -> None:
    images = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids[::5]]  # type: ignore[union-attr]
    model = threefold.load(finished.dir / "model.onnx")
    output = model.infer(images)

    with serving(finished.dir / "model.onnx") as url:
        open_page(browser, url)
        choose(browser, *images)
        texts = articles(browser, len(images))

    for text, image, probs, rows in zip(
        texts, images, output.probs, output.member_probs, strict=True
    ):
        check_article(text, image.name, model.members, probs, rows)


def test_answers_refusals_and_removal(browser: Any, address: str, files: dict[str, Path]) -> None:
    open_page(browser, address)
    choose(browser, *files.values())

    red, green, blue, bad = articles(browser, 4)

    assert "my red flower.png\n" in red
    assert "\nred\n" in red
    assert "Members: 2 of 2 agree" in red
    assert "ü <b>green.jpg\n" in green  # shown as text
    assert "no preview" in blue  # Chromium shows no TIFF; the answer is there
    assert "\nblue\n" in blue
    assert "No answer\nnot an image" in bad
    assert browser.find_element("id", "status").text == "3 answered, 1 failed"

    browser.find_elements("css selector", "article .top button")[1].click()
    assert len(articles(browser, 3)) == 3

    browser.find_element("id", "clear").click()
    assert not browser.find_elements("css selector", "article")


def test_too_large_a_file_is_refused(browser: Any, address: str, tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    big.write_bytes(picture((9, 9, 9)) + bytes(100_001))
    open_page(browser, address)

    choose(browser, big)

    assert "an image file may have at most 100,000 bytes" in articles(browser, 1)[0]


@pytest.mark.parametrize(
    ("kind", "target"), [("paste", "body"), ("drop", "#drop"), ("drop", "footer, h1")]
)
def test_pasted_and_dropped(browser: Any, address: str, kind: str, target: str) -> None:
    data = base64.b64encode(picture((30, 30, 200))).decode()
    open_page(browser, address)

    is_prevented = browser.execute_script(SEND, kind, data, target)

    assert is_prevented == (kind == "drop")  # or the browser would leave the page for the image
    assert "\nblue\n" in articles(browser, 1)[0]


def test_the_keyboard_is_enough(browser: Any, address: str, files: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, address)
    choose(browser, files["red"])
    articles(browser, 1)

    check_tab_order(browser, ["pick", "clear", "Remove my red flower.png"])
    webdriver.ActionChains(browser).send_keys(Keys.TAB, Keys.TAB).perform()  # past "Why?"
    webdriver.ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert wait_until(lambda: browser.find_elements("css selector", "#card[open]"))

    chain = webdriver.ActionChains(browser)
    chain = chain.key_down(Keys.SHIFT).send_keys(Keys.TAB, Keys.TAB).key_up(Keys.SHIFT)
    chain.send_keys(Keys.ENTER).perform()
    wait_until(lambda: not browser.find_elements("css selector", "article"))


def texts_of(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


EXPLAINED = """
const image = document.querySelector(".why img");
return image && image.complete && [image.alt, image.naturalWidth, image.naturalHeight];
"""


def test_an_answer_is_explained_by_keyboard(browser: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    pixels = np.full((42, 63, 3), 90, np.uint8)
    pixels[:12, 45:] = (250, 20, 20)
    (tmp_path / "spot.png").write_bytes(encode(pixels, "PNG"))
    open_page(browser, address)
    choose(browser, tmp_path / "spot.png")
    articles(browser, 1)

    check_tab_order(browser, ["pick", "clear", "Remove spot.png", "Why? red, spot.png"])
    webdriver.ActionChains(browser).send_keys(Keys.ENTER).perform()
    alt, *size = wait_until(lambda: browser.execute_script(EXPLAINED))

    assert alt == "spot.png, with the parts that matter most for “red” in yellow: top right"
    assert size == [448, 299]
    (text,) = articles(browser, 1)
    assert "hiding a part makes “red” less probable" in text
    assert "not that it is right" in text
    button = browser.find_element("css selector", ".answer button")
    assert button.get_attribute("aria-expanded") == "true"
    webdriver.ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert texts_of(browser, ".why") == [""]  # hidden
    assert button.get_attribute("aria-expanded") == "false"
    assert not severe_messages(browser)


def test_the_wait_and_the_failure_are_in_words(
    browser: Any, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, prepare = threading.Event(), explain._prepare
    monkeypatch.setattr(explain, "_prepare", lambda *args: gate.wait(30) and prepare(*args))
    limits = ServerLimits(explain_seconds=2)

    with serving(write_model(tmp_path / "m.onnx"), limits) as url:
        open_page(browser, url)
        choose(browser, files["red"])
        articles(browser, 1)
        browser.find_element("css selector", ".answer button").click()
        (waits,) = texts_of(browser, ".why")
        (failure,) = wait_until(lambda: texts_of(browser, ".why .bad"))
        gate.set()
        browser.find_element("css selector", ".answer button").click()
        wait_until(lambda: browser.execute_script(EXPLAINED))
        (explained,) = texts_of(browser, ".why")

    assert waits == "Hiding parts of the image, one after the other …"
    assert failure.startswith("No explanation: not explained within 2 seconds")
    assert failure.endswith("Press “Why?” to ask again.")
    assert explained.startswith("No part of the image matters alone")


def test_the_card_is_shown(browser: Any, address: str) -> None:
    open_page(browser, address)
    open_details(browser)

    facts = browser.find_element("id", "facts").text

    assert browser.find_element("id", "name").text == "colours"
    expected = "expected accuracy on new images: 88.4 % (86.3 % to 90.2 %)"
    assert expected in headline(browser)
    for part in (
        "honest",
        "1000 rows, test",
        "sharp (mean + linear), soft (mean + gru)",
        "torch 2.15.0",
        "blue, green, red",
    ):
        assert part in facts


def test_prediction_sets_and_unknown_images(browser: Any, tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    grey.write_bytes(picture((99, 99, 99)))
    path = write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN))

    with serving(path) as url:
        open_page(browser, url)
        choose(browser, grey)
        (text,) = articles(browser, 1)
        open_details(browser)
        facts = browser.find_element("id", "facts").text

    assert "90 % prediction set (measured coverage 91.2 %):" in text
    assert "unlike those the model was trained on" in text
    assert len(browser.find_elements("css selector", ".set b")) == 3
    assert "target coverage 90 %; measured 91.2 % on 1000 rows (test), 1.20 classes" in facts


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1000])
def test_any_width_light_and_dark(
    browser: Any, address: str, files: dict[str, Path], width: int, dark: bool
) -> None:
    try:
        emulate(browser, width, dark)
        open_page(browser, address)
        choose(browser, files["red"], files["bad"])
        articles(browser, 2)
        browser.find_element("css selector", ".answer button").click()
        wait_until(lambda: browser.execute_script(EXPLAINED))
        open_details(browser)

        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")

        assert (paper == "rgb(255, 255, 255)") != dark
        check_fits_and_is_readable(browser, width)
    finally:
        emulate(browser, 1000, False)


def test_it_loads_nothing_from_elsewhere(
    browser: Any, address: str, files: dict[str, Path]
) -> None:
    open_page(browser, address)
    browser.refresh()
    choose(browser, files["red"], files["green"])
    articles(browser, 2)

    urls = requested_urls(browser)

    assert f"{address}/predict?top=5" in urls
    assert all(url.startswith((address, "blob:", "data:")) for url in urls)
    assert not severe_messages(browser)
    check_policy_blocks_other_hosts(browser)


def test_the_page_asks_for_the_key(browser: Any, tmp_path: Path, files: dict[str, Path]) -> None:
    with serving(write_model(tmp_path / "m.onnx"), api_key="open sesame") as url:
        open_page(browser, url)
        field = browser.find_element("id", "key-text")
        assert field.is_displayed()

        field.send_keys("wrong\n")
        wait_until(field.is_displayed)
        field.clear()
        field.send_keys("open sesame\n")

        wait_until(lambda: browser.find_element("id", "name").text == "colours")
        choose(browser, files["red"])
        assert "\nred\n" in articles(browser, 1)[0]
        assert not field.is_displayed()
