"""The ensemble of several labels per image: laws of its fit, and of cross-fitting."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from support.multilabel import make_multilabel

from threefold.ensembles import multilabel as ensembles
from threefold.ensembles.multilabel import MultilabelEnsemble, fit_multilabel_ensemble
from threefold.errors import DataError
from threefold.stats.multilabel import log_loss

ENSEMBLE = MultilabelEnsemble(
    weights=[0.25, 0.75], slope=[2.0, 1.0], intercept=[-1.0, 0.0], thresholds=[0.3, 0.6]
)


def test_the_answer_is_the_calibrated_weighted_mean():
    probs = np.array([[[0.2, 0.9]], [[0.6, 0.1]]])

    answer = ENSEMBLE(probs)

    np.testing.assert_allclose(answer, [[expit(2 * logit(0.5) - 1), 0.25 * 0.9 + 0.75 * 0.1]])
    np.testing.assert_array_equal(ENSEMBLE.decide([[0.3, 0.59]]), [[1, 0]])


def test_certain_members_give_finite_answers():
    answer = ENSEMBLE(np.array([[[0.0, 1.0]], [[0.0, 1.0]]]))

    assert np.isfinite(answer).all()
    assert ((answer >= 0) & (answer <= 1)).all()


def test_json_keeps_every_number():
    again = MultilabelEnsemble.from_json(json.loads(json.dumps(ENSEMBLE.as_json())))

    assert again.as_json() == ENSEMBLE.as_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, 0.6]}, "sum to 1"),
        ({"weights": [-0.5, 1.5]}, "not negative"),
        ({"slope": [0.0, 1.0]}, "slopes of a calibration are positive"),
        ({"thresholds": [0.5]}, "wrong shape: thresholds"),
        ({"intercept": [np.nan, 0.0]}, "NaN or infinite: intercept"),
    ],
)
def test_wrong_arrays_are_one_line(change, message):
    with pytest.raises(DataError, match=message):
        MultilabelEnsemble(**{**ENSEMBLE.as_json(), **change})
    with pytest.raises(DataError, match="2 members and 2 labels"):
        ENSEMBLE(np.full((1, 3, 2), 0.5))


def test_equal_members_are_averaged_and_a_better_one_is_taken():
    alike = make_multilabel(200, signal=(1.0, 1.0, 1.0))
    apart = make_multilabel(200, signal=(2.5, 0.0, 0.0))

    np.testing.assert_allclose(fit_multilabel_ensemble(alike).weights, 1 / 3)
    np.testing.assert_allclose(fit_multilabel_ensemble(apart).weights, [1, 0, 0])


@pytest.mark.parametrize("metric", ["mean_average_precision", "log_loss"])
def test_the_choice_says_why(metric):
    rows = ensembles.rows_of(make_multilabel(120, signal=(2.5, 0.0)))

    choice = ensembles.choose_weights(rows, metric)

    assert choice.name == "best"
    assert "better by more than one standard error" in choice.reason


def test_calibration_mends_probabilities_that_are_too_certain():
    rows = make_multilabel(600, signal=(1.0,))
    certain = replace(rows, probs=expit(4 * logit(rows.probs.astype(np.float64)) + 2))

    ensemble = fit_multilabel_ensemble(certain)

    assert (ensemble.slope < 0.6).all()
    crossed = ensembles.cross_fit_member(ensembles.rows_of(certain), 0)
    assert log_loss(crossed.probs, rows.targets) < 0.6 * log_loss(certain.probs[0], rows.targets)


def test_calibrated_probabilities_stay_as_they_are():
    random = np.random.default_rng(0)
    rows = make_multilabel(300, signal=(1.0,))
    probs = random.uniform(0.05, 0.95, rows.targets.shape)
    calibrated = replace(
        rows, probs=probs[None], targets=(random.random(probs.shape) < probs).astype(int)
    )

    ensemble = fit_multilabel_ensemble(calibrated)

    np.testing.assert_array_equal(ensemble.slope, 1)
    np.testing.assert_array_equal(ensemble.intercept, 0)


def test_slope_and_intercept_are_those_of_a_logistic_regression():
    rows = make_multilabel(4000, signal=(0.5,), rates=(0.5, 0.3))
    z = logit(rows.probs[0].astype(np.float64)) * 3
    every = ensembles.fit_calibration(expit(z), rows.targets, rows.folds)

    for j in range(2):
        theirs = LogisticRegression(C=np.inf).fit(z[:, [j]], rows.targets[:, j])
        assert every[0][j] == pytest.approx(theirs.coef_[0, 0], rel=0.02)
        assert every[1][j] == pytest.approx(theirs.intercept_[0], abs=0.02)


@pytest.mark.parametrize("groups", [False, True])
def test_no_image_chooses_what_answers_it(groups):
    """Turning an image's own targets around changes neither its answer nor its labels."""
    whole = make_multilabel(90, signal=(1.0, 0.8), groups=groups)
    predictions = replace(whole, folds=np.arange(90) // 30, roles=None)
    rows = ensembles.rows_of(predictions)
    fits = {
        "chosen": ensembles.fit_chosen,
        "best": partial(ensembles.fit_method, method="best"),
        "mean": partial(ensembles.fit_method, method="mean"),
    }
    held = rows.part == 1
    turned = rows._replace(targets=np.where(held[:, None], 1 - rows.targets, rows.targets))

    for name, fit in fits.items():
        before, after = (ensembles.cross_fit(r, fit) for r in (rows, turned))
        np.testing.assert_array_equal(before.probs[held], after.probs[held], err_msg=name)
        np.testing.assert_array_equal(before.decided[held], after.decided[held], err_msg=name)
        assert not np.array_equal(before.probs[~held], after.probs[~held])


def test_thresholds_alone_are_cross_fitted_too():
    rows = ensembles.rows_of(make_multilabel(90, signal=(0.3,)))
    held = rows.part == 1
    turned = np.where(held[:, None], 1 - rows.targets, rows.targets)

    before, after = (
        ensembles.cross_fit_thresholds(rows.probs[0], targets, rows.part)
        for targets in (rows.targets, turned)
    )

    np.testing.assert_array_equal(before[held], after[held])
    assert not np.array_equal(before[~held], after[~held])


def test_noise_has_a_threshold_that_looks_better_than_it_is():
    """Thresholds chosen on the scored rows flatter; cross-fitted ones do not."""
    rows = ensembles.rows_of(make_multilabel(60, signal=(0.0,), rates=(0.2, 0.2, 0.2)))
    ensemble = ensembles.fit_weighted(rows, np.ones(1))
    apparent = ensemble.decide(ensemble(rows.probs))
    honest = ensembles.cross_fit_member(rows, 0).decided

    def f1(decided):
        return 2 * (decided * rows.targets).sum() / (decided.sum() + rows.targets.sum())

    assert f1(apparent) > f1(honest)


def test_parts_spread_rare_labels_and_keep_groups_together():
    targets = np.zeros((100, 2), np.uint8)
    targets[:10, 0], targets[::2, 1] = 1, 1

    part = ensembles.similar_parts(targets)
    grouped = ensembles.similar_parts(targets, [f"g{i // 4}" for i in range(100)])

    assert np.bincount(part[:10], minlength=5).tolist() == [2] * 5
    assert all(len(set(grouped[i : i + 4])) == 1 for i in range(0, 100, 4))


def test_one_row_cannot_be_cross_fitted():
    with pytest.raises(DataError, match="cannot be cross-fitted"):
        fit_multilabel_ensemble(make_multilabel(60, folds=1).rows([0]))
