"""The smallest recipe with both kinds of stage, for benches that break a run in many ways."""

from __future__ import annotations

from typing import Any


def tiny_recipe(root: str) -> dict[str, Any]:
    """Return the recipe of one network without pretrained weights: a head, then one epoch.

    Args:
        root: folder of the images.
    """
    return {
        "data": {"root": root},
        "folds": {"k": 2, "select": 0.25},
        "features": {"engine": "torch"},
        "train": {"batch_size": 8, "device": "cpu", "precision": "float32"},
        "ensemble": {"methods": ["mean"]},
        "stages": [
            {"name": "head", "kind": "head"},
            {"name": "tune", "epochs": 1, "lr": 1e-3},
        ],
        "members": [{"name": "m", "backbone": "test_resnet", "weights": "none", "img_size": 32}],
    }
