"""Folds and roles: the training rows that fit, select and score each member.

Under the honest protocol the three sets of a fold are disjoint. Results do not depend on the names
of classes or groups. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from threefold.data.label_folds import LabelTable, draw_share, score_parts
from threefold.errors import DataError, RunError, shorten
from threefold.names import natural_key
from threefold.recipe.schema import FoldSpec

Rows = NDArray[np.int64]
MOST_FOLDS = 50
"""Largest number of folds from a column; more are a column of something else."""

HOLDOUT = 0.1
"""Share of the rows that the scheme `holdout` scores, unless the recipe says."""
HOLDOUT_STREAM = 2**32
"""Draws the rows of `holdout`; the select rows of fold f are drawn by stream f + 1."""
FOLD_STREAM = HOLDOUT_STREAM + 1
"""Draws the folds of rows with any number of labels."""

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


class Roles(NamedTuple):
    """The rows of one fold by their use, as ascending row numbers."""

    fit: Rows
    """Gradients."""
    select: Rows
    """Choice of checkpoints and stages (under `paper`, the scored rows)."""
    score: Rows
    """Out-of-fold probabilities."""


class _Codes(NamedTuple):
    """Classes or groups, numbered by first appearance, so that renaming them changes nothing."""

    of_row: Rows
    names: list[str]

    @property
    def counts(self) -> Rows:
        return np.bincount(self.of_row, minlength=len(self.names))


def assign_roles(
    labels: ArrayLike,
    groups: Sequence[str] | None,
    spec: FoldSpec,
    protocol: Literal["honest", "paper"],
    seed: int,
    classes: Sequence[str] | None = None,
    folds: Sequence[str] | None = None,
) -> tuple[Roles, ...]:
    """Assign roles to all rows in every fold; over the folds each row is scored exactly once.

    Rows with any number of labels are shared out by iterative stratification (`label_folds`).

    Only `holdout` has one fold, which scores the share `spec.holdout` of each class, or of whole
    groups where there are any; the other rows are never scored.

    `stratified` distributes each class evenly and ignores groups; `grouped` does the same with
    whole groups; `leave-one-group-out` makes one fold per group, in order of first appearance, and
    `column` one per value of `folds`, in natural order; both ignore spec.k. Under the honest
    protocol, `select` is the share `spec.select` of the rows outside `score`, from every class, in
    whole groups if the scheme has groups; `column` uses groups where there are any. Under the paper
    protocol, `select` is `score`, since the authors selected on what they reported; with k = 1 all
    rows are fitted and the other sets are empty (the test split selects).

    Args:
        labels: (n,) class numbers, or targets (n, k) of any number of labels per row.
        groups: (n,) group of each row, or None.
        spec: number of folds, scheme, share of `select`.
        protocol: "honest" or "paper".
        seed: the recipe's seed.
        classes: class names for messages.
        folds: (n,) the user's own fold of each row, for the scheme `column`, or None.

    Raises:
        DataError: a class has too few images, there are too few groups, or groups or folds are
            missing.
    """
    class_codes = _truth(labels, classes)
    n = len(class_codes.of_row)
    group_codes = _group_codes(groups, spec, n)
    everything = np.arange(n)
    if protocol == "paper" and spec.k == 1 and not spec.ignores_k:
        return (Roles(everything, _NO_ROWS, _NO_ROWS),)
    if spec.scheme == "column":
        parts = _column_parts(folds, n)
    elif spec.scheme == "holdout":
        share = spec.holdout or HOLDOUT
        parts = [_draw(everything, class_codes, group_codes, share, seed, HOLDOUT_STREAM)]
        if not len(parts[0]):
            raise DataError(
                "folds.scheme = holdout leaves no images to score",
                expected="2 images of a class, or 2 groups with every class",
                fix="add images or groups, or raise folds.holdout",
            )
    else:
        parts = _score_parts(class_codes, group_codes, spec, seed)
    roles = []
    for fold, score in enumerate(parts):
        rest = np.setdiff1d(everything, score)
        _require_classes(class_codes, rest, fold, spec)
        if protocol == "paper":
            roles.append(Roles(rest, score, score))
        else:
            fit, select = _fit_and_select(rest, class_codes, group_codes, spec, seed, fold)
            roles.append(Roles(fit, select, score))
    check_roles(roles, np.concatenate(parts) if spec.scheme == "holdout" else everything)
    return tuple(roles)


def refit_roles(
    labels: ArrayLike,
    groups: Sequence[str] | None,
    spec: FoldSpec,
    seed: int,
    classes: Sequence[str] | None = None,
) -> Roles:
    """Assign roles for one model refitted on all rows: none is scored.

    Raises:
        DataError: there are too few images or groups, or groups are missing.
    """
    class_codes = _truth(labels, classes)
    n = len(class_codes.of_row)
    group_codes = _group_codes(groups, spec, n)
    fit, select = _fit_and_select(np.arange(n), class_codes, group_codes, spec, seed, -1)
    return Roles(fit, select, _NO_ROWS)


def fold_values(folds: Sequence[str]) -> tuple[str, ...]:
    """Return the values of the user's fold column in natural order: the first is fold 0.

    Raises:
        DataError: there is only one value, or there are more than 50.
    """
    values = tuple(sorted(set(folds), key=natural_key))
    if not 2 <= len(values) <= MOST_FOLDS:
        raise DataError(
            f"the fold column has {len(values)} different values",
            expected=f"2 to {MOST_FOLDS} folds",
            got=shorten(values),
            fix="name the column with the fold of each row in data.fold_column, or remove it",
        )
    return values


def check_roles(roles: Sequence[Roles], rows: Rows) -> None:
    """Check that folds score each of the rows exactly once, and none that they fitted or selected.

    Args:
        roles: of each fold.
        rows: (r,) the rows to be scored.

    Raises:
        RunError: they do not; this is a defect of the program, not of the data.
    """
    scored = np.concatenate([part.score for part in roles]) if roles else _NO_ROWS
    if not np.array_equal(np.sort(scored), np.sort(rows)):
        raise RunError(
            "the folds do not score every row exactly once",
            expected=f"{len(rows)} rows",
            got=f"{len(scored)} rows",
        )
    for fold, part in enumerate(roles):
        if len(np.intersect1d(part.fit, np.union1d(part.select, part.score))):
            raise RunError("rows are fitted and also selected or scored on", where=f"fold {fold}")


def _truth(labels: ArrayLike, names: Sequence[str] | None) -> _Codes | LabelTable:
    """Return what folds are balanced by: classes, or any number of labels per row."""
    if np.asarray(labels).ndim == 2:
        return LabelTable.of(labels, names)
    return _codes(labels, names)


def _codes(values: ArrayLike, names: Sequence[str] | None = None) -> _Codes:
    unique, first, inverse = np.unique(np.asarray(values), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order)
    ordered = unique[order]
    shown = [str(value) for value in ordered] if names is None else [names[v] for v in ordered]
    return _Codes(rank[inverse], shown)


def _group_codes(groups: Sequence[str] | None, spec: FoldSpec, n: int) -> _Codes | None:
    """Return the groups if the scheme uses them, else None."""
    if spec.scheme == "stratified":
        return None
    if groups is None and spec.scheme in ("column", "holdout"):
        return None
    if groups is None:
        raise DataError(
            f"folds.scheme = {spec.scheme} needs groups",
            fix="set data.group_regex or data.group_file, or add a group column to the CSV file",
        )
    if len(groups) != n:
        raise DataError("every image needs one group", expected=f"{n} groups", got=len(groups))
    return _codes(groups)


def _column_parts(folds: Sequence[str] | None, n: int) -> list[Rows]:
    """Return the scored rows of each of the user's own folds."""
    if folds is None:
        raise DataError(
            "folds.scheme = column needs a fold column",
            fix="set data.fold_column to the column with the fold of each row",
        )
    if len(folds) != n:
        raise DataError("every image needs one fold", expected=f"{n} folds", got=len(folds))
    of_row = np.asarray(folds)
    return [np.flatnonzero(of_row == value) for value in fold_values(folds)]


def _score_parts(
    labels: _Codes | LabelTable, groups: _Codes | None, spec: FoldSpec, seed: int
) -> list[Rows]:
    """Return the scored rows of each fold."""
    if spec.scheme == "leave-one-group-out" and groups is not None:
        if len(groups.names) < 2:
            raise DataError(
                "leave-one-group-out needs several groups",
                expected="2 or more",
                got=len(groups.names),
            )
        return [np.flatnonzero(groups.of_row == group) for group in range(len(groups.names))]
    _require_enough(labels, groups, spec.k)
    if isinstance(labels, LabelTable):
        rng = np.random.default_rng([seed % 2**32, FOLD_STREAM])
        parts = score_parts(labels, None if groups is None else groups.of_row, spec.k, rng)
        return _all_used(parts, spec.k)
    splitter_class = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = splitter_class(spec.k, shuffle=True, random_state=seed % 2**32)
    parts = splitter.split(labels.of_row, labels.of_row, None if groups is None else groups.of_row)
    return _all_used([np.asarray(score, dtype=np.int64) for _, score in parts], spec.k)


def _all_used(scores: list[Rows], k: int) -> list[Rows]:
    """Return the scored rows of each fold, if each has some."""
    if not all(len(score) for score in scores):
        raise DataError(
            "the groups are too uneven for these folds", got=f"{k} folds", fix="lower folds.k"
        )
    return scores


def _require_enough(labels: _Codes | LabelTable, groups: _Codes | None, k: int) -> None:
    """Check that there are at least 2 folds, k images of every class, and k groups."""
    if k < 2:
        raise DataError("cross-validation needs 2 folds or more", got=f"folds.k = {k}")
    if isinstance(labels, LabelTable):
        labels.require_folds(k)
    elif labels.counts.min() < k:
        rare = int(np.argmin(labels.counts))
        raise DataError(
            f"too few images of class {labels.names[rare]} for {k} folds",
            expected=f"{k} or more",
            got=int(labels.counts[rare]),
            fix=f"lower folds.k, add images of {labels.names[rare]}, or leave the class out",
        )
    if groups is not None and len(groups.names) < k:
        raise DataError(
            f"too few groups for {k} folds",
            expected=f"{k} or more",
            got=len(groups.names),
            fix="lower folds.k",
        )


def _require_classes(labels: _Codes | LabelTable, rest: Rows, fold: int, spec: FoldSpec) -> None:
    """Check that every class has training rows; otherwise it could never be predicted."""
    if isinstance(labels, LabelTable):
        _require_labels(labels, rest, f"fold {fold}")
        return
    present = np.bincount(labels.of_row[rest], minlength=len(labels.names)) > 0
    if not present.all():
        absent = labels.names[int(np.argmin(present))]
        expected = "each class in several groups, spread over the folds"
        fix = "lower folds.k, add groups that hold this class, or leave the class out"
        if spec.scheme == "column":
            expected = "each class in several folds of the column"
            fix = "change the fold column, or leave the class out"
        raise DataError(
            f"fold {fold} has no images of class {absent} to train on", expected=expected, fix=fix
        )


def _require_labels(labels: LabelTable, rows: Rows, where: str) -> None:
    """Check that rows to train on have images with every label and without it."""
    absent = labels.absent(rows)
    if absent:
        raise DataError(
            f"{where} has no two kinds of images to train on, with the label {absent} and without",
            expected="both in several folds, and in several groups where there are any",
            fix="change the folds, add images, or leave the label out",
        )


def _fit_and_select(
    rest: Rows,
    labels: _Codes | LabelTable,
    groups: _Codes | None,
    spec: FoldSpec,
    seed: int,
    fold: int,
) -> tuple[Rows, Rows]:
    """Split the rows outside `score`; every class of `rest` keeps rows in fit."""
    select = _draw(rest, labels, groups, spec.select, seed, fold + 1)
    if not len(select):
        where = f"fold {fold}" if fold >= 0 else "the refit"
        raise DataError(
            f"{where} leaves no images to choose checkpoints on",
            expected="outside the scored rows, 2 images of a class, or 2 groups with every class",
            fix="add images or groups, or change folds.k",
        )
    return np.setdiff1d(rest, select), select


def _draw(
    rest: Rows,
    labels: _Codes | LabelTable,
    groups: _Codes | None,
    share: float,
    seed: int,
    stream: int,
) -> Rows:
    """Draw a share of the rows, or of whole groups; `stream` tells draws of one seed apart."""
    rng = np.random.default_rng([seed % 2**32, stream])
    if isinstance(labels, LabelTable):
        return draw_share(rest, labels, None if groups is None else groups.of_row, share, rng)
    if groups is None:
        return _draw_rows(rest, labels.of_row[rest], share, rng)
    return _draw_groups(rest, labels.of_row[rest], groups.of_row[rest], share, rng)


def _draw_rows(rest: Rows, codes: Rows, share: float, rng: np.random.Generator) -> Rows:
    """Draw a share of each class: at least one row, but never the last one."""
    drawn = []
    for code in np.unique(codes):
        rows = rng.permutation(rest[codes == code])
        drawn.append(rows[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    return np.sort(np.concatenate(drawn))


def _draw_groups(
    rest: Rows, codes: Rows, groups: Rows, share: float, rng: np.random.Generator
) -> Rows:
    """Draw whole groups in random order, each if it brings the shares closer to the target.

    If every group is too large for that, draw the closest one. No group may take the last rows of
    a class.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), int(codes.max()) + 1))
    np.add.at(counts, (inverse, codes), 1)
    counts = counts[:, counts.sum(axis=0) > 0]
    shares = counts / counts.sum(axis=0)

    def error(taken: NDArray[np.float64]) -> float:
        return float(((taken - share) ** 2).sum())

    # Counts, not shares, decide what is left: sums of shares are not exact.
    taken, left, chosen = np.zeros(shares.shape[1]), counts.sum(axis=0), []
    for group in rng.permutation(len(names)):
        if error(taken + shares[group]) < error(taken) and (left > counts[group]).all():
            taken, left = taken + shares[group], left - counts[group]
            chosen.append(group)
    if not chosen:
        possible = [group for group in range(len(names)) if (left > counts[group]).all()]
        chosen = sorted(possible, key=lambda group: error(shares[group]))[:1]
    return rest[np.isin(inverse, chosen)]
