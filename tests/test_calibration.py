"""Vector scaling, the choice of a calibration, and the temperature of an average of fold models.

Temperature itself is tested in test_ensemble, where its public names are.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from threefold import stats
from threefold.calibration import (
    METHODS,
    Calibration,
    _standard_error,
    choose_calibration,
    fit_averaged_temperature,
    fit_calibration,
    saved_calibration,
)
from threefold.crossfit import stratified_parts
from threefold.errors import DataError
from threefold.scaling import (
    _FEWEST,
    VectorModule,
    VectorScaling,
    _bounded,
    _newton,
    apply_temperature,
    apply_vector,
    as_scaling,
    fit_temperature,
    fit_temperatures,
    fit_vector,
    floored_logs,
    scaling_from_state,
    scaling_state,
)

LAW = settings(max_examples=40, deadline=None)


def drawn(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels (n,) drawn from probabilities (n, k)."""
    labels: np.ndarray = (
        (rng.random((len(probs), 1)) > probs.cumsum(1)).sum(1).clip(max=probs.shape[1] - 1)
    )
    return labels


def fold_world(
    seed: int,
    n: int = 3000,
    u: int = 3000,
    folds: int = 5,
    k: int = 4,
    noise: float = 1.5,
    sharp: float = 1.5,
) -> dict[str, np.ndarray]:
    """Fold models that see true logits through noise of their own, and are too sure: oof rows get one, new rows all."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n + u, k))
    labels = drawn(softmax(logits, -1), rng)
    seen = sharp * (logits + noise * rng.normal(size=(folds, n + u, k)))
    probs = softmax(seen, -1)
    oof = probs[np.arange(n) % folds, np.arange(n)]
    return {
        "oof": oof,
        "labels": labels[:n],
        "folds": probs[:, n:],
        "truth": labels[n:],
        "seen": seen[:, n:],
    }


@pytest.mark.parametrize(("noise", "sharp"), [(0.5, 1.0), (1.5, 1.0), (1.5, 3.0), (3.0, 0.5)])
@pytest.mark.parametrize("folds", [2, 5])
def test_averaging_needs_its_own_temperature_and_gets_it_without_labels(
    noise: float, sharp: float, folds: int
) -> None:
    plain, found, best = [], [], []
    for seed in range(3):
        w = fold_world(seed, folds=folds, noise=noise, sharp=sharp)
        answer = w["folds"].mean(0)
        temperatures = (
            fit_temperature(w["oof"], w["labels"]),
            fit_averaged_temperature(w["oof"], w["labels"], w["folds"]),
            fit_temperature(answer, w["truth"]),
        )
        for t, errors in zip(temperatures, (plain, found, best), strict=True):
            scaled = apply_temperature(answer, t)
            errors.append(
                (np.log(t), stats.ece(scaled, w["truth"]), stats.log_loss(scaled, w["truth"]))
            )
    table = np.array([plain, found, best])  # (how, seed, (log T, ECE, log loss))
    distance = np.abs(table[:2, :, 0] - table[2, :, 0]).mean(1)
    ece, loss = table[:, :, 1].mean(1), table[:, :, 2].mean(1)
    assert distance[1] < 0.5 * distance[0]
    assert loss[1] - loss[2] < 0.25 * (loss[0] - loss[2])
    assert ece[1] < max(ece[0], 0.02)
    if noise > 1:
        assert ece[1] < 0.6 * ece[0]


def test_the_labels_of_the_new_rows_are_estimated_without_bias() -> None:
    """For the geometric mean the law is exact: with many rows the result is that of a fit on the new rows' labels."""
    w = fold_world(0, n=20_000, u=20_000, folds=3)
    geometric = softmax(w["seen"].mean(0), -1)
    found = fit_averaged_temperature(w["oof"], w["labels"], w["folds"], geometric)
    assert found == pytest.approx(fit_temperature(geometric, w["truth"]), rel=0.03)
    assert abs(found - fit_temperature(w["oof"], w["labels"])) > 0.3


@LAW
@given(seed=st.integers(0, 999), folds=st.integers(2, 4))
def test_fold_models_that_agree_leave_the_plain_temperature(seed: int, folds: int) -> None:
    w = fold_world(seed, n=200, u=50)
    same = np.repeat(w["folds"][:1], folds, 0)
    found = fit_averaged_temperature(w["oof"], w["labels"], same)
    assert found == pytest.approx(fit_temperature(w["oof"], w["labels"]), rel=1e-3)


def test_the_order_of_fold_models_and_rows_does_not_matter() -> None:
    w = fold_world(1, n=300, u=200)
    found = fit_averaged_temperature(w["oof"], w["labels"], w["folds"])
    turned = fit_averaged_temperature(w["oof"][::-1], w["labels"][::-1], w["folds"][::-1, ::-1])
    assert turned == pytest.approx(found, rel=1e-6)


def test_two_of_five_fold_models_tell_what_all_five_would() -> None:
    w = fold_world(2, n=6000, u=6000)
    whole = fit_averaged_temperature(w["oof"], w["labels"], w["folds"])
    pair = fit_averaged_temperature(w["oof"], w["labels"], w["folds"][:2])
    told = fit_averaged_temperature(w["oof"], w["labels"], w["folds"][:2], averaged=5)
    assert told == pytest.approx(whole, rel=0.15)
    assert abs(told - whole) < 0.5 * abs(pair - whole)
    assert fit_averaged_temperature(w["oof"], w["labels"], w["folds"], averaged=5) == whole


def test_parts_of_an_average_that_contradict_each_other_are_refused() -> None:
    w = fold_world(0, n=40, u=30)
    oof, labels, folds = w["oof"], w["labels"], w["folds"]
    with pytest.raises(
        DataError, match="one fold model is no average; expected fold_probs of two or more, got 1"
    ):
        fit_averaged_temperature(oof, labels, folds[:1])
    with pytest.raises(
        DataError, match="fold_probs are of other classes than oof; expected 4 classes, got 2"
    ):
        fit_averaged_temperature(oof, labels, np.full((2, 9, 2), 0.5))
    with pytest.raises(
        DataError, match=r"answers do not match fold_probs; expected \(30, 4\), got \(29, 4\)"
    ):
        fit_averaged_temperature(oof, labels, folds, folds[0, :29])
    with pytest.raises(
        DataError, match="fewer fold models are averaged than given; expected averaged >= 5, got 4"
    ):
        fit_averaged_temperature(oof, labels, folds, averaged=4)
    with pytest.raises(
        DataError, match="cannot be extrapolated; fix: leave answers out, or averaged"
    ):
        fit_averaged_temperature(oof, labels, folds[:2], folds[:2].mean(0), averaged=5)
    with pytest.raises(DataError, match="do not sum to 1"):
        fit_averaged_temperature(oof, labels, folds * 2)


def tilted(
    seed: int, n: int, bias: tuple[float, ...] = (1.5, 0.0, -1.5)
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are off by a bias of each class, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, len(bias)))
    return softmax(logits + np.array(bias), -1), drawn(softmax(logits, -1), rng)


def test_vector_scaling_undoes_a_bias_of_each_class() -> None:
    probs, labels = tilted(0, 20_000)
    scale, bias = fit_vector(probs, labels)
    assert bias - bias.mean() == pytest.approx([-1.5, 0, 1.5], abs=0.1)
    assert scale == pytest.approx(np.ones(3), abs=0.1)
    vector, warm = (
        apply_vector(probs, VectorScaling(scale, bias)),
        apply_temperature(probs, fit_temperature(probs, labels)),
    )
    assert stats.log_loss(vector, labels) < stats.log_loss(warm, labels) - 0.1
    assert stats.accuracy(vector, labels) > stats.accuracy(warm, labels) + 0.05


def test_vector_scaling_ends_in_temperature_as_the_shrinkage_grows() -> None:
    probs, labels = tilted(1, 300)
    temperature = fit_temperature(probs, labels)
    far = []
    for shrinkage in (1e-2, 1e1, 1e4, 1e8):
        scale, bias = fit_vector(probs, labels, shrinkage)
        far.append(np.linalg.norm(scale * temperature - 1) + np.linalg.norm(bias))
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-3
    assert apply_vector(probs, fit_vector(probs, labels, 1e8)) == pytest.approx(
        apply_temperature(probs, temperature), abs=1e-3
    )


def test_vector_scaling_of_two_classes_is_logistic_regression() -> None:
    """With two classes and hardly any penalty it is Platt scaling; scikit-learn fits the same."""
    probs, labels = tilted(2, 4000, (1.0, -1.0))
    logs = np.log(probs)
    platt = LogisticRegression(C=1e9, tol=1e-8, max_iter=2000).fit(logs, labels).predict_proba(logs)
    assert apply_vector(probs, fit_vector(probs, labels, 1e-6)) == pytest.approx(platt, abs=2e-3)


@LAW
@given(seed=st.integers(0, 999), n=st.integers(1, 30), k=st.integers(2, 6))
def test_vector_scaling_fits_any_rows_and_its_module_answers_the_same(
    seed: int, n: int, k: int
) -> None:
    """Also one row, classes without rows, exact zeros."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(k, 0.2), n).astype(np.float32)
    probs[0] = np.eye(k, dtype=np.float32)[0]
    scaling = fit_vector(probs, rng.integers(0, k, n))
    assert (scaling.scale > 0).all()
    found = apply_vector(probs, scaling)
    assert np.isfinite(found).all()
    assert found.sum(1) == pytest.approx(1)
    with torch.inference_mode():
        assert VectorModule(scaling)(torch.tensor(probs)).numpy() == pytest.approx(found, abs=2e-5)


def test_vector_scaling_survives_export() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    module = VectorModule(VectorScaling(np.array([1.0, 2.0, 0.5]), np.array([0.1, 0.0, -0.3])))
    exported = torch.export.export(
        module, (probs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert torch.allclose(exported.module()(probs[:2]), module(probs[:2]))


def test_a_temperature_is_a_scaling_and_follows_another() -> None:
    probs, _ = tilted(3, 50)
    assert apply_vector(probs, as_scaling(1.7, 3)) == pytest.approx(apply_temperature(probs, 1.7))
    first = VectorScaling(np.array([1.0, 2.0, 0.5]), np.array([0.1, 0.0, -0.3]))
    both = apply_temperature(apply_vector(probs, first), 0.6)
    assert apply_vector(probs, as_scaling(0.6, 3, first)) == pytest.approx(both, abs=1e-6)


def test_the_choice_is_the_simplest_that_is_needed() -> None:
    rng = np.random.default_rng(0)
    good = softmax(rng.normal(0, 1.5, (2000, 3)), -1)
    labels = drawn(good, rng)
    chosen = choose_calibration(good, labels)
    assert chosen.name == "none"
    assert "simpl" in chosen.reason
    assert chosen.probs == pytest.approx(good, abs=1e-6)
    assert choose_calibration(apply_temperature(good, 0.4), labels).name == "temperature"
    assert choose_calibration(*tilted(0, 2000)).name == "vector"
    assert choose_calibration(*tilted(0, 2000)).reason.endswith(
        "nothing simpler comes within one standard error"
    )


def test_the_choice_is_made_on_rows_that_the_fit_has_not_seen() -> None:
    """Two rows of each of thirty classes, no information: fitted on all rows vector scaling would look better than it is."""
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(30), 60), rng.permutation(np.repeat(np.arange(30), 2))
    chosen = choose_calibration(probs, labels)
    assert stats.log_loss(chosen.probs, labels) > stats.log_loss(
        apply_vector(probs, fit_vector(probs, labels)), labels
    )
    folds = np.arange(60) % 3
    held = folds == 1
    crossed = choose_calibration(*(w := tilted(0, 60)), folds=folds)
    fit = {
        "none": lambda *_: as_scaling(1.0, 3),
        "temperature": lambda p, y: as_scaling(fit_temperature(p, y), 3),
    }
    again = {**fit, "vector": fit_vector}[crossed.name](w[0][~held], w[1][~held])
    assert crossed.probs[held] == pytest.approx(apply_vector(w[0][held], again))


def test_rows_of_one_group_count_as_one() -> None:
    """Five copies of every row say no more than one: the standard error of the choice is that of single rows."""
    values = np.random.default_rng(0).normal(size=150)
    once = _standard_error(values, np.arange(150))
    assert once == pytest.approx(values.std() / 150**0.5)
    assert _standard_error(np.tile(values, 5), np.tile(np.arange(150), 5)) == pytest.approx(once)
    assert _standard_error(np.tile(values, 5), np.arange(750)) == pytest.approx(once / 5**0.5)


def test_groups_stay_in_one_part_of_the_choice() -> None:
    probs, truth = tilted(4, 90)
    names = [f"g{g:02d}" for g in np.arange(90) // 6]
    part = stratified_parts(truth, names)
    assert all(len(set(part[np.array(names) == name])) == 1 for name in names)
    for name in ("temperature", "auto"):
        grouped = fit_calibration(name, probs, truth, groups=names)
        assert grouped.probs == pytest.approx(
            fit_calibration(name, probs, truth, part, names).probs
        )
    plain = fit_calibration("temperature", probs, truth)
    assert plain.probs != pytest.approx(
        fit_calibration("temperature", probs, truth, groups=names).probs, abs=1e-9
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_calibration_by_name_is_fitted_on_all_rows_and_crossed(name: str) -> None:
    probs, labels = tilted(5, 300)
    part = np.arange(300) % 3
    found = fit_calibration(name, probs, labels, part)
    assert found.name == name
    one = {
        "none": lambda p, y: as_scaling(1.0, 3),
        "temperature": lambda p, y: as_scaling(fit_temperature(p, y), 3),
        "vector": fit_vector,
    }[name]
    assert found.apply(probs) == pytest.approx(apply_vector(probs, one(probs, labels)), abs=1e-6)
    for value in range(3):
        held = part == value
        expected = apply_vector(probs[held], one(probs[~held], labels[~held]))
        assert found.probs[held] == pytest.approx(expected, abs=1e-6)


@LAW
@given(name=st.sampled_from([*METHODS, "auto"]), seed=st.integers(0, 99))
def test_a_calibration_is_the_same_after_json_and_as_a_module(name: str, seed: int) -> None:
    probs, labels = tilted(seed, 120)
    found = fit_calibration(name, probs, labels)
    again = Calibration.from_state(json.loads(json.dumps(found.state(), allow_nan=False)))
    assert (again.name, again.reason) == (found.name, found.reason)
    assert again.temperature == found.temperature
    assert (again.apply(probs) == found.apply(probs)).all()
    with torch.inference_mode():
        answers = again.to_module()(torch.tensor(probs, dtype=torch.float32)).numpy()
    assert answers == pytest.approx(found.apply(probs), abs=1e-5)


def test_a_scaling_is_the_same_after_npz_and_json(tmp_path: Path) -> None:
    scaling = fit_vector(*tilted(6, 80))
    np.savez(tmp_path / "a.npz", **scaling_state(scaling))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        from_npz = scaling_from_state(arrays)
    for again in (from_npz, scaling_from_state(json.loads(json.dumps(scaling_state(scaling))))):
        assert (again.scale == scaling.scale).all()
        assert (again.bias == scaling.bias).all()
    for broken in (
        {"scale": [1.0]},
        {"scale": [1.0, "a"], "bias": [0, 0]},
        {"scale": [1.0], "bias": [0.0, 0.0]},
    ):
        with pytest.raises(
            DataError, match=r"not the state of a scaling|two lists of finite numbers"
        ):
            scaling_from_state(broken)


def test_results_of_older_runs_have_a_temperature_only() -> None:
    probs, labels = tilted(7, 100)
    old = saved_calibration({"temperature": 1.7}, 3)
    assert (old.name, old.temperature) == ("temperature", pytest.approx(1.7))
    assert old.apply(probs) == pytest.approx(apply_temperature(probs, 1.7))
    new = fit_calibration("vector", probs, labels)
    assert (
        saved_calibration({"temperature": None, "calibration": new.state()}, 3).apply(probs)
        == new.apply(probs)
    ).all()
    for results, message in (
        ({}, "no calibration in the results"),
        ({"temperature": None}, "no calibration in the results"),
        ({"temperature": -1.0}, "a temperature is above 0"),
        ({"calibration": new.state()}, "of other classes; expected 4 classes, got 3"),
        (
            {"calibration": {**new.state(), "name": "platt"}},
            "expected none or temperature or vector, got platt",
        ),
    ):
        with pytest.raises(DataError, match=message):
            saved_calibration(results, 4)


def test_the_temperature_is_the_minimum_of_the_log_loss() -> None:
    for seed in range(5):
        probs, labels = tilted(seed, 400)
        best = fit_temperature(probs, labels)
        here = stats.log_loss(apply_temperature(probs, best), labels)
        assert all(
            here < stats.log_loss(apply_temperature(probs, best * f), labels) for f in (0.99, 1.01)
        )
    assert fit_temperature(np.full((9, 3), 1 / 3), np.arange(9) % 3) == 1.0


@LAW
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 60),
    k=st.integers(2, 8),
    shrinkage=st.floats(0.1, 100),
)
def test_newtons_steps_end_where_a_bounded_search_does(
    seed: int, n: int, k: int, shrinkage: float
) -> None:
    rng = np.random.default_rng(seed)
    z, truth = floored_logs(rng.dirichlet(np.full(k, 0.3), n)), rng.integers(0, k, n)
    found = _newton(z, truth, shrinkage)
    assert found is not None
    slow = _bounded(z, truth, shrinkage)
    if found[0].min() > _FEWEST:
        assert found == pytest.approx(slow, abs=5e-3)
    else:  # the bound acts: `fit_vector` takes the search
        assert slow[0].min() == pytest.approx(_FEWEST)


def test_bad_input_is_told_in_one_line() -> None:
    probs, labels = tilted(0, 20)
    with pytest.raises(DataError, match="shrinkage of vector scaling is a number above 0; got -1"):
        fit_vector(probs, labels, -1)
    with pytest.raises(
        DataError, match="the scaling is of other classes; expected 2 classes, got 3"
    ):
        apply_vector(probs, as_scaling(1.0, 2))
    with pytest.raises(DataError, match="the scaling is of other classes"):
        as_scaling(1.0, 3, as_scaling(1.0, 2))
    with pytest.raises(DataError, match="two lists of finite numbers"):
        VectorModule(VectorScaling(np.array([1.0, np.nan]), np.zeros(2)))
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


@pytest.mark.parametrize(("n", "sharp"), [(3000, 1.0), (40, 8.0), (12, 0.1)])
def test_temperatures_of_parts_are_those_of_single_fits(n: int, sharp: float) -> None:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 4, n)
    logits = sharp * (rng.normal(0, 1, (n, 4)) + np.eye(4)[labels])
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    part = np.arange(n) % 5
    whole, apart = fit_temperatures(probs, labels, part)
    assert whole == pytest.approx(fit_temperature(probs, labels), rel=1e-7)
    for value, temperature in apart.items():
        rest = part != value
        assert temperature == pytest.approx(fit_temperature(probs[rest], labels[rest]), rel=1e-5)
