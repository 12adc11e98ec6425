"""Predictions of simulated models, in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from threefold.predictions.predictions import Predictions


def model(
    n: int = 300, right: float = 0.8, seed: int = 0, name: str = "net", **more: object
) -> Predictions:
    """Simulate a member of accuracy `right`; labels and ids do not depend on the seed."""
    labels = np.random.default_rng(99).integers(0, 3, n)
    rng = np.random.default_rng(seed)
    answers = np.where(rng.random(n) < right, labels, (labels + 1) % 3)
    tree = {
        "ids": tuple(f"i{i}" for i in range(n)),
        "classes": ("a", "b", "c"),
        "members": (name,),
        **more,
    }
    return Predictions(
        probs=(0.7 * np.eye(3)[answers] + 0.1)[None].astype(np.float32), labels=labels, **tree
    )  # type: ignore[arg-type]


def save(folder: Path, **models: Predictions) -> list[str]:
    """Write a file for each model, and return their paths."""
    for name, rows in models.items():
        rows.save(folder / f"{name}.npz")
    return [str(folder / f"{name}.npz") for name in models]
