"""Paired tests against scipy, statsmodels, and numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, t, ttest_1samp, ttest_rel
from support.nulls import equals, trained

from threefold.errors import DataError
from threefold.stats import paired_tests

LAW = settings(max_examples=60, deadline=None)


@LAW
@given(rows=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_binomial_test_of_discordant_rows(rows: list[tuple[bool, bool]]) -> None:
    a, b = np.array(rows).T

    only_a, only_b, p = paired_tests.mcnemar_exact(a, b)

    assert only_a == sum(x and not y for x, y in rows)
    assert only_b == sum(y and not x for x, y in rows)
    assert p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0)
    assert paired_tests.mcnemar_exact(b, a) == (only_b, only_a, p)


def test_paired_tests_refuse_rows_that_do_not_pair() -> None:
    for a, b in (([1], [1, 0]), ([], []), ([[1]], [[1]])):
        with pytest.raises(DataError, match="one value per row"):
            paired_tests.mcnemar_exact(a, b)


def test_holm_by_hand() -> None:
    assert paired_tests.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert paired_tests.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert paired_tests.holm([]).shape == (0,)

    for wrong in ([1.2, 0.1], [-0.1], [np.nan], 0.5):
        with pytest.raises(DataError):
            paired_tests.holm(wrong)


@LAW
@given(
    p=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    alpha=st.sampled_from([0.01, 0.05, 0.2, 0.5]),
)
def test_holm_equals_the_step_down_procedure(p: list[float], alpha: float) -> None:
    adjusted = paired_tests.holm(p)
    ordered = sorted(range(len(p)), key=lambda i: p[i])
    rejected = itertools.takewhile(
        lambda step: p[step[1]] * (len(p) - step[0]) <= alpha, enumerate(ordered)
    )

    assert {i for i in range(len(p)) if adjusted[i] <= alpha} == {i for _, i in rejected}
    assert (adjusted >= np.array(p)).all()
    assert adjusted.max() <= 1


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((141, 140, 1.0), "no evidence of a difference: 141 against 140 images, p = 1.00"),
        ((114, 77, 0.00901), "mean is better than net: 114 against 77 images, p = 0.009"),
        ((77, 114, 0.00901), "net is better than mean: 114 against 77 images, p = 0.009"),
        ((90, 10, 1e-9), "mean is better than net: 90 against 10 images, p < 0.001"),
        ((114, 77, 0.0501), "no evidence of a difference: 114 against 77 images, p = 0.050"),
        ((3, 1, 0.625), "no evidence of a difference: 3 against 1 images, p = 0.62"),
    ],
)
def test_verdicts_in_words(counts: tuple[int, int, float], sentence: str) -> None:
    assert paired_tests.verdict("mean", "net", *counts) == sentence


def test_verdict_names_its_test_and_the_images_needed() -> None:
    expected = "no evidence of a difference: 141 against 140 images (exact McNemar, p = 1.00)"

    assert paired_tests.verdict("STD", "GRU", 141, 140, 1.0, test="exact McNemar") == expected

    sentence = paired_tests.verdict("STD", "GRU", 141, 140, 1.0, test="exact McNemar", n=10_000)
    equal = paired_tests.verdict("a", "b", 5, 5, 1.0, n=100)
    better = paired_tests.verdict("a", "b", 30, 5, 1e-4, n=99)

    needed = "about 23,000,000 images would be needed to show a difference of this size"
    assert sentence == f"{expected}; {needed}"
    assert equal == "no evidence of a difference: 5 against 5 images, p = 1.00"
    assert better == "a is better than b: 30 against 5 images, p < 0.001"


HITS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=60)


@LAW
@given(rows=HITS, mid_p=st.booleans())
def test_mcnemar_with_groups_is_the_enumeration_of_all_signs(
    rows: list[tuple[bool, bool, int]], mid_p: bool
) -> None:
    a, b, groups = np.array(rows).T
    sums = [(a - b)[groups == g].sum() for g in np.unique(groups)]
    observed = abs(sum(sums))
    all_sums = np.array(
        [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    )
    weight = 0.5 if mid_p and observed else 1
    expected = (all_sums > observed).mean() + weight * (all_sums == observed).mean()

    result = paired_tests.mcnemar_exact(a, b, groups, mid_p=mid_p)

    assert result == (
        ((a == 1) & (b == 0)).sum(),
        ((b == 1) & (a == 0)).sum(),
        pytest.approx(expected),
    )


@LAW
@given(rows=HITS, mid_p=st.booleans())
def test_mcnemar_of_groups_of_one_row_is_that_of_rows(
    rows: list[tuple[bool, bool, int]], mid_p: bool
) -> None:
    a, b, _ = np.array(rows).T

    alone = paired_tests.mcnemar_exact(a, b, mid_p=mid_p)

    assert paired_tests.mcnemar_exact(a, b, np.arange(len(a)), mid_p=mid_p) == pytest.approx(alone)


@LAW
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_statsmodels(p: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")

    assert paired_tests.holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


@LAW
@given(only_a=st.integers(0, 60), only_b=st.integers(0, 60))
def test_the_mid_p_value_counts_the_observed_outcome_by_half(only_a: int, only_b: int) -> None:
    a, b = np.repeat([1, 0], [only_a, only_b + 1]), np.repeat([0, 1, 0], [only_a, only_b, 1])
    exact, mid = paired_tests.mcnemar_exact(a, b).p, paired_tests.mcnemar_exact(a, b, mid_p=True).p
    n, fewer = only_a + only_b, min(only_a, only_b)

    # Fagerland et al. (2013), equation for the mid-p McNemar test.
    assert mid == pytest.approx(2 * binom.cdf(fewer - 1, n, 0.5) + binom.pmf(fewer, n, 0.5))
    assert mid <= exact or mid == pytest.approx(exact)


@pytest.mark.parametrize("n", [100, 1000])
def test_false_positive_rate_stays_below_the_level(n: int) -> None:
    rng = np.random.default_rng(n)
    pairs = [equals(rng, n, 0.3) for _ in range(200)]

    exact = sum(paired_tests.mcnemar_exact(a, b).p <= 0.05 for a, b in pairs)
    mid = sum(paired_tests.mcnemar_exact(a, b, mid_p=True).p <= 0.05 for a, b in pairs)

    assert 1 <= exact <= mid <= 14  # of 200: 5 % and two points


@pytest.mark.parametrize("n", [100, 1000])
def test_groups_keep_the_false_positive_rate_of_repeated_rows(n: int) -> None:
    rng = np.random.default_rng(n)
    pairs = [equals(rng, n, 0.3) for _ in range(200)]
    repeated = [(np.repeat(a, 8), np.repeat(b, 8)) for a, b in pairs]
    groups = np.arange(8 * n) // 8

    grouped = [paired_tests.mcnemar_exact(a, b, groups).p for a, b in repeated]
    ungrouped = [paired_tests.mcnemar_exact(a, b).p for a, b in repeated]

    assert grouped == pytest.approx([paired_tests.mcnemar_exact(a, b).p for a, b in pairs])
    assert sum(p <= 0.05 for p in ungrouped) > 60


@LAW
@given(seed=st.integers(0, 999), m=st.integers(2, 6), n=st.integers(1, 50))
def test_cochrans_q_equals_statsmodels(seed: int, m: int, n: int) -> None:
    table = pytest.importorskip("statsmodels.stats.contingency_tables")
    rng = np.random.default_rng(seed)
    hits = rng.random((m, n)) < rng.random((m, 1))

    result = paired_tests.cochran_q(hits)

    if (hits == hits[0]).all():
        assert result == (0, m - 1, 1)
    else:
        expected = table.cochrans_q(hits.T.astype(float))
        assert result == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    if m == 2:
        a, b, _ = paired_tests.mcnemar_exact(*hits)
        assert result.q == pytest.approx((a - b) ** 2 / (a + b) if a + b else 0)
        counts = [[(hits[0] & hits[1]).sum(), a], [b, (~hits[0] & ~hits[1]).sum()]]
        assert table.mcnemar(counts, exact=True).pvalue == pytest.approx(
            paired_tests.mcnemar_exact(*hits).p
        )


def test_cochrans_q_compares_classifiers() -> None:
    for wrong, message in (
        ([[1, 0]], "compares classifiers"),
        ([1, 0], "value per row"),
        ([[0.5], [1]], "right or wrong"),
    ):
        with pytest.raises(DataError, match=message):
            paired_tests.cochran_q(wrong)


def test_the_corrected_t_test_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, variance 1, times 1/3 + 1/9 for ten folds: t = 2 / (2/3) = 3.
    result = paired_tests.corrected_t_test(
        [0.91, 0.92, 0.93], [0.9, 0.9, 0.9], n_fit=900, n_score=100
    )

    assert result.estimate == pytest.approx(0.02)
    assert (result.t, result.df) == pytest.approx((3, 2))
    assert result.p == pytest.approx(2 * t.sf(3, 2))
    assert (result.low, result.high) == pytest.approx(
        (0.02 - t.ppf(0.975, 2) / 150, 0.02 + t.ppf(0.975, 2) / 150)
    )


@LAW
@given(seed=st.integers(0, 999), splits=st.integers(2, 30))
def test_with_few_scored_rows_it_is_the_plain_t_test(seed: int, splits: int) -> None:
    a, b = np.random.default_rng(seed).normal(0.8, 0.05, (2, splits))
    corrected, plain = paired_tests.corrected_t_test(a, b, 1e12, 1e-3), ttest_rel(a, b)

    assert (corrected.t, corrected.p) == pytest.approx((plain.statistic, plain.pvalue))
    assert paired_tests.corrected_t_test(a, b, 900, 100).p > corrected.p


def test_differences_without_spread() -> None:
    assert paired_tests.corrected_t_test([0.5, 0.75], [0.25, 0.5], 2, 1) == (
        0.25,
        0.25,
        0.25,
        np.inf,
        1,
        0,
    )
    assert paired_tests.corrected_t_test([0.5, 0.75], [0.5, 0.75], 2, 1) == (0, 0, 0, 0, 1, 1)


def test_a_t_test_refuses() -> None:
    for a, b, rows, message in (
        ([1.0], [1.0], (2, 1), "two or more"),
        ([1.0, 2], [1.0], (2, 1), "one value per row each"),
        ([1.0, np.nan], [1.0, 2], (2, 1), "NaN or infinite"),
        ([1.0, 2], [1.0, 2], (0, 1), "rows to fit on and rows to score"),
        ([1.0, 2], [1.0, 2], (1, np.nan), "rows to fit on and rows to score"),
    ):
        with pytest.raises(DataError, match=message):
            paired_tests.corrected_t_test(a, b, *rows)


@pytest.mark.parametrize("seeds", [0.0, 0.3])
@pytest.mark.parametrize("grouped", [False, True])
def test_seeds_intervals_cover_other_seeds_and_other_images(seeds: float, grouped: bool) -> None:
    rng, covered, alone = np.random.default_rng(1), 0, 0
    groups = np.arange(200) // 5 if grouped else None
    for _ in range(150):
        a, b = trained(rng, 4, 200, seeds, groups)
        interval = paired_tests.seeds_difference(a, b, groups)
        covered += interval.low <= 0 <= interval.high
        alone += abs(interval.per_seed[0]) <= 1.96 * (a[0].astype(float) - b[0]).std() / 200**0.5

    assert covered / 150 >= 0.92

    if seeds:  # the interval of one pair of seeds treats its rows as all there is
        assert alone / 150 < 0.8


@LAW
@given(seed=st.integers(0, 999), s=st.integers(2, 5), n=st.integers(2, 40))
def test_seeds_difference_is_antisymmetric(seed: int, s: int, n: int) -> None:
    a, b = trained(np.random.default_rng(seed), s, n, 0.3)
    forward, backward = paired_tests.seeds_difference(a, b), paired_tests.seeds_difference(b, a)

    assert (backward.estimate, backward.low, backward.high) == pytest.approx(
        (-forward.estimate, -forward.high, -forward.low)
    )
    assert backward.p == pytest.approx(forward.p)
    assert forward.per_seed == pytest.approx((a.mean(1) - b.mean(1)).tolist())
    assert forward.low <= forward.estimate <= forward.high
    assert 0 <= forward.seeds_share <= 1
    assert paired_tests.seeds_difference(a, b, [f"r{i:02d}" for i in range(n)])[
        :4
    ] == pytest.approx(forward[:4], abs=1e-9)


def test_with_very_many_images_only_the_seeds_count() -> None:
    a, b = trained(np.random.default_rng(2), 5, 200_000, 0.3)

    result = paired_tests.seeds_difference(a, b)

    assert result.p == pytest.approx(ttest_1samp(result.per_seed, 0).pvalue, abs=0.01)
    assert result.seeds_share > 0.98


def test_seeds_that_repeat_leave_the_interval_of_the_images() -> None:
    a, b = np.random.default_rng(3).random((2, 1, 400)) < [[[0.9]], [[0.8]]]
    result = paired_tests.seeds_difference(np.repeat(a, 3, 0), np.repeat(b, 3, 0))

    rows = (a.astype(float) - b)[0]

    assert result.high - result.estimate == pytest.approx(t.ppf(0.975, 399) * rows.std(ddof=1) / 20)
    assert result.seeds_share == 0

    none = paired_tests.seeds_difference(np.repeat(a, 2, 0), np.repeat(a, 2, 0))

    assert none == (0, 0, 0, 1, (0, 0), 0)


def test_seeds_difference_refuses() -> None:
    hits = np.array([[1, 0, 1], [1, 1, 1]])

    for a, b, groups, message in (
        (
            hits[:1],
            hits[:1],
            None,
            "one seed says nothing about other seeds.*fix: use paired_bootstrap",
        ),
        (hits, hits[:, :2], None, "one value per row each"),
        (hits[0], hits[0], None, "value per row"),
        (hits * 0.5, hits, None, "right or wrong"),
        (hits, hits, ["a", "a", "a"], "one row or group says nothing"),
        (hits, hits, ["a"], "groups have the wrong length"),
    ):
        with pytest.raises(DataError, match=message):
            paired_tests.seeds_difference(a, b, groups)
