"""Prediction sets cover, and the unknown threshold rejects, as often as they promise."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import betabinom
from support.paths import AUTHORS_PREDICTIONS

from threefold.ensembles.conformal import (
    RAPS_PENALTY,
    ConformalSets,
    UnknownThreshold,
    conformal_quantile,
    conformity_scores,
    measure_sets,
)
from threefold.errors import DataError, RunError
from threefold.predictions.predictions import Predictions

LAW = settings(max_examples=50, deadline=None)
METHODS = ("lac", "aps", "raps")


def rows(seed: int, n: int, k: int = 8, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of an overconfident, noisy model, and labels: coverage needs no calibration."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, k)) + np.linspace(0, 2, k)
    labels = (rng.random((n, 1)) > softmax(logits, -1).cumsum(1)).sum(1).clip(max=k - 1)
    return softmax(1.7 * (logits + noise * rng.normal(size=(n, k))), -1), labels


def resplits(
    sets: ConformalSets,
    pool: tuple[np.ndarray, np.ndarray],
    alpha: float,
    used: int,
    times: int = 200,
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of fresh rows in each resplit of a pool, and its quantile, both (times, parts).

    Hits follow a beta-binomial law (Vovk 2012), by class each class separately. A class without a
    threshold is left out (NaN).
    """
    probs, labels = pool
    rng, hits, places = np.random.default_rng(1), [], []
    for _ in range(times):
        order = rng.permutation(len(labels))
        old, new = order[:used], order[used:]
        inside = sets.fit(probs[old], labels[old], alpha).predict_sets(probs[new])[
            np.arange(len(new)), labels[new]
        ]
        parts = [labels == c for c in range(probs.shape[1])] if sets.by_class else [labels >= 0]
        hits.append([inside[part[new]].mean() for part in parts])
        quantiles = []
        for part in parts:
            n, m, right = part[old].sum(), part[new].sum(), inside[part[new]].sum()
            rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
            law = betabinom(m, rank, n + 1 - rank) if rank <= n else None
            quantiles.append(
                math.nan if law is None else law.cdf(right) - law.pmf(right) * rng.random()
            )
        places.append(quantiles)
    return np.array(hits), np.array(places)


def keeps_the_law(places: np.ndarray) -> bool:
    """Return whether about 95 % of the quantiles are central and neither side is favored."""
    seen = places[~np.isnan(places)]
    within = ((seen > 0.025) & (seen < 0.975)).mean()
    return bool(0.90 <= within <= 0.99 and abs(seen.mean() - 0.5) < 4 * (1 / 12 / 200) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("alpha", "n"), [(0.1, 400), (0.3, 20)])
def test_coverage_is_at_its_level_over_200_resplits(method: str, alpha: float, n: int) -> None:
    sets = ConformalSets(method, never_empty=False)  # type: ignore[arg-type]

    hits, places = resplits(sets, rows(0, n + 300), alpha, n)

    assert keeps_the_law(places)
    assert 1 - alpha - 0.02 <= hits.mean() <= 1 - alpha + 1 / (n + 1) + 0.02


@pytest.mark.parametrize("method", METHODS)
def test_every_class_is_covered_at_the_level(method: str) -> None:
    sets = ConformalSets(method, by_class=True, never_empty=False)  # type: ignore[arg-type]

    hits, places = resplits(sets, rows(1, 1200, k=4), 0.1, 600)

    assert keeps_the_law(places)
    assert np.abs(hits.mean(0) - 0.9).max() < 0.03

    marginal, _ = resplits(ConformalSets(method, never_empty=False), rows(1, 1200, k=4), 0.1, 600)  # type: ignore[arg-type]
    assert abs(marginal.mean() - 0.9) < 0.02


@pytest.mark.skipif(
    not AUTHORS_PREDICTIONS.exists(), reason="the authors' predictions are not at hand"
)
@pytest.mark.parametrize("by_class", [False, True])
def test_the_authors_predictions_are_covered_at_the_level(by_class: bool) -> None:
    """The figures are those of bench/conformal.py."""
    pool = Predictions.load(AUTHORS_PREDICTIONS)
    mixed = pool.select([name for name in pool.members if "Mixed" in name]).probs.mean(
        0, dtype=np.float64
    )
    sets = ConformalSets(by_class=by_class, never_empty=False)

    hits, places = resplits(sets, (mixed, pool.labels), 0.05, 5000, times=200)

    assert keeps_the_law(places)
    assert np.abs(hits.mean(0) - 0.95).max() < 0.01


def test_sets_that_are_never_empty_cover_at_least_as_much() -> None:
    probs, labels = rows(3, 400, noise=0.0)
    exact, full = (
        ConformalSets(never_empty=flag).fit(probs, labels, 0.45) for flag in (False, True)
    )

    empty = ~exact.predict_sets(probs).any(1)

    assert empty.any()
    assert full.predict_sets(probs).any(1).all()
    assert (full.predict_sets(probs)[~empty] == exact.predict_sets(probs)[~empty]).all()
    assert (full.predict_sets(probs)[empty].sum(1) == 1).all()
    assert full.measure(probs, labels).coverage > exact.measure(probs, labels).coverage


def test_only_thresholds_by_class_cover_every_class() -> None:
    probs, labels = rows(4, 40_000)
    half = np.arange(40_000) % 2 == 0

    coverage = {}
    for by_class in (False, True):
        sets = (
            ConformalSets(by_class=by_class)
            .fit(probs[half], labels[half], 0.1)
            .predict_sets(probs[~half])
        )
        coverage[by_class] = [sets[labels[~half] == c, c].mean() for c in range(8)]

    assert min(coverage[False]) < 0.85
    assert min(coverage[True]) > 0.87
    assert max(abs(share - 0.9) for share in coverage[True]) < 0.03


def test_a_class_with_too_few_rows_is_in_every_set() -> None:
    """Nine rows are the fewest that can leave a class out one time in ten."""
    probs, _ = rows(5, 17, k=2)
    labels = np.array([0] * 9 + [1] * 8)

    sets = ConformalSets(by_class=True).fit(probs, labels, 0.1)

    assert np.isinf(sets.thresholds_).tolist() == [False, True]
    assert sets.predict_sets(probs)[:, 1].all()
    assert not sets.predict_sets(np.array([[0.0, 1.0]]))[:, 0].any() or sets.thresholds_[0] == 1
    assert np.isinf(ConformalSets().fit(probs[:8], labels[:8], 0.1).thresholds_).all()


@LAW
@given(seed=st.integers(0, 999), n=st.integers(1, 60), alpha=st.floats(0.01, 0.99))
def test_the_quantile_is_the_smallest_score_with_enough_below(
    seed: int, n: int, alpha: float
) -> None:
    scores = np.random.default_rng(seed).normal(size=n).round(1)
    enough = [s for s in sorted(scores) if (scores <= s).sum() >= (n + 1) * (1 - alpha) - 1e-9]

    quantile = conformal_quantile(scores, alpha)

    assert quantile == (enough[0] if enough else math.inf)


def test_rounding_does_not_move_the_quantile() -> None:
    """10 * (1 - 0.1) and 20 * (1 - 0.3) are whole numbers, but not always in floating point."""
    for n, alpha, rank in [
        (9, 0.1, 9),
        (19, 0.05, 19),
        (19, 0.3, 14),
        (99, 0.01, 99),
        (8, 0.1, None),
    ]:
        assert conformal_quantile(np.arange(1, n + 1), alpha) == (rank or math.inf)


def test_scores_by_hand() -> None:
    probs = [[0.1, 0.6, 0.3]]

    assert conformity_scores(probs, "lac") == pytest.approx(np.array([[0.9, 0.4, 0.7]]))
    assert conformity_scores(probs, "aps") == pytest.approx(np.array([[1.0, 0.6, 0.9]]))

    many = softmax(np.arange(8.0))[None]
    added = conformity_scores(many, "raps") - conformity_scores(many, "aps")
    assert added[0] == pytest.approx(
        [3 * RAPS_PENALTY, 2 * RAPS_PENALTY, RAPS_PENALTY, 0, 0, 0, 0, 0]
    )


@LAW
@given(seed=st.integers(0, 999), method=st.sampled_from(METHODS), by_class=st.booleans())
def test_sets_shrink_with_alpha_and_keep_the_class_order(
    seed: int, method: str, by_class: bool
) -> None:
    probs, labels = rows(seed, 120, k=4)

    narrow, wide = (
        ConformalSets(method, by_class=by_class).fit(probs, labels, alpha).predict_sets(probs)  # type: ignore[arg-type]
        for alpha in (0.3, 0.1)
    )

    assert (wide | ~narrow).all()
    if not by_class:  # a class is in only with all that are likelier
        worst = np.where(wide, probs, 2).min(1)
        best = np.where(wide, -1, probs).max(1)
        assert (worst >= best).all()


@LAW
@given(
    seed=st.integers(0, 999),
    method=st.sampled_from(METHODS),
    by_class=st.booleans(),
    full=st.booleans(),
)
def test_sets_are_the_same_after_json(seed: int, method: str, by_class: bool, full: bool) -> None:
    probs, labels = rows(seed, 30, k=3)
    sets = ConformalSets(method, by_class=by_class, never_empty=full).fit(probs, labels, 0.1)  # type: ignore[arg-type]
    text = json.dumps(sets.state(), allow_nan=False)

    again = ConformalSets.from_state(json.loads(text))

    assert (again.predict_sets(probs) == sets.predict_sets(probs)).all()
    assert again.state() == sets.state()


def test_a_reader_needs_numpy_only() -> None:
    probs, labels = rows(6, 200)
    sets = ConformalSets(by_class=True).fit(probs, labels, 0.1)
    card = sets.state()
    limits = np.array([np.inf if t is None else t for t in card["thresholds"]])

    inside = (1 - probs <= limits) | (probs == probs.max(1, keepdims=True))

    assert (inside == sets.predict_sets(probs)).all()


def test_measured_coverage_by_hand() -> None:
    sets = np.array([[True, False], [True, True], [False, True], [False, False]])

    measured = measure_sets(sets, [0, 0, 0, 1])

    assert measured[:2] == (4, 0.5)
    assert measured[3:] == (1.0, 0.5)
    assert measured.interval == pytest.approx((0.150, 0.850), abs=1e-3)


def test_known_images_are_rejected_at_the_chosen_rate() -> None:
    rates = []
    for seed in range(200):
        probs, _ = rows(seed, 299)
        rates.append(UnknownThreshold().fit(probs[:199], 0.05).measure(probs[199:]).rate)

    law = betabinom(100, 190, 10)  # known rows that are called known

    assert abs(1 - np.mean(rates) - law.mean() / 100) < 4 * law.std() / 100 / 200**0.5


def test_images_of_no_class_are_found_more_often_than_known_ones() -> None:
    known, _ = rows(9, 4000, noise=0.0)
    vague = softmax(np.random.default_rng(0).normal(0, 0.5, (2000, 8)), -1)
    unknown = UnknownThreshold().fit(known[:2000], 0.05)

    detected, false = unknown.measure(vague), unknown.measure(known[2000:])

    assert detected.interval.low > false.interval.high
    assert unknown.state() == {
        "score": "1 - max",
        "rate": 0.05,
        "n": 2000,
        "threshold": unknown.threshold_,
    }
    assert unknown.is_unknown(vague).tolist() == (1 - vague.max(1) > unknown.threshold_).tolist()


def test_the_unknown_threshold_is_the_same_after_json() -> None:
    known, _ = rows(9, 4000, noise=0.0)
    vague = softmax(np.random.default_rng(0).normal(0, 0.5, (2000, 8)), -1)
    unknown = UnknownThreshold().fit(known[:2000], 0.05)
    never = UnknownThreshold().fit(known[:5], 0.05)

    again = UnknownThreshold.from_state(json.loads(json.dumps(unknown.state())))

    assert again.state() == unknown.state()
    assert again.is_unknown(vague).tolist() == unknown.is_unknown(vague).tolist()
    assert never.state()["threshold"] is None
    assert not UnknownThreshold.from_state(never.state()).is_unknown(vague).any()


class Fixed:
    """A classifier that returns its input, for MAPIE."""

    def __init__(self, k: int) -> None:
        self.classes_, self.n_features_in_ = np.arange(k), k

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, *_: object) -> Fixed:
        return self

    def predict_proba(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs)

    def predict(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs.argmax(1))


@pytest.mark.filterwarnings("ignore")
def test_lac_and_aps_agree_with_mapie() -> None:
    mapie = pytest.importorskip("mapie.classification", reason="MAPIE is not installed")
    from mapie.conformity_scores.sets.aps import APSConformityScore
    from sklearn.base import BaseEstimator, ClassifierMixin

    probs, labels = rows(10, 403, k=5)
    new, _ = rows(11, 200, k=5)
    model = type("Model", (ClassifierMixin, Fixed, BaseEstimator), {})(5)

    for level in (0.8, 0.9, 0.97):
        theirs = mapie.SplitConformalClassifier(
            model, confidence_level=level, conformity_score="lac", prefit=True
        )
        sets = theirs.conformalize(probs, labels).predict_set(new)[1][:, :, 0]
        ours = ConformalSets(never_empty=False).fit(probs, labels, 1 - level).predict_sets(new)
        assert (sets == ours).all()

    scores = APSConformityScore.get_true_label_cumsum_proba(labels, probs, np.arange(5))[0]
    assert conformity_scores(probs, "aps")[np.arange(403), labels] == pytest.approx(scores[:, 0])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            partial(ConformalSets, "topk"),
            "unknown conformal method; expected lac or aps or raps, got topk",
        ),
        (partial(conformity_scores, np.full((1, 2), 0.5), "x"), "unknown conformal method"),
        (lambda: ConformalSets().fit(*rows(0, 9), 1.0), "alpha is between 0 and 1; got 1.0"),
        (lambda: ConformalSets().fit(*rows(0, 9), math.nan), "alpha is between 0 and 1; got nan"),
        (lambda: ConformalSets().fit(rows(0, 9)[0], [1]), "labels have the wrong shape"),
        (
            lambda: ConformalSets().fit(*rows(0, 9)).predict_sets(rows(0, 3, 4)[0]),
            "fitted on other classes; expected 8",
        ),
        (
            lambda: ConformalSets.from_state({"method": "lac"}),
            "not the state of ConformalSets; got KeyError 'by_class'",
        ),
        (
            lambda: conformal_quantile([[0.1]], 0.1),
            r"scores must be a list of numbers; got shape \(1, 1\)",
        ),
        (lambda: measure_sets(np.ones((2, 2)), [0, 1]), "sets must be booleans"),
        (lambda: UnknownThreshold().fit(rows(0, 9)[0], 0), "rate is between 0 and 1; got 0"),
    ],
)
def test_wrong_arguments_are_refused(use: partial, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match=message):
        use()


def test_use_before_fit_is_refused() -> None:
    probs = rows(0, 3)[0]

    for use in (ConformalSets().predict_sets, UnknownThreshold().is_unknown):
        with pytest.raises(RunError, match="not fitted; fix: call fit"):
            use(probs)
    for state in (ConformalSets().state, UnknownThreshold().state):
        with pytest.raises(RunError, match="not fitted"):
            state()

    state = ConformalSets().fit(*rows(0, 40)).state()
    with pytest.raises(DataError, match="got 2 thresholds"):
        ConformalSets.from_state({**state, "thresholds": [0.1, 0.2]})

    state_dict = {"score": "1 - max", "rate": 0.05, "n": 9, "threshold": 0.4}
    for broken in (
        {**state_dict, "score": "energy"},
        {**state_dict, "rate": "often"},
        {"score": "1 - max"},
    ):
        with pytest.raises(DataError, match="not the state of UnknownThreshold"):
            UnknownThreshold.from_state(broken)
