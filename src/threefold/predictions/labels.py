"""Turn the contents of a file into Predictions: find the labels and compare their sources.

Labels come from the file, from a separate table of labels, or from the folder of each image's
path. They are never guessed. A file without any of these is refused, and where there are two
sources they must agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from threefold.errors import DataError
from threefold.names import natural_key, normalise_name
from threefold.predictions.checks import describe_unsuitable, find_unsuitable, is_clean
from threefold.predictions.label_table import LabelTable
from threefold.predictions.member_probs import default_names
from threefold.predictions.predictions import Predictions

_FIX_CLASS_ORDER = (
    "save `classes` in the order of the columns, or give them as --classes (classes=)"
)


LabelSource = LabelTable | Literal["folder"] | None
"""Labels from outside the file: a table, or "folder" if ids are paths below class folders."""


@dataclass(frozen=True, eq=False)
class FileContent:
    """What one file says about one or more members.

    Attributes:
        where: the file, for messages.
        probs: (n, k) or (m, n, k), not yet checked.
        labels: n class names, or (n,) column numbers; None if the file has none.
        ids: n names of rows.
        paths: n paths of files below class folders.
        classes: k names, in the order of the columns of `probs`.
        members: m names.
        timm_order: if nothing names the classes, the columns are the class folders in timm's order.
        extra: further arguments of Predictions.
    """

    where: str
    probs: np.ndarray
    labels: Sequence[str] | np.ndarray | None = None
    ids: Sequence[str] | None = None
    paths: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None
    members: tuple[str, ...] | None = None
    timm_order: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def build_predictions(
    content: FileContent, source: LabelSource, classes: tuple[str, ...] | None
) -> Predictions:
    """Build Predictions from the content of a file.

    Args:
        content: what the file says.
        source: labels from outside the file.
        classes: names of the columns, for files that do not name them.

    Raises:
        DataError: there are no labels, two sources of labels disagree, classes are unknown, or the
            numbers are not probabilities.
    """
    where = content.where
    probs = _with_member_axis(content)
    m, n, k = probs.shape
    names = _class_names(content, classes, k)
    paths = content.paths
    if source == "folder":
        paths = paths or content.ids
        if not paths:
            raise DataError(
                "there are no paths to take labels from",
                where=where,
                fix="save `paths`, or give a CSV file",
            )
    if names is None and content.timm_order and paths:
        names = _timm_class_folders(paths, k, where)
    _check_lengths(content, n)
    ids, groups = content.ids, content.extra.get("groups")
    labels: list[np.ndarray] = []  # one array per source
    if content.labels is not None:
        labels.append(_class_numbers(content.labels, names, where))
    if paths:
        required = not labels and not isinstance(source, LabelTable)
        ids, folder_labels = _labels_from_folders(paths, names, where, required)
        if folder_labels is not None:
            labels.append(folder_labels)
    if isinstance(source, LabelTable):
        ids, rows = source.match_rows(ids, paths, n, where)
        labels.append(_class_numbers([source.labels[row] for row in rows], names, source.where))
        if not groups and source.groups is not None:
            groups = tuple(source.groups[row] for row in rows)
    if not labels:
        raise DataError(
            "there are no labels",
            where=where,
            expected="labels in the file, `paths` below class folders, or a CSV file of labels",
            fix="add `labels`, or give a table of id and label, or folder, as --labels (labels=)",
        )
    for other in labels[1:]:
        _compare_labels(labels[0], other, ids, names, where)
    _check_probs(probs, ids, names, where)
    arguments: dict[str, Any] = {**default_names(m, n, k), **content.extra}
    known_names = {"ids": ids, "classes": names, "members": content.members}
    arguments |= {name: tuple(values) for name, values in known_names.items() if values}
    arguments |= {"probs": probs, "labels": labels[0], "groups": groups}
    try:
        return Predictions(**arguments)
    except DataError as error:
        raise DataError("the predictions cannot be used", where=where, got=error) from None


def _with_member_axis(content: FileContent) -> np.ndarray:
    """The probabilities as (m, n, k). Refuses the single column of a sigmoid."""
    probs = content.probs
    if probs.dtype.kind not in "biuf":
        raise DataError(
            "probabilities must be numbers", where=content.where, got=f"dtype {probs.dtype}"
        )
    if probs.ndim == 1 or (probs.ndim in (2, 3) and probs.shape[-1] == 1):
        raise DataError(
            "one number per row is not enough",
            where=content.where,
            expected="one column per class",
            got=f"shape {probs.shape}",
            fix="for a sigmoid p of two classes save numpy.stack([1 - p, p], -1)",
        )
    if probs.ndim not in (2, 3) or 0 in probs.shape:
        raise DataError(
            "probabilities have the wrong shape",
            where=content.where,
            expected="(rows, classes) or (members, rows, classes)",
            got=probs.shape,
        )
    return probs[None] if probs.ndim == 2 else probs


def _check_lengths(content: FileContent, n: int) -> None:
    for name in ("labels", "ids", "paths"):
        values = getattr(content, name)
        if values is not None and np.shape(values)[:1] != (n,):
            raise DataError(
                f"{name} do not fit the probabilities",
                where=content.where,
                expected=f"{n}, one per row",
                got=len(values) if np.ndim(values) else "one",
            )


def _class_names(
    content: FileContent, requested: tuple[str, ...] | None, k: int
) -> tuple[str, ...] | None:
    """Names of the columns from the file or the caller, if either has them."""
    names = content.classes or requested
    if names and requested and names != requested:
        differing = [name for name, other in zip(names, requested, strict=False) if name != other]
        raise DataError(
            "the file has other class names",
            where=content.where,
            expected=", ".join(requested),
            got=differing[0] if differing else f"{len(names)} names",
        )
    if names and len(names) != k:
        raise DataError(
            "the class names do not fit the probabilities",
            where=content.where,
            expected=f"{k} names, one per column",
            got=f"{len(names)}: {', '.join(names)[:80]}",
        )
    return names


def _class_numbers(
    labels: Sequence[str] | np.ndarray, names: tuple[str, ...] | None, where: str
) -> np.ndarray:
    """Class numbers (n,) from names, or from numbers if no class is named by a number."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "US":
        return labels
    cells = [str(cell) for cell in labels]
    number_of = {name: i for i, name in enumerate(names or ())}
    normal = {normalise_name(name): i for name, i in number_of.items()}
    if len(normal) == len(number_of):  # no two names differ in their form alone
        cells, number_of = [normalise_name(cell) for cell in cells], normal
    unknown = next((row for row, cell in enumerate(cells) if cell not in number_of), None)
    if unknown is None:
        return np.array([number_of[cell] for cell in cells], np.int64)
    cells_are_numbers = all(cell.isascii() and cell.isdigit() for cell in cells)
    cells_name_a_class = any(cell in number_of for cell in cells)
    names_are_numbers = any(name.isdigit() for name in number_of)
    if cells_are_numbers and not cells_name_a_class and not names_are_numbers:
        # Nine digits fit int64; Predictions refuses numbers out of range.
        return np.array([int(cell[:9]) for cell in cells], np.int64)
    if names is None:
        raise DataError(
            "the order of the classes is not known",
            where=where,
            expected="class names beside the labels",
            got=f"label {cells[unknown]}",
            fix=_FIX_CLASS_ORDER,
        )
    near = difflib.get_close_matches(cells[unknown], names, 1, cutoff=0.6)
    raise DataError(
        "a label is not a class",
        where=f"{where} row {unknown}",
        expected=f"{near[0]}, or another" if near else f"one of {', '.join(names[:10])}",
        got=cells[unknown],
    )


def _labels_from_folders(
    paths: Sequence[str], names: tuple[str, ...] | None, where: str, required: bool
) -> tuple[list[str], np.ndarray | None]:
    """Ids and labels from paths that have a class name as a folder.

    The id is the path from the class folder on. If labels are not required and no path has a class
    folder, the ids are the paths and the labels None.
    """
    if names is None:
        if not required:
            return list(paths), None
        raise DataError("the order of the classes is not known", where=where, fix=_FIX_CLASS_ORDER)
    number_of = {name: i for i, name in enumerate(names)}
    number_of = {normalise_name(name): i for name, i in number_of.items()} | number_of
    ids: list[str] = []
    labels: list[int] = []
    unclear: list[tuple[str, set[str]]] = []
    for path in paths:
        pieces = [
            piece if piece in number_of else normalise_name(piece) for piece in _split_path(path)
        ]
        positions = [i for i, folder in enumerate(pieces[:-1]) if folder in number_of]
        folders = {pieces[i] for i in positions}
        if len(folders) == 1:
            ids.append("/".join(_split_path(path)[positions[0] :]))
            labels.append(number_of[pieces[positions[0]]])
        else:
            unclear.append((path, folders))
    if not required and not ids and not any(folders for _, folders in unclear):
        return list(paths), None
    if unclear:
        path, folders = unclear[0]
        raise DataError(
            "the class of a path is not clear",
            where=f"{where}: {path}",
            expected=f"one folder named as a class ({', '.join(names)[:80]})",
            got=f"folders {' and '.join(sorted(folders))}" if folders else path,
            fix="keep the class folders in the paths; save `ids` with `labels`, or give --labels",
        )
    return ids, np.array(labels, np.int64)


def _split_path(path: str) -> list[str]:
    """Folders and the file name of a POSIX or Windows path."""
    separator = "/" if "/" in path else "\\"
    return [piece for piece in path.split(separator) if piece not in ("", ".")]


def _timm_class_folders(paths: Sequence[str], k: int, where: str) -> tuple[str, ...]:
    """The folders that hold the files, in timm's order: natural order of the lower-case names."""
    split = [_split_path(path) for path in paths]
    folders = sorted(
        {pieces[-2] for pieces in split if len(pieces) > 1},
        key=lambda name: (natural_key(name.lower()), name),
    )
    if len(folders) != k:
        raise DataError(
            "the class names are not known",
            where=where,
            expected=f"{k} class folders in the file names",
            got=f"{len(folders)}",
            fix="run timm with --fullname, or give the names as --classes (classes=)",
        )
    return tuple(folders)


def _compare_labels(
    first: np.ndarray,
    other: np.ndarray,
    ids: Sequence[str] | None,
    names: tuple[str, ...] | None,
    where: str,
) -> None:
    """Refuse two sources of labels that disagree. Both have n rows."""
    if first.shape != other.shape:
        raise DataError(
            "labels have the wrong shape",
            where=where,
            expected="one class number per row",
            got=first.shape,
        )
    rows = np.flatnonzero(first != other)
    if not len(rows):
        return
    row = int(rows[0])

    def name_of(label: Any) -> Any:
        return names[label] if names and 0 <= label < len(names) else label

    raise DataError(
        "a row has two labels",
        where=f"{where}: {ids[row] if ids is not None else row}",
        expected=name_of(first[row]),
        got=name_of(other[row]),
    )


def _check_probs(
    probs: np.ndarray, ids: Sequence[str] | None, names: tuple[str, ...] | None, where: str
) -> None:
    """Refuse numbers that are not probabilities, and name the row and the likely reason."""

    def describe_row(row: int) -> str:
        return f"{where}, row {ids[row] if ids is not None else row}"

    if is_clean(probs):
        return
    bad = ~np.isfinite(probs)
    if bad.any():
        member, row, column = np.argwhere(bad)[0]
        raise DataError(
            "a probability is not a number",
            where=f"{describe_row(row)}, class {names[column] if names else column}",
            got=probs[member, row, column],
        )
    off = find_unsuitable(probs)
    if off.any():
        member, row = np.argwhere(off)[0]
        what, got, fix = describe_unsuitable(probs, int(member), int(row), names)
        raise DataError(
            what, where=describe_row(row), expected="shares that sum to 1", got=got, fix=fix
        )
