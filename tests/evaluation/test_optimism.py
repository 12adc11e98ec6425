"""The optimism meter: what a choice promises on its own rows, minus what it is worth on others."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.errors import DataError
from threefold.evaluation.optimism import Counts, nested_choice, optimism_entry
from threefold.predictions.results_schema import Optimism


def entry(apparent: Counts, honest: Counts, groups: object = None) -> Optimism:
    return optimism_entry("x", "what", apparent, honest, groups, rows=("select rows", "score rows"))  # type: ignore[arg-type]


def test_the_difference_of_two_shares_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(2000) < 0.9, rng.random(2000) < 0.8

    measured = entry(Counts.from_hits(first), Counts.from_hits(second))

    assert measured.difference == pytest.approx(first.mean() - second.mean())
    low, high = measured.interval
    error = ((first.astype(float) - second).std() / 2000**0.5) * 1.96
    assert (high - low) / 2 == pytest.approx(error, rel=0.1)


def test_images_may_be_answered_often_or_never() -> None:
    apparent = Counts(np.array([2.0, 0, 1, 0]), np.array([2.0, 1, 1, 0]))
    honest = Counts(np.array([0.0, 1, 0, 1]), np.array([1.0, 1, 0, 1]))

    measured = entry(apparent, honest)

    assert (measured.apparent, measured.honest, measured.n) == (3 / 4, 2 / 3, 4)


def test_groups_are_drawn_whole() -> None:
    apparent = Counts.from_hits(np.repeat(np.arange(40) % 2 == 0, 25))
    honest = Counts.from_hits(np.zeros(1000, bool))
    groups = [f"g{i // 25}" for i in range(1000)]

    single = entry(apparent, honest).interval
    grouped = entry(apparent, honest, groups).interval

    assert grouped[1] - grouped[0] > 3 * (single[1] - single[0])


def test_coverage_of_the_interval() -> None:
    """With true accuracies 0.9 and 0.85 about 95 of 100 intervals contain 0.05."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        role = rng.random(400) < 0.5
        hits = rng.random(400) < np.where(role, 0.9, 0.85)
        parts = [Counts((hits & rows).astype(float), rows.astype(float)) for rows in (role, ~role)]
        low, high = entry(*parts).interval
        covered += low <= 0.05 <= high

    assert 88 <= covered <= 100


def test_the_meter_grows_with_the_number_of_candidates() -> None:
    """The best of m guessing members: apparent the largest of m binomials, honest 1/2."""
    n, gains = 400, []

    for m in (2, 8, 32, 128):
        rows = []
        for seed in range(10):
            rng = np.random.default_rng(seed)
            hits = rng.random((m, n)) < 0.5
            rows.append(hits.mean(1).max() - 0.5)
        gains.append(np.mean(rows))
        expected = (2 * np.log(m)) ** 0.5 * 0.5 / n**0.5  # its upper bound, reached slowly
        assert 0.4 * expected < gains[-1] < 1.1 * expected

    assert gains == sorted(gains)


def test_a_nested_choice_never_sees_the_rows_that_it_answers() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 300)
    tables = {name: rng.dirichlet(np.ones(3), 300) for name in ("mean", "weighted", "greedy")}
    folds = np.arange(300) % 3

    before, chosen = nested_choice(tables, labels, folds)

    assert len(chosen) == 3
    changed = labels.copy()
    changed[folds == 0] = (labels[folds == 0] + 1) % 3
    after, _ = nested_choice(tables, changed, folds)
    np.testing.assert_array_equal(before[folds == 0], after[folds == 0])
    for fold in range(3):
        assert any(
            (before[folds == fold] == table[folds == fold]).all() for table in tables.values()
        )


def test_bad_counts() -> None:
    with pytest.raises(DataError, match="the same images"):
        entry(Counts.from_hits([True]), Counts.from_hits([True, False]))
    with pytest.raises(DataError, match="answers of both kinds"):
        entry(Counts.from_hits([True]), Counts(np.zeros(1), np.zeros(1)))
