"""Statistical laws: level and power of the tests, and choices among noise (see bench/laws.py)."""

from __future__ import annotations

import numpy as np
import pytest
from support.nulls import equals, expected_best, grouped_equals, noise, softmaxes, trained

from threefold.ensembles.cross_fit import cross_fit
from threefold.ensembles.registry import make_ensemble
from threefold.stats import paired_differences, paired_tests, sample_size

PAIRS = 400


def contains_zero(interval: paired_differences.Difference | paired_tests.SeedsDifference) -> bool:
    return interval.low <= 0 <= interval.high


def rate(alarms: list[bool]) -> float:
    return sum(alarms) / len(alarms)


def test_an_a_a_test_rejects_at_5_percent_and_two_points() -> None:
    rng = np.random.default_rng(0)
    pairs = [equals(rng, 400, 0.3) for _ in range(PAIRS)]

    exact = [paired_tests.mcnemar_exact(a, b).p for a, b in pairs]
    mid = [paired_tests.mcnemar_exact(a, b, mid_p=True).p for a, b in pairs]
    drawn = [paired_differences.paired_bootstrap(a, b, resamples=400) for a, b in pairs[:200]]

    assert 0.03 <= rate([p <= 0.05 for p in exact]) <= 0.07
    assert 0.03 <= rate([p <= 0.05 for p in mid]) <= 0.07
    assert 0.03 <= rate([not contains_zero(interval) for interval in drawn]) <= 0.07


def test_group_test_keeps_its_level_where_the_row_test_does_not() -> None:
    rng = np.random.default_rng(1)
    pairs = [grouped_equals(rng, 60, 8, 0.4) for _ in range(PAIRS)]

    exact, mid = (
        rate([paired_tests.mcnemar_exact(a, b, part, mid_p=mid).p <= 0.05 for a, b, part in pairs])
        for mid in (False, True)
    )
    drawn = [
        paired_differences.paired_bootstrap(a, b, part, resamples=400) for a, b, part in pairs[:200]
    ]

    assert 0.025 <= exact <= mid <= 0.07
    assert 0.03 <= rate([not contains_zero(interval) for interval in drawn]) <= 0.08
    assert rate([paired_tests.mcnemar_exact(a, b).p <= 0.05 for a, b, _ in pairs]) > 0.12


def test_seed_test_keeps_its_level_where_one_seed_does_not() -> None:
    rng = np.random.default_rng(2)
    pairs = [trained(rng, 4, 300, 0.3) for _ in range(PAIRS)]

    assert 0.03 <= rate([paired_tests.seeds_difference(a, b).p <= 0.05 for a, b in pairs]) <= 0.07
    assert rate([paired_tests.mcnemar_exact(a[0], b[0]).p <= 0.05 for a, b in pairs]) > 0.3


def test_an_a_a_test_of_log_losses_and_of_five_classifiers() -> None:
    rng = np.random.default_rng(3)
    pairs = [softmaxes(rng, 250) for _ in range(200)]

    drawn = [
        paired_differences.score_difference("log_loss", a, b, labels, resamples=400)
        for a, b, labels in pairs
    ]

    assert 0.03 <= rate([not contains_zero(interval) for interval in drawn]) <= 0.07

    easy = rng.random((2000, 1, 300)) < 0.7
    hits = easy | (rng.random((2000, 5, 300)) < 0.5)

    assert 0.03 <= rate([paired_tests.cochran_q(table).p <= 0.05 for table in hits]) <= 0.07


def test_exact_test_nearly_reaches_the_power_of_required_rows() -> None:
    n = sample_size.required_rows(0.1, 0.03)
    rng, power = np.random.default_rng(0), []

    for multiple in (0.25, 1, 2):
        counts = rng.multinomial(round(n * multiple), [0.065, 0.035, 0.9], 500)[:, :2]
        hits = [np.arange(x + y) < x for x, y in counts if x + y]
        power.append(rate([paired_tests.mcnemar_exact(a, ~a).p <= 0.05 for a in hits]))

    assert power[0] < 0.4
    assert 0.72 <= power[1] <= 0.82
    assert power[2] > 0.95


@pytest.mark.parametrize("m", [1, 16, 64])
def test_best_of_guessing_members_matches_the_theory(m: int) -> None:
    """The best apparent score grows like the root of 2 log m; cross-fitted it stays at chance."""
    rng, n, k, draws = np.random.default_rng(m), 200, 4, 40
    apparent, honest = np.empty(draws), np.empty(draws)
    for i in range(draws):
        probs, labels = noise(rng, m, n, k)
        apparent[i] = (make_ensemble("best").fit(probs, labels).predict(probs) == labels).mean()
        honest[i] = (
            cross_fit(lambda: make_ensemble("best"), probs, labels).argmax(1) == labels
        ).mean()
    error = 4 / draws**0.5

    assert abs(apparent.mean() - expected_best(m, n, k)) < error * apparent.std(ddof=1)
    assert abs(honest.mean() - 1 / k) < error * honest.std(ddof=1)

    if m > 1:
        spread = (0.25 * 0.75 / n) ** 0.5
        assert 0.75 < (apparent.mean() - 1 / k) / (spread * (2 * np.log(m)) ** 0.5) < 1
