"""Scores as lines of results.json, and the paired comparisons of what combines members with the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from threefold import paired, stats
from threefold.combiners import Ensemble
from threefold.crossfit import side_by_side
from threefold.predictions import Predictions

LEVEL: Final = 0.95
"""Confidence level of every interval."""

TAUGHT: Final = "apparent: the teachers learned from these labels"
"""Where out-of-fold rows of a student stand that its teachers have seen."""

Key = tuple[str, str]
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
) -> list[dict[str, Any]]:
    """A line per member and ensemble on one kind of rows.

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
    for (kind, name), found in zip(table, figures, strict=True):
        learns = kind == "ensemble" and fitted[name].needs_fit
        entries.append(
            {
                **found,
                "name": name,
                "kind": kind,
                "rows": rows.kind,
                "protocol": rows.protocol,
                "apparent": taught or (learns and apparent),
                "fitted_on": TAUGHT if taught else fitted_on if learns else "calibration only",
            }
        )
    return entries


def comparisons(
    rows: Predictions, table: dict[Key, np.ndarray], combined: Sequence[str], chosen: str
) -> list[dict[str, Any]]:
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
    primary = ("ensemble", chosen)
    order = [primary, *(key for key in names if key != primary)]
    right = [names[key].argmax(1) == rows.labels for key in order]
    found = [paired.mcnemar_exact(mine, hits[best], rows.groups) for mine in right]
    p = [found[0].p, *paired.holm([test.p for test in found[1:]])]
    return [
        compared(rows, (key[1], best), test, float(value))
        | _difference(mine, hits[best], rows)
        | {"primary": key == primary}
        for key, mine, test, value in zip(order, right, found, p, strict=True)
    ]


def _difference(a: np.ndarray, b: np.ndarray, rows: Predictions) -> dict[str, Any]:
    """Difference in accuracy with its bootstrap interval, over whole groups where there are any."""
    found = paired.paired_bootstrap(a, b, rows.groups)
    return {"difference": found.estimate, "interval": [found.low, found.high]}


def compared(
    rows: Predictions, names: tuple[str, str], test: paired.McNemar, p: float
) -> dict[str, Any]:
    """One comparison as a line of results.json, with its verdict in words."""
    a, b = names
    told = "McNemar test over whole groups" if rows.groups is not None else "exact McNemar test"
    n = (
        0 if rows.groups is not None else len(rows)
    )  # how many images are needed is not known for groups
    verdict = paired.verdict(a, b, test.only_a, test.only_b, p, test=told, n=n)
    return {
        "a": a,
        "b": b,
        "rows": rows.kind,
        "only_a": test.only_a,
        "only_b": test.only_b,
        "p": p,
        "verdict": verdict,
    }


def per_class(rows: Predictions, probs: np.ndarray) -> list[dict[str, Any]]:
    """Recall, precision and F1 of each class with intervals, for results.json; probs (n, k)."""
    return [
        dict(entry)
        for entry in stats.per_class(probs, rows.labels, rows.classes, LEVEL, rows.groups)
    ]
