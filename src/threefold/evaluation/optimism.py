"""Optimism: the score of a choice on the rows it was made on, minus its score on other rows.

An entry describes one choice (checkpoint, stage, subset, stacker, views, method): the accuracy that
one would have reported (`apparent`) and the honest one, with an interval of the difference from a
bootstrap of images, or of whole groups. The name and the idea are Efron's (1983, "Estimating the
error rate of a prediction rule").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.ensembles.cross_fit import stratified_parts
from threefold.ensembles.registry import choose
from threefold.errors import DataError
from threefold.predictions.results_schema import Optimism
from threefold.scratch import scratch, take_rows
from threefold.stats.bootstrap import RESAMPLES, check_groups, column_sums, percentile_interval


class Counts(NamedTuple):
    """Correct answers and all answers of each of n images, float64 (n,) each.

    An image may be answered several times or never.
    """

    right: np.ndarray
    answers: np.ndarray

    @classmethod
    def from_hits(cls, hits: npt.ArrayLike) -> Counts:
        """Count one answer per image from hits, booleans (n,)."""
        right = np.asarray(hits, np.float64)
        return cls(right, np.ones_like(right))

    def share(self) -> float:
        """Return the share of answers that are correct."""
        return float(self.right.sum() / self.answers.sum())


def optimism_entry(
    choice: str,
    description: str,
    apparent: Counts,
    honest: Counts,
    groups: npt.ArrayLike | None = None,
    *,
    rows: tuple[str, str],
    seed: int = 0,
) -> Optimism:
    """Measure the optimism of one choice.

    Args:
        choice: checkpoint, stage, views, member, method, or the name of a fitted method.
        description: what was chosen, as a phrase.
        apparent: counts on the rows that the choice was made on.
        honest: counts on rows that it has not seen; the same images in the same order.
        groups: (n,) names of groups that are drawn as a whole, or None.
        rows: names of the two kinds of rows, apparent and honest.
        seed: seed of the bootstrap.

    Raises:
        DataError: the two have different images, or one has no answer.
    """
    if apparent.right.shape != honest.right.shape:
        raise DataError(
            "optimism compares the same images",
            expected=apparent.right.shape,
            got=honest.right.shape,
        )
    if not apparent.answers.sum() or not honest.answers.sum():
        raise DataError("optimism needs answers of both kinds", where=choice)
    n = len(apparent.right)
    part = np.arange(n) if groups is None else check_groups(groups, n)
    columns = np.stack([np.bincount(part, values) for values in (*apparent, *honest)])
    draws = []
    for a, na, h, nh in column_sums(columns, RESAMPLES, seed):
        # A draw without answers gives NaN, which `percentile_interval` leaves out.
        with np.errstate(invalid="ignore", divide="ignore"):
            draws.append(a / na - h / nh)
    difference = apparent.share() - honest.share()
    return Optimism(
        choice=choice,
        description=description,
        apparent=apparent.share(),
        honest=honest.share(),
        difference=difference,
        interval=percentile_interval(np.concatenate(draws), 0.95),
        n=n,
        apparent_rows=rows[0],
        honest_rows=rows[1],
    )


class _Others(Mapping[str, np.ndarray]):
    """Some rows of each table (n, k), taken when they are asked for: no two of them at a time."""

    def __init__(self, tables: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        self.tables, self.rows = tables, rows

    def __getitem__(self, name: str) -> np.ndarray:
        return take_rows(self.tables[name], self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)


class NestedChoice(NamedTuple):
    """The answers of a cross-fitted choice among methods.

    Attributes:
        probs: (n, k) each row answered by the method that was chosen on the other parts.
        methods: the method chosen for each part.
    """

    probs: np.ndarray
    methods: list[str]


def nested_choice(
    tables: Mapping[str, np.ndarray],
    labels: np.ndarray,
    folds: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    metric: str = "accuracy",
) -> NestedChoice:
    """Cross-fit the choice among methods: no row takes part in the choice that answers it.

    Args:
        tables: cross-fitted probabilities (n, k) by method.
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`.
        groups: (n,) groups that must stay in one part if `folds` is None.
        metric: what the choice goes by, see `registry.choose`.

    Raises:
        DataError: no methods, or probabilities are not usable.
        RecipeError: a method is unknown.
    """
    part = folds if folds is not None else stratified_parts(labels, groups)
    first = next(iter(tables))
    answers, methods = scratch(tables[first].shape), []
    answers[...] = tables[first]
    for value in np.unique(part):
        inside = part == value
        name = first
        if not inside.all():
            name = choose(_Others(tables, ~inside), labels[~inside], metric).name
        np.copyto(answers, tables[name], where=inside[:, None])
        methods.append(name)
    return NestedChoice(answers, methods)
