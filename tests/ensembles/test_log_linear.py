"""The logarithmic pool and logistic stacking, against plain optimizers and at their limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from support.pools import draw_pool, scored

from threefold import scratch
from threefold.ensembles import log_linear
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.log_linear import RIDGES, LogisticEnsemble, LogPoolEnsemble
from threefold.ensembles.scaling import HIGHEST
from threefold.errors import RecipeError

LAW = settings(max_examples=40, deadline=None)


def loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].sum())


@pytest.mark.parametrize("ridge", [0.1, 10, 1000])
def test_the_pool_minimises_its_penalised_log_loss(ridge: float) -> None:
    probs, labels = scored(4, 150)
    logs = np.log(probs.astype(float))

    def value(w: np.ndarray) -> float:
        penalty = ridge * 4 * ((w - w.mean()) ** 2).sum() + (w.sum() - 1) ** 2
        return loss(np.tensordot(w, logs, 1), labels) + penalty

    expected = minimize(
        value, np.full(4, 0.25), method="L-BFGS-B", bounds=[(0, None)] * 4, options={"ftol": 1e-14}
    )

    weights = LogPoolEnsemble(ridge).fit(probs, labels).weights_

    assert value(weights) <= expected.fun + 1e-3
    assert weights == pytest.approx(expected.x, abs=5e-3)


def test_a_member_that_misleads_has_no_weight_in_the_pool() -> None:
    probs, labels = scored(3, 2000)
    probs[0] = np.roll(probs[0], 1, axis=-1)

    weights = LogPoolEnsemble(0.1).fit(probs, labels).weights_

    assert weights[0] == 0
    assert weights[1:].min() > 0.2


def test_the_pool_of_equals_is_the_tempered_geometric_mean() -> None:
    probs, labels = scored()

    ensemble = LogPoolEnsemble(1e6).fit(probs, labels)

    assert np.ptp(ensemble.weights_) < 1e-3

    by_hand = softmax(ensemble.weights_.sum() * np.log(probs.astype(float)).mean(0), -1)
    assert ensemble.predict_proba(probs) == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("ridge", [0.3, 30])
def test_logistic_stacking_minimises_its_penalised_log_loss(ridge: float) -> None:
    probs, labels = scored(3, 150)
    logs, mean = np.log(probs.astype(float)), np.log(probs.mean(0, dtype=float))

    def value(t: np.ndarray) -> float:
        penalty = ridge * (3 * (t[:3] ** 2).sum() + (t[4:] ** 2).sum()) + (t[3] - 1) ** 2
        return loss(np.tensordot(t[:3], logs, 1) + t[3] * mean + t[4:], labels) + penalty

    expected = minimize(value, np.eye(8)[3], options={"gtol": 1e-6})

    ensemble = LogisticEnsemble(ridge).fit(probs, labels)

    theta = np.r_[ensemble.weights_, ensemble.bias_]
    assert value(theta) <= expected.fun + 1e-3
    assert theta == pytest.approx(expected.x, abs=5e-3)


@LAW
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), m=st.integers(1, 5))
@example(seed=6, n=1, m=1)  # the only row is wrong, so the best temperature would be negative
def test_the_strongest_ridge_gives_the_mean(seed: int, n: int, m: int) -> None:
    probs, labels = scored(m, n, seed=seed)
    new, _ = scored(m, 30, seed=seed + 1)
    mean = MeanEnsemble().predict_proba(new)
    clear = np.ptp(np.sort(mean)[:, -2:], axis=1) > 0.01

    answers = LogisticEnsemble(RIDGES[0]).fit(probs, labels).predict(new)

    assert (answers == mean.argmax(1))[clear].all()


def test_the_ridge_adapts_to_what_can_be_learned() -> None:
    def ridges(kind: str, n: int, seeds: range) -> np.ndarray:
        pools = [draw_pool(kind, seed, n=n, test=1)[:2] for seed in seeds]
        return np.array([LogisticEnsemble().fit(*pool).ridge_ for pool in pools])

    # Without the one-standard-error rule hardly any ridge would be strong.
    assert (ridges("null", 100, range(6)) >= 1e4).sum() >= 4
    assert (ridges("few", 100, range(6)) >= 1e4).sum() >= 4
    assert ridges("guessers", 1500, range(1)).max() <= 10


@pytest.mark.parametrize("seed", range(3))
def test_with_few_rows_logistic_stacking_stays_near_the_mean(seed: int) -> None:
    probs, labels, new, truth = draw_pool("few", seed)

    stacked, mean = (
        (e.fit(probs, labels).predict(new) == truth).mean()
        for e in (LogisticEnsemble(), MeanEnsemble())
    )

    assert stacked > mean - 0.02


def test_a_bias_mends_a_class_that_every_member_neglects() -> None:
    probs, labels = scored(3, 2000)
    probs = probs * np.array([1, 1, 1, 0.02], np.float32)
    probs /= probs.sum(-1, keepdims=True)

    ensemble = LogisticEnsemble(1.0).fit(probs, labels)

    assert ensemble.bias_.argmax() == 3

    accuracy, mean = ((e.predict(probs) == labels).mean() for e in (ensemble, MeanEnsemble()))
    assert accuracy > mean + 0.05


@pytest.mark.parametrize("ridge", [None, 0.1, 1000.0])
def test_many_classes_are_fitted_as_few_are(
    ridge: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their Hessian is never written out."""
    probs, labels = scored(3, 400, 12)
    few = LogisticEnsemble(ridge).fit(probs, labels)
    monkeypatch.setattr(log_linear, "_DENSE_CLASSES", 0)
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 3000)

    many = LogisticEnsemble(ridge).fit(probs, labels)

    assert many.ridge_ == few.ridge_
    np.testing.assert_allclose(many.weights_, few.weights_, atol=1e-5)
    np.testing.assert_allclose(many.bias_, few.bias_, atol=1e-5)


def test_many_classes_keep_the_sum_of_weights_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all rows wrong, the best sum would be below 0 and reverse the classes."""
    labels = np.arange(12) % 4
    wrong = 0.97 * np.eye(4)[(labels + 1) % 4] + 0.01
    probs = np.stack([wrong, wrong]) / wrong.sum(-1, keepdims=True)
    few = LogisticEnsemble(1.0).fit(probs, labels)
    monkeypatch.setattr(log_linear, "_DENSE_CLASSES", 0)

    many = LogisticEnsemble(1.0).fit(probs, labels)

    assert few.weights_.sum() == pytest.approx(1 / HIGHEST, abs=1e-6)
    np.testing.assert_allclose(many.weights_, few.weights_, atol=1e-5)
    np.testing.assert_allclose(many.bias_, few.bias_, atol=1e-4)


def test_exact_zeros_and_perfect_rows_are_handled() -> None:
    labels = np.arange(40) % 4
    sure = np.stack([np.eye(4)[labels]] * 2)
    wrong = np.stack([np.eye(4)[labels], np.eye(4)[(labels + 1) % 4]])

    for ensemble in (LogPoolEnsemble(), LogisticEnsemble()):
        for probs in (sure, wrong):
            answers = ensemble.fit(probs, labels).predict_proba(probs)
            assert np.isfinite(answers).all()
            assert answers.sum(1) == pytest.approx(1)
        assert (ensemble.fit(sure, labels).predict(sure) == labels).all()


@pytest.mark.parametrize("ridge", [0, -1, np.nan])
def test_a_ridge_is_positive(ridge: float) -> None:
    for kind in (LogPoolEnsemble, LogisticEnsemble):
        with pytest.raises(RecipeError, match="a ridge is above 0"):
            kind(ridge)
