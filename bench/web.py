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
import functools
import http.server
import io
import shutil
import tempfile
import threading
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

import threefold
from threefold.data.images import decode
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


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's static server without its log."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
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


def every_kind(image: Image.Image) -> dict[str, bytes]:
    """One photograph in several formats."""
    exif = Image.Exif()
    exif[0x0112] = 6
    glass = image.copy()
    glass.putalpha(image.convert("L"))
    return {
        "PNG": saved(image, "PNG"),
        "PNG, half transparent": saved(glass, "PNG"),
        "JPEG 4:2:0, quality 75": saved(image, "JPEG", quality=75),
        "JPEG 4:4:4, quality 95": saved(image, "JPEG", quality=95, subsampling=0),
        "JPEG, progressive": saved(image, "JPEG", quality=85, progressive=True),
        "JPEG, to be turned": saved(image, "JPEG", quality=85, exif=exif),
        "WebP, lossy": saved(image, "WEBP", quality=80),
        "WebP, to be turned": saved(image, "WEBP", lossless=True, exif=exif),
        "PNG, 16-bit grey": saved(
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 251), "PNG"
        ),
    }


def chromium() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
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
    with np.load(
        resources("threefold") / "assets/fashion_mnist/data.npz", allow_pickle=False
    ) as asset:
        small = [
            saved(Image.fromarray(pixels), "PNG") for pixels in asset["test_images"][: args.images]
        ]
    kinds: dict[str, list[bytes]] = {f"Fashion-MNIST, PNG ({len(small)} images)": small}
    for photo in photographs():
        for kind, content in every_kind(photo).items():
            kinds.setdefault(kind, []).append(content)
    print(f"{hardware()}, commit {commit()}")
    with tempfile.TemporaryDirectory() as folder:
        web = write_web(args.model, Path(folder) / "site")
        print(web)
        handler = functools.partial(Quiet, directory=web.path)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = chromium()
        try:
            print(browser.capabilities["browserVersion"])
            browser.get(f"http://127.0.0.1:{server.server_port}/")
            measure(browser, model, kinds, args.rounds)
        finally:
            browser.quit()
            server.shutdown()


def measure(
    browser: Any, model: threefold.runtime.Model, kinds: dict[str, list[bytes]], rounds: int
) -> None:
    """Print the table of differences, then the times."""

    def ask(
        content: bytes, module: str = "./backend.js", call: str = "predict", limits: Any = None
    ) -> Any:
        return browser.execute_async_script(
            ASK, module, call, base64.b64encode(content).decode(), limits
        )

    limits = {"file_bytes": 10**8, "pixels": 10**8, "side": 10**5}
    time.sleep(1)  # the card arrives
    began = time.monotonic()
    ask(kinds["PNG"][0])
    print(f"first answer, with fetching and starting the model: {time.monotonic() - began:.1f} s")
    print(
        f"{'files':32} {'pixels: most':>12} {'share other':>12} "
        f"{'probability: most':>18} {'same class':>11}"
    )
    for kind, files in kinds.items():
        pixels, probs = [], []
        for content in files:
            reply, ours = ask(content, "./decode.js", "decode", limits), decode(content)
            theirs = np.frombuffer(base64.b64decode(reply["data"]), np.uint8).reshape(ours.shape)
            pixels.append(np.abs(theirs.astype(int) - ours))
            probs.append((np.array(ask(content)["probs"]), model.predict_proba([content])[0]))
        most = max(int(p.max()) for p in pixels)
        other = np.mean(np.concatenate([p.ravel() for p in pixels]) > 0)
        apart = max(float(np.abs(a - b).max()) for a, b in probs)
        same = sum(a.argmax() == b.argmax() for a, b in probs)
        print(f"{kind:32} {most:12} {other:12.4%} {apart:18.1e} {same:7} of {len(files)}")
    for name, content in (
        ("28 x 28", next(iter(kinds.values()))[0]),
        ("640 x 427", kinds["PNG"][0]),
    ):
        theirs, ours, image = [], [], decode(content)
        for _ in range(rounds):
            theirs.append(ask(content)["milliseconds"])
            began = time.perf_counter()
            model.session.run(["probs"], {"images": image[None]})
            ours.append(1000 * (time.perf_counter() - began))
        ratio = median(a / b for a, b in zip(theirs, ours, strict=True))
        print(
            f"{name}: browser {median(theirs):.0f} ms, "
            f"onnxruntime, one thread {median(ours):.0f} ms, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
