"""The page, in a real Chromium: images go up, answers come back as the file gives them, and it can be used by anyone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import (
    CONTRAST,
    articles,
    check_article,
    choose,
    emulate,
    needs_chromium,
    until,
    webdriver,
)
from support.server import UNCERTAIN, card, picture, serving, write_model

import threefold
from threefold.serving.limits import ServerLimits
from threefold.training.run import Run

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(
        write_model(tmp_path_factory.mktemp("model") / "m.onnx"), ServerLimits(file_bytes=100_000)
    ) as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Images with the names that people give them, and one that is none."""
    made = {
        "red": "my red flower.png",
        "green": "ü <b>green.jpg",
        "blue": "blue.tif",
        "bad": "notes.png",
    }
    paths = {key: tmp_path / name for key, name in made.items()}
    paths["red"].write_bytes(picture((200, 30, 30), (300, 200)))
    paths["green"].write_bytes(picture((30, 200, 30), (200, 300), "JPEG"))
    paths["blue"].write_bytes(picture((30, 30, 200), (50, 50), "TIFF"))
    paths["bad"].write_bytes(b"not a picture")
    return paths


def open_page(browser: Any, address: str) -> None:
    browser.get(address)
    until(lambda: "expect" in browser.find_element("id", "headline").text or _card_failed(browser))
    browser.get_log("browser")
    browser.get_log("performance")


def _card_failed(browser: Any) -> bool:
    return "cannot" in browser.find_element("id", "headline").text


def test_real_images_get_the_answers_of_the_file(browser: Any, finished: Run) -> None:
    images = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids[::5]]  # type: ignore[union-attr]
    model = threefold.load(finished.dir / "model.onnx")
    output = model.infer(images)
    probs, members = output.probs, output.member_probs
    with serving(finished.dir / "model.onnx") as address:
        open_page(browser, address)
        choose(browser, *images)
        shown = articles(browser, len(images))
    for text, image, p, opinions in zip(shown, images, probs, members, strict=True):
        check_article(text, image.name, model.members, p, opinions)


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
    browser.find_elements("css selector", "article button")[1].click()
    assert len(articles(browser, 3)) == 3
    browser.find_element("id", "clear").click()
    assert not browser.find_elements("css selector", "article")


def test_the_models_of_one_file_is_asked_with_the_bytes_as_they_are(
    browser: Any, address: str, tmp_path: Path
) -> None:
    open_page(browser, address)
    big = tmp_path / "big.png"
    big.write_bytes(picture((9, 9, 9)) + bytes(100_001))
    choose(browser, big)
    assert "an image file may have at most 100,000 bytes" in articles(browser, 1)[0]


SEND = """
const [kind, data, target] = arguments;
const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
const options = { bubbles: true, cancelable: true };
const event = kind === "paste" ? new ClipboardEvent("paste", { ...options, clipboardData: transfer }) : new DragEvent("drop", { ...options, dataTransfer: transfer });
document.querySelector(target).dispatchEvent(event);
return event.defaultPrevented;
"""


@pytest.mark.parametrize(
    ("kind", "target"), [("paste", "body"), ("drop", "#drop"), ("drop", "footer, h1")]
)
def test_pasted_and_dropped(browser: Any, address: str, kind: str, target: str) -> None:
    open_page(browser, address)
    prevented = browser.execute_script(
        SEND, kind, base64.b64encode(picture((30, 30, 200))).decode(), target
    )
    assert prevented == (kind == "drop")  # else the browser would leave the page for the image
    assert "\nblue\n" in articles(browser, 1)[0]


FOCUSED = """
const e = document.activeElement;
const name = e.id || e.getAttribute("aria-label") || e.textContent;
return [name, getComputedStyle(e.id === "pick" ? e.parentElement : e).outlineStyle];
"""


def test_the_keyboard_is_enough(browser: Any, address: str, files: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, address)
    choose(browser, files["red"])
    articles(browser, 1)
    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    for name in ("pick", "clear", "Remove my red flower.png", "Model card"):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.execute_script(FOCUSED) == [name, "solid"]
    webdriver.ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert until(lambda: browser.find_elements("css selector", "#card[open]"))
    chain = (
        webdriver.ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT)
    )
    chain.send_keys(Keys.ENTER).perform()
    until(lambda: not browser.find_elements("css selector", "article"))


def test_the_card_is_shown(browser: Any, address: str) -> None:
    open_page(browser, address)
    assert browser.find_element("id", "name").text == "colours"
    assert (
        "expected accuracy on new images: 88.4 % (86.3 % to 90.2 %)"
        in browser.find_element("id", "headline").text
    )
    browser.execute_script("document.getElementById('card').open = true")
    text = browser.find_element("id", "facts").text
    for part in (
        "honest",
        "1000 rows, test",
        "sharp (mean + linear), soft (mean + gru)",
        "torch 2.15.0",
        "blue, green, red",
    ):
        assert part in text


def test_prediction_sets_and_unknown_images(browser: Any, tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    grey.write_bytes(picture((99, 99, 99)))
    with serving(write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN))) as address:
        open_page(browser, address)
        choose(browser, grey)
        (text,) = articles(browser, 1)
        assert "90 % prediction set (measured coverage 91.2 %):" in text
        assert "unlike those the model was trained on" in text
        assert len(browser.find_elements("css selector", ".set b")) == 3
        browser.execute_script("document.getElementById('card').open = true")
        assert (
            "target coverage 90 %; measured 91.2 % on 1000 rows (test), 1.20 classes"
            in browser.find_element("id", "facts").text
        )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1000])
def test_any_width_light_and_dark(
    browser: Any, address: str, files: dict[str, Path], width: int, dark: bool
) -> None:
    """Nothing sticks out to the side, and every text has at least WCAG's contrast of 4.5."""
    try:
        emulate(browser, width, dark)
        open_page(browser, address)
        choose(browser, files["red"], files["bad"])
        articles(browser, 2)
        browser.execute_script(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") != dark
        low = [found for found in browser.execute_script(CONTRAST) if found[0] < 4.5]
        assert not low
    finally:
        emulate(browser, 1000, False)


def test_it_loads_nothing_from_elsewhere_and_breaks_no_policy(
    browser: Any, address: str, files: dict[str, Path]
) -> None:
    open_page(browser, address)
    browser.refresh()
    choose(browser, files["red"], files["green"])
    articles(browser, 2)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert f"{address}/predict?top=5" in asked
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # A script that got into the page would reach nothing.
    assert (
        browser.execute_async_script(
            "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('refused'))"
        )
        == "refused"
    )
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_the_page_asks_for_the_key(browser: Any, tmp_path: Path, files: dict[str, Path]) -> None:
    with serving(write_model(tmp_path / "m.onnx"), api_key="open sesame") as address:
        open_page(browser, address)
        field = browser.find_element("id", "key-text")
        assert field.is_displayed()
        field.send_keys("wrong\n")
        until(field.is_displayed)
        field.clear()
        field.send_keys("open sesame\n")
        until(lambda: browser.find_element("id", "name").text == "colours")
        choose(browser, files["red"])
        assert "\nred\n" in articles(browser, 1)[0]
        assert not field.is_displayed()
