"""Sets and unknown threshold: fitted on all rows, measured on rows that they have not seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import softmax

from threefold.ensembles.conformal import ConformalSets, UnknownThreshold
from threefold.errors import DataError
from threefold.evaluation.scoring import CROSS_FITTED
from threefold.evaluation.uncertainty import fit_uncertainty, uncertainty_card
from threefold.stats.scores import wilson_interval


def rows(seed: int, n: int, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Draw calibrated probabilities, and labels from them; the last classes are harder."""
    rng = np.random.default_rng(seed)
    probs = softmax(rng.normal(0, 2, (n, k)) + np.linspace(1, 0, k), -1)
    labels = (rng.random((n, 1)) > probs.cumsum(1)).sum(1).clip(max=k - 1)
    return probs, labels


def test_the_contract_of_the_results_file() -> None:
    results = fit_uncertainty(*rows(0, 400), alpha=0.2, reject=0.1).as_dict()

    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert list(results) == ["alpha", "sets", "unknown"]
    assert results["alpha"] == 0.2
    keys = {"by_class", "state", "n", "coverage", "interval", "mean_size", "single", "rows"}
    assert [set(entry) for entry in results["sets"]] == [keys, keys]
    assert [entry["by_class"] for entry in results["sets"]] == [False, True]
    assert set(results["unknown"]) == {"state", "rate", "measured", "interval", "n", "rows"}
    assert results["unknown"]["rate"] == 0.1
    rows_used = {results["unknown"]["rows"], *(entry["rows"] for entry in results["sets"])}
    assert rows_used == {CROSS_FITTED}


def test_thresholds_use_all_rows_and_figures_other_parts() -> None:
    probs, labels = rows(1, 300)
    part = np.arange(300) % 3

    results = fit_uncertainty(probs, labels, folds=part).as_dict()

    for by_class in (False, True):
        entry, whole = results["sets"][by_class], ConformalSets(by_class=by_class)
        assert entry["state"] == whole.fit(probs, labels, 0.1).state()
        hits, sizes = [], []
        for value in range(3):
            inside = part == value
            fitted = ConformalSets(by_class=by_class).fit(probs[~inside], labels[~inside], 0.1)
            sets = fitted.predict_sets(probs[inside])
            hits += list(sets[np.arange(len(sets)), labels[inside]])
            sizes += list(sets.sum(1))
        assert entry["coverage"] == pytest.approx(np.mean(hits))
        assert entry["mean_size"] == pytest.approx(np.mean(sizes))
        assert entry["interval"] == pytest.approx(wilson_interval(int(np.sum(hits)), 300))
    assert results["unknown"]["state"] == UnknownThreshold().fit(probs, 0.05).state()
    rejected = [
        UnknownThreshold().fit(probs[part != v], 0.05).is_unknown(probs[part == v]).sum()
        for v in range(3)
    ]
    assert results["unknown"]["measured"] == pytest.approx(np.sum(rejected) / 300)


def test_a_test_split_replaces_only_the_figures() -> None:
    fitted = fit_uncertainty(*rows(2, 300))
    probs, labels = rows(3, 200)

    results = fitted.measure(probs, labels, "test").as_dict()

    sets = fitted.sets[0].predict_sets(probs)
    assert results["sets"][0]["coverage"] == sets[np.arange(200), labels].mean()
    assert results["sets"][0]["n"] == results["unknown"]["n"] == 200
    assert {results["unknown"]["rows"], *(entry["rows"] for entry in results["sets"])} == {"test"}
    assert results["unknown"]["measured"] == (1 - probs.max(1) > fitted.unknown.threshold_).mean()
    before = fitted.as_dict()
    assert before["sets"][0]["rows"] == CROSS_FITTED
    assert [e["state"] for e in before["sets"]] == [e["state"] for e in results["sets"]]


def test_cross_fitted_figures_predict_those_of_new_rows() -> None:
    """On average over draws; with few rows, in-sample figures would look too good."""
    gaps = []
    for seed in range(40):
        fitted = fit_uncertainty(*rows(seed, 60), alpha=0.3)
        fresh = fitted.measure(*rows(1000 + seed, 2000))
        pairs = zip(fitted.coverage, fresh.coverage, strict=True)
        coverage_gaps = [a.coverage - b.coverage for a, b in pairs]
        gaps.append([*coverage_gaps, fitted.rejection.rate - fresh.rejection.rate])

    assert np.abs(np.mean(gaps, 0)).max() < 0.025


def grouped(
    seed: int, groups: int = 30, each: int = 10
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw groups of equal rows, each group easy or hard."""
    probs, labels = rows(seed, groups)
    temperature = np.random.default_rng(seed).choice([0.3, 3.0], groups)[:, None]
    scaled = softmax(np.log(probs) / temperature, -1)
    return (
        np.repeat(scaled, each, 0),
        np.repeat(labels, each),
        [f"p{g}" for g in np.repeat(np.arange(groups), each)],
    )


def test_groups_stay_whole_and_widen_the_intervals() -> None:
    probs, labels, names = grouped(4)

    single, whole = (fit_uncertainty(probs, labels, groups=g) for g in (None, names))

    assert [s.state() for s in single.sets] == [s.state() for s in whole.sets]
    for narrow, wide in (
        (single.coverage[0].interval, whole.coverage[0].interval),
        (single.rejection.interval, whole.rejection.interval),
    ):
        assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    narrow, wide = (
        whole.measure(probs, labels, groups=g).coverage[0].interval for g in (None, names)
    )
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_folds_that_split_groups_are_ignored() -> None:
    probs, labels, names = grouped(4)
    number = np.repeat(np.arange(30), 10)

    unsplit, split = (
        fit_uncertainty(probs, labels, groups=names, folds=folds)
        for folds in (number % 4, np.arange(300) % 4)
    )

    ungrouped = fit_uncertainty(probs, labels, folds=number % 4)
    assert unsplit.coverage[0].coverage == ungrouped.coverage[0].coverage
    whole = fit_uncertainty(probs, labels, groups=names)
    assert split == whole or split.coverage == whole.coverage


def test_the_card_has_the_sets_and_the_threshold() -> None:
    results = fit_uncertainty(*rows(5, 100)).as_dict()

    card = uncertainty_card(json.loads(json.dumps(results)))

    assert card == {"conformal": results["sets"], "unknown": results["unknown"]}
    for broken in (
        {},
        {"sets": [{}], "unknown": {}},
        {**results, "unknown": {"state": {"score": "1 - max"}}},
    ):
        with pytest.raises(DataError, match=r"not the (uncertainty of a run|state of)"):
            uncertainty_card(broken)


def test_wrong_arguments_are_refused() -> None:
    probs, labels = rows(6, 20)

    for use, message in (
        ({"alpha": 0.0}, "alpha is between 0 and 1"),
        ({"reject": 1.0}, "rate is between 0 and 1"),
        ({"folds": [0, 1]}, r"folds have the wrong shape; expected \(20,\)"),
        ({"folds": np.zeros(20, int)}, "cannot be cross-fitted; expected two parts at least"),
        ({"groups": ["a"] * 20}, "cannot be cross-fitted; expected two parts at least"),
        ({"groups": ["a"]}, r"groups have the wrong length; expected \(20,\)"),
    ):
        with pytest.raises(DataError, match=message):
            fit_uncertainty(probs, labels, **use)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labels are out of range"):
        fit_uncertainty(probs, labels + 4)
