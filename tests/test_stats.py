"""Statistics against scikit-learn, scipy and numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics

from threefold import stats
from threefold.errors import DataError

LAW = settings(max_examples=60, deadline=None)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, k) that never reach the floor, and labels that need not hold every class."""
    n, k, seed = draw(st.integers(1, 60)), draw(st.integers(2, 6)), draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    probs = 0.9 * rng.dirichlet(np.full(k, draw(st.sampled_from([0.3, 1.0, 5.0]))), n) + 0.1 / k
    return probs, rng.integers(0, k, n)


@LAW
@given(data=scored())
def test_scores_equal_scikit_learns(data: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = data
    numbers = np.arange(probs.shape[1])
    assert stats.accuracy(probs, labels) == pytest.approx(metrics.accuracy_score(labels, probs.argmax(1)), abs=1e-12)
    assert stats.log_loss(probs, labels) == pytest.approx(metrics.log_loss(labels, probs, labels=numbers), rel=1e-9)
    one_hot = np.eye(len(numbers))[labels]
    assert stats.brier(probs, labels) == pytest.approx(((probs - one_hot) ** 2).sum(1).mean(), rel=1e-9)
    expected = metrics.confusion_matrix(labels, probs.argmax(1), labels=numbers)
    assert (stats.confusion_matrix(probs, labels) == expected).all()


@LAW
@given(data=scored())
def test_per_class_figures_equal_scikit_learns_and_are_none_where_undefined(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    probs, labels = data
    k = probs.shape[1]
    table = stats.per_class(probs, labels, [f"c{i}" for i in range(k)])
    precision, recall, f1, n = metrics.precision_recall_fscore_support(
        labels, probs.argmax(1), labels=np.arange(k), zero_division=np.nan
    )
    for i, entry in enumerate(table):
        assert (entry["class"], entry["n"]) == (f"c{i}", n[i])
        for name, value in (("precision", precision[i]), ("recall", recall[i]), ("f1", f1[i])):
            assert entry[name] == (None if np.isnan(value) else pytest.approx(value))
        for name, interval in (("recall", "interval"), ("precision", "precision_interval")):
            low, high = entry[interval]
            assert (low, high) == (0, 1) if entry[name] is None else low <= entry[name] <= high


def test_a_sure_miss_costs_the_floor_and_not_infinity() -> None:
    assert stats.log_loss([[1.0, 0.0]], [1]) == pytest.approx(-np.log(1e-7))


@LAW
@given(n=st.integers(1, 10_000), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_equals_scipys(n: int, share: float, level: float) -> None:
    correct = round(n * share)
    expected = binomtest(correct, n).proportion_ci(level, "wilson")
    assert stats.wilson_interval(correct, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_its_ends() -> None:
    assert stats.wilson_interval(0, 0) == (0, 1)
    assert stats.wilson_interval(0, 20).low == 0
    assert stats.wilson_interval(20, 20).high == 1
    for correct, n, level in ((3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 95)):
        with pytest.raises(DataError):
            stats.wilson_interval(correct, n, level)


def test_reliability_by_hand() -> None:
    # Bins of an eighth: 0.6 and 0.625 are in (0.5, 0.625], 0.7 in (0.625, 0.75], 0.9 and 1.0 in (0.875, 1].
    top = np.array([0.6, 0.625, 0.7, 0.9, 1.0])
    probs = np.column_stack([top, 1 - top])
    labels = np.array([0, 1, 0, 0, 0])
    curve = stats.reliability_curve(probs, labels, bins=8)
    assert curve.confidence == pytest.approx([0.6125, 0.7, 0.95])
    assert curve.accuracy == pytest.approx([0.5, 1, 1])
    assert curve.n.tolist() == [2, 1, 2]
    assert stats.ece(probs, labels, bins=8) == pytest.approx((2 * 0.1125 + 1 * 0.3 + 2 * 0.05) / 5)


def test_ece_tells_calibrated_from_overconfident() -> None:
    rng = np.random.default_rng(0)
    top = rng.uniform(0.5, 1, 50_000)
    labels = (rng.random(50_000) > top).astype(int)
    assert stats.ece(np.column_stack([top, 1 - top]), labels) < 0.01
    sure = top**0.2
    assert stats.ece(np.column_stack([sure, 1 - sure]), labels) > 0.15


@LAW
@given(data=scored())
def test_ece_lies_between_the_mean_gap_and_one(data: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = data
    gap = abs(probs.max(1).mean() - stats.accuracy(probs, labels))
    assert gap - 1e-12 <= stats.ece(probs, labels) <= 1
    assert stats.reliability_curve(probs, labels).n.sum() == len(labels)


@LAW
@given(rows=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_binomial_test_of_discordant_rows(rows: list[tuple[bool, bool]]) -> None:
    a, b = np.array(rows).T
    only_a, only_b, p = stats.mcnemar_exact(a, b)
    assert only_a == sum(x and not y for x, y in rows)
    assert only_b == sum(y and not x for x, y in rows)
    assert p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0)
    assert stats.mcnemar_exact(b, a) == (only_b, only_a, p)


def test_paired_tests_refuse_rows_that_do_not_pair() -> None:
    for a, b in (([1], [1, 0]), ([], []), ([[1]], [[1]])):
        with pytest.raises(DataError, match="one value per row"):
            stats.mcnemar_exact(a, b)
    with pytest.raises(DataError, match="groups have the wrong length"):
        stats.paired_bootstrap([1, 0], [0, 0], groups=["a"])
    with pytest.raises(DataError, match="confidence level"):
        stats.paired_bootstrap([1, 0], [0, 0], level=95)


def test_bootstrap_interval_is_the_normal_one_for_many_rows() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(2000) < 0.9, rng.random(2000) < 0.8
    found = stats.paired_bootstrap(a, b)
    difference = a.astype(float) - b
    error = difference.std() / len(difference) ** 0.5
    assert found.estimate == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.2 * error)
    assert stats.paired_bootstrap(a, b) == found
    assert stats.paired_bootstrap(a, b, seed=1) != found


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(200):
        found = stats.paired_bootstrap(rng.normal(0.3, 1, 60), rng.normal(0, 1, 60), level=0.9, resamples=300, seed=i)
        covered += found.low <= 0.3 <= found.high
    assert 0.82 <= covered / 200 <= 0.96


def test_groups_widen_the_interval_where_rows_repeat() -> None:
    rng = np.random.default_rng(3)
    a, b = (np.repeat(rng.random(40) < share, 25).astype(float) for share in (0.8, 0.6))
    groups = [f"patient{i // 25}" for i in range(1000)]
    alone, grouped = stats.paired_bootstrap(a, b), stats.paired_bootstrap(a, b, groups)
    assert grouped.estimate == alone.estimate
    assert 3.5 < (grouped.high - grouped.low) / (alone.high - alone.low) < 6.5  # 5 = sqrt(25) in theory


def test_groups_of_one_row_are_rows() -> None:
    a, b = np.array([1, 0, 1, 1.0]), np.array([0, 0, 1, 0.0])
    assert stats.paired_bootstrap(a, b, list("abcd")) == stats.paired_bootstrap(a, b)


def test_holm_by_hand() -> None:
    assert stats.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert stats.holm([]).shape == (0,)
    for wrong in ([1.2, 0.1], [-0.1], [np.nan], 0.5):
        with pytest.raises(DataError):
            stats.holm(wrong)


@LAW
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8), alpha=st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_holm_rejects_exactly_what_the_step_down_procedure_rejects(p: list[float], alpha: float) -> None:
    adjusted = stats.holm(p)
    ordered = sorted(range(len(p)), key=lambda i: p[i])
    rejected = itertools.takewhile(lambda step: p[step[1]] * (len(p) - step[0]) <= alpha, enumerate(ordered))
    assert {i for i in range(len(p)) if adjusted[i] <= alpha} == {i for _, i in rejected}
    assert (adjusted >= np.array(p)).all()
    assert adjusted.max() <= 1


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((141, 140, 1.0), "no evidence of a difference: 141 against 140 images, p = 1.00"),
        ((114, 77, 0.00901), "mean is better than net: 114 against 77 images, p = 0.009"),
        ((77, 114, 0.00901), "net is better than mean: 114 against 77 images, p = 0.009"),
        ((90, 10, 1e-9), "mean is better than net: 90 against 10 images, p < 0.001"),
        ((114, 77, 0.0501), "no evidence of a difference: 114 against 77 images, p = 0.050"),
        ((3, 1, 0.625), "no evidence of a difference: 3 against 1 images, p = 0.62"),
    ],
)
def test_verdicts_in_words(counts: tuple[int, int, float], sentence: str) -> None:
    assert stats.verdict("mean", "net", *counts) == sentence


def test_a_score_has_the_figures_of_results_json() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    entry = stats.score_table(probs, labels, level=0.9)
    assert list(entry) == ["n", "accuracy", "interval", "level", "log_loss", "ece"]
    assert (entry["n"], entry["accuracy"], entry["level"]) == (4, 0.75, 0.9)
    assert entry["interval"] == list(stats.wilson_interval(3, 4, 0.9))
    assert entry["log_loss"] == stats.log_loss(probs, labels)
    assert entry["ece"] == stats.ece(probs, labels)
    assert all(type(value) in (int, float, list) for value in entry.values())


@pytest.mark.parametrize(
    "score", [stats.accuracy, stats.log_loss, stats.brier, stats.ece, stats.confusion_matrix, stats.score_table]
)
def test_scores_refuse_what_does_not_fit(score) -> None:
    with pytest.raises(DataError, match="labels have the wrong shape"):
        score(np.full((3, 2), 0.5), [0, 1])
    with pytest.raises(DataError, match="out of range"):
        score(np.full((2, 2), 0.5), [0, 2])
    with pytest.raises(DataError, match="sum to 1"):
        score(np.full((2, 2), 0.7), [0, 1])


def test_per_class_refuses_another_number_of_names() -> None:
    with pytest.raises(DataError, match="class names"):
        stats.per_class(np.full((2, 2), 0.5), [0, 1], ["a"])
