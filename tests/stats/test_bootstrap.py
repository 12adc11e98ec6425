"""Bootstrap draws: how often rows, groups and cells are drawn."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.errors import DataError
from threefold.stats import bootstrap
from threefold.stats.scores import balanced_accuracy, bootstrap_interval

LAW = settings(max_examples=40, deadline=None)


def together(chunks) -> np.ndarray:
    return np.concatenate(list(chunks), axis=1)


@LAW
@given(
    n=st.integers(1, 40),
    resamples=st.integers(1, 30),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_as_many_are_drawn_as_there_are(n: int, resamples: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    part, cells = (np.unique(rng.integers(0, 6, n), return_inverse=True)[1] for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_CHUNK", chunk)
        rows = together(bootstrap.row_weights(n, None, resamples, seed))
        grouped = together(bootstrap.row_weights(n, part, resamples, seed))
        per_cell = together(bootstrap.cell_weights(cells, None, resamples, seed))
        both = together(bootstrap.cell_weights(cells, part, resamples, seed))

    assert rows.shape == grouped.shape == (n, resamples)
    assert per_cell.shape == both.shape == (cells.max() + 1, resamples)
    assert (rows.sum(0) == n).all()
    assert (per_cell.sum(0) == n).all()
    first = np.unique(part, return_index=True)[1]
    assert (grouped == grouped[first][part]).all()  # a group comes whole or not at all
    assert (grouped[first].sum(0) == part.max() + 1).all()
    assert (both == [grouped[cells == c].sum(0) for c in range(len(both))]).all()


@pytest.mark.parametrize(
    "draw",
    [bootstrap.unit_weights, lambda n, r, s: bootstrap.cell_weights(np.arange(n), None, r, s)],
)
def test_draws_are_multinomial(draw: Callable) -> None:
    weights = together(draw(20, 20_000, 0))

    assert weights.mean(1) == pytest.approx(np.ones(20), abs=0.04)
    assert weights.var(1) == pytest.approx(np.full(20, 0.95), abs=0.06)
    assert np.corrcoef(weights)[0, 1] == pytest.approx(-1 / 19, abs=0.03)
    assert (together(draw(20, 50, 7)) == together(draw(20, 50, 7))).all()
    assert (together(draw(20, 50, 7)) != together(draw(20, 50, 8))).any()


def test_an_interval_leaves_out_draws_without_a_value() -> None:
    values = np.concatenate([np.arange(101.0), [np.nan] * 50])

    assert bootstrap.percentile_interval(values, 0.9) == pytest.approx((5, 95))
    with pytest.raises(DataError, match="not defined in any bootstrap resample"):
        bootstrap.percentile_interval(np.full(3, np.nan), 0.9)


def test_groups_are_numbered_by_name() -> None:
    assert bootstrap.check_groups(["b", "a", "b"], 3).tolist() == [1, 0, 1]
    assert bootstrap.check_groups(np.array([7, 3, 7]), 3).tolist() == [1, 0, 1]
    assert bootstrap.check_groups(np.array(["x", 3, "x"], dtype=object), 3).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a"], r"groups have the wrong length; expected \(3,\), got \(1,\)"),
        (np.ones((3, 1), int), "wrong length"),
        ("abc", "wrong length"),
        (["a", None, "b"], "a group has no name: row 1"),
        ([1.0, np.nan, 2.0], "a group has no name: row 0"),
        (np.array([1.0, np.nan, 2.0]), "a group has no name: row 0"),
    ],
)
def test_groups_without_sense_are_refused(groups: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bootstrap.check_groups(groups, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hits", [[0.5, 1], ["yes", "no"], [2, 0], [np.nan], [], [[1]], 1, [[1], [1, 0]], [None]]
)
def test_hits_are_booleans(hits: object) -> None:
    with pytest.raises(DataError, match="hits"):
        bootstrap.check_hits(hits)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [["a"], [], [[1.0]], [np.nan], [np.inf], 3.0, [[1], [1, 2]]])
def test_scores_are_finite_numbers(values: object) -> None:
    with pytest.raises(DataError, match="scores"):
        bootstrap.check_numbers(values)  # type: ignore[arg-type]


def test_few_draws_have_no_ends() -> None:
    bootstrap.check_draws(0.95, 40)

    with pytest.raises(DataError, match="expected at least 40, got 39"):
        bootstrap.check_draws(0.95, 39)

    for level in (0, 1, 95, np.nan):
        with pytest.raises(DataError, match="confidence level"):
            bootstrap.check_draws(level, 2000)


def test_column_sums_are_alike_for_few_and_many_kinds() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, (2, 4000)).astype(float)
    many = np.stack([kinds[0], np.arange(4000.0)])  # no two units alike: drawn one by one

    for columns in (kinds, many):
        sums = np.concatenate(list(bootstrap.column_sums(columns, 2000, 1)), axis=1)
        assert sums.shape == (2, 2000)
        share = columns[0].mean()
        spread = (4000 * share * (1 - share)) ** 0.5
        assert abs(sums[0].mean() - columns[0].sum()) < 4 * spread / 2000**0.5
        assert abs(sums[0].std() / spread - 1) < 0.06


def test_classes_without_rows_change_no_interval() -> None:
    """They would take a number for each draw: 320 MB here."""
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(5), 400), rng.integers(0, 5, 400)
    wide = np.zeros((400, 20_000))
    wide[:, ::4000] = probs
    expected = bootstrap_interval("macro_f1", probs, labels)

    tracemalloc.start()
    found = bootstrap_interval("macro_f1", wide, labels * 4000)
    low, high = bootstrap_interval("balanced_accuracy", wide, labels * 4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert found == expected
    assert low < balanced_accuracy(wide, labels * 4000) < high
    assert peak < 100 << 20
