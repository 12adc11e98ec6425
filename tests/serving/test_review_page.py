"""The page of a review in a real Chromium: its buttons decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.browser import needs_chromium, severe_messages
from support.review import COPY, EMPTY, labels, write_photos
from support.server import in_thread, wait_until

from threefold.evaluation.review import open_review
from threefold.evaluation.review_state import ReviewState
from threefold.serving.limits import ServerLimits
from threefold.serving.listen import make_uvicorn, open_listener
from threefold.serving.review import make_review_app

pytestmark = needs_chromium


@pytest.fixture
def state(tmp_path: Path) -> ReviewState:
    (tmp_path / "photos").mkdir()
    return ReviewState(open_review(str(write_photos(tmp_path / "photos"))), tmp_path / "clean.csv")


@pytest.fixture
def address(state: ReviewState) -> Iterator[str]:
    """The page, served on a free port of this machine."""
    limits, listener = ServerLimits(), open_listener("127.0.0.1", 0)
    server = make_uvicorn(make_review_app(state, limits), limits)
    with in_thread(server, listener) as address:
        yield address


def test_buttons_of_the_page_decide(browser: Any, address: str, state: ReviewState) -> None:
    browser.get(address)
    wait_until(lambda: len(browser.find_elements("css selector", ".item")) == 2)
    copy, empty = browser.find_elements("css selector", ".item")

    def press(item: Any, name: str, then: str) -> None:
        (button,) = [b for b in item.find_elements("css selector", "button") if b.text == name]
        button.click()
        wait_until(lambda: item.find_element("css selector", ".decided").text == then)

    press(copy, "Drop", "dropped")
    empty.find_element("css selector", "select").send_keys("dog")
    press(empty, "Relabel", "relabelled: dog")

    assert COPY not in labels(state)
    assert labels(state)[EMPTY] == "dog"
    status = browser.find_element("css selector", "#status").text
    assert status == "2 of 2 decided: 0 accepted, 1 relabelled, 1 dropped"

    press(copy, "Undo", "")
    assert labels(state)[COPY] == "dog"
    loaded = "return [...document.images].every((i) => i.complete && i.naturalWidth === 320)"
    wait_until(lambda: browser.execute_script(loaded))
    assert severe_messages(browser) == []
    assert httpx.get(address).headers["content-security-policy"].startswith("default-src 'none'")
