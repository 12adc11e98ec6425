"""Scores of several labels per image: scikit-learn's values, and intervals that cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics
from support.multilabel import make_multilabel

from threefold.stats import multilabel as stats
from threefold.stats import multilabel_tables as tables
from threefold.stats.bootstrap import row_weights


def answers(n: int = 80, digits: int = 1, seed: int = 3):
    """Probabilities with many ties, decisions and targets, all (n, 3)."""
    rows = make_multilabel(n, signal=(0.7,), seed=seed)
    probs = rows.probs[0].astype(np.float64).round(digits)
    return probs, (probs >= 0.4).astype(int), rows.targets


@pytest.mark.parametrize("digits", [1, 8])
def test_average_precision_is_that_of_scikit_learn(digits):
    probs, _, targets = answers(digits=digits)

    ours = stats.average_precision(probs, targets)

    np.testing.assert_allclose(ours, metrics.average_precision_score(targets, probs, average=None))
    assert stats.mean_average_precision(probs, targets) == pytest.approx(ours.mean())


def test_weighted_draws_are_those_of_scikit_learn():
    probs, decided, targets = answers()
    drawn = tables.draw_scores(probs, decided, targets, resamples=40, seed=5)
    weights = next(iter(row_weights(len(probs), None, 40, 5)))

    for draw in (0, 17):
        w = weights[:, draw]
        np.testing.assert_allclose(
            drawn.average_precision[:, draw],
            metrics.average_precision_score(targets, probs, average=None, sample_weight=w),
        )
        for average, values in (("macro", drawn.macro_f1), ("micro", drawn.micro_f1)):
            score = metrics.f1_score(targets, decided, average=average, sample_weight=w)
            assert values[draw] == pytest.approx(score)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_is_that_of_scikit_learn(average):
    _, decided, targets = answers()

    ours = {"macro": stats.macro_f1, "micro": stats.micro_f1}[average](decided, targets)

    assert ours == pytest.approx(metrics.f1_score(targets, decided, average=average))


def test_the_other_scores_are_those_of_scikit_learn():
    probs, decided, targets = answers(digits=8)
    columns = [(targets[:, j], probs[:, j]) for j in range(3)]

    assert stats.subset_accuracy(decided, targets) == metrics.accuracy_score(targets, decided)
    assert stats.log_loss(probs, targets) == pytest.approx(
        np.mean([metrics.log_loss(t, p) for t, p in columns])
    )
    assert stats.brier(probs, targets) == pytest.approx(
        np.mean([metrics.brier_score_loss(t, p) for t, p in columns])
    )


def test_precision_and_recall_are_those_of_scikit_learn():
    probs, _, targets = answers()

    recall, precision = stats.precision_recall(probs[:, 0], targets[:, 0])

    theirs = metrics.precision_recall_curve(targets[:, 0], probs[:, 0])
    np.testing.assert_allclose(precision[::-1], theirs[0][:-1])
    np.testing.assert_allclose(recall[::-1], theirs[1][:-1])


def test_a_label_without_images_is_left_out_of_the_mean():
    probs, decided, targets = answers()
    targets, decided = targets * np.array([1, 1, 0], np.uint8), decided * [1, 1, 0]

    assert np.isnan(stats.average_precision(probs, targets)[2])
    assert stats.mean_average_precision(probs, targets) == pytest.approx(
        stats.average_precision(probs, targets)[:2].mean()
    )
    labels = tables.label_table(probs, decided, targets, "abc")
    assert labels[2]["average_precision"] is None
    assert labels[2]["f1"] is None


def test_perfect_answers_have_intervals_with_a_width():
    targets = answers()[2]
    probs = np.where(targets == 1, 0.9, 0.1)

    table = tables.score_table(probs, targets, targets)
    labels = tables.label_table(probs, targets, targets, "abc")

    assert table["mean_average_precision"] == table["macro_f1"] == 1
    assert table["mean_average_precision_interval"][0] < 1
    assert all(label["average_precision_interval"][0] < 1 for label in labels)


def test_groups_that_repeat_an_image_widen_the_interval():
    probs, decided, targets = answers(60)
    again = np.repeat(np.arange(60), 3)
    alone = tables.score_table(probs[again], decided[again], targets[again])
    grouped = tables.score_table(probs[again], decided[again], targets[again], again)
    single = tables.score_table(probs, decided, targets)

    for name in ("mean_average_precision_interval", "macro_f1_interval"):
        low, high = grouped[name]
        assert high - low > 1.3 * np.ptp(alone[name])
        np.testing.assert_allclose((low, high), single[name], atol=0.03)


@pytest.mark.parametrize("seed", range(2))
def test_the_threshold_has_the_largest_f1_of_all(seed):
    probs, _, targets = answers(40, digits=2, seed=seed)

    for p, t in zip(probs.T[:2], targets.T, strict=False):
        threshold = stats.best_f1_threshold(p, t)
        every = [metrics.f1_score(t, p >= cut) for cut in np.unique(p)]
        assert metrics.f1_score(t, p >= threshold) == pytest.approx(max(every))
        assert threshold not in p


def test_a_threshold_of_a_label_without_images_is_half():
    assert stats.best_f1_threshold(np.array([0.2, 0.9]), np.zeros(2)) == 0.5


def test_reliability_is_the_share_of_images_in_each_bin():
    curve = stats.label_reliability(np.array([0.11, 0.19, 0.95]), np.array([1, 0, 1]))

    np.testing.assert_allclose(curve.confidence, [0.15, 0.95])
    np.testing.assert_allclose(curve.accuracy, [0.5, 1.0])
    assert curve.n.tolist() == [2, 1]


def test_a_difference_that_no_draw_contradicts_has_a_small_p():
    drawn = np.full(1999, 0.1)
    (low, high), p = tables.difference_interval(0.1, drawn)

    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert p == pytest.approx(2 / 2000)
    assert tables.difference_interval(0.0, np.zeros(99)) == ((0.0, 0.0), 1.0)


@pytest.mark.parametrize(
    ("signal", "rates"), [(0.5, (0.5, 0.3, 0.2)), (2.0, (0.1, 0.05, 0.04))], ids=["usual", "rare"]
)
def test_intervals_cover_the_score_of_the_population(signal, rates):
    """95 % intervals from 60 samples of 150 images contain the score of 20,000 images."""
    everyone = make_multilabel(20_000, signal=(signal,), rates=rates, seed=9)
    probs, targets = everyone.probs[0], everyone.targets
    decided = (probs >= 0.5).astype(np.uint8)
    truth = {
        "mean_average_precision": stats.mean_average_precision(probs, targets),
        "macro_f1": stats.macro_f1(decided, targets),
    }
    random = np.random.default_rng(1)
    covered = dict.fromkeys(truth, 0)
    for seed in range(60):
        rows = random.choice(len(probs), 150, replace=False)
        answer = probs[rows], decided[rows], targets[rows]
        draws = tables.draw_scores(*answer, resamples=100, seed=seed)
        table = tables.score_table(*answer, draws=draws)
        for name, value in truth.items():
            low, high = table[f"{name}_interval"]
            covered[name] += low <= value <= high

    for name, count in covered.items():
        assert count >= 52, (name, count)  # fewer at a coverage of 0.95: once in 200
