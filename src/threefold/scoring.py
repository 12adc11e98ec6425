"""Scores as lines of results.json, and the paired comparisons of what combines members with the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np

from threefold import paired, stats
from threefold.combiners import Ensemble
from threefold.crossfit import side_by_side
from threefold.predictions import Predictions
from threefold.predictions__results_schema import ClassScore, Comparison, Score
from threefold.resampling import LEVEL

TAUGHT: Final = "apparent: the teachers learned from these labels"
"""Where out-of-fold rows of a student stand that its teachers have seen."""

Key = tuple[Literal["member", "ensemble"], str]
"""Kind (member or ensemble) and name: a member may be called like a method."""


def score_ensemble(
    ensemble: Ensemble, rows: Predictions, *, apparent: bool = False
) -> dict[str, Any]:
    """Score a fitted ensemble on rows that its `fit` has not seen.

    Args:
        ensemble: fitted with the ids of its rows (`fit(rows.probs, rows.labels, rows.ids)`), or one that fits nothing.
        rows: what to score it on, with the members of the fit.
        apparent: score it even on rows of its fit; the entry then says so.

    Returns:
        The figures of `stats.score_table`, rows, protocol, and apparent: whether the ensemble has seen some of these rows.

    Raises:
        DataError: it has, and an apparent score was not asked for; or the predictions do not fit.
    """
    seen = ensemble.seen_ is not None and ensemble.seen_.check(
        type(ensemble).__name__, rows.ids, apparent
    )
    table = stats.score_table(ensemble.predict_proba(rows.probs), rows.labels, LEVEL, rows.groups)
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
        table: probabilities (n, k) as they are scored: calibrated, and cross-fitted where the rows are those of the fit.
        fitted: the ensembles by method.
        fitted_on: the rows that those were fitted on that learn anything.
    """
    apparent, taught = fitted_on == "the scored rows", rows.protocol == "taught"
    figures = side_by_side(
        lambda probs: stats.score_table(probs, rows.labels, LEVEL, rows.groups), table.values()
    )
    entries = []
    for (kind, name), table_of_figures in zip(table, figures, strict=True):
        learns = kind == "ensemble" and fitted[name].needs_fit
        basis = fitted_on if learns else "calibration only"
        entries.append(
            Score(
                **table_of_figures,
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
    """Exact McNemar tests against the best of the combined members on the same rows.

    The chosen ensemble comes first, marked `primary`, and is one test by itself: it was chosen on other rows, or before these
    were looked at. The other ensembles, and members that join others, are a family of their own under Holm's correction.
    """
    hits = {
        name: probs.argmax(1) == rows.labels
        for name, probs in zip(rows.members, rows.probs, strict=True)
    }
    best = max(combined, key=lambda name: hits[name].mean())
    names = {
        key: probs for key, probs in table.items() if key[0] == "ensemble" or key[1] not in combined
    }
    primary: Key = ("ensemble", chosen)
    order = [primary, *(key for key in names if key != primary)]
    right = [names[key].argmax(1) == rows.labels for key in order]
    found = [paired.mcnemar_exact(mine, hits[best], rows.groups) for mine in right]
    p = [found[0].p, *paired.holm([test.p for test in found[1:]])]
    name, n = "exact McNemar test", len(rows)
    if rows.groups is not None:
        # How many images would be needed is not known for groups, hence n = 0.
        name, n = "McNemar test over whole groups", 0
    lines = []
    for key, mine, test, value in zip(order, right, found, p, strict=True):
        gap = paired.paired_bootstrap(mine, hits[best], rows.groups)
        a, p_value = key[1], float(value)
        lines.append(
            Comparison(
                a=a,
                b=best,
                rows=rows.kind,
                only_a=test.only_a,
                only_b=test.only_b,
                p=p_value,
                verdict=paired.verdict(a, best, test.only_a, test.only_b, p_value, test=name, n=n),
                difference=gap.estimate,
                interval=(gap.low, gap.high),
                primary=key == primary,
            )
        )
    return lines


def per_class(rows: Predictions, probs: np.ndarray) -> tuple[ClassScore, ...]:
    """Score each class: recall, precision and F1 with intervals; probs (n, k)."""
    entries = stats.per_class(probs, rows.labels, rows.classes, LEVEL, rows.groups)
    return tuple(ClassScore(**entry) for entry in entries)
