"""Builders of predictions and of files that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from threefold.predictions.predictions import Predictions

names = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12)


def make(m: int = 2, n: int = 6, k: int = 3, **changes) -> Predictions:
    rng = np.random.default_rng(0)
    parts = {
        "probs": rng.dirichlet(np.ones(k), (m, n)).astype(np.float32),
        "labels": np.arange(n) % k,
        "ids": tuple(f"train/{i}.png" for i in range(n)),
        "classes": tuple("abcdefgh"[:k]),
        "members": tuple(f"net{i}" for i in range(m)),
    }
    return Predictions(**{**parts, **changes})


def raw(**changes) -> dict[str, np.ndarray]:
    """The arrays of a foreign file; a value of None leaves the array out."""
    predictions = make()
    arrays = {"probs": predictions.probs, "labels": predictions.labels, **changes}
    return {name: value for name, value in arrays.items() if value is not None}


def same(a: Predictions, b: Predictions) -> bool:
    arrays = [(a.probs, b.probs), (a.labels, b.labels), (a.folds, b.folds)]
    plain = ("ids", "classes", "members", "groups", "protocol", "kind")
    return all(getattr(a, name) == getattr(b, name) for name in plain) and all(
        (x is None and y is None) or (x.dtype == y.dtype and x.tobytes() == y.tobytes())
        for x, y in arrays
    )


@st.composite
def predictions(draw):
    m, n, k = draw(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(2, 6)))
    weights = draw(hnp.arrays(np.float32, (m, n, k), elements=st.floats(0.0078125, 1, width=32)))
    unique = {"unique": True}
    return Predictions(
        probs=weights / weights.sum(-1, keepdims=True),
        labels=draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1))),
        ids=tuple(draw(st.lists(names, min_size=n, max_size=n, **unique))),
        classes=tuple(draw(st.lists(names, min_size=k, max_size=k, **unique))),
        members=tuple(draw(st.lists(names, min_size=m, max_size=m, **unique))),
        groups=draw(st.none() | st.lists(names, min_size=n, max_size=n).map(tuple)),
        protocol=draw(st.sampled_from(["honest", "paper"])),
        kind=draw(st.sampled_from(["oof", "test", "foreign"])),
        folds=draw(st.none() | hnp.arrays(np.int64, n, elements=st.integers(-1, 4))),
    )


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
