"""Build tiny image folders and recipes that train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from threefold.files import sha256

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}


def paint(
    path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 32)
) -> None:
    """Write a noisy image of one colour."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 60, (*size[::-1], 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(root: Path, per_class: int = 12, test: int = 0) -> Path:
    """Write class folders of coloured noise; with `test`, below train/ and test/."""
    counts = {"train": per_class, "test": test} if test else {"": per_class}
    for split, count in counts.items():
        for c, (name, colour) in enumerate(COLOURS.items()):
            for i in range(count):
                seed = hash((split == "test", c, i)) % 2**31
                paint(root / split / name / f"{i:03d}.png", colour, seed)
    return root


def tiny_tree(root: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe as plain values: two tiny networks from scratch, two folds, two stages."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"root": str(root)},
        "folds": {"k": 2, "select": 0.25},
        "augment": {"hflip": True, "rotation": 10.0},
        # Not "auto", which takes bfloat16 on some processors: exported files answer in float32.
        "train": {"batch_size": 8, "device": "cpu", "precision": "float32"},
        # A hidden layer of the paper's width, 4096, takes longer to fit than the networks do.
        "ensemble": {"methods": ["mean", "pruned", "stacked"], "stacked": {"hidden": 64}},
        "stages": [
            {"name": "one", "epochs": 2, "lr": 3e-3, "schedule": "one-cycle"},
            {"name": "two", "epochs": 1, "lr": 3e-4},
        ],
        "members": [
            {"name": "plain", "backbone": "test_resnet", "weights": "none", "img_size": 32},
            {
                "name": "gated",
                "backbone": "test_efficientnet",
                "weights": "none",
                "img_size": 40,
                "head": {"kind": "gru", "units": 16, "fc": 8},
            },
        ],
    }
    return {**tree, **changes}


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hash of every weights and probabilities file of a run, by its path."""
    return {
        str(p.relative_to(folder)): sha256(p)
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".safetensors", ".npz")
    }
