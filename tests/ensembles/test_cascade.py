"""The cascade on arrays: its answers, its bound, its scores, its state."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta

from threefold.ensembles.cascade import NEVER, Cascade, disagreement_bound, margins, stages_by_cost
from threefold.ensembles.cross_fit import stratified_parts
from threefold.ensembles.stacked import StackedEnsemble
from threefold.errors import DataError, RunError
from threefold.evaluation.cascade_savings import cascade_card, fit_savings
from threefold.evaluation.scoring import CROSS_FITTED
from threefold.stats.bootstrap import LEVEL

STAGES = [[0], [1], [2]]


def world(
    seed: int, n: int, m: int = 3, k: int = 4, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw members (m, n, k) that see one truth through noise of their own, and labels."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 2, (n, k))
    probs = np.exp(truth + noise * rng.normal(size=(m, n, k)))
    return probs / probs.sum(-1, keepdims=True), (truth + rng.gumbel(size=(n, k))).argmax(1)


def fitted(
    seed: int = 0, n: int = 2000, disagreement: float = 0.02
) -> tuple[Cascade, np.ndarray, np.ndarray]:
    probs, labels = world(seed, n)
    return Cascade(STAGES).fit(probs, labels, probs.mean(0), disagreement), probs, labels


def test_rows_that_never_stop_get_the_exact_full_answer() -> None:
    probs, labels = world(1, 400)
    full = StackedEnsemble(16, epochs=3).fit(probs, labels).predict_proba(probs)
    cascade = Cascade(STAGES).fit(probs, labels, full, 0.05)

    complete = cascade.predict(probs, full, cascade.stops("full"))
    fast = cascade.predict(probs, full)

    np.testing.assert_array_equal(complete.probs, full)
    assert (complete.stages == 3).all()
    late = fast.stages == 3
    assert 0 < late.sum() < 400
    np.testing.assert_array_equal(fast.probs[late], full[late])
    assert np.abs(fast.probs[~late] - full[~late]).max() > 0.01


def test_a_threshold_of_zero_runs_only_the_first_member() -> None:
    cascade, probs, _ = fitted()

    answers = cascade.predict(probs, probs.mean(0), [0.0, NEVER])

    assert (answers.stages == 1).all()
    sharpened = probs[0] ** (1 / cascade.temperatures_[0])
    expected = sharpened / sharpened.sum(1, keepdims=True)
    np.testing.assert_allclose(answers.probs, expected, atol=1e-9)


@pytest.mark.parametrize("max_stages", [1, 2])
def test_no_row_takes_more_stages_than_allowed(max_stages: int) -> None:
    cascade, probs, _ = fitted()

    full, fast = (
        cascade.predict(probs, probs.mean(0), cascade.stops(mode, max_stages)).stages
        for mode in ("full", "fast")
    )

    assert full.tolist() == [max_stages] * 2000
    assert fast.max() == max_stages


def test_fit_rows_disagree_within_the_bound() -> None:
    cascade, probs, _ = fitted()

    answers = cascade.predict(probs, probs.mean(0))

    differs = answers.probs.argmax(1) != probs.mean(0).argmax(1)
    assert 0 < disagreement_bound(differs) <= 0.02
    # The bound is nearly used up: one row is charged for the second stage.
    more = np.arange(2000) < differs.sum() + 2
    assert disagreement_bound(more) > 0.02
    assert disagreement_bound(np.arange(100) < 3) == pytest.approx(beta.ppf(LEVEL, 4, 97))
    assert disagreement_bound(np.ones(100)) == 1.0


def test_too_few_rows_let_nobody_stop() -> None:
    cascade, probs, _ = fitted(n=100, disagreement=0.005)

    assert cascade.thresholds_.tolist() == [NEVER, NEVER]
    assert (cascade.predict(probs, probs.mean(0)).stages == 3).all()


@pytest.mark.parametrize(("members", "disagreement"), [(2, 0.02), (4, 0.02), (4, 0.01)])
def test_the_bound_holds_on_new_rows_at_its_level(members: int, disagreement: float) -> None:
    """Of 100 fits on 800 rows, at most 5 % disagree on the whole pool by more than allowed."""
    probs, labels = world(2, 8_000, members, noise=1.2)
    full, rng, draws = probs.mean(0), np.random.default_rng(0), 100

    above = 0
    for _ in range(draws):
        rows = rng.choice(8_000, 800, replace=False)
        cascade = Cascade([[i] for i in range(members)]).fit(
            probs[:, rows], labels[rows], full[rows], disagreement
        )
        answers = cascade.predict(probs, full)
        above += (answers.probs.argmax(1) != full.argmax(1)).mean() > disagreement

    assert above <= (1 - LEVEL) * draws + 2 * (LEVEL * (1 - LEVEL) * draws) ** 0.5


def test_rows_of_one_margin_stop_together() -> None:
    probs = np.tile(np.array([[0.7, 0.3], [0.3, 0.7]]), (2, 500, 1))
    # One of a thousand equal rows gets another class from both members than from the first.
    probs[1, 0] = [0.0, 1.0]

    cascade = Cascade([[0], [1]]).fit(probs, np.arange(1000) % 2, probs.mean(0), 0.005)

    assert set(cascade.predict(probs, probs.mean(0)).stages) == {1}

    probs[1, :12:2] = [0.0, 1.0]
    cascade = Cascade([[0], [1]]).fit(probs, np.arange(1000) % 2, probs.mean(0), 0.005)
    assert set(cascade.predict(probs, probs.mean(0)).stages) == {2}


def test_cross_fitted_figures_use_thresholds_of_other_rows() -> None:
    """No part has a say in the thresholds that answer it."""
    probs, labels = world(3, 900)
    full, part = probs.mean(0), stratified_parts(labels)
    correct, stages, differs = np.empty(900, bool), np.empty(900, int), np.empty(900, bool)
    for value in np.unique(part):
        inside = part == value
        cascade = Cascade(STAGES).fit(probs[:, ~inside], labels[~inside], full[~inside], 0.02)
        answers = cascade.predict(probs[:, inside], full[inside])
        correct[inside], stages[inside] = (
            answers.probs.argmax(1) == labels[inside],
            answers.stages,
        )
        differs[inside] = answers.probs.argmax(1) != full[inside].argmax(1)

    savings = fit_savings(
        probs, labels, full, STAGES, costs=[1, 2, 3], members="abc", disagreement=0.02
    )

    measured = savings.measured[0]
    assert measured.rows == CROSS_FITTED
    assert (measured.accuracy, measured.disagreement) == (correct.mean(), differs.mean())
    assert measured.shares == tuple(np.bincount(stages, minlength=4)[1:] / 900)
    assert measured.macs == pytest.approx(np.array([1 / 6, 3 / 6, 1])[stages - 1].mean())
    full_correct = full.argmax(1) == labels
    assert measured.only_fast == (correct & ~full_correct).sum()
    assert measured.only_full == (full_correct & ~correct).sum()
    assert measured.difference == correct.mean() - full_correct.mean()
    assert measured.interval[0] <= measured.difference <= measured.interval[1]
    assert savings.cascade.state() == Cascade(STAGES).fit(probs, labels, full, 0.02).state()
    assert [round(cap.shares[0], 9) for cap in savings.caps] == [1.0, round(measured.shares[0], 9)]


def test_test_rows_are_measured_with_the_thresholds_of_all_rows() -> None:
    probs, labels = world(4, 900)
    new, truth = world(5, 500)
    savings = fit_savings(
        probs, labels, probs.mean(0), STAGES, costs=[1, 1, 1], members="abc", disagreement=0.02
    )

    both = savings.measure(new, truth, new.mean(0))

    assert [m.rows for m in both.measured] == [CROSS_FITTED, "test"]
    answers = savings.cascade.predict(new, new.mean(0))
    assert both.measured[1].accuracy == (answers.probs.argmax(1) == truth).mean()
    assert both.caps[0].rows == "test"
    assert both.caps[0].macs == pytest.approx(1 / 3)


def test_groups_stay_whole_and_widen_the_intervals() -> None:
    probs, labels = (
        np.repeat(part, 10, axis) for part, axis in zip(world(6, 60), (1, 0), strict=True)
    )
    groups = [f"p{i // 10}" for i in range(600)]

    ungrouped, grouped = (
        fit_savings(
            probs,
            labels,
            probs.mean(0),
            STAGES,
            costs=[1, 1, 1],
            members="abc",
            disagreement=0.2,
            groups=names,
        )
        for names in (None, groups)
    )

    narrow, wide = ungrouped.measured[0], grouped.measured[0]
    assert (
        np.ptp(wide.disagreement_interval) / wide.disagreement
        > np.ptp(narrow.disagreement_interval) / narrow.disagreement
    )
    assert grouped.cascade.thresholds_[0] > ungrouped.cascade.thresholds_[0]


def test_copies_in_a_group_count_as_one_row() -> None:
    probs, labels = world(6, 600)
    copies, copied_labels = np.repeat(probs, 10, 1), np.repeat(labels, 10)
    groups = [f"p{i // 10}" for i in range(6000)]
    differs = np.arange(600) < 30

    ungrouped, single, grouped = (
        Cascade(STAGES).fit(p, y, p.mean(0), 0.05, names).thresholds_[0]
        for p, y, names in (
            (copies, copied_labels, None),
            (probs, labels, None),
            (copies, copied_labels, groups),
        )
    )
    bound = disagreement_bound(np.repeat(differs, 10), groups)

    assert ungrouped < single <= grouped < 1.1 * single
    assert single < NEVER
    assert bound == pytest.approx(disagreement_bound(differs), rel=0.01)


def test_the_state_survives_json() -> None:
    cascade, probs, _ = fitted()

    again = Cascade.from_state(json.loads(json.dumps(cascade.state(), allow_nan=False)))

    before, after = (c.predict(probs, probs.mean(0)) for c in (cascade, again))
    np.testing.assert_array_equal(before.probs, after.probs)
    np.testing.assert_array_equal(before.stages, after.stages)


def test_the_card_has_the_state_and_the_measurements() -> None:
    cascade, probs, labels = fitted()

    savings = fit_savings(
        probs, labels, probs.mean(0), STAGES, costs=[1, 2, 3], members="abc", disagreement=0.02
    ).as_dict()

    assert json.loads(json.dumps(savings, allow_nan=False)) == savings
    assert list(savings) == ["state", "members", "costs", "measured", "caps"]
    assert cascade_card(savings)["cascade"]["state"] == cascade.state()
    for broken in (
        {},
        {"state": {}},
        {**savings, "state": {**savings["state"], "thresholds": [0.5]}},
    ):
        with pytest.raises(DataError, match=r"not the (cascade of a run|state of a cascade)"):
            cascade_card(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"stages": [[0], [0]]},
        {"stages": [[0, 1, 2]]},
        {"stages": 3},
        {"stages": [[0], [1], ["x"]]},
        {"stages": [[0], [1], [2e99]]},
        {"thresholds": [0.5]},
        {"thresholds": [float("nan"), 0.5]},
        {"thresholds": [-1.0, 0.5]},
        {"thresholds": "ab"},
        {"temperatures": [0.0, 1.0]},
        {"temperatures": [1.0, float("inf")]},
        {"temperatures": None},
        {"score": "top"},
        {"n": None},
    ],
)
def test_an_invalid_state_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"not the sta(te|ges) of a cascade") as error:
        Cascade.from_state({**fitted(n=200)[0].state(), **change})

    assert "\n" not in str(error.value)


def test_stages_come_by_cost_and_idle_members_with_the_last() -> None:
    assert stages_by_cost([3, 1, 2]) == [[1], [2], [0]]
    assert stages_by_cost([1, 1]) == [[0], [1]]
    assert stages_by_cost([1, 5, 3, 2], used=[1, 2]) == [[2], [1, 0, 3]]
    np.testing.assert_allclose(margins(np.array([[0.2, 0.7, 0.1], [0.5, 0.0, 0.5]])), [0.5, 0.0])


def test_wrong_arguments_are_refused() -> None:
    probs, labels = world(7, 50)
    full, few, cascade = probs.mean(0), probs[:, :9], Cascade(STAGES)

    with pytest.raises(DataError, match="disagreement is between 0 and 1"):
        cascade.fit(probs, labels, full, 0.0)
    with pytest.raises(DataError, match="the cascade has other members"):
        Cascade([[0], [1]]).fit(probs, labels, full)
    with pytest.raises(DataError, match="not the stages of a cascade"):
        Cascade([[0, 1, 2]])
    with pytest.raises(RunError, match="the cascade is not fitted"):
        cascade.predict(probs, full)
    with pytest.raises(DataError, match="unknown mode; expected full or fast"):
        fitted()[0].stops("quick")
    with pytest.raises(DataError, match="there are not so many stages"):
        fitted()[0].stops("fast", 4)
    with pytest.raises(DataError, match="costs or names"):
        fit_savings(probs, labels, full, STAGES, costs=[1], members="abc")
    with pytest.raises(DataError, match="cannot be cross-fitted"):
        fit_savings(
            few,
            labels[:9],
            few.mean(0),
            STAGES,
            costs=[1, 1, 1],
            members="abc",
            groups=["a"] * 9,
        )
