"""The optimism meter: what a choice looks like on the rows it was made on, minus what it is worth on rows it has not seen.

An entry says of one choice (checkpoint, stage, subset, stacker, views, method) the share of images right that one would have
printed (`apparent`) and the honest one, with an interval of the difference that draws images, or whole groups, anew. The
name and the idea are Efron's (1983, "Estimating the error rate of a prediction rule").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.crossfit import stratified_parts
from threefold.ensembles__registry import choose
from threefold.errors import DataError
from threefold.predictions__results_schema import Optimism
from threefold.resampling import RESAMPLES, check_groups, column_sums, percentile_interval


class Counts(NamedTuple):
    """Right answers and answers of each of n images, float64 (n,) each; an image may be answered often or never."""

    right: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, hits: npt.ArrayLike) -> Counts:
        """One answer per image: hits, booleans (n,)."""
        right = np.asarray(hits, np.float64)
        return cls(right, np.ones_like(right))

    def share(self) -> float:
        """Share of answers that are right."""
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
        description: what was chosen, in plain words.
        apparent: of the rows that the choice was made on.
        honest: of rows that it has not seen; the same images, in the same order, as in `apparent`.
        groups: (n,) names of what is drawn as a whole, or None.
        rows: what the two kinds of rows are called.
        seed: of the draws.

    Raises:
        DataError: the two are of other images, or one has no answer.
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
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # a draw without answers is left out below
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


def nested_choice(
    tables: Mapping[str, np.ndarray],
    labels: np.ndarray,
    folds: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Probabilities (n, k) of a choice among methods that no row took part in that it answers, and what each part chose.

    Args:
        tables: method -> probabilities (n, k), cross-fitted.
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`.
        groups: (n,) what must stay in one part, where `folds` is None.

    Raises:
        DataError: nothing to choose from, or probabilities are not usable.
        RecipeError: a method is unknown.
    """
    part = folds if folds is not None else stratified_parts(labels, groups)
    first = next(iter(tables.values()))
    answer, chosen = np.array(first, np.float64), []
    for value in np.unique(part):
        held = part == value
        rest = {name: probs[~held] for name, probs in tables.items()}
        name = choose(rest, labels[~held])[0] if not held.all() else next(iter(tables))
        answer[held] = tables[name][held]
        chosen.append(name)
    return answer, chosen
