"""Interpret the columns and arrays that other tools save.

Tables: threefold's own columns (CSV or parquet) and timm's inference.py. Arrays: threefold's own
names, Keras, scikit-learn, fastai and Ultralytics; docs/formats.md shows how to save them. Files
without the probabilities of every class are refused, and the message says what to save instead.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from threefold.errors import DataError
from threefold.predictions.label_table import is_clear_id_name, is_id_name
from threefold.predictions.labels import FileContent
from threefold.predictions.member_probs import parse_provenance
from threefold.predictions.tables import Table

COLUMNS: Final = ("id", "path", "label", "group", "fold", "roles", "member", "protocol", "kind")
"""Columns with a fixed meaning; every other column of a table is a class."""

ANSWER: Final = ("prediction", "confidence")
"""Columns of `threefold predict --csv` that the probabilities imply; not classes if both exist."""

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
"""Names of arrays that Keras and scikit-learn use."""

_EXPECTED_COLUMNS = "label (or path) [id] [group] [fold] [member] and one column per class"
_ROW_NUMBERS = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
_TIMM = re.compile(r"(prob|logit|index)_\d+")
_TIMM_LISTS = ("prob", "logit", "index", "prob_0", "logit_0", "index_0", "label_0")
_TIMM_FIX = "run inference.py with --topk 0 --results-separate-col --fullname"
_ULTRALYTICS_FIX = (
    "save every class: numpy.savez(path, probs=[r.probs.data.cpu().numpy() for r in results], "
    "paths=[r.path for r in results], classes=list(model.names.values()))"
)


def is_reserved_column(name: str) -> bool:
    """Whether a column cannot be a class: it has a fixed meaning, or holds pandas' row numbers."""
    return name.strip().lower() in COLUMNS or _ROW_NUMBERS.fullmatch(name) is not None


def known_columns(header: Sequence[str]) -> dict[str, str]:
    """The columns with a fixed meaning, and the name in COLUMNS that each stands for.

    `Label` stands for `label` where there is no such column. In a table without `id` and `path`, a
    column such as `image_id` or `filename` is the id, and so is a first column called `image`.
    """
    known = {name: name for name in header if name in COLUMNS}
    for name in header:
        meaning = name.strip().lower()
        if name not in known and meaning in COLUMNS and meaning not in known.values():
            known[name] = meaning
    if set(ANSWER) <= set(header):
        known |= {name: name for name in ANSWER}
    if {"id", "path"}.isdisjoint(known.values()):
        clear = [name for name in header if is_clear_id_name(name)]
        # A class can be called `file` or `key`: such a name is the id's in the first column only.
        first = [name for name in header[:1] if name not in known and is_id_name(name)]
        for name in (clear or first)[:1]:
            known[name] = "id"
    return known


def number_columns(header: Sequence[str], where: str, has_labels: bool = False) -> Sequence[str]:
    """The columns of a table that hold numbers.

    Args:
        header: names of all columns.
        where: the file, for messages.
        has_labels: whether labels come from elsewhere, so that the table needs none.

    Raises:
        DataError: the table is of an unknown kind, or cannot be used for an ensemble.
    """
    columns = set(header)
    shown = ", ".join(header)[:80]
    if {"name", "class", "confidence"} <= columns:
        raise DataError(
            "these are Ultralytics' best five classes",
            where=where,
            expected="every class of every image",
            got=shown,
            fix=_ULTRALYTICS_FIX,
        )
    if {"top1", "top5", "param_count"} <= columns:
        raise DataError(
            "these are scores of timm's validate.py, not predictions", where=where, fix=_TIMM_FIX
        )
    if _is_timm(columns):
        return [name for name in header if _TIMM.fullmatch(name)]
    known = known_columns(header)
    columns |= set(known.values())
    if not columns & {"label", "path"} and not (has_labels and "id" in columns):
        for name in header:
            if difflib.get_close_matches(name.strip().lower(), ("label", "path"), cutoff=0.8):
                shown += f"; did you mean {name}"
                break
        raise DataError(
            "the table has neither labels nor paths",
            where=where,
            expected=_EXPECTED_COLUMNS,
            got=shown,
            fix="add a column label, or give a table of id and label as --labels (labels=)",
        )
    if "member" in columns and not columns & {"id", "path"}:
        raise DataError(
            "a table with a column member needs ids",
            where=where,
            expected=_EXPECTED_COLUMNS,
            got=shown,
        )
    if {"id", "path"} <= columns:
        raise DataError("a table has id or path, not both", where=where, expected=_EXPECTED_COLUMNS)
    for name in header:
        if _ROW_NUMBERS.fullmatch(name):
            raise DataError(
                "a column holds row numbers", where=where, got=name, fix="to_csv(..., index=False)"
            )
    classes = [name for name in header if name not in known]
    if len(classes) < 2:
        raise DataError(
            "too few class columns",
            where=where,
            expected=_EXPECTED_COLUMNS,
            got=shown,
            fix="for a sigmoid p of two classes write a column 1 - p, too"
            if classes
            else "give probabilities, one column per class; answers alone cannot be combined",
        )
    return classes


def _is_timm(columns: set[str]) -> bool:
    if "filename" not in columns or columns & {"id", "path"}:
        return False
    return not columns.isdisjoint(_TIMM_LISTS)


def from_table(table: Table) -> list[FileContent]:
    """The content of a table, one for each member.

    Raises:
        DataError: cells contradict each other.
    """
    if _is_timm({*table.text, *table.names}):
        return [_from_timm(table)]
    known = known_columns(list(table.text))
    # What is neither a class nor known by its name alone was taken for the id by its place.
    text = {known.get(name, "id"): cells for name, cells in table.text.items()}
    table = replace(table, text=text)
    members = table.text.get("member")
    if members is None:
        return [_member_content(table, range(len(table.numbers)), None)]
    rows_of: dict[str, list[int]] = {}
    for row, member in enumerate(members):
        rows_of.setdefault(member, []).append(row)
    return [_member_content(table, rows, member) for member, rows in rows_of.items()]


def _member_content(table: Table, rows: Sequence[int], member: str | None) -> FileContent:
    """The content of the rows of one member; all rows if the table has no member column."""
    text = {name: [cells[row] for row in rows] for name, cells in table.text.items()}
    where = table.where if member is None else f"{table.where} member {member}"
    extra: dict[str, Any] = {}
    for name in ("protocol", "kind"):
        if name in text:
            values = sorted(set(text[name]))
            if len(values) > 1:
                raise DataError(
                    "a column must be the same in all rows of a member",
                    where=f"{where}, column {name}",
                    got=", ".join(values[:3]),
                )
            extra[name] = values[0]
    if "group" in text:
        extra["groups"] = tuple(text["group"])
    if "fold" in text:
        extra["folds"] = _parse_integers(text["fold"], f"{where}, column fold")
    if "roles" in text:
        extra["roles"] = _parse_roles(text["roles"], f"{where}, column roles")
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, then refused
        probs = table.numbers[np.asarray(rows)].astype(np.float32)
    return FileContent(
        where=where,
        probs=probs,
        labels=text.get("label"),
        ids=text.get("id"),
        paths=text.get("path"),
        classes=table.names,
        members=None if member is None else (member,),
        extra=extra,
    )


def _parse_integers(cells: Sequence[str], where: str) -> np.ndarray:
    for cell in cells:
        if not re.fullmatch(r"-?[0-9]{1,9}", cell):
            raise DataError("a cell is not a whole number", where=where, got=cell[:40])
    return np.array([int(cell) for cell in cells], np.int64)


def _parse_roles(cells: Sequence[str], where: str) -> np.ndarray:
    """Roles (folds, n) from cells with one hexadecimal digit for each fold."""
    if len({len(cell) for cell in cells}) > 1:
        raise DataError("the cells of a column differ in length", where=where)
    bad = re.search(r"[^0-9a-f]", "".join(cells))
    if bad is not None:
        raise DataError(
            "a cell does not consist of digits", where=where, expected="0 to f", got=bad[0]
        )
    roles = np.array([[int(digit, 16) for digit in cell] for cell in cells], np.int8)
    return roles.T


def _from_timm(table: Table) -> FileContent:
    """The content of a file of timm's inference.py.

    Its columns are `filename`; the outputs, as lists in `prob` or as `prob_0`, `prob_1`, ...; and,
    with --topk, their `index` or `label`. A label is the model's answer, never the true label:
    that comes from the folders or from a table.
    """
    where = table.where
    if any(name.split("_")[0] == "logit" for name in (*table.text, *table.names)):
        raise DataError(
            "these are logits", where=where, fix="run inference.py without --output-type logit"
        )
    prob_cells = _list_cells(table, "prob")
    if prob_cells is None:
        raise DataError(
            "the outputs are not in the file",
            where=where,
            expected="columns prob or prob_0, prob_1, ...",
            fix=_TIMM_FIX,
        )
    probs = _parse_numbers(prob_cells, f"{where}, column prob")
    label_cells, index_cells = _list_cells(table, "label"), _list_cells(table, "index")
    k = probs.shape[1]
    if k == 1:
        raise DataError(
            "the file has only the best class of each row",
            where=where,
            expected="every class",
            fix=_TIMM_FIX,
        )
    index = None
    if index_cells is not None:
        index = _parse_numbers(index_cells, f"{where}, column index")
    elif label_cells is None and (np.diff(probs, axis=1) <= 0).all():
        raise DataError(
            "the outputs of every row are sorted, so their classes are not known",
            where=where,
            fix=_TIMM_FIX,
        )
    classes = None
    if label_cells is not None:
        label = np.array([[str(cell) for cell in row] for row in label_cells], dtype=np.str_)
        if index is None:
            classes = tuple(sorted(set(label.ravel().tolist())))
        else:
            classes = _classes_by_number(index, label, where)
        number_of = {name: i for i, name in enumerate(classes)}
        index = np.array([[number_of.get(name, -1) for name in row] for row in label])
    if index is not None:
        if (np.sort(index, axis=1) != np.arange(k)).any():
            raise DataError(
                f"the file has only the best {k} classes of each row",
                where=where,
                expected="every class",
                fix=_TIMM_FIX,
            )
        probs = np.take_along_axis(probs, np.argsort(index, axis=1), axis=1)
    return FileContent(
        where=where, probs=probs, paths=table.text["filename"], classes=classes, timm_order=True
    )


def _list_cells(table: Table, name: str) -> list[list[Any]] | None:
    """n lists of q values: from the lists in one column, or from columns name_0, name_1, ..."""
    if name in table.text:
        rows = [_parse_list(cell, name) for cell in table.text[name]]
        if len({len(row) for row in rows}) > 1:
            raise DataError(
                "the lists of a column differ in length", where=f"{table.where}, column {name}"
            )
        return rows
    columns: dict[str, Any] = dict(zip(table.names, table.numbers.T, strict=True)) | table.text
    numbered = [f"{name}_{i}" for i in range(len(columns)) if f"{name}_{i}" in columns]
    if not numbered:
        return None
    return [list(row) for row in zip(*(columns[name] for name in numbered), strict=True)]


def _parse_numbers(rows: list[list[Any]], where: str) -> np.ndarray:
    try:
        return np.array([[float(cell) for cell in row] for row in rows], np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            "a cell is not a list of numbers", where=where, got=str(error)[:80]
        ) from None


def _parse_list(cell: Any, name: str) -> list[Any]:
    """A list from JSON or parquet, or from the way numpy prints a list into a CSV cell."""
    if isinstance(cell, list):
        return cell
    inside = str(cell).strip().removeprefix("[").removesuffix("]")
    if name != "label":
        return inside.split()
    quoted = re.findall(r"""'([^']*)'|"([^"]*)\"""", inside)
    return [single or double for single, double in quoted] or [str(cell)]


def _classes_by_number(index: np.ndarray, label: np.ndarray, where: str) -> tuple[str, ...]:
    """Class names in the order of their numbers."""
    numbers = index.ravel().astype(int).tolist()
    name_of = dict(zip(numbers, label.ravel().tolist(), strict=True))
    names = tuple(name_of[number] for number in sorted(name_of))
    if len(set(names)) < len(names):
        raise DataError(
            "two classes have the same name",
            where=where,
            fix="run inference.py with --label-type name",
        )
    return names


def from_arrays(arrays: dict[str, np.ndarray], where: str) -> FileContent:
    """The content of the arrays of an .npz or a .pt file.

    Raises:
        DataError: the probabilities are missing, a name is misspelt, or a number is ambiguous.
    """
    arrays = dict(arrays)
    if "class_indices" in arrays:
        arrays = _rename_keras(arrays, where)
    if "classes_" in arrays:  # scikit-learn: labels are values of classes_
        names = _texts(arrays.pop("classes_"))
        arrays["classes"] = np.array(names, dtype=np.str_)
        if "labels" in arrays:
            arrays["labels"] = np.array(_texts(arrays["labels"]), dtype=np.str_)
    _refuse_misspelt(arrays, where)
    if "probs" not in arrays:
        is_foreign = not arrays.keys().isdisjoint(FOREIGN)
        raise DataError(
            "the probabilities are missing",
            where=where,
            expected="an array probs (n, k) or (m, n, k)",
            got=", ".join(arrays)[:80] or "no arrays",
            fix="save class_indices=list(data.class_indices), too" if is_foreign else "",
        )
    if not {"ids", "paths"} & arrays.keys():
        arrays |= _find_ids(arrays)
    text = {
        name: _texts(arrays[name])
        for name in ("ids", "paths", "classes", "members", "groups")
        if name in arrays
    }
    _refuse_ambiguous_labels(arrays, text.get("classes", ()), where)
    extra: dict[str, Any] = {name: arrays[name] for name in ("folds", "roles") if name in arrays}
    if "groups" in text:
        extra["groups"] = text["groups"]
    return FileContent(
        where=where,
        probs=arrays["probs"],
        labels=arrays.get("labels"),
        ids=text.get("ids"),
        paths=text.get("paths"),
        classes=text.get("classes"),
        members=text.get("members"),
        extra=extra | parse_provenance(arrays.get("provenance"), where),
    )


def _find_ids(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The array that names the rows under another name, as `ids`; empty if there is none."""
    n = arrays["probs"].shape[-2] if arrays["probs"].ndim > 1 else -1
    for name, values in arrays.items():
        is_candidate = name not in ARRAYS and is_id_name(name) and values.shape == (n,)
        if is_candidate and len(set(_texts(values))) == n:
            return {"ids": values}
    return {}


def _rename_keras(arrays: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Give the arrays of a Keras generator threefold's names.

    `class_indices` holds the class names in column order (or is the generator's dict as JSON), and
    `classes` the class number of each row.
    """
    class_indices = arrays.pop("class_indices")
    names: Sequence[str] | None = _texts(class_indices)
    if class_indices.ndim == 0:
        names = _parse_class_indices(str(class_indices))
        if names is None:
            raise DataError(
                "class_indices is not usable",
                where=where,
                expected="list(data.class_indices)",
                got=str(class_indices)[:80],
            )
    if "classes" in arrays:
        arrays["labels"] = arrays.pop("classes")
    if "filenames" in arrays:
        arrays["paths"] = arrays.pop("filenames")
    if "predictions" in arrays:
        arrays["probs"] = arrays.pop("predictions")
    return arrays | {"classes": np.array(names, dtype=np.str_)}


def _parse_class_indices(text: str) -> list[str] | None:
    """Class names in column order from a dict as JSON; None if it does not number them 0 to k-1."""
    try:
        numbers = json.loads(text)
        names = sorted(numbers, key=numbers.__getitem__)
        is_complete = [numbers[name] for name in names] == list(range(len(names)))
    except (ValueError, TypeError, AttributeError):
        return None
    return names if is_complete else None


def _texts(values: np.ndarray) -> tuple[str, ...]:
    """The values of an array as text."""
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    return tuple(str(name) for name in np.atleast_1d(values).ravel().tolist())


def _refuse_misspelt(arrays: dict[str, np.ndarray], where: str) -> None:
    """Refuse a name close to a known one, so that `group` for `groups` is not silently ignored.

    Other unknown arrays are ignored.
    """
    for name in arrays:
        near = difflib.get_close_matches(name.lower(), ARRAYS, 1, cutoff=0.8)
        if name not in ARRAYS and near:
            raise DataError("an array is misspelt", where=where, expected=near[0], got=name)


def _refuse_ambiguous_labels(
    arrays: dict[str, np.ndarray], classes: tuple[str, ...], where: str
) -> None:
    """Refuse labels 1, 2 with classes 1, 2: they could be column numbers or names."""
    all_numbers = all(
        name in arrays and arrays[name].dtype.kind in "iuf" for name in ("classes", "labels")
    )
    if all_numbers and classes != tuple(map(str, range(len(classes)))):
        raise DataError(
            "it is not clear whether labels are numbers of columns or of classes",
            where=where,
            expected="classes as text, or named classes_ as in scikit-learn",
            got=", ".join(classes)[:60],
        )
