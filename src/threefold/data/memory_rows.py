"""What a program gives as images and labels, as rows: of a table, a list, or pairs.

Neither pandas nor polars is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from threefold.data.sources.columns import (
    NamedColumns,
    find_columns,
    find_fold_columns,
    has_usual_name,
    require_columns,
)
from threefold.data.sources.label_sets import LabelCells, seems_multilabel
from threefold.data.sources.npz_file import label_text, label_texts
from threefold.data.sources.one_hot import class_columns, marked_columns
from threefold.errors import DataError


class Rows(NamedTuple):
    """Rows to be stored."""

    images: list[Any]
    """Paths, encoded images, pixels, or PIL images."""
    labels: list[str]
    """Of one label per image, or of any number, separated by vertical bars."""
    others: dict[str, list[str]]
    """Cells of the columns group, split and fold, as far as there are any, and of columns without a
    usual name, one of which may name groups (`data.group_column`)."""
    column: str = "label"
    """Name of the column of labels: `labels` where images have any number of them."""


def is_table(data: Any) -> bool:
    """Whether data are a table of pandas, polars or pyarrow, or a dict of columns."""
    return isinstance(data, Mapping) or hasattr(data, "columns") or hasattr(data, "column_names")


def as_array(data: Any) -> np.ndarray | None:
    """Return an array or a tensor as an array; None for anything else."""
    if isinstance(data, Image.Image) or not hasattr(data, "__array__"):
        return None
    try:
        return np.asarray(data)
    except Exception as error:  # such as a tensor on another device
        raise DataError("cannot read the array", got=str(error).split("\n")[0][:200]) from None


def rows_of_table(data: Any, labels: Any) -> Rows:
    """Take from a table the columns that are used."""
    names = data if isinstance(data, Mapping) else getattr(data, "column_names", None)
    keys = {str(key): key for key in (data.columns if names is None else names)}
    where = "the table"
    named = NamedColumns(
        label=labels if isinstance(labels, str) else "",
        has_recipe=False,
        rename="rename a column; labels=NAME names the one of the labels",
    )
    known = ["path", "label", "group", "split"]
    if labels is not None and not isinstance(labels, str):
        known.remove("label")  # given labels take the place of a column
    header = [str(key) for key in (data.columns if names is None else names)]
    found = find_columns(header, known, named, where)
    folds = find_fold_columns([name for name in header if name not in found.values()])
    if len(folds) > 1:
        got = " and ".join(folds)
        raise DataError("two columns can be the fold", got=got, fix="rename or remove one of them")
    found |= dict.fromkeys(["fold"] if folds else [], "".join(folds))
    cells = {meaning: _cells(data, keys[name]) for meaning, name in found.items()}
    classes: Sequence[str] = ()
    if "label" in known and "label" not in found and "path" in found:
        rest = [name for name in header if name not in found.values()]
        marks = {name: [_cell_text(cell) for cell in _cells(data, keys[name])] for name in rest}
        classes = class_columns(marks)
        if classes:
            cells["label"] = list(marked_columns(marks, classes))
    elif "label" not in known:
        cells["label"] = _list_of(labels)
    require_columns({name: name for name in cells}, header, named, where)
    images = cells["path"]
    texts, column = read_labels(cells["label"], len(images), found.get("label", "label"))
    others: dict[str, list[str]] = {}
    for name in ("group", "split", "fold"):
        if name in cells:
            others[name] = [_cell_text(cell) for cell in cells[name]]
    used = {*found.values(), *classes}
    for name in header:
        if name not in used and name.strip() and not has_usual_name(name):
            texts_of_column = _plain_texts(data[keys[name]])
            if len(texts_of_column) == len(images):
                others[name] = texts_of_column
    return Rows(images, texts, others, column)


def _plain_texts(column: Any) -> list[str]:
    """Return the cells of a column as texts; none if it has others, such as images, or is none."""
    try:
        cells = _list_of(column)
    except DataError:  # a dict may hold other things beside its columns
        return []
    if not all(_is_missing(cell) or isinstance(cell, str | int | float) for cell in cells):
        return []
    return [_cell_text(cell) for cell in cells]


def _cells(data: Any, key: Any) -> list[Any]:
    """Return a column as a list."""
    return _list_of(data[key])


def _list_of(values: Any) -> list[Any]:
    """Return a column, an array or any sequence as a list."""
    for name in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, name):
            listed = getattr(values, name)()
            return listed if isinstance(listed, list) else [listed]
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise DataError("not a sequence", got=f"{type(values).__name__} {values!r}"[:100])
    return list(values)


def _cell_text(cell: Any) -> str:
    """Return a cell as text; empty if it is missing, and whole numbers alike in every type."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if _is_missing(cell) or cell != cell else str(cell).strip()


def _is_missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ in ("NAType", "NaTType")


def rows_of_list(data: Any, labels: Any) -> Rows:
    """Take a sequence of images and their labels, or of pairs of both."""
    images = list(data) if isinstance(data, np.ndarray) else _list_of(data)
    if labels is None and images and all(_is_pair(item) for item in images):
        images, labels = [item[0] for item in images], [item[1] for item in images]
    texts, column = read_labels(labels, len(images))
    return Rows(images, texts, {}, column)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2


def read_labels(labels: Any, number: int, name: str = "label") -> tuple[list[str], str]:
    """Return the labels as texts, and the name of their column.

    Args:
        labels: one for each image, or any number for each.
        number: of images.
        name: of the column that they are from.

    Raises:
        DataError: there are not as many as images.
    """
    if labels is None or isinstance(labels, str):
        raise DataError(
            "the images have no labels",
            expected="one label for each image",
            got="a text" if labels is not None else "None",
            fix="give them, too: labels=LABELS in threefold.fit, the second argument elsewhere",
        )
    array = as_array(labels)
    values: Any = _list_of(labels) if array is None else array
    sets = _label_sets(values)
    column = "label"
    if sets is not None:
        texts, column = [_join(labels) for labels in sets], "labels"
    elif isinstance(values, np.ndarray):
        texts = label_texts(values, "labels")
    elif values and isinstance(values[0], list | tuple | np.ndarray):
        texts = label_texts(np.array([np.asarray(v).tolist() for v in values]), "labels")
    else:
        cells = [_cell_text(value) for value in values]
        can_be_empty = seems_multilabel(LabelCells(cells, {}, name)) is not None
        column = "labels" if can_be_empty else "label"
        texts = [
            "" if can_be_empty and not cell else label_text(value, f"labels, row {row}")
            for row, (value, cell) in enumerate(zip(values, cells, strict=True))
        ]
    if len(texts) != number or not number:
        raise DataError(
            "images and labels differ in number" if number else "there are no images",
            got=f"{number} images, {len(texts)} labels",
        )
    return texts, column


def _label_sets(values: Any) -> list[list[str]] | None:
    """Return any number of labels for each image as texts; None where each has one.

    They are lists of labels, or 0 and 1 for each of k labels, which are then numbered.
    """
    if isinstance(values, np.ndarray):
        is_table = values.ndim == 2 and values.shape[1] > 1 and values.dtype.kind in "biuf"
        if not is_table or not values.size or not np.isin(values, (0, 1)).all():
            return None
        rows: list[list[Any]] = [np.flatnonzero(row).tolist() for row in values]
    elif values and all(isinstance(v, list | tuple | set | frozenset | np.ndarray) for v in values):
        lists = [v.tolist() if isinstance(v, np.ndarray) else list(v) for v in values]
        numbers = [item for row in lists for item in row]
        if len(set(map(len, lists))) == 1 and len(lists[0]) > 1 and set(numbers) <= {0, 1}:
            return _label_sets(np.array(lists))
        rows = [
            sorted(row, key=str) if isinstance(v, set | frozenset) else row
            for row, v in zip(lists, values, strict=True)
        ]
    else:
        return None
    sets = [
        [label_text(label, f"labels, row {row}") for label in labels]
        for row, labels in enumerate(rows)
    ]
    return None if all(len(labels) == 1 for labels in sets) else sets


def _join(labels: Sequence[str]) -> str:
    """Return the labels of an image as one text.

    Raises:
        DataError: a label has the sign that separates them.
    """
    wrong = [label for label in labels if "|" in label]
    if wrong:
        raise DataError("the name of a label has a vertical bar", got=wrong[0], fix="rename it")
    return "|".join(labels)


# What is written
