"""The server of a model that gives an image any number of labels: JSON, explanations, the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.browser import (
    articles,
    check_fits_and_is_readable,
    choose,
    emulate,
    needs_chromium,
    open_details,
    open_page,
    severe_messages,
)
from support.label_models import THRESHOLDS, write_label_model
from support.server import picture, post, serving, wait_until

import threefold

BLACK, WHITE = picture((10, 10, 10)), picture((250, 250, 250))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_label_model(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with serving(model) as url:
        yield url


def test_answers_have_labels_and_no_label(model: Path, address: str) -> None:
    files = [("files", (f"{i}.png", content)) for i, content in enumerate((BLACK, WHITE))]

    black, white = httpx.post(f"{address}/predict?top=2", files=files).json()["answers"]

    assert black.keys() == {"file", "labels", "top", "members"}
    assert (black["labels"], len(black["top"])) == ([], 2)
    assert {entry["label"] for entry in white["labels"]} == {"blue", "green", "red"}
    assert white["top"] == white["labels"][:2]
    output = threefold.load(model).infer(WHITE)
    for number, (name, threshold) in enumerate(
        zip(("blue", "green", "red"), THRESHOLDS, strict=True)
    ):
        entry = next(entry for entry in white["labels"] if entry["label"] == name)
        assert entry["probability"] == pytest.approx(float(output.probs[0, number]), abs=1e-6)
        assert entry["threshold"] == threshold
        soft = white["members"]["soft"][name]
        assert soft == pytest.approx(float(output.member_probs[0, 1, number]), abs=1e-6)


def test_openapi_describes_the_labels(address: str) -> None:
    tree = httpx.get(f"{address}/openapi.json").json()

    assert "MultilabelResponse" in tree["components"]["schemas"]
    assert "PredictResponse" not in tree["components"]["schemas"]


def test_an_explanation_names_its_label(address: str) -> None:
    url, files = f"{address}/explain", {"files": ("w.png", WHITE)}

    unnamed = httpx.post(url, files=files)
    named = httpx.post(url, files=files, params={"class": "green"})

    assert unnamed.status_code == 400
    assert "say which with ?class=" in unnamed.json()["error"]["message"]
    assert named.json()["label"] == "green"


def test_there_is_no_mode_fast(address: str) -> None:
    answer = httpx.post(f"{address}/predict?mode=fast", files={"files": ("w.png", WHITE)})

    assert answer.status_code == 400
    assert "no cascade" in answer.json()["error"]["message"]
    assert post(address, WHITE).status_code == 200


@needs_chromium
def test_the_page_shows_labels_with_thresholds(browser: Any, address: str, tmp_path: Path) -> None:
    paths = [tmp_path / "black.png", tmp_path / "white.png"]
    for path, content in zip(paths, (BLACK, WHITE), strict=True):
        path.write_bytes(content)
    open_page(browser, address)
    choose(browser, *paths)

    black, white = articles(browser, 2)
    marks = browser.find_elements("css selector", "article:first-child .mark")
    buttons = browser.find_elements("css selector", ".answer button")
    buttons[2].click()
    wait_until(lambda: browser.find_elements("css selector", ".why img"))

    assert "No label" in black
    assert "\nblue, green, red\n" in white
    assert "81.8 % / 30.0 %" in white
    assert sorted(mark.get_attribute("style") for mark in marks) == [
        "left: 30%;",
        "left: 50%;",
        "left: 70%;",
    ]
    assert [button.text for button in buttons] == ["Why?", "Why blue?", "Why green?", "Why red?"]
    assert "“green”" in browser.find_element("css selector", ".why:not([hidden])").text
    assert "mean average precision" in browser.find_element("id", "headline").text
    open_details(browser)
    assert "red (from 70.0 %)" in browser.find_element("id", "facts").text
    for width, dark in ((320, True), (1000, False)):
        emulate(browser, width, dark)
        check_fits_and_is_readable(browser, width)
    assert not severe_messages(browser)
