"""Places that tests read from."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""

GOLDEN = ROOT / "tests" / "golden"
"""Stored reference values."""

AUTHORS_PREDICTIONS = ROOT.parent / "shared" / "data" / "fashion_mnist_authors_predictions.npz"
"""The paper's own predictions, where a copy lies beside the repository; tests skip without it."""
