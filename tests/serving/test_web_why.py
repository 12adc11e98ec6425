""" "Why?" in the folder of `export --web`, in a real Chromium: the numbers are those of Python."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import articles, choose, needs_chromium, open_page, severe_messages
from support.http_server import hosting
from support.server import card, encode, wait_until, write_model

import threefold
from threefold.data.images import decode
from threefold.runtime.canvas import Canvas, fit_canvas
from threefold.runtime.heat import occlude, occlusion_heat, overlay
from threefold.serving.browser import write_web

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, which gets onnxruntime-web"),
]

EXPLAIN = """
const [data, label, done] = arguments;
const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
const text = (array) => btoa(Array.from(array, (b) => String.fromCharCode(b)).join(""));
const encode = async (blob) => text(new Uint8Array(await blob.arrayBuffer()));
import("./backend.js")
  .then((m) => m.explain(new File([bytes], "a.png"), label, new AbortController().signal))
  .then(async (found) => done({ ...found, picture: await encode(found.picture) }))
  .catch((error) => done(String(error)));
"""

FIT = """
const [images, canvas, done] = arguments;
const fit = ({ fitCanvas }, { data, width, height }) =>
  Array.from(fitCanvas({ data: Uint8Array.from(data), width, height }, canvas).data);
import("./heat.js").then((m) => done(images.map((image) => fit(m, image))), done);
"""

SPOTTED = np.full((42, 63, 3), 90, np.uint8)
"""Grey, with red at the top."""
SPOTTED[:12, 36:48] = (250, 20, 20)


@pytest.fixture(scope="module")
def address(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("web")
    write_web(write_model(folder / "m.onnx"), folder / "site", runtime)
    with hosting(folder / "site") as url:
        yield url


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_images_are_resized_as_in_python(browser: Any, address: str, mode: str) -> None:
    rng = np.random.default_rng(3)
    sizes = [(9, 40), (21, 21), (37, 22), (100, 63), (5, 7)]
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    sent = [
        {"data": image.flatten().tolist(), "height": image.shape[0], "width": image.shape[1]}
        for image in images
    ]
    open_page(browser, address)

    replies = browser.execute_async_script(FIT, sent, {"size": 21, "mode": mode})

    for reply, image in zip(replies, images, strict=True):
        expected = fit_canvas(image, Canvas(21, mode))  # type: ignore[arg-type]
        assert reply == expected.flatten().tolist(), image.shape


@pytest.mark.parametrize("mode", ["squash", "crop", "several sizes"])
def test_an_explanation_is_that_of_python(
    browser: Any, runtime: Path, tmp_path: Path, mode: str
) -> None:
    part = {"filter": "triangle, antialiased", "resize": mode, "pixels": 28}
    parts = [part] if mode in ("squash", "crop") else [part, {**part, "pixels": 30}]
    path = write_model(tmp_path / "m.onnx", model_card=card(preprocessing=parts))
    write_web(path, tmp_path / "site", runtime)
    model = threefold.load(path)
    expected = occlude(model.answer, model.fit_canvas(SPOTTED), model.classes.index("red"))
    heat = occlusion_heat(model, SPOTTED, model.classes.index("red"))
    content = base64.b64encode(encode(SPOTTED, "PNG")).decode()

    with hosting(tmp_path / "site") as url:
        open_page(browser, url)
        found = browser.execute_async_script(EXPLAIN, content, "red")

    assert not isinstance(found, str), found
    assert np.abs(np.array(found["cells"]) - expected.cells).max() < 1e-6
    assert found["probability"] == pytest.approx(expected.probability, abs=1e-6)
    assert found["lowest"] == pytest.approx(expected.lowest, abs=1e-6)
    assert found["cropped"] == (mode == "crop")
    picture = decode(base64.b64decode(found["picture"])).astype(int)
    shown = np.asarray(overlay(SPOTTED, heat.map)).astype(int)
    assert picture.shape == shown.shape
    assert np.abs(picture - shown).mean() < 4  # the enlargement is the browser's


def test_why_is_asked_and_answered_on_the_page(browser: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "spot.png").write_bytes(encode(SPOTTED, "PNG"))
    open_page(browser, address)
    choose(browser, tmp_path / "spot.png")
    articles(browser, 1)

    browser.find_element("css selector", ".answer button").click()
    choose(browser, tmp_path / "spot.png")  # is answered meanwhile
    articles(browser, 2)
    image = wait_until(lambda: browser.find_elements("css selector", ".why img"))[0]
    text = image.find_element("xpath", "..").text

    assert "in yellow: top centre" in image.get_attribute("alt")
    assert "hiding a part makes “red” less probable" in text
    assert not severe_messages(browser)
