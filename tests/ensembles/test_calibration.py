"""The choice of a calibration, its cross-fit, and its state."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from support.pools import biased_probs, draw_labels

from threefold.ensembles.calibration import (
    METHODS,
    Calibration,
    choose_calibration,
    fit_calibration,
    saved_calibration,
)
from threefold.ensembles.cross_fit import stratified_parts
from threefold.ensembles.scaling import (
    VectorScaling,
    apply_temperature,
    apply_vector,
    as_scaling,
    fit_temperature,
    fit_vector,
)
from threefold.errors import DataError
from threefold.predictions.results_schema import CalibrationState
from threefold.stats import scores
from threefold.stats.one_standard_error import standard_error

LAW = settings(max_examples=40, deadline=None)

FITS: dict[str, Callable[[np.ndarray, np.ndarray], VectorScaling]] = {
    "none": lambda probs, _: as_scaling(1.0, probs.shape[1]),
    "temperature": lambda probs, labels: as_scaling(fit_temperature(probs, labels), probs.shape[1]),
    "vector": fit_vector,
}
"""Each method as a single fit on all of its rows."""


def test_the_simplest_calibration_that_is_needed_is_chosen() -> None:
    rng = np.random.default_rng(0)
    good = softmax(rng.normal(0, 1.5, (2000, 3)), -1)
    labels = draw_labels(good, rng)

    none = choose_calibration(good, labels)
    temperature = choose_calibration(apply_temperature(good, 0.4), labels)
    vector = choose_calibration(*biased_probs(0, 2000))

    assert none.name == "none"
    assert "simpl" in none.reason
    assert none.probs == pytest.approx(good, abs=1e-6)
    assert temperature.name == "temperature"
    assert vector.name == "vector"
    assert vector.reason.endswith("nothing simpler comes within one standard error")


def test_the_choice_is_made_on_cross_fitted_rows() -> None:
    """Fitted on all rows, vector scaling would look better than it is: there is nothing to learn.

    There are two rows in each of thirty classes.
    """
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(30), 60), rng.permutation(np.repeat(np.arange(30), 2))

    chosen = choose_calibration(probs, labels)

    in_sample = apply_vector(probs, fit_vector(probs, labels))
    assert scores.log_loss(chosen.probs, labels) > scores.log_loss(in_sample, labels)


def test_the_choice_cross_fits_in_the_given_folds() -> None:
    probs, labels = biased_probs(0, 60)
    folds = np.arange(60) % 3
    inside = folds == 1

    chosen = choose_calibration(probs, labels, folds=folds)

    scaling = FITS[chosen.name](probs[~inside], labels[~inside])
    assert chosen.probs[inside] == pytest.approx(apply_vector(probs[inside], scaling))


def test_rows_of_one_group_count_as_one() -> None:
    """Five copies of every row say no more than one."""
    values = np.random.default_rng(0).normal(size=150)

    once = standard_error(values, np.arange(150))

    assert once == pytest.approx(values.std() / 150**0.5)
    assert standard_error(np.tile(values, 5), np.tile(np.arange(150), 5)) == pytest.approx(once)
    assert standard_error(np.tile(values, 5), np.arange(750)) == pytest.approx(once / 5**0.5)
    assert standard_error(np.tile(values, 5)) == pytest.approx(once / 5**0.5)


def test_groups_stay_in_one_part_of_the_choice() -> None:
    probs, labels = biased_probs(4, 90)
    groups = [f"g{g:02d}" for g in np.arange(90) // 6]

    part = stratified_parts(labels, groups)
    plain = fit_calibration("temperature", probs, labels)

    assert all(len(set(part[np.array(groups) == name])) == 1 for name in groups)
    for name in ("temperature", "auto"):
        grouped = fit_calibration(name, probs, labels, groups=groups)
        in_parts = fit_calibration(name, probs, labels, part, groups)
        assert grouped.probs == pytest.approx(in_parts.probs)
    assert plain.probs != pytest.approx(
        fit_calibration("temperature", probs, labels, groups=groups).probs, abs=1e-9
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_named_calibration_is_fitted_and_cross_fitted(name: str) -> None:
    probs, labels = biased_probs(5, 300)
    part = np.arange(300) % 3
    fit = FITS[name]

    calibration = fit_calibration(name, probs, labels, part)

    assert calibration.name == name
    assert calibration.apply(probs) == pytest.approx(
        apply_vector(probs, fit(probs, labels)), abs=1e-6
    )
    for value in range(3):
        inside = part == value
        expected = apply_vector(probs[inside], fit(probs[~inside], labels[~inside]))
        assert calibration.probs[inside] == pytest.approx(expected, abs=1e-6)


@LAW
@given(name=st.sampled_from([*METHODS, "auto"]), seed=st.integers(0, 99))
def test_a_calibration_survives_json_and_as_a_module(name: str, seed: int) -> None:
    probs, labels = biased_probs(seed, 120)
    calibration = fit_calibration(name, probs, labels)

    restored = Calibration.from_state(json.loads(json.dumps(calibration.state(), allow_nan=False)))
    with torch.inference_mode():
        answers = restored.to_module()(torch.tensor(probs, dtype=torch.float32)).numpy()

    assert (restored.name, restored.reason) == (calibration.name, calibration.reason)
    assert restored.temperature == calibration.temperature
    assert (restored.apply(probs) == calibration.apply(probs)).all()
    assert answers == pytest.approx(calibration.apply(probs), abs=1e-5)


def test_the_calibration_of_results_is_read() -> None:
    probs, labels = biased_probs(7, 100)
    calibration = fit_calibration("vector", probs, labels)

    restored = saved_calibration(CalibrationState(**calibration.state()), 3)

    assert (restored.apply(probs) == calibration.apply(probs)).all()


VECTOR_STATE: dict[str, Any] = fit_calibration("vector", *biased_probs(7, 100)).state()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "no calibration in the results"),
        (CalibrationState(**VECTOR_STATE), "for other classes; expected 4 classes, got 3"),
        (
            CalibrationState(**{**VECTOR_STATE, "name": "platt"}),
            "expected none or temperature or vector, got platt",
        ),
    ],
)
def test_results_without_a_usable_calibration_are_refused(
    state: CalibrationState | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        saved_calibration(state, 4)


def test_wrong_arguments_are_refused() -> None:
    probs, labels = biased_probs(0, 20)

    for name in ("temperature", "auto"):
        with pytest.raises(DataError, match="groups do not match the labels; expected 20, got 3"):
            fit_calibration(name, probs, labels, groups=["a", "b", "c"])
    with pytest.raises(
        DataError, match="unknown calibration; expected none, temperature, vector, auto, got platt"
    ):
        fit_calibration("platt", probs, labels)
    with pytest.raises(
        DataError, match=r"folds have the wrong shape; expected \(20,\), one per row, got \(3,\)"
    ):
        choose_calibration(probs, labels, folds=[0, 1, 2])
    with pytest.raises(
        DataError, match="cannot be cross-fitted; expected two parts at least, got all rows in one"
    ):
        choose_calibration(probs, labels, folds=np.zeros(20, int))
