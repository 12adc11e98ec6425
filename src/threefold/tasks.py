"""The two tasks: one class for an image, or any number of labels."""

from __future__ import annotations

from typing import Final, Literal

Task = Literal["multiclass", "multilabel"]

TASKS: Final[tuple[Task, ...]] = ("multiclass", "multilabel")
"""In scikit-learn's words. An image has exactly one class, or any number of labels, also none."""
