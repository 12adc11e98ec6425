"""Scores, choice and calibration on arrays; test rows change neither choice nor fit."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.ensembles.calibration import fit_calibration
from threefold.evaluation.evaluate import Evaluation, evaluate
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import Score
from threefold.recipe.ensemble import EnsembleSpec
from threefold.stats.scores import ece

ALL = EnsembleSpec(methods=("mean", "pruned", "vote", "weighted"))


def pool(
    n: int, seed: int, kind: str = "oof", informative: bool = True, sharpness: float = 2.0
) -> Predictions:
    """Draw three members on n rows of four classes; unless `informative`, labels are random."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    seen = labels if informative else rng.integers(0, 4, n)
    shared = rng.normal(0, 1, (n, 4))  # errors that members have in common are not averaged away
    logits = rng.normal(0, 0.3, (3, n, 4)) + shared + sharpness * np.eye(4)[seen]
    probs = np.exp(3 * logits)
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    return Predictions(
        probs=probs,
        labels=labels,
        ids=tuple(f"{kind}{i}" for i in range(n)),
        classes=tuple("abcd"),
        members=("x", "y", "z"),
        kind=kind,
        folds=np.arange(n) % 3 if kind == "oof" else None,
    )  # type: ignore[arg-type]


def score(evaluation: Evaluation, name: str, rows: str) -> Score:
    return next(s for s in evaluation.scores if (s.name, s.rows) == (name, rows))


def test_shuffled_labels_give_chance() -> None:
    evaluation = evaluate(pool(800, 0, informative=False), None, ALL)

    for entry in evaluation.scores:
        low, high = entry.interval
        assert low < 0.25 + 0.03
        assert high > 0.25 - 0.03


@pytest.mark.parametrize("kind", ["oof", "test"])
def test_headline_has_the_metric_with_a_bootstrap_interval(kind: str) -> None:
    oof, test = pool(400, 1), pool(200, 2, "test")

    evaluation = evaluate(oof, test if kind == "test" else None, ALL, metric="macro_f1")

    metric = evaluation.expected.metric
    assert metric is not None
    assert (metric.name, metric.words) == ("macro_f1", "macro F1")
    assert metric.interval[0] < metric.value < metric.interval[1]
    if kind == "test":
        entry = score(evaluation, evaluation.chosen, "test")
        assert metric.value == pytest.approx(entry.macro_f1)


def test_perfect_rows_leave_the_metric_an_interval() -> None:
    metric = evaluate(pool(60, 1, sharpness=30.0), None, ALL, metric="macro_f1").expected.metric

    assert metric is not None
    assert metric.value == metric.interval[1] == 1.0
    assert 0.9 < metric.interval[0] < 0.97


def test_accuracy_is_no_second_metric_of_the_headline() -> None:
    assert evaluate(pool(200, 1), None, ALL).expected.metric is None


def test_test_rows_change_neither_the_choice_nor_the_fit() -> None:
    oof = pool(600, 1)

    a = evaluate(oof, pool(200, 2, "test"), ALL)
    b = evaluate(oof, pool(200, 3, "test", informative=False), ALL)

    assert (a.chosen, a.reason) == (b.chosen, b.reason)
    assert a.calibration.temperature == b.calibration.temperature
    probs = pool(50, 4, "test").probs
    np.testing.assert_array_equal(a.ensemble.predict_proba(probs), b.ensemble.predict_proba(probs))
    assert [s for s in a.scores if s.rows == "oof"] == [s for s in b.scores if s.rows == "oof"]


def test_overconfident_members_are_calibrated() -> None:
    test = pool(1500, 6, "test", sharpness=1.0)

    evaluation = evaluate(pool(1500, 5, sharpness=1.0), test, ALL)

    assert evaluation.calibration.temperature > 1.2
    mean = score(evaluation, "mean", "test")
    raw = test.probs.mean(0)
    assert mean.ece < 0.5 * ece(raw, test.labels)
    assert mean.accuracy == pytest.approx((raw.argmax(1) == test.labels).mean())


def test_calibrated_scores_are_cross_fitted() -> None:
    """Changing the labels of one fold must not change that fold's calibrated probabilities."""
    oof = pool(300, 7, sharpness=1.0)
    labels = oof.labels.copy()
    labels[oof.folds == 0] = (labels[oof.folds == 0] + 1) % 4
    probs = oof.probs.mean(0)

    before, after = (
        fit_calibration("temperature", probs, y, oof.folds).probs for y in (oof.labels, labels)
    )

    np.testing.assert_array_equal(before[oof.folds == 0], after[oof.folds == 0])
    assert np.abs(before - after).max() > 1e-3


def test_without_folds_scores_are_marked_as_in_sample() -> None:
    test = pool(200, 8, "test")
    paper = Predictions(
        probs=test.probs,
        labels=test.labels,
        ids=test.ids,
        classes=test.classes,
        members=test.members,
        kind="test",
        protocol="paper",
    )

    evaluation = evaluate(None, paper, ALL)

    assert score(evaluation, "weighted", "test").fitted_on == "the scored rows"
    assert score(evaluation, "mean", "test").fitted_on == "calibration only"
    assert len(evaluation.warnings) == 2


def test_comparisons_name_the_best_member_and_count_images() -> None:
    test = pool(400, 10, "test")
    hits = test.probs.argmax(-1) == test.labels

    evaluation = evaluate(pool(400, 9), test, ALL)

    for entry in evaluation.comparisons:
        assert entry.b == "xyz"[hits.mean(1).argmax()]
        assert 0 <= entry.p <= 1
        assert entry.rows == "test"
        assert str(entry.only_a) in entry.verdict


def test_a_member_called_like_a_method_keeps_its_own_score() -> None:
    oof = pool(400, 11)
    named = Predictions(
        probs=oof.probs,
        labels=oof.labels,
        ids=oof.ids,
        classes=oof.classes,
        members=("mean", "y", "z"),
        kind="oof",
        folds=oof.folds,
    )

    scores = {(s.kind, s.name): s.accuracy for s in evaluate(named, None, ALL).scores}

    assert len(scores) == 3 + len(ALL.methods)
    assert scores["member", "mean"] == (oof.probs[0].argmax(1) == oof.labels).mean()
    assert scores["ensemble", "mean"] != scores["member", "mean"]
