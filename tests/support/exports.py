"""Images and pipelines for exported files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from threefold.ensembles.registry import make_ensemble
from threefold.ensembles.scaling import temperature_module
from threefold.exporting import onnx_files
from threefold.models.pipeline import Combiner, Pipeline
from threefold.runtime.model import Model
from threefold.training.run import Run


def run_pipeline(run: Run, method: str = "mean") -> Pipeline:
    """The pipeline of a run's members, with this ensemble and a temperature of 1.3."""
    oof = run.predictions("oof")
    ensemble = make_ensemble(method).fit(oof.probs, oof.labels)
    return run.pipeline(Combiner(ensemble.to_module(), temperature_module(1.3)))


def noise_images(count: int = 6) -> list[np.ndarray]:
    """Random images uint8 of random sizes."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        height, width = int(rng.integers(3, 90)), int(rng.integers(3, 90))
        images.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return images


def plain_images(count: int = 200) -> list[np.ndarray]:
    """Images of one random colour each, uint8 of random sizes."""
    rng = np.random.default_rng(0)
    colours, sides = rng.integers(0, 256, (count, 3)), rng.integers(3, 20, count)
    return [
        np.full((int(side), int(side) + 2, 3), colour, np.uint8)
        for colour, side in zip(colours, sides, strict=True)
    ]


def dimmed_images(count: int = 60, side: int | None = None) -> list[np.ndarray]:
    """Random images of random brightness, uint8 of random sizes or all of one height."""
    rng = np.random.default_rng(0)
    sides = rng.integers(3, 20, count) if side is None else np.full(count, side)
    images = []
    for height in map(int, sides):
        pixels = rng.integers(0, 256, (height, height + 2, 3), dtype=np.uint8)
        images.append(pixels // np.uint8(rng.integers(1, 9)))
    return images


def save_images(images: list[np.ndarray], folder: Path) -> None:
    """Write images as 000.png, 001.png, ..."""
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def copy_with_card(model: Model, path: Path, **changes: Any) -> Path:
    """Write a copy of a model file whose card has other values."""
    copy = onnx.load(model.path)
    onnx_files.set_card(copy, {**model.card, **changes})
    onnx.save(copy, path)
    return path
