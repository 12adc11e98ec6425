"""A headless Chromium, and what people do on the page: choose files, read answers, go dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.server import wait_until

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="needs selenium: uv sync --group browser"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1400")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver, as in Debian's packages chromium, chromium-driver",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def headline(browser: Any) -> str:
    return str(browser.find_element("id", "headline").text)


def open_page(browser: Any, address: str) -> None:
    """Open the page, wait until it shows the model card or an error, and empty the logs."""
    browser.get(address)
    wait_until(lambda: " expected " in headline(browser) or "cannot" in headline(browser))
    browser.get_log("browser")
    browser.get_log("performance")


def choose(browser: Any, *paths: Path) -> None:
    browser.find_element("id", "pick").send_keys("\n".join(map(str, paths)))


def articles(browser: Any, count: int) -> list[str]:
    """The text of the answers, once there are that many."""
    wait_until(lambda: len(browser.find_elements("css selector", "article h2")) == count)
    return [article.text for article in browser.find_elements("css selector", "article")]


def open_details(browser: Any) -> None:
    """Open the model card and every other fold of the page."""
    browser.execute_script(
        "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
    )


def check_article(
    text: str, name: str, members: Sequence[str], probs: np.ndarray, member_probs: np.ndarray
) -> None:
    """Check that an answer names its image and all probabilities: (k,) and (m, k)."""
    assert name in text
    assert f"{100 * probs.max():.1f} %" in text
    for member, row in zip(members, member_probs, strict=True):
        assert f"{member} " in text.replace("\n", " ")
        assert f"{100 * row.max():.1f} %" in text


def emulate(browser: Any, width: int, dark: bool) -> None:
    """Set the width of the screen and the colour scheme."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    value = "dark" if dark else "light"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": value}]},
    )


def requested_urls(browser: Any) -> set[str]:
    """URLs that the page has requested since the logs were read last."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }


def severe_messages(browser: Any) -> list[dict[str, Any]]:
    """Errors on the console since it was read last."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


FETCH_ELSEWHERE = """
const done = arguments[0];
fetch("http://127.0.0.1:9/").then(() => done("sent"), () => done("refused"));
"""


def check_policy_blocks_other_hosts(browser: Any) -> None:
    """Check that a script that got into the page could reach no other host."""
    assert browser.execute_async_script(FETCH_ELSEWHERE) == "refused"
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert any("Content Security Policy" in message for message in messages)


CONTRASTS = """
const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!colour.endsWith(", 0)")) return colour;
  }
  return "rgb(255, 255, 255)";
};
const isText = (node) => node.nodeType === 3 && node.data.trim();
return [...document.querySelectorAll("body *")]
  .filter((element) => element.offsetParent && [...element.childNodes].some(isText))
  .map((element) => {
    const text = luminance(getComputedStyle(element).color);
    const behind = luminance(background(element));
    const contrast = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
    return [contrast, element.tagName + " " + element.textContent.slice(0, 30)];
  });
"""


def check_fits_and_is_readable(browser: Any, width: int) -> None:
    """Check that nothing exceeds the width and every text has WCAG's contrast of 4.5."""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert not [entry for entry in browser.execute_script(CONTRASTS) if entry[0] < 4.5]


FOCUSED = """
const element = document.activeElement;
const name = element.id || element.getAttribute("aria-label") || element.textContent;
const outlined = element.id === "pick" ? element.parentElement : element;
return [name, getComputedStyle(outlined).outlineStyle];
"""


def check_tab_order(browser: Any, names: Sequence[str]) -> None:
    """Check that the Tab key visits these elements in turn, each with a visible focus."""
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    for name in names:
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.execute_script(FOCUSED) == [name, "solid"]
