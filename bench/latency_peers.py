"""Time one image: the exported ensemble beside its members, exported one by one without it.

    uv run python bench/latency_peers.py [--sizes 96,160,224] [--image 640x480] [--rounds 40]
        [--threads 1]

The ensemble is one file of three packaged EfficientNet-Lite networks with random heads, as
`threefold.load` runs it. The peers are the same three networks of timm, each exported by
`torch.onnx.export` and run by onnxruntime with its own defaults; their preparation is Pillow's
resize and timm's mean and standard deviation, done once for all three. Both sides start from the
same decoded image. They take turns, so that other work on the machine affects both alike; the ratio
is the median over rounds of the ensemble's time by the sum of the peers'. With more than one thread
those of one session wait in a loop for a while, and slow down the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image
from serve import export_pipeline

import threefold
from threefold.training.provenance import commit, hardware

NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")


def export_networks(folder: Path, size: int) -> list[Path]:
    """Export each network by itself, for one image."""
    paths = []
    for name in NETWORKS:
        network = timm.create_model(name, num_classes=10).eval()
        path = folder / f"{name}-{size}.onnx"
        torch.onnx.export(network, (torch.zeros(1, 3, size, size),), path, dynamo=True)
        paths.append(path)
    return paths


def ensemble_call(path: Path, pixels: np.ndarray, threads: int) -> Callable[[], object]:
    """One answer of the ensemble's file."""
    model = threefold.load(path, threads)
    return lambda: model.infer([pixels])


def peers_call(
    paths: list[Path], pixels: np.ndarray, size: int, threads: int
) -> Callable[[], object]:
    """One answer of each network's file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = [onnxruntime.InferenceSession(path, options) for path in paths]
    config = timm.data.resolve_data_config({}, model=timm.create_model(NETWORKS[0]))
    mean, std = (np.array(config[key], np.float32) for key in ("mean", "std"))

    def call() -> None:
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
        values = (np.asarray(image, np.float32) / 255 - mean) / std
        batch = np.ascontiguousarray(values.transpose(2, 0, 1)[None])
        for session in sessions:
            session.run(None, {session.get_inputs()[0].name: batch})

    return call


def time_turns(calls: list[Callable[[], object]], rounds: int) -> np.ndarray:
    """Milliseconds of each call in each round (rounds, calls), after one round to warm up."""
    elapsed = np.empty((rounds + 1, len(calls)))
    for row in elapsed:
        for column, call in enumerate(calls):
            began = time.perf_counter()
            call()
            row[column] = 1000 * (time.perf_counter() - began)
    return elapsed[1:]


def main() -> None:
    """Time both sides at each size, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="96,160,224")
    parser.add_argument("--image", default="640x480")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    width, height = map(int, options.image.split("x"))
    coarse = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height)))
    print("| size | ensemble ms | sum of three files ms | ensemble / sum |")
    print("|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ensemble.onnx"
            export_pipeline(path, size)
            networks = export_networks(Path(folder), size)
            calls = [
                ensemble_call(path, pixels, options.threads),
                peers_call(networks, pixels, size, options.threads),
            ]
            elapsed = time_turns(calls, options.rounds)
        ours, theirs = np.median(elapsed, axis=0)
        ratio = np.median(elapsed[:, 0] / elapsed[:, 1])
        print(f"| {size} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)
    print(f"\n{time.strftime('%Y-%m-%d')}, {hardware()}, commit {commit()}")


if __name__ == "__main__":
    main()
