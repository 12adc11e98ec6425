"""Scores for results.json, and paired comparisons of ensembles with the best member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np

from threefold.ensembles.base import Ensemble
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import ClassScore, Comparison, Score
from threefold.scratch import top_classes
from threefold.stats import paired_differences, paired_tests, scores
from threefold.stats.bootstrap import LEVEL

CROSS_FITTED: Final = "oof, cross-fitted"
"""Name of out-of-fold rows, each answered by what was fitted on the other parts' rows."""

TAUGHT: Final = "apparent: the teachers learned from these labels"
"""Marks out-of-fold scores of a student, whose teachers have seen these rows."""

Key = tuple[Literal["member", "ensemble"], str]
"""Kind and name; the kind is needed because a member may have the name of a method."""


def score_ensemble(ensemble: Ensemble, rows: Predictions, *, apparent: bool = False) -> Score:
    """Score a fitted ensemble on rows that its `fit` has not seen.

    Args:
        ensemble: fitted with the ids of its rows (`fit(rows.probs, rows.labels, rows.ids)`), or one
            that learns nothing.
        rows: the rows to score, with the members of the fit.
        apparent: allow rows of the fit; the score then says so.

    Raises:
        DataError: the ensemble has seen some of the rows, and `apparent` is false; or the
            predictions do not match the fit.
    """
    name = type(ensemble).__name__
    seen = ensemble.seen_ is not None and ensemble.seen_.check(name, rows.ids, apparent)
    return score_probs(
        rows,
        ensemble.predict_proba(rows.probs),
        name=name,
        kind="ensemble",
        fitted_on="the scored rows" if seen else "other rows",
        apparent=seen,
    )


def score_probs(
    rows: Predictions,
    probs: np.ndarray,
    *,
    name: str,
    kind: Literal["member", "ensemble", "contender"],
    fitted_on: str,
    apparent: bool = False,
    **figures: Any,
) -> Score:
    """Score probabilities as they are.

    Args:
        rows: labels, groups, kind and protocol.
        probs: (n, k).
        name, kind: of what gave the probabilities.
        fitted_on: name of the rows that it was fitted on.
        apparent: whether it has seen the labels; scores of the protocol "taught" always have.
        figures: further fields of the score.
    """
    return Score(
        **scores.score_table(probs, rows.labels, LEVEL, rows.groups),
        name=name,
        kind=kind,
        rows=rows.kind,
        protocol=rows.protocol,
        apparent=apparent or rows.protocol == "taught",
        fitted_on=fitted_on,
        **figures,
    )


def score_entry(
    rows: Predictions, key: Key, probs: np.ndarray, fitted: Mapping[str, Ensemble], fitted_on: str
) -> Score:
    """Score a member or an ensemble on one kind of rows.

    Args:
        rows: labels, groups, kind and protocol.
        key: what is scored.
        probs: its calibrated probabilities (n, k), cross-fitted if the rows are those of the fit.
        fitted: the ensembles by method.
        fitted_on: name of the rows that ensembles which learn were fitted on.
    """
    kind, name = key
    learns = kind == "ensemble" and fitted[name].needs_fit
    basis = fitted_on if learns else "calibration only"
    return score_probs(
        rows,
        probs,
        name=name,
        kind=kind,
        fitted_on=TAUGHT if rows.protocol == "taught" else basis,
        apparent=learns and fitted_on == "the scored rows",
    )


def comparisons(
    rows: Predictions, hits_of: Mapping[Key, np.ndarray], combined: Sequence[str], chosen: str
) -> list[Comparison]:
    """Compare ensembles with the best of the combined members by exact McNemar tests.

    The chosen ensemble comes first, marked `primary`, and is a single test: it was chosen on other
    rows, or before these were used. The other ensembles, and members that join others, are a family
    of their own under Holm's correction.

    Args:
        rows: labels, groups and the members' probabilities.
        hits_of: whether each row is classified correctly, booleans (n,) by kind and name.
        combined: names of the members that the ensembles combine.
        chosen: the chosen method.
    """
    hits = {
        name: top_classes(probs) == rows.labels
        for name, probs in zip(rows.members, rows.probs, strict=True)
    }
    best = max(combined, key=lambda name: hits[name].mean())
    primary: Key = ("ensemble", chosen)
    others = [key for key in hits_of if key[0] == "ensemble" or key[1] not in combined]
    order = [primary, *(key for key in others if key != primary)]
    ensemble_hits = [hits_of[key] for key in order]
    tests = [paired_tests.mcnemar_exact(a, hits[best], rows.groups) for a in ensemble_hits]
    p_values = [tests[0].p, *paired_tests.holm([test.p for test in tests[1:]])]
    name, n = "exact McNemar test", len(rows)
    if rows.groups is not None:
        # With groups the number of images needed is not known, hence n = 0.
        name, n = "McNemar test over whole groups", 0
    entries = []
    for key, a_hits, test, p in zip(order, ensemble_hits, tests, p_values, strict=True):
        gap = paired_differences.paired_bootstrap(a_hits, hits[best], rows.groups)
        a = key[1]
        entries.append(
            Comparison(
                a=a,
                b=best,
                rows=rows.kind,
                only_a=test.only_a,
                only_b=test.only_b,
                p=float(p),
                verdict=paired_tests.verdict(
                    a, best, test.only_a, test.only_b, float(p), test=name, n=n
                ),
                difference=gap.estimate,
                interval=(gap.low, gap.high),
                primary=key == primary,
            )
        )
    return entries


def per_class(rows: Predictions, probs: np.ndarray) -> tuple[ClassScore, ...]:
    """Score each class: recall, precision and F1 with intervals; probs (n, k)."""
    entries = scores.per_class(probs, rows.labels, rows.classes, LEVEL, rows.groups)
    return tuple(ClassScore(**entry) for entry in entries)
