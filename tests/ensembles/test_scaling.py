"""Temperature and vector scaling: against their definitions, at their limits, as modules."""

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
from support.pools import biased_probs, draw_labels

from threefold.ensembles.scaling import (
    SMALLEST_SCALE,
    VectorScaling,
    apply_temperature,
    apply_vector,
    as_scaling,
    fit_temperature,
    fit_temperatures,
    fit_vector,
    floored_logs,
    minimize_bounded,
    minimize_newton,
    scaling_from_state,
    scaling_state,
    temperature_module,
    vector_module,
)
from threefold.errors import DataError
from threefold.stats import scores

LAW = settings(max_examples=40, deadline=None)


def test_temperature_undoes_a_known_sharpening() -> None:
    rng = np.random.default_rng(0)
    probs = softmax(rng.normal(0, 2, (20_000, 5)), -1)
    labels = draw_labels(probs, rng)

    for temperature in (0.5, 1.0, 2.5):
        sharpened = softmax(np.log(probs) / temperature, -1)
        assert fit_temperature(sharpened, labels) == pytest.approx(1 / temperature, rel=0.05)
    overconfident = softmax(np.log(probs) * 3, -1)
    calibrated = apply_temperature(overconfident, fit_temperature(overconfident, labels))
    assert scores.ece(calibrated, labels) < 0.02 < scores.ece(overconfident, labels)


@settings(max_examples=50, deadline=None)
@given(temperature=st.floats(0.05, 20), seed=st.integers(0, 999))
def test_temperature_keeps_the_order_of_the_classes(temperature: float, seed: int) -> None:
    probs = np.random.default_rng(seed).dirichlet(np.ones(5), 20).astype(np.float32)

    scaled = apply_temperature(probs, temperature)
    with torch.inference_mode():
        by_module = temperature_module(temperature)(torch.tensor(probs)).numpy()

    assert scaled.sum(1) == pytest.approx(1)
    assert (scaled.argmax(1) == probs.argmax(1)).all()
    assert by_module == pytest.approx(scaled, abs=1e-6)


def test_temperature_of_one_changes_only_exact_zeros() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])

    scaled = apply_temperature(probs, 1.0)

    assert scaled[0] == pytest.approx(probs[0])
    assert scaled[1] == pytest.approx([1, 1e-7, 1e-7])


def test_temperature_is_bounded() -> None:
    right = np.tile([0.9, 0.1], (100, 1))
    labels = np.zeros(100, int)

    assert 0.05 <= fit_temperature(right, labels) < 0.1
    assert 19 < fit_temperature(right[:, ::-1], labels) <= 20


def test_temperature_minimizes_the_log_loss() -> None:
    for seed in range(5):
        probs, labels = biased_probs(seed, 400)

        best = fit_temperature(probs, labels)

        loss = scores.log_loss(apply_temperature(probs, best), labels)
        for factor in (0.99, 1.01):
            assert loss < scores.log_loss(apply_temperature(probs, best * factor), labels)
    assert fit_temperature(np.full((9, 3), 1 / 3), np.arange(9) % 3) == 1.0


@pytest.mark.parametrize(("n", "sharpness"), [(3000, 1.0), (40, 8.0), (12, 0.1)])
def test_temperatures_by_part_equal_separate_fits(n: int, sharpness: float) -> None:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 4, n)
    logits = sharpness * (rng.normal(0, 1, (n, 4)) + np.eye(4)[labels])
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    part = np.arange(n) % 5

    whole, by_part = fit_temperatures(probs, labels, part)

    assert whole == pytest.approx(fit_temperature(probs, labels), rel=1e-7)
    for value, temperature in by_part.items():
        rest = part != value
        assert temperature == pytest.approx(fit_temperature(probs[rest], labels[rest]), rel=1e-5)


def test_temperature_module_can_be_exported() -> None:
    probs = torch.full((3, 4), 0.25)

    exported = torch.export.export(
        temperature_module(2.0), (probs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )

    assert torch.allclose(exported.module()(probs[:2]), probs[:2])


@pytest.mark.parametrize("temperature", [0, -1, np.nan])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(DataError, match="above 0"):
        apply_temperature([[0.9, 0.1]], temperature)
    with pytest.raises(DataError, match="above 0"):
        temperature_module(temperature)


def test_vector_scaling_undoes_a_bias_of_each_class() -> None:
    probs, labels = biased_probs(0, 20_000)

    scale, bias = fit_vector(probs, labels)
    by_vector = apply_vector(probs, VectorScaling(scale, bias))
    by_temperature = apply_temperature(probs, fit_temperature(probs, labels))

    assert bias - bias.mean() == pytest.approx([-1.5, 0, 1.5], abs=0.1)
    assert scale == pytest.approx(np.ones(3), abs=0.1)
    assert scores.log_loss(by_vector, labels) < scores.log_loss(by_temperature, labels) - 0.1
    assert scores.accuracy(by_vector, labels) > scores.accuracy(by_temperature, labels) + 0.05


def test_vector_scaling_becomes_temperature_with_shrinkage() -> None:
    probs, labels = biased_probs(1, 300)
    temperature = fit_temperature(probs, labels)

    distances = []
    for shrinkage in (1e-2, 1e1, 1e4, 1e8):
        scale, bias = fit_vector(probs, labels, shrinkage)
        distances.append(np.linalg.norm(scale * temperature - 1) + np.linalg.norm(bias))

    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3
    assert apply_vector(probs, fit_vector(probs, labels, 1e8)) == pytest.approx(
        apply_temperature(probs, temperature), abs=1e-3
    )


def test_vector_scaling_of_two_classes_is_platt_scaling() -> None:
    """With two classes and hardly any penalty scikit-learn's logistic regression fits the same."""
    probs, labels = biased_probs(2, 4000, (1.0, -1.0))
    logs = np.log(probs)

    platt = LogisticRegression(C=1e9, tol=1e-8, max_iter=2000).fit(logs, labels).predict_proba(logs)

    assert apply_vector(probs, fit_vector(probs, labels, 1e-6)) == pytest.approx(platt, abs=2e-3)


@LAW
@given(seed=st.integers(0, 999), n=st.integers(1, 30), k=st.integers(2, 6))
def test_vector_scaling_fits_any_rows(seed: int, n: int, k: int) -> None:
    """Including a single row, classes without rows, and exact zeros."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(k, 0.2), n).astype(np.float32)
    probs[0] = np.eye(k, dtype=np.float32)[0]

    scaling = fit_vector(probs, rng.integers(0, k, n))
    scaled = apply_vector(probs, scaling)
    with torch.inference_mode():
        by_module = vector_module(scaling)(torch.tensor(probs)).numpy()

    assert (scaling.scale > 0).all()
    assert np.isfinite(scaled).all()
    assert scaled.sum(1) == pytest.approx(1)
    assert by_module == pytest.approx(scaled, abs=2e-5)


@LAW
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 60),
    k=st.integers(2, 8),
    shrinkage=st.floats(0.1, 100),
)
def test_newton_and_the_bounded_search_agree(seed: int, n: int, k: int, shrinkage: float) -> None:
    rng = np.random.default_rng(seed)
    z, labels = floored_logs(rng.dirichlet(np.full(k, 0.3), n)), rng.integers(0, k, n)

    newton = minimize_newton(z, labels, shrinkage)
    bounded = minimize_bounded(z, labels, shrinkage)

    assert newton is not None
    if newton[0].min() > SMALLEST_SCALE:
        assert newton == pytest.approx(bounded, abs=5e-3)
    else:
        assert bounded[0].min() == pytest.approx(SMALLEST_SCALE)


def test_vector_module_can_be_exported() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    module = vector_module(VectorScaling(np.array([1.0, 2.0, 0.5]), np.array([0.1, 0.0, -0.3])))

    exported = torch.export.export(
        module, (probs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )

    assert torch.allclose(exported.module()(probs[:2]), module(probs[:2]))


def test_a_temperature_is_a_scaling() -> None:
    probs, _ = biased_probs(3, 50)

    scaled = apply_vector(probs, as_scaling(1.7, 3))

    assert scaled == pytest.approx(apply_temperature(probs, 1.7))


def test_a_scaling_survives_npz_and_json(tmp_path: Path) -> None:
    scaling = fit_vector(*biased_probs(6, 80))
    np.savez(tmp_path / "a.npz", **scaling_state(scaling))

    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        from_npz = scaling_from_state(arrays)
    from_json = scaling_from_state(json.loads(json.dumps(scaling_state(scaling))))

    for restored in (from_npz, from_json):
        assert (restored.scale == scaling.scale).all()
        assert (restored.bias == scaling.bias).all()


@pytest.mark.parametrize(
    "state",
    [
        {"scale": [1.0]},
        {"scale": [1.0, "a"], "bias": [0, 0]},
        {"scale": [1.0], "bias": [0.0, 0.0]},
    ],
)
def test_a_broken_state_of_a_scaling_is_refused(state: dict[str, list[object]]) -> None:
    with pytest.raises(DataError, match=r"not the state of a scaling|two lists of finite numbers"):
        scaling_from_state(state)


def test_wrong_arguments_are_refused() -> None:
    probs, labels = biased_probs(0, 20)

    with pytest.raises(DataError, match="shrinkage of vector scaling is a number above 0; got -1"):
        fit_vector(probs, labels, -1)
    with pytest.raises(
        DataError, match="the scaling is for other classes; expected 2 classes, got 3"
    ):
        apply_vector(probs, as_scaling(1.0, 2))
    with pytest.raises(DataError, match="two lists of finite numbers"):
        vector_module(VectorScaling(np.array([1.0, np.nan]), np.zeros(2)))
