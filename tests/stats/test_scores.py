"""Statistics against scikit-learn, scipy and numbers worked out by hand."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, t
from sklearn import metrics
from sklearn.calibration import calibration_curve

from threefold.errors import DataError
from threefold.stats import scores
from threefold.stats.weighted_scores import SCORES, score_value

LAW = settings(max_examples=60, deadline=None)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, k) above the floor, and labels that may lack a class."""
    n, k, seed = draw(st.integers(1, 60)), draw(st.integers(2, 6)), draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    probs = 0.9 * rng.dirichlet(np.full(k, draw(st.sampled_from([0.3, 1.0, 5.0]))), n) + 0.1 / k
    return probs, rng.integers(0, k, n)


@LAW
@given(data=scored())
def test_scores_equal_scikit_learns(data: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = data
    numbers = np.arange(probs.shape[1])

    assert scores.accuracy(probs, labels) == pytest.approx(
        metrics.accuracy_score(labels, probs.argmax(1)), abs=1e-12
    )
    assert scores.log_loss(probs, labels) == pytest.approx(
        metrics.log_loss(labels, probs, labels=numbers), rel=1e-9
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers that are no row's label
        recall = metrics.balanced_accuracy_score(labels, probs.argmax(1))
        assert scores.balanced_accuracy(probs, labels) == pytest.approx(recall)
    if len(numbers) == 2:
        assert scores.brier(probs, labels) == pytest.approx(
            2 * metrics.brier_score_loss(labels, probs[:, 1], pos_label=1)
        )

    one_hot = np.eye(len(numbers))[labels]

    assert scores.brier(probs, labels) == pytest.approx(
        ((probs - one_hot) ** 2).sum(1).mean(), rel=1e-9
    )

    expected = metrics.confusion_matrix(labels, probs.argmax(1), labels=numbers)

    assert (scores.confusion_matrix(probs, labels) == expected).all()


def test_confusions_are_the_cells_beside_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(7), 300), rng.integers(0, 7, 300)
    matrix = scores.confusion_matrix(probs, labels)
    np.fill_diagonal(matrix, 0)

    found = scores.confusions(probs, labels)

    order = np.argsort(-matrix, axis=None, kind="stable")[: np.count_nonzero(matrix)]
    assert (found.labels * 7 + found.answers == order).all()
    assert (found.counts == matrix.ravel()[order]).all()


def test_the_interval_of_many_classes_needs_no_table_of_them() -> None:
    """Balanced accuracy and F1 count cells of label and answer; they need no probabilities."""
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2000
    probs = np.full((4000, 2000), 1e-4, np.float32)
    probs[np.arange(4000), np.where(rng.random(4000) < 0.8, labels, 0)] += 0.8001

    for score in ("balanced_accuracy", "macro_f1"):
        tracemalloc.start()
        low, high = scores.bootstrap_interval(score, probs, labels, resamples=100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        assert 0.6 < low < high < 0.9
        assert peak < 40 << 20


@LAW
@given(data=scored())
def test_per_class_scores_equal_those_of_scikit_learn(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    probs, labels = data
    k = probs.shape[1]
    table = scores.per_class(probs, labels, [f"c{i}" for i in range(k)])

    precision, recall, f1, n = metrics.precision_recall_fscore_support(
        labels, probs.argmax(1), labels=np.arange(k), zero_division=np.nan
    )

    for i, entry in enumerate(table):
        assert (entry["class"], entry["n"]) == (f"c{i}", n[i])
        for name, value in (("precision", precision[i]), ("recall", recall[i]), ("f1", f1[i])):
            assert entry[name] == (None if np.isnan(value) else pytest.approx(value))
        for name, interval in (
            ("recall", "interval"),
            ("precision", "precision_interval"),
            ("f1", "f1_interval"),
        ):
            low, high = entry[interval]
            assert (low, high) == (0, 1) if entry[name] is None else low <= entry[name] <= high


@LAW
@given(data=scored(), bins=st.integers(1, 20))
def test_reliability_curve_and_ece_equal_their_references(
    data: tuple[np.ndarray, np.ndarray], bins: int
) -> None:
    probs, labels = data
    confidence, hits = probs.max(1), probs.argmax(1) == labels

    curve = scores.reliability_curve(probs, labels, bins)

    if 0 < hits.sum() < len(hits):  # scikit-learn's wants both kinds of rows
        accuracy, middle = calibration_curve(hits, confidence, n_bins=bins)
        assert curve.accuracy == pytest.approx(accuracy)
        assert curve.confidence == pytest.approx(middle)

    # Guo et al. (2017), equation 3: bins are closed at their upper ends.
    where = np.ceil(confidence * bins)
    gaps = [abs((confidence - hits)[where == b].sum()) for b in range(1, bins + 1)]

    assert scores.ece(probs, labels, bins) == pytest.approx(sum(gaps) / len(labels))


@LAW
@given(n=st.integers(1, 500), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_equals_statsmodels(n: int, share: float, level: float) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    correct = round(share * n)
    expected = proportion.proportion_confint(correct, n, 1 - level, "wilson")

    assert scores.wilson_interval(correct, n, level) == pytest.approx(expected, abs=1e-12)


def test_a_sure_miss_costs_the_floor_and_not_infinity() -> None:
    assert scores.log_loss([[1.0, 0.0]], [1]) == pytest.approx(-np.log(1e-7))


@LAW
@given(n=st.integers(1, 10_000), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_equals_scipys(n: int, share: float, level: float) -> None:
    correct = round(n * share)
    expected = binomtest(correct, n).proportion_ci(level, "wilson")

    assert scores.wilson_interval(correct, n, level) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_wilson_at_its_ends() -> None:
    assert scores.wilson_interval(0, 0) == (0, 1)
    assert scores.wilson_interval(0, 20).low == 0
    assert scores.wilson_interval(20, 20).high == 1

    for correct, n, level in ((3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 95)):
        with pytest.raises(DataError):
            scores.wilson_interval(correct, n, level)


def test_reliability_by_hand() -> None:
    # Bins of 1/8: 0.6 and 0.625 are in (0.5, 0.625], 0.7 in (0.625, 0.75], 0.9 and 1 in (0.875, 1].
    top = np.array([0.6, 0.625, 0.7, 0.9, 1.0])
    probs = np.column_stack([top, 1 - top])
    labels = np.array([0, 1, 0, 0, 0])

    curve = scores.reliability_curve(probs, labels, bins=8)

    assert curve.confidence == pytest.approx([0.6125, 0.7, 0.95])
    assert curve.accuracy == pytest.approx([0.5, 1, 1])
    assert curve.n.tolist() == [2, 1, 2]
    assert scores.ece(probs, labels, bins=8) == pytest.approx((2 * 0.1125 + 1 * 0.3 + 2 * 0.05) / 5)


def test_ece_tells_calibrated_from_overconfident() -> None:
    rng = np.random.default_rng(0)
    top = rng.uniform(0.5, 1, 50_000)
    labels = (rng.random(50_000) > top).astype(int)

    assert scores.ece(np.column_stack([top, 1 - top]), labels) < 0.01

    sure = top**0.2

    assert scores.ece(np.column_stack([sure, 1 - sure]), labels) > 0.15


@LAW
@given(data=scored())
def test_ece_lies_between_the_mean_gap_and_one(data: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = data
    gap = abs(probs.max(1).mean() - scores.accuracy(probs, labels))

    assert gap - 1e-12 <= scores.ece(probs, labels) <= 1
    assert scores.reliability_curve(probs, labels).n.sum() == len(labels)


def test_a_score_has_the_figures_of_results_json() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])

    entry = scores.score_table(probs, labels, level=0.9)

    assert list(entry)[:6] == ["n", "accuracy", "interval", "level", "log_loss", "ece"]
    assert list(entry)[6:] == [
        "brier",
        "balanced_accuracy",
        "balanced_accuracy_interval",
        "macro_f1",
        "roc_auc",
    ]
    assert (entry["n"], entry["accuracy"], entry["level"]) == (4, 0.75, 0.9)
    assert entry["interval"] == list(scores.wilson_interval(3, 4, 0.9))
    assert entry["log_loss"] == scores.log_loss(probs, labels)
    assert entry["ece"] == scores.ece(probs, labels)

    for name in ("brier", "balanced_accuracy", "macro_f1", "roc_auc"):
        assert entry[name] == getattr(scores, name)(probs, labels)

    assert all(type(value) in (int, float, list) for value in entry.values())

    alone = scores.score_table(probs[:1], [0])

    assert (alone["roc_auc"], alone["balanced_accuracy"]) == (None, 1.0)

    grouped = scores.score_table(probs, labels, 0.9, ["a", "a", "b", "b"])

    assert grouped["interval"] == list(
        scores.share_interval(scores.correct(probs, labels), ["a", "a", "b", "b"], 0.9)
    )
    assert {key for key in entry if entry[key] != grouped[key]} <= {
        "interval",
        "balanced_accuracy_interval",
    }


@pytest.mark.parametrize(
    "score",
    [
        scores.accuracy,
        scores.log_loss,
        scores.brier,
        scores.ece,
        scores.confusion_matrix,
        scores.score_table,
        scores.roc_auc,
        scores.balanced_accuracy,
        scores.macro_f1,
        scores.top_k_accuracy,
    ],
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
        scores.per_class(np.full((2, 2), 0.5), [0, 1], ["a"])


def groups_of(
    shares: np.ndarray, sizes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hits (n,) of groups with these shares and sizes (groups,), and the group of each."""
    part = np.repeat(np.arange(len(sizes)), sizes)
    return rng.random(len(part)) < shares[part], part


@LAW
@given(hits=st.lists(st.booleans(), min_size=2, max_size=60), level=st.sampled_from([0.8, 0.95]))
def test_groups_of_one_row_are_rows_for_a_share(hits: list[bool], level: float) -> None:
    rows = scores.wilson_interval(sum(hits), len(hits), level)

    assert scores.share_interval(hits, level=level) == rows
    assert scores.share_interval(hits, list(range(len(hits))), level) == pytest.approx(rows)


@LAW
@given(seed=st.integers(0, 999), groups=st.integers(2, 20), largest=st.integers(1, 30))
def test_groups_never_narrow_the_interval_of_a_share(seed: int, groups: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    hits, part = groups_of(rng.random(groups), rng.integers(1, largest + 1, groups), rng)
    alone, grouped = scores.share_interval(hits), scores.share_interval(hits, part)

    assert 0 <= grouped.low <= alone.low + 1e-12
    assert alone.high - 1e-12 <= grouped.high <= 1
    assert grouped.low - 1e-12 <= hits.mean() <= grouped.high + 1e-12


def test_the_design_effect_by_hand() -> None:
    # 4, 2 and 0 of 4 right: variance 8 * 3/2 / 12^2 = 1/12, that of independent rows 0.25 / 11,
    # so 12 rows are worth 36/11.
    hits = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    worth = 36 / 11 * (t.ppf(0.975, 11) / t.ppf(0.975, 2)) ** 2

    assert scores.share_interval(hits, list("aaaabbbbcccc")) == pytest.approx(
        scores.wilson_interval(worth / 2, worth)
    )


def test_groups_that_are_alike_count_once_each() -> None:
    hits = np.repeat(np.random.default_rng(0).random(400) < 0.7, 10)

    interval = scores.share_interval(hits, np.repeat(np.arange(400), 10))

    assert interval == pytest.approx(scores.wilson_interval(hits.sum() / 10, 400), abs=5e-4)
    four_groups = scores.share_interval(np.ones(40), np.repeat(np.arange(4), 10))
    assert four_groups.low < scores.wilson_interval(4, 4).low
    assert scores.share_interval(np.ones(40), ["one"] * 40) == (0, 1)


def test_grouped_share_interval_has_its_coverage() -> None:
    rng, covered = np.random.default_rng(4), np.zeros(2)
    for _ in range(300):
        hits, part = groups_of(rng.beta(8, 2, 25), rng.integers(5, 30, 25), rng)
        intervals = (scores.share_interval(hits, part), scores.share_interval(hits))
        covered += [interval.low <= 0.8 <= interval.high for interval in intervals]

    assert 0.92 <= covered[0] / 300 <= 0.98
    assert covered[1] / 300 < 0.85  # rows alone: too sure


def test_shares_are_of_rows_that_count() -> None:
    hits, among = np.array([1, 0, 1, 0, 0]), np.array([1, 1, 1, 0, 0])

    assert scores.share_interval(hits, among=among) == scores.wilson_interval(2, 3)
    assert scores.share_interval(np.zeros(2), ["a", "b"], among=np.zeros(2)) == (0, 1)

    for wrong in ([1, 1], [0, 1, 1, 0, 0]):
        with pytest.raises(DataError, match="hits lie outside the rows that count"):
            scores.share_interval(hits, among=wrong)

    with pytest.raises(DataError, match="groups have the wrong length"):
        scores.share_interval(hits, ["a"])
    with pytest.raises(DataError, match="confidence level"):
        scores.share_interval(hits, level=1)


def answers(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, k) that are often right, and labels of rarer and rarer classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    logits = rng.normal(0, 1, (n, k)) + 1.5 * np.eye(k)[labels]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


@pytest.mark.parametrize("name", ["balanced_accuracy", "macro_f1", "log_loss", "brier"])
def test_bootstrap_equals_scipys_which_copies_the_rows(name: str) -> None:
    probs, labels = answers(250, 3, 5)
    score = getattr(scores, name)
    low, high = bootstrap(
        (np.arange(250),),
        lambda rows: score(probs[rows], labels[rows]),
        vectorized=False,
        n_resamples=1500,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval

    interval = scores.bootstrap_interval(name, probs, labels)

    assert interval == pytest.approx((low, high), abs=0.09 * (high - low))
    assert interval.low < score(probs, labels) < interval.high
    assert scores.bootstrap_interval(name, probs, labels) == interval
    assert scores.bootstrap_interval(name, probs, labels, seed=1) != interval


def test_whole_groups_are_drawn() -> None:
    probs, labels = answers(60, 3, 6)
    many, groups = (np.repeat(probs, 16, 0), np.repeat(labels, 16)), np.repeat(np.arange(60), 16)

    for name in ("balanced_accuracy", "log_loss"):
        few = scores.bootstrap_interval(name, probs, labels)
        assert scores.bootstrap_interval(name, *many, groups) == pytest.approx(
            few, abs=0.15 * (few.high - few.low)
        )
        alone = scores.bootstrap_interval(name, *many)
        assert 3 < (few.high - few.low) / (alone.high - alone.low) < 5.2  # 4 = sqrt(16) in theory


def test_any_function_of_weighted_rows_can_be_bootstrapped() -> None:
    probs, labels = answers(200, 3, 7)

    interval = scores.bootstrap_interval(
        lambda p, y, w: (p.argmax(1) == y) @ w / w.sum(0), probs, labels, resamples=5000
    )

    assert interval == pytest.approx(
        scores.wilson_interval(int(scores.correct(probs, labels).sum()), 200), abs=0.012
    )


def test_bootstrap_refuses() -> None:
    probs, labels = answers(20, 3, 8)

    for change, message in (
        ({"score": "ece"}, "unknown score: ece"),
        ({"resamples": 10}, "too few bootstrap resamples"),
        ({"level": 0}, "confidence level"),
        ({"groups": ["a"]}, "wrong length"),
        ({"score": "roc_auc", "labels": np.zeros(20, int)}, "not defined in any"),
    ):
        with pytest.raises(DataError, match=message):
            scores.bootstrap_interval(
                **{"score": "accuracy", "probs": probs, "labels": labels, **change}
            )

    with pytest.raises(DataError, match="rows of two classes"):
        scores.roc_auc(probs, np.zeros(20, int))
    with pytest.raises(DataError, match="top >= 1"):
        scores.top_k_accuracy(probs, labels, 0)


def test_f1_interval_agrees_with_the_bootstrap() -> None:
    probs, labels = answers(2000, 3, 9)

    def f1(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        return 2 * ((p.argmax(1) == 1) & (y == 1)) @ w / ((p.argmax(1) == 1) @ w + (y == 1) @ w)

    groups = np.arange(2000) // 20

    for part in (None, groups):
        interval = scores.per_class(probs, labels, ["a", "b", "c"], groups=part)[1]["f1_interval"]
        assert interval == pytest.approx(
            scores.bootstrap_interval(f1, probs, labels, part), abs=0.006
        )

    sure = scores.per_class(np.eye(2)[[0] * 20 + [1] * 5], [0] * 20 + [1] * 5, ["a", "b"])

    assert [entry["f1"] for entry in sure] == [1, 1]
    assert sure[1]["f1_interval"][0] < sure[0]["f1_interval"][0] < 1


@LAW
@given(data=scored())
def test_an_area_by_sorting_is_that_of_weighted_rows(data: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = data
    tied = np.round(probs, 1) + 1e-3
    tied /= tied.sum(1, keepdims=True)

    for table in (probs, tied):
        plain = SCORES["roc_auc"](table, labels, np.ones((len(labels), 1)))[0]
        assert score_value("roc_auc", table, labels) == pytest.approx(plain, abs=1e-15, nan_ok=True)


def test_a_table_of_scores_is_its_parts() -> None:
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(4), 300), rng.integers(0, 4, 300)

    entry = scores.score_table(probs, labels)

    for name in (
        "accuracy",
        "log_loss",
        "ece",
        "brier",
        "balanced_accuracy",
        "macro_f1",
        "roc_auc",
    ):
        assert entry[name] == getattr(scores, name)(probs, labels)

    assert entry["balanced_accuracy_interval"] == list(
        scores.bootstrap_interval("balanced_accuracy", probs, labels)
    )

    # A function is scored row by row, a name by cells.
    own = scores.bootstrap_interval(SCORES["balanced_accuracy"], probs, labels, resamples=4000)

    assert entry["balanced_accuracy_interval"] == pytest.approx(own, abs=0.006)
