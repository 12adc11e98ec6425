"""Photographs to review: a copy under another label, and an empty one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from threefold.evaluation.review_state import ReviewState

COPY, EMPTY = "dog/<b>copy&.png", "cat/empty.png"


def write_photos(root: Path) -> Path:
    """Write 24 images of two classes and the two that are found; returns the folder."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((600, 300)).save(root / label / f"{i}.png")
    (root / COPY).write_bytes((root / "cat/0.png").read_bytes())
    Image.new("RGB", (600, 300), (9, 9, 9)).save(root / EMPTY)
    return root


def labels(state: ReviewState) -> dict[str, str]:
    """Return the labels in the written file, by folder and name."""
    with open(state.target, newline="") as file:
        rows = list(csv.DictReader(file))
    return {"/".join(Path(row["path"]).parts[-2:]): row["label"] for row in rows}
