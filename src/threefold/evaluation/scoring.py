"""Scores for results.json, and paired comparisons of ensembles with the best member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np

from threefold.ensembles.base import Ensemble
from threefold.ensembles.cross_fit import side_by_side
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import ClassScore, Comparison, Score
from threefold.stats import paired_tests, scores
from threefold.stats.bootstrap import LEVEL

TAUGHT: Final = "apparent: the teachers learned from these labels"
"""Marks out-of-fold scores of a student, whose teachers have seen these rows."""

Key = tuple[Literal["member", "ensemble"], str]
"""Kind and name; the kind is needed because a member may have the name of a method."""


def score_ensemble(
    ensemble: Ensemble, rows: Predictions, *, apparent: bool = False
) -> dict[str, Any]:
    """Score a fitted ensemble on rows that its `fit` has not seen.

    Args:
        ensemble: fitted with the ids of its rows (`fit(rows.probs, rows.labels, rows.ids)`), or one
            that learns nothing.
        rows: the rows to score, with the members of the fit.
        apparent: allow rows of the fit; the entry then says so.

    Returns:
        The figures of `stats.score_table`, rows, protocol, and apparent: whether the ensemble has
        seen some of these rows.

    Raises:
        DataError: it has, and `apparent` is false; or the predictions do not match the fit.
    """
    seen = ensemble.seen_ is not None and ensemble.seen_.check(
        type(ensemble).__name__, rows.ids, apparent
    )
    table = scores.score_table(ensemble.predict_proba(rows.probs), rows.labels, LEVEL, rows.groups)
    return {
        **table,
        "rows": rows.kind,
        "protocol": rows.protocol,
        "apparent": seen or rows.protocol == "taught",
    }


def score_entries(
    rows: Predictions, table: dict[Key, np.ndarray], fitted: dict[str, Ensemble], fitted_on: str
) -> list[Score]:
    """Score members and ensembles on one kind of rows.

    Args:
        rows: labels, groups, kind and protocol.
        table: calibrated probabilities (n, k), cross-fitted if the rows are those of the fit.
        fitted: the ensembles by method.
        fitted_on: name of the rows that ensembles which learn were fitted on.
    """
    apparent, taught = fitted_on == "the scored rows", rows.protocol == "taught"
    figures = side_by_side(
        lambda probs: scores.score_table(probs, rows.labels, LEVEL, rows.groups), table.values()
    )
    entries = []
    for (kind, name), score in zip(table, figures, strict=True):
        learns = kind == "ensemble" and fitted[name].needs_fit
        basis = fitted_on if learns else "calibration only"
        entries.append(
            Score(
                **score,
                name=name,
                kind=kind,
                rows=rows.kind,
                protocol=rows.protocol,
                apparent=taught or (learns and apparent),
                fitted_on=TAUGHT if taught else basis,
            )
        )
    return entries


def comparisons(
    rows: Predictions, table: dict[Key, np.ndarray], combined: Sequence[str], chosen: str
) -> list[Comparison]:
    """Compare ensembles with the best of the combined members by exact McNemar tests.

    The chosen ensemble comes first, marked `primary`, and is a single test: it was chosen on other
    rows, or before these were used. The other ensembles, and members that join others, are a family
    of their own under Holm's correction.

    Args:
        rows: labels, groups and the members' probabilities.
        table: probabilities (n, k) by kind and name.
        combined: names of the members that the ensembles combine.
        chosen: the chosen method.
    """
    hits = {
        name: probs.argmax(1) == rows.labels
        for name, probs in zip(rows.members, rows.probs, strict=True)
    }
    best = max(combined, key=lambda name: hits[name].mean())
    primary: Key = ("ensemble", chosen)
    others = [key for key in table if key[0] == "ensemble" or key[1] not in combined]
    order = [primary, *(key for key in others if key != primary)]
    ensemble_hits = [table[key].argmax(1) == rows.labels for key in order]
    tests = [paired_tests.mcnemar_exact(a, hits[best], rows.groups) for a in ensemble_hits]
    p_values = [tests[0].p, *paired_tests.holm([test.p for test in tests[1:]])]
    name, n = "exact McNemar test", len(rows)
    if rows.groups is not None:
        # With groups the number of images needed is not known, hence n = 0.
        name, n = "McNemar test over whole groups", 0
    entries = []
    for key, a_hits, test, p in zip(order, ensemble_hits, tests, p_values, strict=True):
        gap = paired_tests.paired_bootstrap(a_hits, hits[best], rows.groups)
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
