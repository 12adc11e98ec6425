"""Bootstrap intervals of paired differences: normal theory, coverage, groups, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.errors import DataError
from threefold.stats import scores
from threefold.stats.paired_differences import paired_bootstrap, score_difference


def test_bootstrap_interval_is_the_normal_one_for_many_rows() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(2000) < 0.9, rng.random(2000) < 0.8
    interval = paired_bootstrap(a, b)
    difference = a.astype(float) - b
    error = difference.std() / len(difference) ** 0.5

    assert interval.estimate == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.2 * error)
    assert paired_bootstrap(a, b) == interval
    assert paired_bootstrap(a, b, seed=1) != interval


def test_the_bootstrap_refuses_wrong_groups_and_levels() -> None:
    with pytest.raises(DataError, match="groups have the wrong length"):
        paired_bootstrap([1, 0], [0, 0], groups=["a"])
    with pytest.raises(DataError, match="confidence level"):
        paired_bootstrap([1, 0], [0, 0], level=95)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(200):
        interval = paired_bootstrap(
            rng.normal(0.3, 1, 60), rng.normal(0, 1, 60), level=0.9, resamples=300, seed=i
        )
        covered += interval.low <= 0.3 <= interval.high

    assert 0.82 <= covered / 200 <= 0.96


def test_groups_widen_the_interval_where_rows_repeat() -> None:
    rng = np.random.default_rng(3)
    a, b = (np.repeat(rng.random(40) < share, 25).astype(float) for share in (0.8, 0.6))
    groups = [f"patient{i // 25}" for i in range(1000)]

    alone = paired_bootstrap(a, b)
    grouped = paired_bootstrap(a, b, groups)

    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert grouped.estimate == alone.estimate
    assert 3.5 < ratio < 6.5  # 5 = sqrt(25) in theory


def test_groups_of_one_row_are_rows() -> None:
    a, b = np.array([1, 0, 1, 1.0]), np.array([0, 0, 1, 0.0])

    assert paired_bootstrap(a, b, list("abcd")) == paired_bootstrap(a, b)


def test_a_score_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    logits = rng.normal(0, 1, (300, 3)) + 1.2 * np.eye(3)[labels]
    a, b = (
        np.exp(z) / np.exp(z).sum(1, keepdims=True)
        for z in (logits, logits + rng.normal(0, 0.5, (300, 3)))
    )

    for groups in (None, np.arange(300) // 5):
        hits = paired_bootstrap(scores.correct(a, labels), scores.correct(b, labels), groups)
        assert score_difference("accuracy", a, b, labels, groups) == pytest.approx(hits, abs=1e-9)

    difference = score_difference("log_loss", a, b, labels)

    assert difference.estimate == pytest.approx(
        scores.log_loss(a, labels) - scores.log_loss(b, labels)
    )
    assert difference.low < difference.estimate < difference.high

    alone = [scores.bootstrap_interval("log_loss", probs, labels) for probs in (a, b)]

    assert difference.high - difference.low < 0.7 * max(
        interval.high - interval.low for interval in alone
    )
    assert score_difference("macro_f1", a, a, labels) == (0, 0, 0)


def test_a_score_difference_refuses() -> None:
    a, labels = np.full((4, 2), 0.5), [0, 0, 0, 0]

    with pytest.raises(DataError, match="different rows or classes"):
        score_difference("accuracy", a, np.full((3, 2), 0.5), labels)
    with pytest.raises(DataError, match="not defined on these rows: roc_auc"):
        score_difference("roc_auc", a, a, labels)
    with pytest.raises(DataError, match="unknown score"):
        score_difference("f1", a, a, labels)
