"""Cross-fitting: no row is predicted by an ensemble that saw it; groups stay whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pools import scored

from threefold.ensembles.averaging import MeanEnsemble, WeightedEnsemble
from threefold.ensembles.base import Ensemble
from threefold.ensembles.cross_fit import cross_fit
from threefold.errors import DataError

LAW = settings(max_examples=50, deadline=None)


class Memory(Ensemble):
    """Remembers the label of every row that it was fitted on: a leak would make it perfect."""

    _state = ("known_",)
    known_: dict[bytes, int]

    def _fit(self, probs, labels):
        self.known_ = {probs[:, i].tobytes(): int(labels[i]) for i in range(len(labels))}

    def _combine(self, probs):
        answers = [self.known_.get(probs[:, i].tobytes(), 0) for i in range(probs.shape[1])]
        return np.eye(probs.shape[2])[answers]

    def to_module(self):
        raise NotImplementedError


class Witness(Memory):
    """Records the rows of every fit: the first probability encodes the row number."""

    fits: list[set[int]]

    def _fit(self, probs, labels):
        super()._fit(probs, labels)
        self.fits.append({round(float(p) * 1e4) for p in probs[0, :, 0]})


def numbered(n: int, k: int = 3) -> np.ndarray:
    """Return probabilities (1, n, k) whose first class encodes the row number."""
    first = np.arange(n) / 1e4
    rest = np.repeat((1 - first)[:, None] / (k - 1), k - 1, 1)
    return np.column_stack([first, rest])[None]


def parts_of(labels: np.ndarray, groups: list[str] | None = None) -> np.ndarray:
    """Return the parts of cross_fit, recovered from the rows that it fitted on."""
    fits: list[set[int]] = []

    def factory() -> Witness:
        witness = Witness()
        witness.fits = fits
        return witness

    n = len(labels)
    cross_fit(factory, numbered(n), labels, groups=groups)
    parts = [set(range(n)) - rows for rows in fits]
    assert sum(map(len, parts)) == n
    part = np.full(n, -1)
    for number, rows in enumerate(parts):
        part[list(rows)] = number
    assert (part >= 0).all()
    return part


@pytest.mark.parametrize("folds", [None, np.arange(60) % 3])
def test_no_row_is_predicted_by_an_ensemble_that_saw_it(folds: np.ndarray | None) -> None:
    labels = np.array([1, 2] * 30)
    probs = numbered(60)

    leaked = Memory().fit(probs, labels).predict(probs)
    answers = cross_fit(Memory, probs, labels, folds).argmax(1)

    assert (leaked == labels).all()
    assert (answers == 0).all()


def test_cross_fit_uses_the_folds_of_its_caller() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), (2, 40))
    labels = rng.integers(0, 3, 40)
    folds = rng.integers(-1, 3, 40)

    answers = cross_fit(WeightedEnsemble, probs, labels, folds)

    for value in np.unique(folds):
        inside = folds == value
        ensemble = WeightedEnsemble().fit(probs[:, ~inside], labels[~inside])
        assert (answers[inside] == ensemble.predict_proba(probs[:, inside])).all()
    assert (cross_fit(MeanEnsemble, probs, labels) == MeanEnsemble().predict_proba(probs)).all()


@LAW
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=3).filter(lambda c: sum(c) > 1),
    seed=st.integers(0, 99),
)
def test_parts_are_stratified_whatever_the_classes_sizes(counts: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))

    part = parts_of(labels)

    for c, count in enumerate(counts):
        sizes = np.bincount(part[labels == c], minlength=min(5, len(labels)))
        assert sizes.max() - sizes.min() <= 1, count


@LAW
@given(seed=st.integers(0, 999), number=st.integers(2, 15))
def test_groups_stay_in_one_part(seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    labels, numbers = rng.integers(0, 3, 80), rng.integers(0, number, 80)

    part = parts_of(labels, [f"signer{g}" for g in numbers])

    assert all(len(set(part[numbers == g])) == 1 for g in numbers)
    assert len(set(part)) == min(5, len(set(numbers)))


def test_groups_are_spread_so_that_classes_stay_even() -> None:
    """Fifty groups of one class each, every fifth of the rare one: each part gets both."""
    groups = np.repeat(np.arange(50), 4)
    labels = (groups % 5 == 0).astype(int)

    part = parts_of(labels, [f"{g:02d}" for g in groups])

    table = np.array([np.bincount(part[labels == c], minlength=5) for c in (0, 1)])
    assert (table == [[32], [8]]).all()


def test_fewer_than_two_parts_are_refused() -> None:
    probs, labels = numbered(6), np.arange(6) % 3

    with pytest.raises(DataError, match="cannot be cross-fitted"):
        cross_fit(MeanEnsemble, probs, labels, folds=np.zeros(6, int))
    with pytest.raises(DataError, match="folds have the wrong shape"):
        cross_fit(MeanEnsemble, probs, labels, folds=np.arange(5))
    with pytest.raises(DataError, match="cannot be cross-fitted"):
        cross_fit(MeanEnsemble, probs, labels, groups=["one"] * 6)
    with pytest.raises(DataError, match="groups do not match"):
        cross_fit(MeanEnsemble, probs, labels, groups=["one", "two"])


def test_methods_that_learn_nothing_are_not_cross_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, labels = scored(3, 60)
    calls = []
    combine = MeanEnsemble._combine
    monkeypatch.setattr(
        MeanEnsemble, "_combine", lambda self, p: calls.append(p.shape) or combine(self, p)
    )

    answers = cross_fit(MeanEnsemble, probs, labels)

    assert (answers == combine(MeanEnsemble(), probs)).all()
    assert calls == [(3, 60, 4)]
