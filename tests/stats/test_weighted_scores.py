"""Scores of weighted rows against scikit-learn's, and against rows that are really repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from threefold.errors import DataError
from threefold.stats import scores, weighted_scores

LAW = settings(max_examples=60, deadline=None)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (n, k) with ties, labels that may lack a class, and weights (n, 3), some 0."""
    n, k, seed = draw(st.integers(2, 60)), draw(st.integers(2, 6)), draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, draw(st.sampled_from([3, 50])), (n, k))
    weights = rng.integers(0, 4, (n, 3)).astype(np.float64)
    weights[rng.integers(0, n, 3), range(3)] += 1  # a weighting of nothing is none
    return counts / counts.sum(1, keepdims=True), rng.integers(0, k, n), weights


@LAW
@given(data=scored(), name=st.sampled_from(sorted(weighted_scores.SCORES)))
def test_a_weight_is_a_number_of_copies(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], name: str
) -> None:
    probs, labels, weights = data
    weighted = weighted_scores.SCORES[name](probs, labels, weights)
    copies = [np.repeat(np.arange(len(labels)), column.astype(int)) for column in weights.T]
    expected = [weighted_scores.score_value(name, probs[rows], labels[rows]) for rows in copies]

    assert weighted == pytest.approx(np.array(expected), nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(data=scored())
def test_scores_equal_scikit_learns(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    probs, labels, weights = data
    k, preds = probs.shape[1], probs.argmax(1)

    for column in weights.T:
        used = column > 0
        truth, predicted, w = labels[used], preds[used], column[used]
        expected = {
            "accuracy": metrics.accuracy_score(truth, predicted, sample_weight=w),
            "balanced_accuracy": metrics.recall_score(
                truth, predicted, labels=np.unique(truth), average="macro", sample_weight=w
            ),
            "macro_f1": metrics.f1_score(truth, predicted, average="macro", sample_weight=w),
            "log_loss": metrics.log_loss(truth, probs[used], labels=np.arange(k), sample_weight=w),
        }
        areas = [
            metrics.roc_auc_score(truth == c, probs[used, c], sample_weight=w)
            for c in ([1] if k == 2 else range(k))
            if 0 < (truth == c).sum() < len(truth)
        ]
        expected["roc_auc"] = np.mean(areas) if areas else np.nan
        for name, value in expected.items():
            assert weighted_scores.SCORES[name](probs, labels, column[:, None])[0] == pytest.approx(
                value, nan_ok=True
            ), name


@pytest.mark.parametrize("top", [1, 2, 3, 5])
def test_top_k_equals_scikit_learns_without_ties(top: int) -> None:
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(6), 300), rng.integers(0, 6, 300)

    assert scores.top_k_accuracy(probs, labels, top) == pytest.approx(
        metrics.top_k_accuracy_score(labels, probs, k=top)
    )

    if f"top{top}" in weighted_scores.SCORES:
        assert weighted_scores.score_value(f"top{top}", probs, labels) == scores.top_k_accuracy(
            probs, labels, top
        )


def test_top_1_breaks_ties_as_the_accuracy_does() -> None:
    probs = np.full((4, 4), 0.25)

    top_k = [scores.top_k_accuracy(probs, np.arange(4), top) for top in (1, 2, 3, 4, 9)]

    assert scores.accuracy(probs, np.arange(4)) == 0.25
    assert top_k == [0.25, 0.5, 0.75, 1, 1]


def test_the_area_by_hand() -> None:
    # Class 1 at 0.9, 0.6, 0.6 against 0.6, 0.2: pairs right 1 + 1, 1/2 + 1, 1/2 + 1 of 6.
    p = np.array([0.9, 0.6, 0.6, 0.6, 0.2])

    assert scores.roc_auc(np.column_stack([1 - p, p]), [1, 1, 1, 0, 0]) == pytest.approx(5 / 6)


def test_score_is_a_name_or_a_function_of_weights() -> None:
    with pytest.raises(DataError, match="unknown score: auc; expected accuracy, balanced_accuracy"):
        weighted_scores.check_score("auc")

    probs, labels, weights = np.full((3, 2), 0.5), np.zeros(3, int), np.ones((3, 4))

    right = weighted_scores.check_score(lambda p, y, w: p[:, 0] @ w)

    assert right(probs, labels, weights) == pytest.approx(np.full(4, 1.5))

    wrong = weighted_scores.check_score(lambda p, y, w: p[:, 0].mean())

    with pytest.raises(DataError, match="one value per weighting"):
        wrong(probs, labels, weights)
