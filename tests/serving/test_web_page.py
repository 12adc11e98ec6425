"""The folder of `threefold export --web` in a real Chromium: it answers as Python does."""

from __future__ import annotations

import base64
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
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
)
from support.http_server import hosting
from support.label_models import THRESHOLDS, write_label_model
from support.server import UNCERTAIN, card, encode, picture, write_model
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.data.images import decode
from threefold.ensembles.conformal import ConformalSets
from threefold.serving import onnxruntime_web
from threefold.serving.browser import write_web
from threefold.training.run import Run

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, which gets onnxruntime-web"),
]

ASK = """
const [module, call, data, done] = arguments;
const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
const text = (array) => btoa(Array.from(array, (b) => String.fromCharCode(b)).join(""));
const limits = { file_bytes: 1e8, pixels: 1e8, side: 1e5 };
const argument = call === "decode" ? limits : () => {};
import(module)
  .then((m) => m[call](new File([bytes], "image"), argument))
  .then((reply) => reply.data ? { ...reply, data: text(reply.data) } : reply)
  .then(done, (error) => done(String(error.message)));
"""

SETS = """
const [rows, states, done] = arguments;
const setsOf = (m, state) => rows.map((row) => m.setOf(Float32Array.from(row), state));
import("./sets.js")
  .then((m) => states.map((state) => setsOf(m, state)))
  .then(done, (error) => done(String(error)));
"""


def test_any_number_of_labels(browser: Any, runtime: Path, tmp_path: Path) -> None:
    model = write_label_model(tmp_path / "m.onnx")
    write_web(model, tmp_path / "site", runtime)
    images = {"black.png": picture((10, 10, 10)), "yellow.png": picture((250, 250, 10))}
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)

    with hosting(tmp_path / "site") as url:
        open_page(browser, url)
        choose(browser, *(tmp_path / name for name in images))
        black, yellow = articles(browser, 2)

    assert "No label" in black
    assert "\ngreen, red\n" in yellow
    probs = threefold.load(model).predict_proba(images["yellow.png"])[0]
    for p, threshold in zip(probs, THRESHOLDS, strict=True):
        assert f"{100 * p:.1f} % / {100 * threshold:.1f} %" in yellow
    assert "3 labels, 2 members" in (tmp_path / "site" / "README.md").read_text()


@pytest.fixture(scope="module")
def address(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("web")
    model = write_model(folder / "m.onnx", model_card=card(**UNCERTAIN))
    write_web(model, folder / "site", runtime)
    with hosting(folder / "site") as url:
        yield url


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(picture((200, 30, 30)))
    return path


def ask(browser: Any, content: bytes, module: str = "./backend.js", call: str = "predict") -> Any:
    """Call a function of the page with a file; returns its reply, or the message of its error."""
    return browser.execute_async_script(ASK, module, call, base64.b64encode(content).decode())


def decode_in_browser(browser: Any, content: bytes) -> np.ndarray:
    """Pixels (h, w, 3) of a file, as the page decodes it."""
    reply = ask(browser, content, "./decode.js", "decode")
    assert not isinstance(reply, str), reply
    pixels = np.frombuffer(base64.b64decode(reply["data"]), np.uint8)
    return pixels.reshape(reply["height"], reply["width"], 3)


def photo(channels: int = 3, size: tuple[int, int] = (61, 83)) -> np.ndarray:
    """Something like a photograph: smooth, with noise."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (8, 8, channels)).astype(np.uint8)
    planes = [
        np.asarray(Image.fromarray(coarse[..., c]).resize(size[::-1], 3)) for c in range(channels)
    ]
    noisy = np.stack(planes, -1) + rng.normal(0, 6, (*size, channels))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def filtered_png(values: np.ndarray, png_filter: int) -> bytes:
    """A PNG of 16-bit grey whose rows have one filter; filters above 0 make noise of the values."""
    rows = np.dstack([values >> 8, values & 255]).astype(np.uint8).reshape(len(values), -1)
    lines = b"".join(bytes([png_filter]) + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def files_of_every_kind() -> dict[str, tuple[bytes, int]]:
    """Files by name, and by how much a pixel may differ."""
    rgb, rgba = photo(), photo(4)
    cutout = rgba.copy()
    cutout[..., 3] = np.where(cutout[..., 3] > 99, 255, 0)
    palette = Image.fromarray(rgb)
    deep = rgb[..., 0].astype(np.uint16) * 257 + np.arange(83, dtype=np.uint16)
    transparent = int(deep[9, 9])
    files = {
        "png": (encode(rgb, "PNG"), 0),
        "grey png": (encode(rgb[..., 0], "PNG"), 0),
        "palette png": (encode(palette.convert("P"), "PNG"), 0),
        "transparent png": (encode(rgba, "PNG"), 1),
        "cut-out png": (encode(cutout, "PNG"), 0),
        "16-bit grey png": (encode(deep, "PNG"), 0),
        "16-bit grey png, turned": (encode(deep, "PNG", exif=orientation_exif(8)), 0),
        "16-bit grey png, one value transparent": (
            encode(deep, "PNG", transparency=transparent),
            0,
        ),
        "bmp": (encode(rgb, "BMP"), 0),
        "gif": (encode(palette, "GIF"), 0),
        "webp": (encode(rgb, "WEBP", lossless=True), 0),
        "transparent webp": (encode(rgba, "WEBP", lossless=True), 1),
        "lossy webp": (encode(rgb, "WEBP", quality=70), 2),
        "jpeg": (encode(rgb, "JPEG", quality=80), 2),
        "grey jpeg": (encode(rgb[..., 0], "JPEG", quality=80), 2),
        "progressive jpeg": (encode(rgb, "JPEG", quality=80, progressive=True), 2),
    }
    for png_filter in range(5):
        files[f"16-bit grey png, filter {png_filter}"] = (filtered_png(deep, png_filter), 0)
    for orientation in range(2, 9):
        exif = orientation_exif(orientation)
        files[f"jpeg turned {orientation}"] = (encode(rgb, "JPEG", quality=90, exif=exif), 2)
        files[f"png turned {orientation}"] = (encode(rgb, "PNG", exif=exif), 0)
        files[f"webp turned {orientation}"] = (encode(rgb, "WEBP", lossless=True, exif=exif), 0)
    return files


def test_files_become_the_same_pixels(browser: Any, address: str) -> None:
    open_page(browser, address)
    for name, (content, tolerance) in files_of_every_kind().items():
        expected = decode(content)

        pixels = decode_in_browser(browser, content)

        assert pixels.shape == expected.shape, name
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance, name


def test_bad_files_are_refused_with_a_reason(browser: Any, address: str) -> None:
    rgb = photo()
    bomb = bytearray(encode(rgb, "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    wide = np.zeros((1, 17_000, 3), np.uint8)
    files = [
        (b"", "the file is empty"),
        (svg, "not an image (the content is none of"),
        (encode(rgb, "TIFF"), "a TIFF file"),
        (encode(rgb, "PNG")[:2000], "damaged or truncated PNG"),
        (encode(rgb, "JPEG")[:900], "damaged or truncated JPEG"),
        (encode(rgb, "JPEG")[:30], "damaged or truncated JPEG"),
        (encode(rgb, "GIF")[:900], "damaged or truncated GIF"),
        (encode(rgb, "WEBP", lossless=True)[:900], "damaged or truncated WebP"),
        (encode(rgb, "BMP")[:900], "damaged or truncated BMP"),
        (bytes(bomb), "an image may have at most 20,000,000 pixels"),
        (encode(wide, "PNG"), "an image may be at most 16,384 pixels wide or high"),
        (encode(wide, "BMP"), "an image may be at most 16,384 pixels wide or high"),
        (encode(rgb, "PNG") + bytes(32 * 2**20), "an image file may have at most 33,554,432 bytes"),
    ]
    open_page(browser, address)

    for content, reason in files:
        assert reason in ask(browser, content), reason


def test_probabilities_sets_and_flags_are_those_of_python(
    browser: Any, address: str, tmp_path: Path
) -> None:
    shifted = [
        np.clip(photo().astype(int) + shift, 0, 255).astype(np.uint8)
        for shift in ((90, -90, 0), (9, 9, 9))
    ]
    files = [
        *(encode(image, "PNG") for image in shifted),
        picture((200, 30, 30)),
        picture((99, 99, 99)),
        picture((0, 60, 99), kind="JPEG"),
    ]
    model = threefold.load(write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN)))
    output = model.infer(files)
    flags = model.unknown_from_probs(output.probs).tolist()
    open_page(browser, address)

    answers = [ask(browser, content) for content in files]

    probs = np.array([answer["probs"] for answer in answers])
    assert np.abs(probs - output.probs).max() < 1e-6
    assert [answer["set"] for answer in answers] == model.sets_from_probs(output.probs)
    assert [answer["unknown"] for answer in answers] == flags
    assert flags == [False, True, False, True, False]
    for answer, rows in zip(answers, output.member_probs, strict=True):
        for name, row in zip(model.members, rows, strict=True):
            top = answer["members"][name]["top"]
            by_label = {entry["label"]: entry["probability"] for entry in top}
            shown = np.array([by_label[label] for label in model.classes])
            assert np.abs(shown - row).max() < 1e-6


def test_every_kind_of_set_is_that_of_python(browser: Any, address: str) -> None:
    rng = np.random.default_rng(2)
    probs = rng.dirichlet(np.full(12, 0.5), 60).astype(np.float32)
    ties = probs[:5].round(1) + np.float32(0.1)
    probs[:5] = ties / ties.sum(1, keepdims=True)
    labels = np.array([rng.choice(12, p=row / row.sum()) for row in probs.astype(float)])
    fitted = [
        ConformalSets(method, by_class=by_class, never_empty=never_empty).fit(probs, labels, alpha)
        for method in ("lac", "aps", "raps")
        for by_class in (False, True)
        for never_empty in (False, True)
        for alpha in (0.005, 0.1, 0.7)  # 0.005 is too small for 60 rows: every class is in the set
    ]
    states = [sets.state() for sets in fitted]
    open_page(browser, address)

    replies = browser.execute_async_script(SETS, probs.tolist(), states)

    sizes = set()
    for reply, sets in zip(replies, fitted, strict=True):
        for indices, inside, row in zip(reply, sets.predict_sets(probs), probs, strict=True):
            assert indices == [i for i in np.argsort(-row, kind="stable") if inside[i]]
            sizes.add(len(indices))
    assert {0, 1, 2, 12} <= sizes


def test_a_real_run_answers_as_in_python(
    browser: Any, finished: Run, runtime: Path, tmp_path: Path
) -> None:
    """PNG within 1e-4; JPEG within what one or two levels of a pixel can change."""
    run = tmp_path / "run"
    shutil.copytree(finished.dir, run)
    command = ["export", str(run), "--out", str(tmp_path / "m.onnx")]
    command += ["--web", str(tmp_path / "site"), "--web-runtime", str(runtime)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    images = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids[::4]]  # type: ignore[union-attr]
    jpeg = tmp_path / "on its side.jpg"
    jpeg.write_bytes(encode(photo(), "JPEG", quality=90, exif=orientation_exif(6)))
    transparent = tmp_path / "transparent.png"
    transparent.write_bytes(encode(photo(4), "PNG"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:100])
    images += [jpeg, transparent]
    model = threefold.load(tmp_path / "m.onnx")
    output = model.infer(images)

    with hosting(tmp_path / "site") as url:
        open_page(browser, url)
        choose(browser, *images, broken)
        texts = articles(browser, len(images) + 1)
        exact = np.array([ask(browser, path.read_bytes())["probs"] for path in images])

    difference = np.abs(exact - output.probs).max(1)
    assert difference[[*range(len(images) - 2), -1]].max() < 1e-4
    assert difference[-2] < 1e-2
    assert "damaged or truncated PNG" in texts.pop()
    for text, image, probs, rows in zip(
        texts, images, output.probs, output.member_probs, strict=True
    ):
        check_article(text, image.name, model.members, probs, rows)


def test_the_page_shows_the_card(browser: Any, address: str) -> None:
    open_page(browser, address)
    open_details(browser)

    facts = browser.find_element("id", "facts").text

    assert browser.find_element("id", "name").text == "colours"
    assert "no image leaves it" in browser.find_element("id", "drop").text
    assert not browser.find_element("id", "program").is_displayed()
    for part in (
        "honest",
        "1000 rows, test",
        "sharp (mean + linear)",
        f"onnxruntime-web {onnxruntime_web.VERSION}",
    ):
        assert part in facts


def test_it_loads_its_own_files_only(browser: Any, address: str, red: Path) -> None:
    open_page(browser, address)
    browser.refresh()
    choose(browser, red)
    articles(browser, 1)

    urls = requested_urls(browser)

    assert f"{address}worker.js" in urls
    assert all(url.startswith((address, "blob:", "data:")) for url in urls)
    assert not severe_messages(browser)
    check_policy_blocks_other_hosts(browser)


def test_a_missing_or_other_model_is_reported_and_retried(
    browser: Any, runtime: Path, red: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    write_web(write_model(tmp_path / "m.onnx"), site, runtime)
    model, content = site / "model.onnx", red.read_bytes()
    sound = model.read_bytes()
    with hosting(site) as url:
        open_page(browser, url)

        model.unlink()
        assert ask(browser, content) == "the model file cannot be loaded: 404"

        model.write_bytes(sound[:-9])
        assert "is incomplete" in ask(browser, content)

        model.write_bytes(sound + b"more")
        assert "does not belong to this page" in ask(browser, content)

        model.write_bytes(sound)
        assert ask(browser, content)["label"] == "red"


def test_opened_as_a_file_it_says_what_it_needs(
    browser: Any, runtime: Path, tmp_path: Path
) -> None:
    write_web(write_model(tmp_path / "m.onnx"), tmp_path / "site", runtime)

    browser.get((tmp_path / "site/index.html").as_uri())

    assert "needs a web server" in headline(browser)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1000])
def test_any_width_light_and_dark(
    browser: Any, address: str, red: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    try:
        emulate(browser, width, dark)
        open_page(browser, address)
        choose(browser, red, bad)
        articles(browser, 2)
        open_details(browser)

        check_fits_and_is_readable(browser, width)
    finally:
        emulate(browser, 1000, False)


def test_the_keyboard_is_enough(browser: Any, address: str, red: Path) -> None:
    open_page(browser, address)
    choose(browser, red)
    articles(browser, 1)

    names = ["pick", "clear", "Remove red.png", "Why? red, red.png", "Model card"]
    check_tab_order(browser, names)
