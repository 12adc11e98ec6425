"""Load a source of images as a recipe's `data` table does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from threefold.data.dataset import Sources
from threefold.data.load import load_data
from threefold.recipe.schema import DataSpec


def load_source(source: Any, root: str | Path, **options: Any) -> Sources:
    """Load the data set `source` at `root`; `options` are further values of the `data` table."""
    return load_data(DataSpec(source=source, root=str(root), **options), 0)
