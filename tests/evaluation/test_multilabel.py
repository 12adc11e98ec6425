"""Evaluation of several labels per image: honest scores, one choice, a ledger, comparisons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics
from support.multilabel import make_multilabel

from threefold.errors import DataError, RecipeError
from threefold.evaluation.multilabel import evaluate_multilabel
from threefold.evaluation.multilabel_saved import (
    are_multilabel,
    combine_multilabel,
    compare_multilabel,
    join_multilabel,
    score_multilabel,
)
from threefold.predictions import Predictions


@pytest.fixture(scope="module")
def evaluation():
    return evaluate_multilabel(make_multilabel(150), make_multilabel(80, kind="test", seed=5))


def test_the_headline_is_that_of_the_ensemble_on_test_rows(evaluation):
    test = make_multilabel(80, kind="test", seed=5)

    assert evaluation.rows.kind == evaluation.expected.rows == "test"
    np.testing.assert_allclose(evaluation.probs, evaluation.ensemble(test.probs), atol=1e-6)
    np.testing.assert_array_equal(
        evaluation.decided, evaluation.ensemble.decide(evaluation.ensemble(test.probs))
    )
    assert evaluation.expected.mean_average_precision == pytest.approx(
        metrics.average_precision_score(test.targets, evaluation.probs, average="macro")
    )
    assert evaluation.expected.macro_f1 == pytest.approx(
        metrics.f1_score(test.targets, evaluation.decided, average="macro")
    )


def test_every_member_and_method_is_scored_on_both_kinds_of_rows(evaluation):
    keys = {(s.kind, s.name, s.rows) for s in evaluation.scores}

    names = [("member", "a"), ("member", "b"), ("ensemble", "mean"), ("ensemble", "best")]
    assert keys == {(*key, rows) for key in names for rows in ("oof", "test")}
    low, high = evaluation.expected.mean_average_precision_interval
    assert low < evaluation.expected.mean_average_precision < high


def test_the_ledger_has_every_fit_without_overlap(evaluation):
    steps = {line.step: line for line in evaluation.ledger}

    assert "choice of the way to combine" in steps
    assert "calibration and thresholds" in steps
    assert all(line.overlap == 0 for line in evaluation.ledger)


def test_labels_have_the_thresholds_and_scores_of_scikit_learn(evaluation):
    test = make_multilabel(80, kind="test", seed=5)

    for j, label in enumerate(evaluation.per_label):
        truth = test.targets[:, j]
        assert label.n == truth.sum()
        assert label.threshold == evaluation.ensemble.thresholds[j]
        assert label.f1 == pytest.approx(metrics.f1_score(truth, evaluation.decided[:, j]))
        assert label.average_precision == pytest.approx(
            metrics.average_precision_score(truth, evaluation.probs[:, j])
        )


def test_out_of_fold_labels_never_choose_their_own_answer():
    rows = make_multilabel(90, signal=(0.5, 0.4))
    held = rows.folds == 0
    turned = replace(rows, targets=np.where(held[:, None], 1 - rows.targets, rows.targets))

    before, after = (evaluate_multilabel(r, None, method="mean") for r in (rows, turned))

    np.testing.assert_array_equal(before.decided[held], after.decided[held])
    np.testing.assert_array_equal(before.probs[held], after.probs[held])


def test_a_row_in_both_tables_is_refused():
    oof = make_multilabel(60)
    test = replace(oof, kind="test", folds=None, roles=None)

    with pytest.raises(DataError, match="fitted on some of these rows"):
        evaluate_multilabel(oof, test)


def test_saved_members_are_scored_as_they_are(tmp_path):
    rows = make_multilabel(80)
    rows.save(tmp_path / "p.npz")

    summary = score_multilabel([tmp_path / "p.npz"]).summary

    assert [s.name for s in summary.scores] == ["a", "b"]
    assert summary.per_label_of == "a"
    for score, probs in zip(summary.scores, rows.probs, strict=True):
        assert score.mean_average_precision == pytest.approx(
            metrics.average_precision_score(rows.targets, probs)
        )


def test_files_are_joined_by_the_ids_of_their_rows(tmp_path):
    rows = make_multilabel(60)
    rows.member("a").save(tmp_path / "a.npz")
    rows.member("b").rows(np.arange(60)[::-1]).save(tmp_path / "b.npz")

    summary = combine_multilabel([tmp_path / "a.npz", tmp_path / "b.npz"], ["auto"]).summary

    together = evaluate_multilabel(rows, None)
    assert summary.combined == ("a", "b")
    assert summary.scores[0].log_loss == pytest.approx(together.scores[0].log_loss)
    assert summary.ensemble == together.state


def test_rows_that_do_not_fit_together_are_one_line():
    rows = make_multilabel(60)
    other = replace(rows.member("b"), targets=1 - rows.targets)

    with pytest.raises(DataError, match="different targets"):
        join_multilabel([rows.member("a"), other])
    with pytest.raises(DataError, match="different images"):
        join_multilabel([rows.member("a"), rows.member("b").rows(range(30))])
    assert len(join_multilabel([rows.member("a"), rows.member("b").rows(range(30))], True)) == 30


def test_a_better_member_is_found_and_an_equal_one_is_not(tmp_path):
    rows = make_multilabel(200, signal=(2.0, 0.5, 0.5), seed=2)
    rows.save(tmp_path / "p.npz")

    pairs = compare_multilabel([str(tmp_path / "p.npz")]).summary.comparisons

    assert [(p.a, p.b) for p in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs[0].verdict.startswith("a is better than b")
    assert pairs[0].p <= 0.05 < pairs[2].p
    assert pairs[2].verdict.startswith("no evidence")
    assert pairs[0].difference == pytest.approx(
        pairs[0].mean_average_precision_a - pairs[0].mean_average_precision_b
    )


def test_both_tasks_together_are_refused(tmp_path):
    make_multilabel().save(tmp_path / "several.npz")
    Predictions.from_arrays([[0.5, 0.5]], [0], axes="nk").save(tmp_path / "one.npz")

    assert are_multilabel([tmp_path / "several.npz", f"{tmp_path / 'several.npz'}:a"])
    assert not are_multilabel([tmp_path / "one.npz"])
    with pytest.raises(DataError, match="do not go together"):
        are_multilabel([tmp_path / "several.npz", tmp_path / "one.npz"])


def test_methods_of_one_label_per_image_are_refused(tmp_path):
    make_multilabel().save(tmp_path / "p.npz")

    with pytest.raises(RecipeError, match=r"for one label per image: stacked.*mean or best"):
        combine_multilabel([tmp_path / "p.npz"], ["stacked"])
