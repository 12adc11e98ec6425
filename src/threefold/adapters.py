"""What other tools save, and what its columns and arrays mean; docs/formats.md has the lines that write it.

Tables: threefold's own columns (CSV or parquet), and timm's inference.py. Arrays: threefold's own names, Keras,
scikit-learn, fastai, Ultralytics. What cannot make an ensemble (the best few classes, scores without rows) is refused with
what to save instead.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from threefold.columns import Table
from threefold.errors import DataError
from threefold.parts import Parts
from threefold.predictions import read_provenance

COLUMNS: Final = ("id", "path", "label", "group", "fold", "roles", "member", "protocol", "kind")
"""Columns with a meaning of their own; every other column of a table is a class."""

ARRAYS: Final = (
    "probs",
    "labels",
    "ids",
    "paths",
    "classes",
    "members",
    "groups",
    "folds",
    "roles",
    "provenance",
)
"""Names of arrays in .npz and .pt files."""

FOREIGN: Final = ("predictions", "filenames", "class_indices", "classes_")
"""Names that Keras and scikit-learn use."""

_EXPECTED = "label (or path) [id] [group] [fold] [member] and one column per class"
_NO_CLASS = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
_TIMM = re.compile(r"(prob|logit|index)_\d+")
_TIMM_LISTS = ("prob", "logit", "index", "prob_0", "logit_0", "index_0", "label_0")
_TIMM_FIX = "run inference.py with --topk 0 --results-separate-col --fullname"
_ULTRALYTICS_FIX = (
    "save every class: numpy.savez(path, probs=[r.probs.data.cpu().numpy() for r in results], "
    "paths=[r.path for r in results], classes=list(model.names.values()))"
)


def is_no_class(name: str) -> bool:
    """Whether a column of this name cannot be a class: pandas' row numbers, or a column with a meaning of its own."""
    return name in COLUMNS or _NO_CLASS.fullmatch(name) is not None


# tables ---------------------------------------------------------------------------------------------------------------


def number_columns(header: Sequence[str], where: str) -> Sequence[str]:
    """The columns of a table that hold numbers.

    Raises:
        DataError: a table that threefold does not know, or that cannot make an ensemble.
    """
    columns = set(header)
    if {"name", "class", "confidence"} <= columns:
        raise DataError(
            "these are Ultralytics' best five classes",
            where=where,
            expected="every class of every image",
            got=", ".join(header)[:80],
            fix=_ULTRALYTICS_FIX,
        )
    if {"top1", "top5", "param_count"} <= columns:
        raise DataError(
            "these are scores of timm's validate.py and no predictions", where=where, fix=_TIMM_FIX
        )
    if _is_timm(columns):
        return [name for name in header if _TIMM.fullmatch(name)]
    if not columns & {"label", "path"}:
        near = [
            name
            for name in header
            if difflib.get_close_matches(name.strip().lower(), ("label", "path"), cutoff=0.8)
        ]
        got = ", ".join(header)[:80] + (f"; did you mean {near[0]}" if near else "")
        raise DataError(
            "the table has neither labels nor paths", where=where, expected=_EXPECTED, got=got
        )
    if "member" in columns and not columns & {"id", "path"}:
        raise DataError(
            "a table with a column member needs ids",
            where=where,
            expected=_EXPECTED,
            got=", ".join(header)[:80],
        )
    if {"id", "path"} <= columns:
        raise DataError("a table has id or path, not both", where=where, expected=_EXPECTED)
    numbered = next((name for name in header if name not in COLUMNS and is_no_class(name)), None)
    if numbered is not None:
        raise DataError(
            "a column holds row numbers", where=where, got=numbered, fix="to_csv(..., index=False)"
        )
    classes = [name for name in header if name not in COLUMNS]
    if len(classes) < 2:
        fix = "for a sigmoid p of two classes write a column 1 - p, too"
        raise DataError(
            "too few class columns",
            where=where,
            expected=_EXPECTED,
            got=", ".join(header)[:80],
            fix=fix,
        )
    return classes


def _is_timm(columns: set[str]) -> bool:
    return (
        "filename" in columns and not columns & {"id", "path"} and bool(columns & set(_TIMM_LISTS))
    )


def from_table(table: Table) -> list[Parts]:
    """What a table says, one for each member.

    Raises:
        DataError: cells contradict each other.
    """
    if _is_timm({*table.text, *table.names}):
        return [_from_timm(table)]
    names = table.text.get("member")
    if names is None:
        return [_own(table, slice(None), None)]
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return [_own(table, at, name) for name, at in rows.items()]


def _own(table: Table, rows: Any, member: str | None) -> Parts:
    """The rows of one member."""
    index = np.arange(len(table.numbers))[rows]
    text = {name: [cells[row] for row in index] for name, cells in table.text.items()}
    where = table.where + (f" member {member}" if member is not None else "")
    extra: dict[str, Any] = {
        name: _one(text[name], f"{where}, column {name}")
        for name in ("protocol", "kind")
        if name in text
    }
    if "group" in text:
        extra["groups"] = tuple(text["group"])
    if "fold" in text:
        extra["folds"] = _whole_numbers(text["fold"], f"{where}, column fold")
    if "roles" in text:
        if len({len(cell) for cell in text["roles"]}) > 1:
            raise DataError(
                "the cells of a column differ in length", where=f"{where}, column roles"
            )
        digits = _digits("".join(text["roles"]), f"{where}, column roles")
        extra["roles"] = digits.reshape(len(index), -1).T.astype(np.int8)
    members = (member,) if member is not None else None
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        probs = table.numbers[index].astype(np.float32)
    return Parts(
        where,
        probs,
        text.get("label"),
        text.get("id"),
        text.get("path"),
        table.names,
        members,
        extra=extra,
    )


def _one(cells: list[str], where: str) -> str:
    if len(set(cells)) > 1:
        raise DataError(
            "a column must say the same in all rows of a member",
            where=where,
            got=", ".join(sorted(set(cells))[:3]),
        )
    return cells[0]


def _whole_numbers(cells: Sequence[str], where: str) -> np.ndarray:
    bad = next((cell for cell in cells if not re.fullmatch(r"-?[0-9]{1,9}", cell)), None)
    if bad is not None:
        raise DataError("a cell is no whole number", where=where, got=bad[:40])
    return np.array([int(cell) for cell in cells], np.int64)


def _digits(text: str, where: str) -> np.ndarray:
    """Hexadecimal digits as numbers."""
    bad = re.search(r"[^0-9a-f]", text)
    if bad is not None:
        raise DataError("a cell is no row of digits", where=where, expected="0 to f", got=bad[0])
    return np.array([int(digit, 16) for digit in text], np.int64)


# timm -----------------------------------------------------------------------------------------------------------------


def _from_timm(table: Table) -> Parts:
    """timm's inference.py: `filename`, the outputs `prob` (one list) or `prob_0`, ..., and with --topk their `index` or
    `label`. Its labels are what the model answers, never the truth: that comes from the folders or from a table.
    """
    where = table.where
    numbers = {name: table.numbers[:, i] for i, name in enumerate(table.names)}
    if any(name.split("_")[0] == "logit" for name in (*table.text, *table.names)):
        raise DataError(
            "these are logits", where=where, fix="run inference.py without --output-type logit"
        )
    probs = _ranks(table, numbers, "prob")
    if probs is None:
        raise DataError(
            "the outputs are not in the file",
            where=where,
            expected="columns prob or prob_0, prob_1, ...",
            fix=_TIMM_FIX,
        )
    index, label = _ranks(table, numbers, "index"), _ranks(table, numbers, "label")
    k = probs.shape[1]
    if k == 1:
        raise DataError(
            "the file has the best class of each row",
            where=where,
            expected="every class",
            fix=_TIMM_FIX,
        )
    classes = None
    if index is None and label is None and (np.diff(probs, axis=1) <= 0).all():
        raise DataError(
            "the outputs of every row are sorted, so which class they are of is not known",
            where=where,
            fix=_TIMM_FIX,
        )
    if label is not None:
        first = list(dict.fromkeys(label.ravel().tolist()))
        classes = tuple(sorted(first)) if index is None else tuple(_by_number(index, label, where))
        rank = {name: i for i, name in enumerate(classes)}
        index = np.array([[rank.get(name, -1) for name in row] for row in label])
    if index is not None:
        if (np.sort(index, axis=1) != np.arange(k)).any():
            raise DataError(
                f"the file has the best {k} classes of each row",
                where=where,
                expected="every class",
                fix=_TIMM_FIX,
            )
        probs = np.take_along_axis(probs, np.argsort(index, axis=1), axis=1)
    return Parts(where, probs, paths=table.text["filename"], classes=classes, natural=True)


def _ranks(table: Table, numbers: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    """(n, q) values of the columns name_0, name_1, ..., or of the lists in one column."""
    columns = {**table.text, **numbers}
    if name in table.text:
        rows = [_list(cell, name) for cell in table.text[name]]
        if len({len(row) for row in rows}) > 1:
            raise DataError(
                "the lists of a column differ in length", where=f"{table.where}, column {name}"
            )
        values: list[Any] = rows
    else:
        found = [columns[f"{name}_{i}"] for i in range(len(columns)) if f"{name}_{i}" in columns]
        if not found:
            return None
        values = list(zip(*found, strict=True))
    if name == "label":
        return np.array([[str(cell) for cell in row] for row in values], dtype=np.str_)
    try:
        return np.array([[float(cell) for cell in row] for row in values], np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            "a cell is no list of numbers",
            where=f"{table.where}, column {name}",
            got=str(error)[:80],
        ) from None


def _list(cell: Any, name: str) -> list[Any]:
    """A list: of JSON or parquet, or as numpy prints one into a CSV cell."""
    if isinstance(cell, list):
        return cell
    inside = str(cell).strip().removeprefix("[").removesuffix("]")
    if name != "label":
        return inside.split()
    return [a or b for a, b in re.findall(r"""'([^']*)'|"([^"]*)\"""", inside)] or [str(cell)]


def _by_number(index: np.ndarray, label: np.ndarray, where: str) -> list[str]:
    """Class names in the order of their numbers."""
    named = dict(zip(index.ravel().astype(int).tolist(), label.ravel().tolist(), strict=True))
    names = [named[i] for i in sorted(named)]
    if len(set(names)) < len(names):
        raise DataError(
            "two classes have the same name",
            where=where,
            fix="run inference.py with --label-type name",
        )
    return names


# arrays ---------------------------------------------------------------------------------------------------------------


def from_arrays(arrays: dict[str, np.ndarray], where: str) -> Parts:
    """What the arrays of an .npz or a .pt say.

    Raises:
        DataError: the probabilities are missing, a name is misspelt, or it is not clear what a number means.
    """
    arrays = dict(arrays)
    if "class_indices" in arrays:
        arrays = _keras(arrays, where)
    if "classes_" in arrays:  # scikit-learn: labels are values of classes_
        names = _names(arrays.pop("classes_"))
        arrays["classes"] = np.array(names, dtype=np.str_)
        if "labels" in arrays:
            arrays["labels"] = np.array(_names(arrays["labels"]), dtype=np.str_)
    _refuse_misspelt(arrays, where)
    if "probs" not in arrays:
        raise DataError(
            "the probabilities are missing",
            where=where,
            expected="an array probs (n, k) or (m, n, k)",
            got=", ".join(arrays)[:80] or "no arrays",
            fix="save class_indices=list(data.class_indices), too"
            if {*FOREIGN} & {*arrays}
            else "",
        )
    labels = arrays.get("labels")
    texts = {
        name: tuple(_names(arrays[name]))
        for name in ("ids", "paths", "classes", "members", "groups")
        if name in arrays
    }
    _refuse_unclear(arrays, texts.get("classes", ()), where)
    extra: dict[str, Any] = {name: arrays[name] for name in ("folds", "roles") if name in arrays}
    if "groups" in texts:
        extra["groups"] = texts["groups"]
    return Parts(
        where,
        arrays["probs"],
        labels,
        texts.get("ids"),
        texts.get("paths"),
        texts.get("classes"),
        texts.get("members"),
        extra=extra | read_provenance(arrays.get("provenance"), where),
    )


def _keras(arrays: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """A generator's own names: `class_indices` in column order (or its dict as JSON), `classes` = number of each row."""
    given = arrays.pop("class_indices")
    names = _names(given)
    if given.ndim == 0:
        try:
            numbers = json.loads(str(given))
            names = sorted(numbers, key=numbers.__getitem__)
            usable = [numbers[name] for name in names] == list(range(len(names)))
        except (ValueError, TypeError, AttributeError):
            usable = False
        if not usable:
            raise DataError(
                "class_indices is not usable",
                where=where,
                expected="list(data.class_indices)",
                got=str(given)[:80],
            )
    if "classes" in arrays:
        arrays["labels"] = arrays.pop("classes")
    for theirs, ours in (("filenames", "paths"), ("predictions", "probs")):
        if theirs in arrays:
            arrays[ours] = arrays.pop(theirs)
    return arrays | {"classes": np.array(names, dtype=np.str_)}


def _names(values: np.ndarray) -> list[str]:
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    return [str(name) for name in np.atleast_1d(values).ravel().tolist()]


def _refuse_misspelt(arrays: dict[str, np.ndarray], where: str) -> None:
    """An unknown array is left alone, but not one that is nearly a known name: a lost `groups` would go unnoticed."""
    for name in arrays:
        near = difflib.get_close_matches(name.lower(), ARRAYS, 1, cutoff=0.8)
        if name not in ARRAYS and near:
            raise DataError("an array is misspelt", where=where, expected=near[0], got=name)


def _refuse_unclear(arrays: dict[str, np.ndarray], classes: tuple[str, ...], where: str) -> None:
    """Labels 1, 2 beside classes 1, 2: numbers of columns or names? Nobody can know."""
    numbers = all(
        name in arrays and arrays[name].dtype.kind in "iuf" for name in ("classes", "labels")
    )
    if numbers and classes != tuple(map(str, range(len(classes)))):
        raise DataError(
            "it is not clear whether labels are numbers of columns or of classes",
            where=where,
            expected="classes as text, or named classes_ as scikit-learn does",
            got=", ".join(classes)[:60],
        )
