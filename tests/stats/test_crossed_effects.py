"""Intervals over seeds and images cover the accuracy of other seeds on other images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from threefold.errors import DataError
from threefold.stats.crossed_effects import crossed_mean, seeds_accuracy
from threefold.stats.scores import wilson_interval


def answers(rng: np.random.Generator, s: int, n: int, spread: float, mean: float) -> np.ndarray:
    """Hits (s, n) of seeds that differ in skill, on images that differ in difficulty."""
    seeds, images = spread * rng.normal(size=(s, 1)), rng.normal(size=n)
    return np.asarray(mean + seeds + images + rng.normal(size=(s, n)) > 0)


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("mean", [0.5, 2.0])
def test_the_interval_covers_other_seeds_and_images(spread: float, mean: float) -> None:
    rng, covered, alone, draws = np.random.default_rng(1), 0, 0, 300
    truth = norm.cdf(mean / (2 + spread**2) ** 0.5)
    for _ in range(draws):
        hits = answers(rng, 4, 200, spread, mean)
        over = seeds_accuracy(hits)
        covered += over.low <= truth <= over.high
        low, high = wilson_interval(int(hits[0].sum()), 200)
        alone += low <= truth <= high

    assert covered / draws >= 0.88
    if spread:  # the interval of one seed is for other images only
        assert alone / draws < 0.85


def test_equal_seeds_leave_the_interval_of_the_images() -> None:
    hits = np.random.default_rng(0).random((1, 400)) < 0.8

    over = seeds_accuracy(np.repeat(hits, 3, 0))

    assert (over.low, over.high) == pytest.approx(wilson_interval(int(hits.sum()), 400), abs=0.003)


def test_the_order_of_seeds_and_their_best_decide_nothing() -> None:
    hits = answers(np.random.default_rng(2), 2, 300, 0.5, 0.5)

    assert seeds_accuracy(hits[::-1]) == pytest.approx(seeds_accuracy(hits))
    assert seeds_accuracy(hits).estimate == pytest.approx(hits.mean())


def test_without_an_error_the_interval_is_that_of_one_seed() -> None:
    over = seeds_accuracy(np.ones((3, 50), bool))
    grouped = seeds_accuracy(np.ones((3, 50), bool), np.arange(50) // 5)

    assert (over.estimate, over.high) == (1, 1)
    assert over.low == pytest.approx(wilson_interval(50, 50)[0], abs=0.005)
    assert grouped.low < over.low  # ten groups


def test_groups_take_the_place_of_images() -> None:
    hits = np.repeat(answers(np.random.default_rng(3), 3, 40, 0.3, 0.5), 5, 1)

    grouped = crossed_mean(hits.astype(float), np.arange(200) // 5)

    assert grouped == pytest.approx(crossed_mean(hits[:, ::5].astype(float)))


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="one seed says nothing about other seeds"):
        seeds_accuracy(np.ones((1, 5), bool))
    with pytest.raises(DataError, match="one row or group says nothing"):
        seeds_accuracy(np.ones((2, 5), bool), np.zeros(5, int))
    with pytest.raises(DataError):
        seeds_accuracy(np.full((2, 5), 0.5))
