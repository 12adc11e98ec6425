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
from threefold.evaluation.cascade_savings import CROSS_FITTED, cascade_card, fit_savings
from threefold.stats.bootstrap import LEVEL

STAGES = [[0], [1], [2]]


def world(
    seed: int, n: int, m: int = 3, k: int = 4, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Members (m, n, k) that see the same truth through noise of their own, and labels."""
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
    found = cascade.predict(probs, full, cascade.stops("full"))
    np.testing.assert_array_equal(found.probs, full)
    assert (found.stages == 3).all()
    fast = cascade.predict(probs, full)
    late = fast.stages == 3
    assert 0 < late.sum() < 400
    np.testing.assert_array_equal(fast.probs[late], full[late])
    assert np.abs(fast.probs[~late] - full[~late]).max() > 0.01


def test_a_threshold_of_zero_runs_only_the_first_member() -> None:
    cascade, probs, _ = fitted()
    found = cascade.predict(probs, probs.mean(0), [0.0, NEVER])
    assert (found.stages == 1).all()
    sharpened = probs[0] ** (1 / cascade.temperatures_[0])
    np.testing.assert_allclose(found.probs, sharpened / sharpened.sum(1, keepdims=True), atol=1e-9)
    for most in (1, 2):
        assert (
            cascade.predict(probs, probs.mean(0), cascade.stops("full", most)).stages.tolist()
            == [most] * 2000
        )
        assert (
            cascade.predict(probs, probs.mean(0), cascade.stops("fast", most)).stages.max() == most
        )


def test_fit_rows_disagree_within_the_bound() -> None:
    cascade, probs, _ = fitted()
    found = cascade.predict(probs, probs.mean(0))
    other = found.probs.argmax(1) != probs.mean(0).argmax(1)
    assert 0 < disagreement_bound(other) <= 0.02
    # The bound is nearly used up: one row is charged for the second stage.
    more = np.arange(2000) < other.sum() + 2
    assert disagreement_bound(more) > 0.02
    assert disagreement_bound(np.arange(100) < 3) == pytest.approx(beta.ppf(LEVEL, 4, 97))
    assert disagreement_bound(np.ones(100)) == 1.0


def test_too_few_rows_let_nobody_stop() -> None:
    cascade, probs, _ = fitted(n=100, disagreement=0.005)
    assert cascade.thresholds_.tolist() == [NEVER, NEVER]
    assert (cascade.predict(probs, probs.mean(0)).stages == 3).all()


@pytest.mark.parametrize(("members", "disagreement"), [(2, 0.02), (4, 0.02), (4, 0.01)])
def test_the_bound_holds_on_new_rows_at_its_level(members: int, disagreement: float) -> None:
    """Of many fits on 800 rows, at most 5 % disagree on the whole pool by more than allowed."""
    probs, labels = world(2, 8_000, members, noise=1.2)
    full, rng, draws = probs.mean(0), np.random.default_rng(0), 100
    above = 0
    for _ in range(draws):
        rows = rng.choice(8_000, 800, replace=False)
        cascade = Cascade([[i] for i in range(members)]).fit(
            probs[:, rows], labels[rows], full[rows], disagreement
        )
        found = cascade.predict(probs, full)
        above += (found.probs.argmax(1) != full.argmax(1)).mean() > disagreement
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
    """Whatever one part says, the thresholds that answer it are the same."""
    probs, labels = world(3, 900)
    full, part = probs.mean(0), stratified_parts(labels)
    found = fit_savings(
        probs, labels, full, STAGES, costs=[1, 2, 3], members="abc", disagreement=0.02
    )
    right, asked, other = np.empty(900, bool), np.empty(900, int), np.empty(900, bool)
    for value in np.unique(part):
        held = part == value
        cascade = Cascade(STAGES).fit(probs[:, ~held], labels[~held], full[~held], 0.02)
        one = cascade.predict(probs[:, held], full[held])
        right[held], asked[held] = one.probs.argmax(1) == labels[held], one.stages
        other[held] = one.probs.argmax(1) != full[held].argmax(1)
    measured = found.measured[0]
    assert (measured.accuracy, measured.disagreement, measured.rows) == (
        right.mean(),
        other.mean(),
        CROSS_FITTED,
    )
    assert measured.shares == tuple(np.bincount(asked, minlength=4)[1:] / 900)
    assert measured.macs == pytest.approx(np.array([1 / 6, 3 / 6, 1])[asked - 1].mean())
    whole = full.argmax(1) == labels
    assert (measured.only_fast, measured.only_full) == (
        (right & ~whole).sum(),
        (whole & ~right).sum(),
    )
    assert (
        measured.interval[0]
        <= measured.difference
        == right.mean() - whole.mean()
        <= measured.interval[1]
    )
    assert found.cascade.state() == Cascade(STAGES).fit(probs, labels, full, 0.02).state()
    assert [round(cap.shares[0], 9) for cap in found.caps] == [1.0, round(measured.shares[0], 9)]


def test_test_rows_are_measured_with_the_thresholds_of_all_rows() -> None:
    probs, labels = world(4, 900)
    new, truth = world(5, 500)
    found = fit_savings(
        probs, labels, probs.mean(0), STAGES, costs=[1, 1, 1], members="abc", disagreement=0.02
    )
    both = found.measure(new, truth, new.mean(0))
    assert [m.rows for m in both.measured] == [CROSS_FITTED, "test"]
    answer = found.cascade.predict(new, new.mean(0))
    assert both.measured[1].accuracy == (answer.probs.argmax(1) == truth).mean()
    assert both.caps[0].rows == "test"
    assert both.caps[0].macs == pytest.approx(1 / 3)


def test_groups_stay_whole_and_widen_the_intervals() -> None:
    probs, labels = (
        np.repeat(part, 10, axis) for part, axis in zip(world(6, 60), (1, 0), strict=True)
    )
    groups = [f"p{i // 10}" for i in range(600)]
    alone, whole = (
        fit_savings(
            probs,
            labels,
            probs.mean(0),
            STAGES,
            costs=[1, 1, 1],
            members="abc",
            disagreement=0.2,
            groups=g,
        )
        for g in (None, groups)
    )
    a, b = alone.measured[0], whole.measured[0]
    assert (
        np.ptp(b.disagreement_interval) / b.disagreement
        > np.ptp(a.disagreement_interval) / a.disagreement
    )
    assert whole.cascade.thresholds_[0] > alone.cascade.thresholds_[0]


def test_copies_in_a_group_count_as_one_row() -> None:
    probs, labels = world(6, 600)
    many, truth, groups = (
        np.repeat(probs, 10, 1),
        np.repeat(labels, 10),
        [f"p{i // 10}" for i in range(6000)],
    )
    once, grouped, blind = (
        Cascade(STAGES).fit(p, y, p.mean(0), 0.05, g)
        for p, y, g in ((probs, labels, None), (many, truth, groups), (many, truth, None))
    )
    first = [cascade.thresholds_[0] for cascade in (blind, once, grouped)]
    assert first == sorted(first)
    assert first[0] < first[1] < NEVER
    assert first[2] < 1.1 * first[1]
    hits = np.repeat(np.arange(600) < 30, 10)
    assert disagreement_bound(hits, groups) == pytest.approx(
        disagreement_bound(np.arange(600) < 30), rel=0.01
    )


def test_the_state_survives_json_and_is_in_the_card() -> None:
    cascade, probs, labels = fitted()
    again = Cascade.from_state(json.loads(json.dumps(cascade.state(), allow_nan=False)))
    for a, b in zip(
        cascade.predict(probs, probs.mean(0)), again.predict(probs, probs.mean(0)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    measured = fit_savings(
        probs, labels, probs.mean(0), STAGES, costs=[1, 2, 3], members="abc", disagreement=0.02
    ).as_dict()
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert list(measured) == ["state", "members", "costs", "measured", "caps"]
    assert cascade_card(measured)["cascade"]["state"] == cascade.state()
    for broken in (
        {},
        {"state": {}},
        {**measured, "state": {**measured["state"], "thresholds": [0.5]}},
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
    for act, kind, message in (
        (
            lambda: Cascade(STAGES).fit(probs, labels, probs.mean(0), 0.0),
            DataError,
            "disagreement is between 0 and 1",
        ),
        (
            lambda: Cascade([[0], [1]]).fit(probs, labels, probs.mean(0)),
            DataError,
            "the cascade has other members",
        ),
        (lambda: Cascade([[0, 1, 2]]), DataError, "not the stages of a cascade"),
        (
            lambda: Cascade(STAGES).predict(probs, probs.mean(0)),
            RunError,
            "the cascade is not fitted",
        ),
        (lambda: fitted()[0].stops("quick"), DataError, "unknown mode; expected full or fast"),
        (lambda: fitted()[0].stops("fast", 4), DataError, "there are not so many stages"),
        (
            lambda: fit_savings(probs, labels, probs.mean(0), STAGES, costs=[1], members="abc"),
            DataError,
            "costs or names",
        ),
        (
            lambda: fit_savings(
                probs[:, :9],
                labels[:9],
                probs[:, :9].mean(0),
                STAGES,
                costs=[1, 1, 1],
                members="abc",
                groups=["a"] * 9,
            ),
            DataError,
            "cannot be cross-fitted",
        ),
    ):
        with pytest.raises(kind, match=message):
            act()
