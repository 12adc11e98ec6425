"""Read predictions from any known format; write .npz, .csv and .parquet.

docs/formats.md describes the conventions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import DataError
from threefold.files import read_text, write_bytes
from threefold.predictions.adapters import (
    ARRAYS,
    from_arrays,
    from_table,
    is_reserved_column,
    number_columns,
)
from threefold.predictions.array_files import detect_format, npz_dtypes, read_npy, read_npz, read_pt
from threefold.predictions.join import join_predictions
from threefold.predictions.label_table import LabelTable
from threefold.predictions.labels import FileContent, LabelSource, build_predictions
from threefold.predictions.member_probs import wrong_task
from threefold.predictions.multilabel import is_multilabel_file
from threefold.predictions.predictions import Predictions
from threefold.predictions.tables import import_pyarrow, read_csv, read_json, read_parquet

Classes = Sequence[str] | str | Path

MAX_CLASSES_BYTES = 1 << 26
"""Largest text file of class names."""


def read_predictions(
    source: str | Path, *, labels: str | Path | None = None, classes: Classes | None = None
) -> Predictions:
    """Read predictions of one or more members: .npz, .npy, .csv, .parquet, .json (timm) or .pt.

    The content of the file decides its format; a suffix that disagrees is an error. A single
    member without a name is named after the file.

    Args:
        source: the file.
        labels: for files without labels. A CSV or parquet file with `label` and a column of ids,
            which is found by its content; only a table without one is matched by order. Or
            "folder", which takes each row's label from the class folder in its id.
        classes: names of the columns, for files without them. A sequence, or a text file with one
            name a line.

    Raises:
        DataError: the file is missing, damaged or of unknown format, or its content cannot be used.
    """
    path = Path(source)
    format_name = detect_format(path)
    if is_multilabel_file(path):
        raise wrong_task("multilabel", path)
    label_source = _label_source(labels)
    names = _class_names(classes)
    if format_name == "npz" and label_source is None and names is None:
        dtypes = npz_dtypes(path)
        if _can_load_directly(dtypes):
            predictions = Predictions.load(path)
            return predictions if "members" in dtypes else _name_member(predictions, path)
    contents = _read_content(path, format_name, has_labels=label_source is not None)
    members = [build_predictions(content, label_source, names) for content in contents]
    try:
        predictions = join_predictions(members)
    except DataError as error:
        raise DataError("the members do not fit together", where=path, got=error) from None
    return predictions if contents[0].members is not None else _name_member(predictions, path)


def _name_member(predictions: Predictions, path: Path) -> Predictions:
    """A single member takes the name of its file."""
    if len(predictions.members) > 1:
        return predictions
    return replace(predictions, members=(path.stem,))


def _can_load_directly(dtypes: dict[str, np.dtype[Any]]) -> bool:
    """Whether `Predictions.load` can read an .npz: labels are numbers, classes text, no paths."""
    return (
        dtypes.get("classes", np.dtype(np.str_)).kind == "U"
        and dtypes.get("labels", np.dtype(np.str_)).kind in "iu"
        and dtypes.keys() <= {*ARRAYS} - {"paths"}
    )


def _read_content(path: Path, format_name: str, has_labels: bool) -> list[FileContent]:
    where = str(path)
    if format_name == "npz":
        return [from_arrays(read_npz(path), where)]
    if format_name == "pt":
        return [from_arrays(read_pt(path), where)]
    if format_name == "npy":
        return [from_arrays({"probs": read_npy(path)}, where)]
    read_table = {"csv": read_csv, "parquet": read_parquet, "json": read_json}[format_name]
    return from_table(read_table(path, partial(number_columns, has_labels=has_labels)))


def _label_source(labels: str | Path | None) -> LabelSource:
    """The table of labels, read."""
    if labels is None:
        return None
    if labels == "folder":
        return "folder"
    path = Path(labels)
    format_name = detect_format(path)
    if format_name not in ("csv", "parquet"):
        raise DataError(
            "labels must be a table", where=path, expected=".csv or .parquet", got=format_name
        )
    read_table = read_csv if format_name == "csv" else read_parquet
    table = read_table(path, _no_number_columns)
    return LabelTable.from_columns(table.text, str(path))


def _no_number_columns(_: Sequence[str], __: str) -> Sequence[str]:
    """All columns of a table of labels are text."""
    return []


def _class_names(classes: Classes | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if not isinstance(classes, str | Path):
        return tuple(map(str, classes))
    try:
        names = read_text(Path(classes), MAX_CLASSES_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "cannot read the class names",
            where=classes,
            expected="a text file, one name a line",
            got=getattr(error, "strerror", "") or "not UTF-8",
        ) from None
    return tuple(name for name in names if name)


def write_predictions(predictions: Predictions, path: str | Path) -> None:
    """Write .npz, .csv or .parquet atomically; `read_predictions` returns the same predictions.

    Tables have one row per id and member. CSV has 9 digits, which restore the same float32.

    Raises:
        DataError: the suffix is unknown, or a table cannot hold one of the names.
        RunError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        predictions.save(path)
    elif suffix == ".csv":
        _check_names(predictions, path)
        write_bytes(path, _to_csv(predictions))
    elif suffix == ".parquet":
        _check_names(predictions, path)
        write_bytes(path, _to_parquet(predictions))
    else:
        raise DataError(
            "unknown format",
            where=path,
            expected=".npz, .csv or .parquet",
            got=suffix or "no suffix",
        )


def _check_names(predictions: Predictions, path: Path) -> None:
    """Refuse names that a table cannot hold."""
    for name in predictions.classes:
        if is_reserved_column(name):
            raise DataError(
                "a class has the name of a column",
                where=path,
                got=name or "an empty name",
                fix="write .npz",
            )
    groups = predictions.groups or ()
    for name in (*predictions.ids, *predictions.members, *groups, *predictions.classes):
        has_surrogate = any("\ud800" <= letter <= "\udfff" for letter in name)
        if not name or "\0" in name or has_surrogate:
            raise DataError(
                "a name cannot be written to a table", where=path, got=f"{name!a}", fix="write .npz"
            )


def _text_columns(predictions: Predictions, member: int) -> dict[str, Any]:
    """The columns of one member that come before its probabilities."""
    n = len(predictions)
    columns: dict[str, Any] = {
        "id": predictions.ids,
        "label": [predictions.classes[label] for label in predictions.labels],
    }
    if predictions.groups is not None:
        columns["group"] = predictions.groups
    if predictions.folds is not None:
        columns["fold"] = predictions.folds.tolist()
    if predictions.roles is not None:  # one hexadecimal digit for each fold
        columns["roles"] = [
            "".join(f"{role:x}" for role in roles) for roles in predictions.roles.T.tolist()
        ]
    columns["member"] = [predictions.members[member]] * n
    if (predictions.protocol, predictions.kind) != ("honest", "foreign"):
        columns["protocol"] = [predictions.protocol] * n
        columns["kind"] = [predictions.kind] * n
    return columns


def _to_csv(predictions: Predictions) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    for member, probs in enumerate(predictions.probs):
        columns = _text_columns(predictions, member)
        if member == 0:
            writer.writerow([*columns, *predictions.classes])
        for cells, values in zip(zip(*columns.values(), strict=True), probs.tolist(), strict=True):
            writer.writerow([*cells, *(f"{value:.9g}" for value in values)])
    return stream.getvalue().encode()


def _to_parquet(predictions: Predictions) -> bytes:
    arrow, parquet = import_pyarrow(), import_pyarrow(".parquet")
    tables = []
    for member, probs in enumerate(predictions.probs):
        columns = _text_columns(predictions, member)
        columns |= zip(predictions.classes, np.ascontiguousarray(probs.T), strict=True)
        tables.append(arrow.table(columns))
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.concat_tables(tables), sink)
    return bytes(sink.getvalue())
