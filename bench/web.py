"""Compare the folder of `threefold export --web` in headless Chromium with `threefold.load`.

    uv run --group browser python bench/web.py MODEL.onnx [--images 200] [--rounds 20]

Images: test images of the packaged Fashion-MNIST as PNG, and three photographs that ship with
scikit-learn and matplotlib, saved as PNG, transparent PNG, several kinds of JPEG, and WebP. Both
sides decode and answer every file. Time: one file again and again, in turns in the browser (one
WebAssembly thread, in its worker) and with onnxruntime in this process (one thread), without
decoding; medians and their ratio. Needs chromium, chromedriver and npm.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import sys
import tempfile
import time
from importlib.resources import files as resources
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image
from selenium import webdriver

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.http_server import hosting

import threefold
from threefold.data.images import decode
from threefold.runtime.model import Model
from threefold.serving.browser import write_web
from threefold.training.provenance import commit, hardware

ASK = """
const [module, call, data, limits, done] = arguments;
const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
const text = (array) => {
  let characters = "";
  for (let i = 0; i < array.length; i += 8192)
    characters += String.fromCharCode(...array.subarray(i, i + 8192));
  return btoa(characters);
};
import(module)
  .then((m) => m[call](new File([bytes], "image"), limits ?? (() => {})))
  .then((reply) => reply.data ? { ...reply, data: text(reply.data) } : reply)
  .then(done, (error) => done(String(error)));
"""


LIMITS = {"file_bytes": 10**8, "pixels": 10**8, "side": 10**5}


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photographs() -> list[Image.Image]:
    named = [
        Path(sklearn.datasets.__file__).parent / "images" / name
        for name in ("china.jpg", "flower.jpg")
    ]
    named.append(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg")
    return [Image.open(path).convert("RGB") for path in named]


def files_of_every_kind(image: Image.Image) -> dict[str, bytes]:
    """One photograph in several formats."""
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = image.copy()
    transparent.putalpha(image.convert("L"))
    return {
        "PNG": encode(image, "PNG"),
        "PNG, half transparent": encode(transparent, "PNG"),
        "JPEG 4:2:0, quality 75": encode(image, "JPEG", quality=75),
        "JPEG 4:4:4, quality 95": encode(image, "JPEG", quality=95, subsampling=0),
        "JPEG, progressive": encode(image, "JPEG", quality=85, progressive=True),
        "JPEG, to be turned": encode(image, "JPEG", quality=85, exif=exif),
        "WebP, lossy": encode(image, "WEBP", quality=80),
        "WebP, to be turned": encode(image, "WEBP", lossless=True, exif=exif),
        "PNG, 16-bit grey": encode(
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 251), "PNG"
        ),
    }


def chromium() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    browser.set_script_timeout(300)
    return browser


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    model = threefold.load(args.model, threads=1)
    asset_path = Path(str(resources("threefold"))) / "assets/fashion_mnist/data.npz"
    with np.load(asset_path, allow_pickle=False) as asset:
        arrays = asset["test_images"][: args.images]
    small = [encode(Image.fromarray(array), "PNG") for array in arrays]
    kinds: dict[str, list[bytes]] = {f"Fashion-MNIST, PNG ({len(small)} images)": small}
    for photo in photographs():
        for kind, content in files_of_every_kind(photo).items():
            kinds.setdefault(kind, []).append(content)
    print(f"{hardware()}, commit {commit()}")
    with tempfile.TemporaryDirectory() as folder:
        web = write_web(args.model, Path(folder) / "site")
        print(web)
        with hosting(web.path) as url:
            browser = chromium()
            try:
                print(browser.capabilities["browserVersion"])
                browser.get(url)
                measure(Page(browser), model, kinds, args.rounds)
            finally:
                browser.quit()


class Page:
    """The page of a web folder, and calls of its modules."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def call(self, content: bytes, module: str, function: str, argument: Any = None) -> Any:
        """Call a function of a module with a file."""
        data = base64.b64encode(content).decode()
        return self.browser.execute_async_script(ASK, module, function, data, argument)

    def predict(self, content: bytes) -> dict[str, Any]:
        """Predict a file; the reply has `probs` and `milliseconds`."""
        reply = self.call(content, "./backend.js", "predict")
        assert isinstance(reply, dict), reply
        return reply

    def decode(self, content: bytes) -> np.ndarray:
        """Decode a file to pixels (h, w, 3)."""
        reply = self.call(content, "./decode.js", "decode", LIMITS)
        pixels = np.frombuffer(base64.b64decode(reply["data"]), np.uint8)
        return pixels.reshape(reply["height"], reply["width"], 3)


def measure(page: Page, model: Model, kinds: dict[str, list[bytes]], rounds: int) -> None:
    """Print the table of differences, then the times."""
    time.sleep(1)  # the card arrives
    start = time.monotonic()
    page.predict(kinds["PNG"][0])
    seconds = time.monotonic() - start
    print(f"first answer, with downloading and starting the model: {seconds:.1f} s")
    print(
        f"{'files':32} {'pixels: largest':>16} {'share':>10} "
        f"{'probability: largest':>21} {'same class':>11}"
    )
    for kind, files in kinds.items():
        compare(page, model, kind, files)
    for name, content in (
        ("28 x 28", next(iter(kinds.values()))[0]),
        ("640 x 427", kinds["PNG"][0]),
    ):
        measure_time(page, model, name, content, rounds)


def compare(page: Page, model: Model, kind: str, files: list[bytes]) -> None:
    """Print how pixels and probabilities of some files differ between browser and Python."""
    pixel_differences, differences, same_class = [], [], 0
    for content in files:
        difference = np.abs(page.decode(content).astype(int) - decode(content))
        pixel_differences.append(difference.ravel())
        browser_probs = np.array(page.predict(content)["probs"])
        python_probs = model.predict_proba([content])[0]
        differences.append(float(np.abs(browser_probs - python_probs).max()))
        same_class += int(browser_probs.argmax() == python_probs.argmax())
    pixels = np.concatenate(pixel_differences)
    print(
        f"{kind:32} {pixels.max():16} {np.mean(pixels > 0):10.4%} "
        f"{max(differences):21.1e} {same_class:7} of {len(files)}"
    )


def measure_time(page: Page, model: Model, name: str, content: bytes, rounds: int) -> None:
    """Print median milliseconds in the browser and in this process, in turns."""
    image = decode(content)
    browser_times, python_times = [], []
    for _ in range(rounds):
        browser_times.append(page.predict(content)["milliseconds"])
        start = time.perf_counter()
        model.session.run(["probs"], {"images": image[None]})
        python_times.append(1000 * (time.perf_counter() - start))
    ratio = median(a / b for a, b in zip(browser_times, python_times, strict=True))
    print(
        f"{name}: browser {median(browser_times):.0f} ms, "
        f"onnxruntime, one thread {median(python_times):.0f} ms, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
