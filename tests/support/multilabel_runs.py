"""Tiny runs of images with any number of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.frozen_runs import GATED, PROBE
from support.tiny_runs import tiny_tree
from threefold.recipe.recipe import Recipe


def multilabel_tree(table: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe as plain values: two probes, and one that is tuned from the first."""
    stages = [
        {"name": "head", "kind": "head", "members": ["probe", "gated"], "epochs": 2, "lr": 1e-2},
        {"name": "tune", "epochs": 2, "lr": 1e-3, "members": ["tuned"]},
    ]
    own = {
        "data": {"source": "csv", "root": str(table), "task": "multilabel"},
        "stages": stages,
        "members": [PROBE, GATED, {"name": "tuned", "starts_from": "probe", "img_size": 32}],
        "features": {"engine": "torch"},
    }
    tree = tiny_tree(table, **{**own, **changes})
    tree.pop("ensemble", None)
    return tree


def multilabel_recipe(table: Path, *sets: str, **changes: Any) -> Recipe:
    """Return the recipe of `multilabel_tree` with overrides."""
    return Recipe.parse(multilabel_tree(table, **changes), sets)
