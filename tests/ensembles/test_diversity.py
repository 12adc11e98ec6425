"""Duplicates, pairwise diversity against scikit-learn, accuracy against the number of members."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from support.paths import AUTHORS_PREDICTIONS
from support.pools import draw_pool, scored

from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.diversity import distinct, diversity, duplicates, size_curve
from threefold.errors import DataError
from threefold.predictions.predictions import Predictions

LAW = settings(max_examples=40, deadline=None)


def halved(probs: np.ndarray) -> np.ndarray:
    """Round probabilities to float16, and normalize the rows again."""
    rounded = probs.astype(np.float16).astype(np.float32)
    return rounded / rounded.sum(-1, keepdims=True)


def test_rounded_copies_are_duplicates_and_others_are_not() -> None:
    probs, _ = scored(4, 200)
    pool = np.concatenate([probs, halved(probs[2:3]), probs[:1], probs[2:3]])

    assert duplicates(probs) == []
    assert duplicates(pool) == [(0, 5), (2, 4, 6)]
    assert duplicates(pool, 0) == [(0, 5), (2, 6)]
    assert distinct(pool) == [0, 1, 2, 3]
    assert distinct(probs) == [0, 1, 2, 3]


def test_accurate_members_are_not_taken_for_copies() -> None:
    """Two networks, 99.9 % sure of the right class, are close to each other in every row."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 500)
    doubt = 0.002 * rng.dirichlet(np.full(5, 0.3), (2, 500))
    probs = (1 - doubt.sum(-1, keepdims=True)) * np.eye(5)[labels] + doubt

    assert np.abs(probs[0] - probs[1]).sum(-1).mean() / 2 < 0.002
    assert duplicates(probs) == []
    assert duplicates(np.concatenate([probs, halved(probs[:1])])) == [(0, 2)]


def test_votes_are_copies_only_if_they_are_identical() -> None:
    votes = np.eye(3)[[[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 1]]]

    assert duplicates(votes) == [(0, 1)]


@LAW
@given(seed=st.integers(0, 999), copies=st.lists(st.integers(0, 3), max_size=4))
def test_groups_are_ascending_disjoint_and_leave_one_of_each(seed: int, copies: list[int]) -> None:
    probs, _ = scored(4, 60, seed=seed)
    pool = np.concatenate([probs, probs[copies]])

    groups = duplicates(pool)

    assert sorted(itertools.chain(*groups)) == sorted({i for g in groups for i in g})
    assert all(list(g) == sorted(g) and len(g) > 1 for g in groups)
    assert distinct(pool) == [0, 1, 2, 3]


def test_diversity_by_hand() -> None:
    labels = np.zeros(10, int)
    # Both are correct in 6 rows, only the first in 2, only the second in 1, neither in 1.
    correct = np.array([[1] * 8 + [0] * 2, [1] * 6 + [0, 0, 1, 0]])
    probs = np.where(correct[..., None] == 1, [0.9, 0.1], [0.1, 0.9])

    measures = diversity(probs, labels)

    assert measures.disagreement[0, 1] == pytest.approx(0.3)
    assert measures.double_fault.tolist() == [
        [pytest.approx(0.2), pytest.approx(0.1)],
        [pytest.approx(0.1), pytest.approx(0.3)],
    ]
    assert measures.q[0, 1] == pytest.approx((6 * 1 - 2 * 1) / (6 * 1 + 2 * 1))
    assert measures.agreement[0, 1] == pytest.approx(0.7)
    assert measures.means()["disagreement"] == pytest.approx(0.3)


@LAW
@given(seed=st.integers(0, 9999), m=st.integers(2, 5))
def test_kappa_is_scikit_learns_and_every_measure_is_symmetric(seed: int, m: int) -> None:
    probs, labels = scored(m, 50, seed=seed)
    probs = np.exp(np.log(probs) * 0.5 + np.random.default_rng(seed).normal(0, 1, probs.shape))
    probs /= probs.sum(-1, keepdims=True)

    measures = diversity(probs, labels)

    correct = probs.argmax(-1) == labels
    for i, j in itertools.combinations(range(m), 2):
        assert measures.kappa[i, j] == pytest.approx(
            cohen_kappa_score(correct[i], correct[j]), nan_ok=True
        )
    for name in ("disagreement", "double_fault", "q", "kappa", "agreement"):
        table = getattr(measures, name)
        assert table == pytest.approx(table.T, nan_ok=True)
    assert np.diag(measures.disagreement) == pytest.approx(0)
    assert np.diag(measures.double_fault) == pytest.approx(1 - correct.mean(1))


def test_where_no_row_decides_a_measure_has_no_value() -> None:
    sure = np.eye(2)[[[0, 1, 0]] * 2]

    measures = diversity(sure, np.array([0, 1, 0]))

    assert np.isnan(measures.q[0, 1])
    assert np.isnan(measures.kappa[0, 1])
    assert np.isnan(measures.means()["q"])
    assert measures.means()["agreement"] == 1
    assert np.isnan(diversity(sure[:1], np.array([0, 1, 0])).means()["agreement"])


def test_the_curve_runs_from_single_members_to_the_mean() -> None:
    probs, labels = scored(6, 300)
    mean = (MeanEnsemble().predict(probs) == labels).mean()
    single = (probs.argmax(-1) == labels).mean(1)

    curve = size_curve(probs, labels, draws=200)

    assert (curve.random[-1], curve.low[-1], curve.high[-1]) == pytest.approx((mean,) * 3)
    assert curve.ordered[-1] == pytest.approx(mean)
    assert curve.random[0] == pytest.approx(single.mean(), abs=0.01)
    assert (curve.low[0], curve.high[0]) == pytest.approx((single.min(), single.max()))
    assert curve.random[-1] > curve.random[0]
    assert sorted(curve.order) == list(range(6))
    first, second = (size_curve(probs, labels, seed=seed).random[:-1] for seed in (1, 2))
    assert (first != second).any()


def test_the_greedy_order_tries_every_member() -> None:
    probs, labels = scored(5, 80)
    remaining, order = list(range(5)), []
    while remaining:
        loss = {
            i: -np.log(probs[[*order, i]].mean(0)[np.arange(80), labels]).sum() for i in remaining
        }
        order.append(min(loss, key=loss.__getitem__))
        remaining.remove(order[-1])

    assert size_curve(probs, labels).order == tuple(order)


def test_the_greedy_curve_is_cross_fitted() -> None:
    """With members that guess, an order scored on its own rows would look better than chance."""
    rng = np.random.default_rng(0)
    first, labels = 0.5 + rng.uniform(-0.1, 0.1, (40, 100)), rng.integers(0, 2, 100)
    probs = np.stack([first, 1 - first], -1)

    curve = size_curve(probs, labels, draws=1)

    apparent = (probs[list(curve.order)[:5]].mean(0).argmax(1) == labels).mean()
    assert apparent > 0.58
    assert curve.ordered[4] < apparent - 0.05


def test_wrong_inputs_are_refused() -> None:
    probs, labels = scored(2, 20)

    for call in (diversity, size_curve):
        with pytest.raises(DataError, match="labels have the wrong shape"):
            call(probs, labels[1:])
        with pytest.raises(DataError, match="wrong shape"):
            call(probs[0], labels)
    for tolerance in (-1, np.nan):
        with pytest.raises(DataError, match="tolerance is not negative"):
            duplicates(probs, tolerance)
    with pytest.raises(DataError, match="needs a draw"):
        size_curve(probs, labels, draws=0)


def test_one_row_has_a_curve() -> None:
    probs, labels = scored(3, 1)

    assert size_curve(probs, labels).random.shape == (3,)


def test_the_authors_ten_files_are_seven_networks() -> None:
    if not AUTHORS_PREDICTIONS.exists():
        pytest.skip("the authors' predictions are not here")
    rows = Predictions.load(AUTHORS_PREDICTIONS)

    names = [[rows.members[i] for i in group] for group in duplicates(rows.probs)]

    assert [len(group) for group in names] == [2, 3]
    assert all("Xception" in name for name in names[1])
    assert all("cpResNetV2" in name for name in names[0])
    assert len(distinct(rows.probs)) == 7


def test_near_copies_of_a_simulated_pool_stay_members() -> None:
    probs, _, _, _ = draw_pool("copies", 0, n=300, test=1)

    assert duplicates(probs) == [] or all(0 not in group for group in duplicates(probs))
