"""Images in a second of `predict` on a folder, decoding included, and of the bare session.

    python bench/predict_folder.py MODEL FOLDER [--batch 16] [--device cpu] [--rounds 3]

predict: `predict_to_file` as the command calls it, from the list of files to the CSV file. bare: an
onnxruntime session of the same file, called with as many images at a time, which are decoded and on
the model's canvas already (or, without a common canvas, those of the first image's size). decode:
the reading, decoding and resizing alone, in the same threads. All three take turns. Where cores
allow, the target is predict / bare >= 0.9; where they do not, both share the cores, and
1 / (1 / bare + 1 / decode) is what can be had.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import threefold
from threefold.data.images import decode
from threefold.machine import decoding_threads
from threefold.runtime.model import FULL, Model
from threefold.runtime.predict import Engine, find_images
from threefold.runtime.predict_file import predict_to_file


def speed_of_predict(model: Path, folder: Path, engine: Engine) -> tuple[float, int]:
    """Images in a second of the command, and the size of its batches at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "answers.csv"
        done = predict_to_file(target, print, model, [str(folder)], engine=engine)
    return done.images / done.seconds, done.batch


def speed_of_session(model: Model, images: list[np.ndarray], batch: int) -> float:
    """Images in a second of the bare session."""
    same = [image for image in images if image.shape == images[0].shape]
    batches = [
        np.stack([*itertools.islice(itertools.cycle(same), start, start + batch)])
        for start in range(0, len(images), batch)
    ]
    outputs = ["probs", "member_probs"]
    inputs = {} if model.cascade is None else {"stop": model.stop_thresholds(FULL)}
    model.session.run(outputs, {"images": batches[0], **inputs})
    begin = time.perf_counter()
    for images_of_batch in batches:
        model.session.run(outputs, {"images": images_of_batch, **inputs})
    return len(batches) * batch / (time.perf_counter() - begin)


def speed_of_decoding(paths: list[Path], prepare: Callable[[np.ndarray], np.ndarray]) -> float:
    """Images in a second of the threads that decode."""
    threads = decoding_threads()
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda path: prepare(decode(path)).shape, paths):
            pass
    return len(paths) / (time.perf_counter() - begin)


def main() -> None:
    """Print a line for each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = threefold.load(args.model, device=args.device)
    paths = [*find_images([str(args.folder)])]
    images = [model.fit_canvas(decode(path)) for path in paths[:1000]]
    rows = []
    for number in range(args.rounds):
        predicted, batch = speed_of_predict(
            args.model, args.folder, Engine(args.device, args.batch)
        )
        bare = speed_of_session(model, images, batch)
        decoded = speed_of_decoding(paths, model.fit_canvas)
        rows.append((predicted, bare, decoded, predicted / bare))
        print(
            f"round {number + 1}: predict {predicted:.1f}/s, bare {bare:.1f}/s, "
            f"decode {decoded:.1f}/s, predict / bare {predicted / bare:.2f}",
            flush=True,
        )
    predicted, bare, decoded, share = np.median(rows, axis=0)
    shared = 1 / (1 / bare + 1 / decoded)
    print(
        f"median of {args.rounds}: predict {predicted:.1f}/s, bare {bare:.1f}/s, decode "
        f"{decoded:.1f}/s, predict / bare {share:.2f}, predict / shared {predicted / shared:.2f} "
        f"({len(paths)} images, batch {args.batch}, {args.device}, {os.cpu_count()} cores)"
    )


if __name__ == "__main__":
    main()
