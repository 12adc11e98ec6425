"""The exact linear head: scikit-learn's solution, on raw features, weighted, and distilled."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from threefold.training.features import probe
from threefold.training.features.probe import (
    L2_GRID,
    Targets,
    choose_l2,
    class_weights,
    fit_linear,
)


def make_features(n: int, d: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated, skewed features with a constant one, float16 (n, d), and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    hidden = rng.normal(size=(k, 12))[labels] * 0.6 + rng.normal(size=(n, 12))
    features = np.maximum(hidden @ rng.normal(size=(12, d)) + 2 * rng.normal(size=(n, d)) + 1, 0)
    features *= rng.uniform(0.05, 5.0, d)
    features[:, 3] = 1.5
    return features.astype(np.float16), labels


def by_scikit_learn(
    features: np.ndarray, labels: np.ndarray, l2: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """Probabilities (n, k) of the same problem.

    Of two classes scikit-learn has one weight vector, the difference, whose penalty is half of
    that of the two opposite ones.
    """
    l2 = l2 / 2 if labels.max() == 1 else l2
    standard = StandardScaler().fit_transform(features.astype(np.float64))
    model = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=20_000)
    model.fit(standard, labels, sample_weight=weights)
    return np.asarray(model.predict_proba(standard))


@pytest.mark.parametrize("shape", [(150, 40, 4), (60, 90, 3), (80, 30, 2)], ids=str)
@pytest.mark.parametrize("l2", [1.0, 100.0])
def test_linear_head_is_scikit_learns_solution(shape: tuple[int, int, int], l2: float) -> None:
    features, labels = make_features(*shape)

    head = fit_linear(features, Targets(labels, shape[2]), l2)

    expected = by_scikit_learn(features, labels, l2)
    np.testing.assert_allclose(head.probs(features), expected, atol=2e-3)


def test_balanced_weights_are_scikit_learns() -> None:
    features, labels = make_features(120, 30, 3)
    rows = np.flatnonzero((labels != 2) | (np.arange(120) % 4 == 0))
    features, labels = features[rows], labels[rows]
    weights = class_weights(labels, 3)

    head = fit_linear(features, Targets(labels, 3, weights), 10.0)

    model = LogisticRegression(C=0.1, tol=1e-9, max_iter=20_000, class_weight="balanced")
    standard = StandardScaler().fit_transform(features.astype(np.float64))
    expected = model.fit(standard, labels).predict_proba(standard)
    np.testing.assert_allclose(head.probs(features), expected, atol=2e-3)
    np.testing.assert_allclose(class_weights(labels, 3, power=0), 1.0)


@pytest.mark.parametrize(("features", "best"), [(40, "weaker"), (200, "stronger")])
def test_l2_with_the_lowest_loss_on_the_select_rows_is_chosen(
    features: int, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = make_features(300, features, 4)
    fit, select = np.arange(200), np.arange(200, 300)
    losses = {}
    for l2 in L2_GRID:
        probs = fit_linear(rows[fit], Targets(labels[fit], 4), l2).probs(rows[select])
        losses[l2] = -np.log(probs[np.arange(100), labels[select]]).mean()
    lowest = min(losses, key=lambda l2: losses[l2])
    first = lowest * 10 if best == "weaker" else lowest / 10
    monkeypatch.setattr(probe, "FIRST_L2", first)

    choice = choose_l2(rows[fit], Targets(labels[fit], 4), rows[select], labels[select])

    assert choice.head.l2 == lowest
    assert len(choice.losses) < len(L2_GRID)
    for l2, loss in choice.losses.items():
        assert loss == pytest.approx(losses[l2], abs=2e-3)


def test_the_search_among_many_rows_begins_on_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels = make_features(900, 60, 4)
    fit, select = np.arange(800), np.arange(800, 900)
    arguments = (features[fit], Targets(labels[fit], 4), features[select], labels[select])
    whole = choose_l2(*arguments)
    monkeypatch.setattr(probe, "SEARCH_ROWS", 300)

    choice = choose_l2(*arguments)

    assert len(choice.losses) < len(whole.losses)
    assert choice.losses[choice.head.l2] <= min(whole.losses.values()) + 1e-3
    expected = by_scikit_learn(features[fit], labels[fit], choice.head.l2)
    np.testing.assert_allclose(choice.head.probs(features[fit]), expected, atol=2e-3)


def test_a_tie_goes_to_the_stronger_penalty() -> None:
    features = np.ones((40, 5), np.float16)

    choice = choose_l2(features, Targets(np.arange(40) % 2, 2), features, np.arange(40) % 2)

    assert choice.head.l2 == L2_GRID[0]


def test_weaker_penalties_start_from_stronger_ones_and_end_alike() -> None:
    features, labels = make_features(100, 60, 3)

    choice = choose_l2(features, Targets(labels, 3), features, labels, grid=(1000.0, 30.0, 3.0))

    expected = by_scikit_learn(features, labels, 3.0)
    np.testing.assert_allclose(choice.head.probs(features), expected, atol=2e-3)


def test_the_same_bits_every_time() -> None:
    features, labels = make_features(100, 60, 3)

    first, second = (fit_linear(features, Targets(labels, 3), 5.0) for _ in range(2))

    np.testing.assert_array_equal(first.weight, second.weight)
    np.testing.assert_array_equal(first.bias, second.bias)


def test_a_class_without_rows_is_never_predicted() -> None:
    features, labels = make_features(90, 20, 3)

    head = fit_linear(features, Targets(labels, 5), 1.0)

    assert head.weight.shape == (5, 20)
    assert np.isfinite(head.probs(features)).all()
    assert head.probs(features)[:, 3:].max() < 0.05


def test_probabilities_are_learned_as_shares_of_each_class() -> None:
    """A soft target is as one row of each class, weighted by its probability."""
    features, labels = make_features(90, 20, 3)
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.ones(3), 90)
    weights = rng.uniform(0.5, 2.0, 90)

    ours = fit_linear(features, Targets(labels, 3, weights, probs), 10.0).probs(features)

    every_class = np.repeat(np.arange(3), 90)
    shares = (weights[:, None] * probs).T.ravel()
    expected = by_scikit_learn(np.tile(features, (3, 1)), every_class, 10.0, shares)[:90]
    np.testing.assert_allclose(ours, expected, atol=1e-3)
