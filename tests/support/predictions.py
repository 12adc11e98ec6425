"""Builders of predictions and of files that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from threefold.errors import DataError
from threefold.predictions.formats import read_predictions
from threefold.predictions.predictions import Predictions

names = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12)


def make_predictions(m: int = 2, n: int = 6, k: int = 3, **changes: Any) -> Predictions:
    """Random predictions with every name set; `changes` replace arguments."""
    rng = np.random.default_rng(0)
    arguments: dict[str, Any] = {
        "probs": rng.dirichlet(np.ones(k), (m, n)).astype(np.float32),
        "labels": np.arange(n) % k,
        "ids": tuple(f"train/{i}.png" for i in range(n)),
        "classes": tuple("abcdefgh"[:k]),
        "members": tuple(f"net{i}" for i in range(m)),
    }
    return Predictions(**{**arguments, **changes})


def foreign_arrays(**changes: Any) -> dict[str, np.ndarray]:
    """The arrays of a foreign file; a value of None leaves the array out."""
    predictions = make_predictions()
    arrays = {"probs": predictions.probs, "labels": predictions.labels, **changes}
    return {name: value for name, value in arrays.items() if value is not None}


def are_equal(a: Predictions, b: Predictions) -> bool:
    """Whether all names and, bit for bit, all arrays are equal."""
    for name in ("ids", "classes", "members", "groups", "protocol", "kind"):
        if getattr(a, name) != getattr(b, name):
            return False
    for x, y in ((a.probs, b.probs), (a.labels, b.labels), (a.folds, b.folds)):
        if x is None or y is None:
            if x is not y:
                return False
        elif x.dtype != y.dtype or x.tobytes() != y.tobytes():
            return False
    return True


def assert_refused(
    path: Path, message: str, read: Callable[..., Predictions] = read_predictions, **options: Any
) -> None:
    """Check that reading ends in one line that matches `message` and names the file."""
    with pytest.raises(DataError, match=message) as caught:
        read(path, **options)

    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 700


@st.composite
def predictions(draw: st.DrawFn) -> Predictions:
    """Any valid predictions, with all of Unicode in the names."""
    m, n, k = draw(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(2, 6)))
    weights = draw(hnp.arrays(np.float32, (m, n, k), elements=st.floats(0.0078125, 1, width=32)))
    return Predictions(
        probs=weights / weights.sum(-1, keepdims=True),
        labels=draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1))),
        ids=tuple(draw(st.lists(names, min_size=n, max_size=n, unique=True))),
        classes=tuple(draw(st.lists(names, min_size=k, max_size=k, unique=True))),
        members=tuple(draw(st.lists(names, min_size=m, max_size=m, unique=True))),
        groups=draw(st.none() | st.lists(names, min_size=n, max_size=n).map(tuple)),
        protocol=draw(st.sampled_from(["honest", "paper"])),
        kind=draw(st.sampled_from(["oof", "test", "foreign"])),
        folds=draw(st.none() | hnp.arrays(np.int64, n, elements=st.integers(-1, 4))),
    )


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")
