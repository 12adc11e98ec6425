"""The folder of `threefold export --web` in a real Chromium: the browser answers what Python answers."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
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
from support.server import UNCERTAIN, card, picture, write_model
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.data.images import decode
from threefold.ensembles.conformal import ConformalSets
from threefold.errors import ExportError
from threefold.serving import onnxruntime_web
from threefold.serving.browser import write_web
from threefold.training.run import Run

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, which gets onnxruntime-web"),
]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web, got once."""
    folder = tmp_path_factory.mktemp("ort")
    try:
        parts = onnxruntime_web.read_runtime()
    except ExportError as error:
        pytest.skip(f"npm cannot get onnxruntime-web here: {error}")
    for ours, content in parts.items():
        (folder / onnxruntime_web.FILES[ours].name).write_bytes(content)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's static server as it is, without its log."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def hosting(folder: Path) -> Iterator[str]:
    """The folder on a static server."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("web")
    write_web(
        write_model(folder / "m.onnx", model_card=card(**UNCERTAIN)), folder / "site", runtime
    )
    with hosting(folder / "site") as found:
        yield found


def open_page(browser: Any, address: str) -> None:
    browser.set_script_timeout(120)
    browser.get(address)
    until(lambda: "expect" in browser.find_element("id", "headline").text)
    browser.get_log("browser")
    browser.get_log("performance")


ASK = """
const [module, call, data, done] = arguments;
const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
const plain = (found) => found.data ? { ...found, data: btoa(Array.from(found.data, (b) => String.fromCharCode(b)).join("")) } : found;
const limits = { file_bytes: 1e8, pixels: 1e8, side: 1e5 };
import(module).then((m) => m[call](new File([bytes], "image"), call === "decode" ? limits : () => {})).then(plain).then(done, (error) => done(String(error.message)));
"""


def ask(browser: Any, content: bytes, module: str = "./backend.js", call: str = "predict") -> Any:
    """What a module of the page makes of a file; text where it refuses."""
    return browser.execute_async_script(ASK, module, call, base64.b64encode(content).decode())


def pixels(browser: Any, content: bytes) -> Any:
    found = ask(browser, content, "./decode.js", "decode")
    if isinstance(found, str):
        return found
    return np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(
        found["height"], found["width"], 3
    )


def photo(channels: int = 3, size: tuple[int, int] = (61, 83)) -> np.ndarray:
    """Something like a photograph: smooth, with noise."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (8, 8, channels)).astype(np.uint8)
    planes = [
        np.asarray(Image.fromarray(coarse[..., c]).resize(size[::-1], 3)) for c in range(channels)
    ]
    return np.clip(np.stack(planes, -1) + rng.normal(0, 6, (*size, channels)), 0, 255).astype(
        np.uint8
    )


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def filtered(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16-bit grey whose rows all have one filter; what they say is noise for the filters above 0."""
    rows = np.dstack([values >> 8, values & 255]).astype(np.uint8).reshape(len(values), -1)
    lines = b"".join(bytes([kind]) + row.tobytes() for row in rows)
    found = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, 0, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        found += (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )
    return found


def every_kind() -> dict[str, tuple[bytes, int]]:
    """Files by name, and by how much a value may differ."""
    rgb, rgba = photo(), photo(4)
    cut = rgba.copy()
    cut[..., 3] = np.where(cut[..., 3] > 99, 255, 0)
    plain = Image.fromarray(rgb)
    deep = rgb[..., 0].astype(np.uint16) * 257 + np.arange(83, dtype=np.uint16)
    found = {
        "png": (encode(rgb, "PNG"), 0),
        "grey png": (encode(rgb[..., 0], "PNG"), 0),
        "palette png": (encode(plain.convert("P"), "PNG"), 0),
        "transparent png": (encode(rgba, "PNG"), 1),
        "cut-out png": (encode(cut, "PNG"), 0),
        "16-bit grey png": (encode(deep, "PNG"), 0),
        "16-bit grey png, turned": (encode(deep, "PNG", exif=turned(8)), 0),
        "16-bit grey png, one value transparent": (
            encode(deep, "PNG", transparency=int(deep[9, 9])),
            0,
        ),
        **{f"16-bit grey png, filter {f}": (filtered(deep, f), 0) for f in range(5)},
        "bmp": (encode(rgb, "BMP"), 0),
        "gif": (encode(plain, "GIF"), 0),
        "webp": (encode(rgb, "WEBP", lossless=True), 0),
        "transparent webp": (encode(rgba, "WEBP", lossless=True), 1),
        "lossy webp": (encode(rgb, "WEBP", quality=70), 2),
        "jpeg": (encode(rgb, "JPEG", quality=80), 2),
        "grey jpeg": (encode(rgb[..., 0], "JPEG", quality=80), 2),
        "progressive jpeg": (encode(rgb, "JPEG", quality=80, progressive=True), 2),
    }
    for o in range(2, 9):
        found |= {f"jpeg turned {o}": (encode(rgb, "JPEG", quality=90, exif=turned(o)), 2)}
        found |= {f"png turned {o}": (encode(rgb, "PNG", exif=turned(o)), 0)}
        found |= {f"webp turned {o}": (encode(rgb, "WEBP", lossless=True, exif=turned(o)), 0)}
    return found


def test_files_become_the_same_pixels(browser: Any, address: str) -> None:
    open_page(browser, address)
    for name, (content, tolerance) in every_kind().items():
        expected, got = decode(content), pixels(browser, content)
        assert not isinstance(got, str), (name, got)
        assert got.shape == expected.shape, name
        assert np.abs(got.astype(int) - expected).max() <= tolerance, name


def test_bad_files_are_refused_with_a_reason(browser: Any, address: str) -> None:
    open_page(browser, address)
    rgb = photo()
    bomb = bytearray(encode(rgb, "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    for content, reason in (
        (b"", "the file is empty"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
            "not an image (the content is none of",
        ),
        (encode(rgb, "TIFF"), "a TIFF file"),
        (encode(rgb, "PNG")[:2000], "damaged or truncated PNG"),
        (encode(rgb, "JPEG")[:900], "damaged or truncated JPEG"),
        (encode(rgb, "JPEG")[:30], "damaged or truncated JPEG"),
        (encode(rgb, "GIF")[:900], "damaged or truncated GIF"),
        (encode(rgb, "WEBP", lossless=True)[:900], "damaged or truncated WebP"),
        (encode(rgb, "BMP")[:900], "damaged or truncated BMP"),
        (bytes(bomb), "an image may have at most 20,000,000 pixels"),
        (
            encode(np.zeros((1, 17_000, 3), np.uint8), "PNG"),
            "an image may be at most 16,384 pixels wide or high",
        ),
        (
            encode(np.zeros((1, 17_000, 3), np.uint8), "BMP"),
            "an image may be at most 16,384 pixels wide or high",
        ),
        (encode(rgb, "PNG") + bytes(20 * 2**20), "an image file may have at most 20,971,520 bytes"),
    ):
        assert reason in ask(browser, content), reason


def test_probabilities_sets_and_the_unknown_mark_are_those_of_python(
    browser: Any, address: str, tmp_path: Path
) -> None:
    noisy = [
        np.clip(photo().astype(int) + shift, 0, 255).astype(np.uint8)
        for shift in ((90, -90, 0), (9, 9, 9))
    ]
    files = [
        *(encode(image, "PNG") for image in noisy),
        picture((200, 30, 30)),
        picture((99, 99, 99)),
        picture((0, 60, 99), kind="JPEG"),
    ]
    model = threefold.load(write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN)))
    open_page(browser, address)
    answers = [ask(browser, content) for content in files]
    output = model.infer(files)
    probs, members = output.probs, output.member_probs
    assert np.abs(np.array([a["probs"] for a in answers]) - probs).max() < 1e-6
    assert [a["set"] for a in answers] == model.sets_from_probs(probs)
    assert (
        [a["unknown"] for a in answers]
        == model.unknown_from_probs(probs).tolist()
        == [False, True, False, True, False]
    )
    for found, rows in zip(answers, members, strict=True):
        for name, row in zip(model.members, rows, strict=True):
            top = {share["label"]: share["probability"] for share in found["members"][name]["top"]}
            assert (
                max(abs(top[label] - p) for label, p in zip(model.classes, row, strict=True)) < 1e-6
            )


SETS = """
const [rows, states, done] = arguments;
import("./sets.js").then((m) => states.map((state) => rows.map((row) => m.setOf(Float32Array.from(row), state)))).then(done, (error) => done(String(error)));
"""


def test_every_kind_of_set_is_that_of_python(browser: Any, address: str) -> None:
    open_page(browser, address)
    rng = np.random.default_rng(2)
    probs = rng.dirichlet(np.full(12, 0.5), 60).astype(np.float32)
    ties = probs[:5].round(1) + np.float32(0.1)
    probs[:5] = ties / ties.sum(1, keepdims=True)
    labels = np.array([rng.choice(12, p=row / row.sum()) for row in probs.astype(float)])
    sets = [
        ConformalSets(method, by_class=by_class, never_empty=never_empty).fit(probs, labels, alpha)
        for method in ("lac", "aps", "raps")
        for by_class in (False, True)
        for never_empty in (False, True)
        for alpha in (
            0.005,
            0.1,
            0.7,
        )  # the first is too small for 60 rows: every class is in every set
    ]
    found = browser.execute_async_script(SETS, probs.tolist(), [s.state() for s in sets])
    sizes = set()
    for told, ours in zip(found, sets, strict=True):
        for places, inside, row in zip(told, ours.predict_sets(probs), probs, strict=True):
            assert places == [i for i in np.argsort(-row, kind="stable") if inside[i]]
            sizes.add(len(places))
    assert {0, 1, 2, 12} <= sizes


def test_a_real_run_answers_in_the_browser_as_in_python(
    browser: Any, finished: Run, runtime: Path, tmp_path: Path
) -> None:
    """The command from a run; real networks; PNG within 1e-4, JPEG within what a level or two of a pixel can do."""
    run = tmp_path / "run"
    shutil.copytree(finished.dir, run)
    words = ["export", str(run), "--out", str(tmp_path / "m.onnx"), "--web", str(tmp_path / "site")]
    done = CliRunner().invoke(app, [*words, "--web-runtime", str(runtime)])
    assert done.exit_code == 0, done.output
    images = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids[::4]]  # type: ignore[union-attr]
    jpeg = tmp_path / "on its side.jpg"
    jpeg.write_bytes(encode(photo(), "JPEG", quality=90, exif=turned(6)))
    glass = tmp_path / "transparent.png"
    glass.write_bytes(encode(photo(4), "PNG"))
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:100])
    images += [jpeg, glass]
    model = threefold.load(tmp_path / "m.onnx")
    output = model.infer(images)
    probs, members = output.probs, output.member_probs
    with hosting(tmp_path / "site") as found:
        open_page(browser, found)
        choose(browser, *images, tmp_path / "broken.png")
        shown = articles(browser, len(images) + 1)
        exact = np.array([ask(browser, path.read_bytes())["probs"] for path in images])
    difference = np.abs(exact - probs).max(1)
    assert difference[[*range(len(images) - 2), -1]].max() < 1e-4
    assert difference[-2] < 1e-2
    assert "damaged or truncated PNG" in shown.pop()
    for text, image, p, opinions in zip(shown, images, probs, members, strict=True):
        check_article(text, image.name, model.members, p, opinions)


def test_the_page_shows_the_card_and_where_the_model_runs(browser: Any, address: str) -> None:
    open_page(browser, address)
    assert browser.find_element("id", "name").text == "colours"
    assert "no image leaves it" in browser.find_element("id", "drop").text
    assert not browser.find_element("id", "program").is_displayed()
    browser.execute_script("document.getElementById('card').open = true")
    text = browser.find_element("id", "facts").text
    for part in (
        "honest",
        "1000 rows, test",
        "sharp (mean + linear)",
        f"onnxruntime-web {onnxruntime_web.VERSION}",
    ):
        assert part in text


def test_it_loads_its_own_files_only_and_breaks_no_policy(
    browser: Any, address: str, tmp_path: Path
) -> None:
    red = tmp_path / "red.png"
    red.write_bytes(picture((200, 30, 30)))
    open_page(browser, address)
    browser.refresh()
    choose(browser, red)
    articles(browser, 1)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert f"{address}worker.js" in asked
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    refused = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('refused'))"
    assert browser.execute_async_script(refused) == "refused"
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_a_missing_or_exchanged_model_is_told_and_tried_again(
    browser: Any, runtime: Path, tmp_path: Path
) -> None:
    model, site = write_model(tmp_path / "m.onnx"), tmp_path / "site"
    write_web(model, site, runtime)
    whole, red = (site / "model.onnx").read_bytes(), picture((200, 30, 30))
    with hosting(site) as found:
        open_page(browser, found)
        (site / "model.onnx").unlink()
        assert ask(browser, red) == "the model file cannot be loaded: 404"
        (site / "model.onnx").write_bytes(whole[:-9])
        assert "is incomplete" in ask(browser, red)
        (site / "model.onnx").write_bytes(whole + b"more")
        assert "does not belong to this page" in ask(browser, red)
        (site / "model.onnx").write_bytes(whole)
        assert ask(browser, red)["label"] == "red"


def test_opened_as_a_file_it_says_what_it_needs(
    browser: Any, runtime: Path, tmp_path: Path
) -> None:
    write_web(write_model(tmp_path / "m.onnx"), tmp_path / "site", runtime)
    browser.get((tmp_path / "site/index.html").as_uri())
    assert "needs a web server" in browser.find_element("id", "headline").text


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1000])
def test_any_width_light_and_dark(
    browser: Any, address: str, tmp_path: Path, width: int, dark: bool
) -> None:
    red, bad = tmp_path / "red.png", tmp_path / "bad.png"
    red.write_bytes(picture((200, 30, 30)))
    bad.write_bytes(b"x")
    try:
        emulate(browser, width, dark)
        open_page(browser, address)
        choose(browser, red, bad)
        articles(browser, 2)
        browser.execute_script(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert not [found for found in browser.execute_script(CONTRAST) if found[0] < 4.5]
    finally:
        emulate(browser, 1000, False)


def test_the_keyboard_is_enough(browser: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    red = tmp_path / "red.png"
    red.write_bytes(picture((200, 30, 30)))
    open_page(browser, address)
    choose(browser, red)
    articles(browser, 1)
    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    focused = "const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.textContent;"
    for name in ("pick", "clear", "Remove red.png", "Model card"):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.execute_script(focused) == name
