"""A real headless Chromium, and what people do on the page: choose files, read answers, turn the lights off."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="needs selenium: uv sync --group browser"
)
CHROMIUM, DRIVER = (
    shutil.which("chromium") or shutil.which("chromium-browser"),
    shutil.which("chromedriver"),
)
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver, as in Debian's packages chromium, chromium-driver",
)


@pytest.fixture(scope="module", name="browser")
def a_browser() -> Iterator[Any]:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1000,1400",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    began = time.monotonic()
    while not (found := true()):
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return found


def choose(browser: Any, *paths: Path) -> None:
    browser.find_element("id", "pick").send_keys("\n".join(map(str, paths)))


def articles(browser: Any, count: int) -> list[str]:
    """The text of the answers once all are there."""
    until(lambda: len(browser.find_elements("css selector", "article h2")) == count)
    return [a.text for a in browser.find_elements("css selector", "article")]


def check_article(
    text: str, name: str, members: Sequence[str], p: np.ndarray, opinions: np.ndarray
) -> None:
    """An answer names its image, its share, and every member's: probabilities (k,) and (m, k)."""
    assert name in text
    assert f"{100 * p.max():.1f} %" in text
    for member, row in zip(members, opinions, strict=True):
        assert f"{member} " in text.replace("\n", " ")
        assert f"{100 * row.max():.1f} %" in text


def emulate(browser: Any, width: int, dark: bool) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    value = "dark" if dark else "light"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": value}]},
    )


CONTRAST = """
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(", 0)")) return c; } return "rgb(255, 255, 255)"; };
return [...document.querySelectorAll("body *")].filter((e) => e.offsetParent && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + " " + e.textContent.slice(0, 30)];
});
"""
