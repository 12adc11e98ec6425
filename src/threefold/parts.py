"""What a file from elsewhere says, put together to Predictions: labels found and compared, wrong numbers named.

Labels come from the file, from a table of labels, or from the folder of each image's path. They are never guessed: with
none of these the file is refused, and where there are two they must agree.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from threefold.errors import DataError
from threefold.predictions import Predictions
from threefold.predictions__checks import SUM_TOLERANCE


class Truth(NamedTuple):
    """A table of labels beside the file: n names of rows or nothing (then order is all there is), labels, groups."""

    where: str
    ids: list[str] | None
    labels: list[str]
    groups: list[str] | None


class Parts(NamedTuple):
    """What one file says of one or more members.

    Attributes:
        where: the file, for messages.
        probs: (n, k) or (m, n, k), not yet checked.
        labels: n names of classes, or (n,) numbers of columns; None where the file has none.
        ids: n names of rows.
        paths: n paths of files below class folders.
        classes: k names, in the order of the columns of `probs`.
        members: m names.
        natural: the columns are the folders in timm's natural order, where nothing names the classes.
        extra: further arguments of Predictions.
    """

    where: str
    probs: np.ndarray
    labels: Sequence[str] | np.ndarray | None = None
    ids: Sequence[str] | None = None
    paths: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None
    members: tuple[str, ...] | None = None
    natural: bool = False
    extra: Mapping[str, Any] = {}


def assemble(
    parts: Parts, truth: Truth | Literal["folder"] | None, classes: tuple[str, ...] | None
) -> Predictions:
    """Predictions of what a file says.

    Args:
        truth: labels from beside the file; "folder" = the ids are paths below class folders.
        classes: names of the columns, for files that do not say.

    Raises:
        DataError: no labels or two that differ, unknown classes, or numbers that are no probabilities.
    """
    where = parts.where
    probs = _three_axes(parts)
    names = _classes(parts, classes, probs.shape[2])
    paths = (parts.paths or parts.ids) if truth == "folder" else parts.paths
    if truth == "folder" and not paths:
        raise DataError(
            "there are no paths to take labels from",
            where=where,
            fix="save `paths`, or give a CSV file",
        )
    if names is None and parts.natural and paths:
        names = _natural_folders(paths, probs.shape[2], where)
    _refuse_lengths(parts, probs.shape[1])
    ids, found = parts.ids, []
    groups = parts.extra.get("groups")
    if parts.labels is not None:
        found.append(_numbers(parts.labels, names, where))
    if paths:
        has_other = bool(found) or isinstance(truth, Truth)
        ids, by_folder = _from_folders(paths, names, where, has_other)
        found += [] if by_folder is None else [by_folder]
    if isinstance(truth, Truth):
        ids, rows = _matched(truth, ids, paths, probs.shape[1], where)
        found.append(_numbers([truth.labels[row] for row in rows], names, truth.where))
        groups = groups or (
            None if truth.groups is None else tuple(truth.groups[row] for row in rows)
        )
    if not found:
        raise DataError(
            "there are no labels",
            where=where,
            expected="labels in the file, `paths` below class folders, or a CSV file of labels",
            fix="add `labels`, or give labels= (a CSV file id,label; or folder)",
        )
    for other in found[1:]:
        _compare(found[0], other, ids, names, where)
    _check(probs, ids, names, where)
    made: dict[str, Any] = {"groups": groups, "labels": found[0]}
    try:
        return Predictions(
            **{**parts.extra, **made}, probs=probs, **_named(parts, probs.shape, ids, names)
        )
    except DataError as error:
        raise DataError("the predictions cannot be used", where=where, got=error) from None


def _named(
    parts: Parts, shape: tuple[int, ...], ids: Sequence[str] | None, names: Any
) -> dict[str, Any]:
    """The names, made up as `Predictions.load` does where the file has none."""
    m, n, k = shape
    width = max(4, len(str(n - 1)))
    return {
        "ids": tuple(ids) if ids is not None else tuple(f"row{i:0{width}d}" for i in range(n)),
        "classes": names or tuple(map(str, range(k))),
        "members": parts.members or tuple(f"member{i}" for i in range(m)),
    }


def _three_axes(parts: Parts) -> np.ndarray:
    """(m, n, k), and what a sigmoid gives is named."""
    probs = parts.probs
    if probs.dtype.kind not in "biuf":
        raise DataError(
            "probabilities must be numbers", where=parts.where, got=f"dtype {probs.dtype}"
        )
    if probs.ndim == 1 or (probs.ndim in (2, 3) and probs.shape[-1] == 1):
        fix = "for a sigmoid p of two classes save numpy.stack([1 - p, p], -1)"
        raise DataError(
            "one number per row is not enough",
            where=parts.where,
            expected="one column per class",
            got=f"shape {probs.shape}",
            fix=fix,
        )
    if probs.ndim not in (2, 3) or 0 in probs.shape:
        raise DataError(
            "probabilities have the wrong shape",
            where=parts.where,
            expected="(rows, classes) or (members, rows, classes)",
            got=probs.shape,
        )
    return probs[None] if probs.ndim == 2 else probs


def _refuse_lengths(parts: Parts, n: int) -> None:
    for name, values in (("labels", parts.labels), ("ids", parts.ids), ("paths", parts.paths)):
        if values is not None and np.shape(values)[:1] != (n,):
            raise DataError(
                f"{name} do not fit the probabilities",
                where=parts.where,
                expected=f"{n}, one per row",
                got=len(values) if np.ndim(values) else "one",
            )


# classes and labels ---------------------------------------------------------------------------------------------------


def _classes(parts: Parts, given: tuple[str, ...] | None, k: int) -> tuple[str, ...] | None:
    """Names of the columns from the file or the caller, if any."""
    names = parts.classes or given
    if names and given and names != given:
        got = next((a for a, b in zip(names, given, strict=False) if a != b), f"{len(names)} names")
        raise DataError(
            "the file names its classes otherwise",
            where=parts.where,
            expected=", ".join(given),
            got=got,
        )
    if names and len(names) != k:
        raise DataError(
            "the class names do not fit the probabilities",
            where=parts.where,
            expected=f"{k} names, one per column",
            got=f"{len(names)}: {', '.join(names)[:80]}",
        )
    return names


def _numbers(
    labels: Sequence[str] | np.ndarray, names: tuple[str, ...] | None, where: str
) -> np.ndarray:
    """Class numbers (n,) of names, or of numbers where no name is meant."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "US":
        return labels
    cells = [str(cell) for cell in labels]
    number = {name: i for i, name in enumerate(names or ())}
    unknown = next((row for row, cell in enumerate(cells) if cell not in number), None)
    if unknown is None:
        return np.array([number[cell] for cell in cells], np.int64)
    digits = all(cell.isascii() and cell.isdigit() for cell in cells)
    if (
        digits
        and not any(cell in number for cell in cells)
        and not any(name.isdigit() for name in number)
    ):
        return np.array([int(cell[:9]) for cell in cells], np.int64)  # out of range is found later
    if names is None:
        raise DataError(
            "the order of the classes is not known",
            where=where,
            expected="class names beside the labels",
            got=f"label {cells[unknown]}",
            fix="save `classes` in the order of the columns, or give classes=",
        )
    near = difflib.get_close_matches(cells[unknown], names, 1, cutoff=0.6)
    expected = f"{near[0]}, or another" if near else f"one of {', '.join(names[:10])}"
    raise DataError(
        "a label is no class", where=f"{where} row {unknown}", expected=expected, got=cells[unknown]
    )


def _from_folders(
    paths: Sequence[str], names: tuple[str, ...] | None, where: str, has_other: bool
) -> tuple[list[str], np.ndarray | None]:
    """Ids (the path from the class folder on) and labels; only names where no path has a class and labels are known."""
    if names is None:
        if has_other:
            return list(paths), None
        raise DataError(
            "the order of the classes is not known",
            where=where,
            fix="save `classes` in the order of the columns, or give classes=",
        )
    number = {name: i for i, name in enumerate(names)}
    split = [_split(path) for path in paths]
    classes = [
        [i for i, folder in enumerate(folders[:-1]) if folder in number] for folders in split
    ]
    if has_other and not any(classes):
        return list(paths), None
    for path, folders, at in zip(paths, split, classes, strict=True):
        found = {folders[i] for i in at}
        if len(found) != 1:
            got = f"folders {' and '.join(sorted(found))}" if found else path
            raise DataError(
                "the class of a path is not clear",
                where=f"{where}: {path}",
                expected=f"one folder named as a class ({', '.join(names)[:80]})",
                got=got,
                fix="keep the class folders in the paths; or save `ids` with `labels`, or give labels=",
            )
    ids = ["/".join(folders[at[0] :]) for folders, at in zip(split, classes, strict=True)]
    return ids, np.array(
        [number[folders[at[0]]] for folders, at in zip(split, classes, strict=True)], np.int64
    )


def _split(path: str) -> list[str]:
    """Folders and the file's name, of a POSIX or a Windows path."""
    return [part for part in path.split("/" if "/" in path else "\\") if part not in ("", ".")]


def _natural_folders(paths: Sequence[str], k: int, where: str) -> tuple[str, ...]:
    """The folders that hold the files, in the order in which timm numbers them (numbers in names count as numbers)."""

    def key(name: str) -> list[tuple[int, str]]:
        return [
            (int(part), "") if part.isdecimal() else (-1, part)
            for part in re.split(r"(\d+)", name.lower())
        ]

    folders = sorted({folders[-2] for path in paths if len(folders := _split(path)) > 1}, key=key)
    if len(folders) != k:
        raise DataError(
            "the class names are not known",
            where=where,
            expected=f"{k} class folders in the file names",
            got=f"{len(folders)}",
            fix="run timm with --fullname, or give classes=",
        )
    return tuple(folders)


def _matched(
    truth: Truth, ids: Sequence[str] | None, paths: Sequence[str] | None, n: int, where: str
) -> tuple[Sequence[str] | None, Sequence[int]]:
    """Ids, and for each row its row in the table of labels."""
    if truth.ids is None or ids is None:
        if len(truth.labels) != n:
            raise DataError(
                "the labels do not fit the predictions",
                where=truth.where,
                expected=f"{n} rows as in {where}",
                got=len(truth.labels),
            )
        return (truth.ids if ids is None else ids), range(n)
    there = {name: row for row, name in enumerate(truth.ids)}
    if len(there) < len(truth.ids):
        raise DataError(
            "ids are not unique", where=truth.where, got=Counter(truth.ids).most_common(1)[0][0]
        )
    rows = [there.get(path, there.get(name)) for name, path in zip(ids, paths or ids, strict=True)]
    missing = [name for name, row in zip(ids, rows, strict=True) if row is None]
    if missing:
        raise DataError(
            "labels are missing",
            where=truth.where,
            expected=f"the ids of {where}",
            got=f"{len(missing)} missing, the first is {missing[0]}",
        )
    return ids, [row for row in rows if row is not None]


def _compare(
    first: np.ndarray,
    other: np.ndarray,
    ids: Sequence[str] | None,
    names: tuple[str, ...] | None,
    where: str,
) -> None:
    """Two sources of labels must agree; both have n rows."""
    if first.shape != other.shape:
        raise DataError(
            "labels have the wrong shape",
            where=where,
            expected="one class number per row",
            got=first.shape,
        )
    rows = np.flatnonzero(first != other)
    if len(rows):
        row = int(rows[0])
        mine, theirs = (
            names[a[row]] if names and 0 <= a[row] < len(names) else a[row] for a in (first, other)
        )
        at = ids[row] if ids is not None else row
        raise DataError("a row has two labels", where=f"{where}: {at}", expected=mine, got=theirs)


# numbers --------------------------------------------------------------------------------------------------------------


def _check(
    probs: np.ndarray, ids: Sequence[str] | None, names: tuple[str, ...] | None, where: str
) -> None:
    """Refuse what is not probabilities, naming the row and the likeliest reason."""

    def told(i: int, j: int) -> str:
        return f"{where}, row {ids[j] if ids is not None else j}"

    bad = ~np.isfinite(probs)
    if bad.any():
        i, j, c = np.argwhere(bad)[0]
        raise DataError(
            "a probability is not a number",
            where=f"{told(i, j)}, class {names[c] if names else c}",
            got=probs[i, j, c],
        )
    sums = probs.sum(-1, dtype=np.float64)
    off = (np.abs(sums - 1) > SUM_TOLERANCE) | (probs < 0).any(-1)
    if off.any():
        i, j = np.argwhere(off)[0]
        row = np.asarray(probs[i, j], np.float64)
        what, fix = _reason(row, names)
        shown = ", ".join(f"{value:.4g}" for value in row[:4]) + (", ..." if len(row) > 4 else "")
        raise DataError(
            what,
            where=told(i, j),
            expected="shares that sum to 1",
            got=f"{shown} with sum {row.sum():.4g}",
            fix=fix,
        )


def _reason(row: np.ndarray, names: tuple[str, ...] | None) -> tuple[str, str]:
    """What numbers that do not sum to 1 most likely are, and what to do."""
    total = row.sum()
    pairs = [name.split(":", 1) for name in names or () if ":" in name]
    if (row >= 0).all() and abs(total - 100) < 1:
        return "these are percent", "divide by 100"
    if (row <= 0).all() and abs(np.exp(row).sum() - 1) < 0.01:
        return "these are logarithms of probabilities", "apply exp first"
    if len(pairs) == len(row) and len({member for member, _ in pairs}) == round(total) > 1:
        return (
            "the columns are those of several members",
            "write one row per id and member, with a column `member`",
        )
    if (row >= 0).all() and abs(total - 1) < 0.05:
        return (
            "probabilities of a row do not sum to 1",
            "write at least 5 digits, and one column for every class",
        )
    if (row >= 0).all() and (row <= 1).all() and total < 1:
        return (
            "probabilities of a row do not sum to 1",
            "save all classes, not the best few; or these are sigmoids",
        )
    return (
        "these are no probabilities (logits?)",
        "apply softmax first; every column but the named ones is a class",
    )
