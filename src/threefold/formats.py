"""Files of predictions: read whatever threefold knows, write .npz, .csv and .parquet. docs/formats.md has the conventions."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from threefold.adapters import ARRAYS, from_arrays, from_table, is_no_class, number_columns
from threefold.columns import Table, pyarrow, read_csv, read_json, read_parquet
from threefold.containers import content_of, npz_headers, read_npy, read_npz, read_pt
from threefold.errors import DataError
from threefold.files import write_bytes
from threefold.joining import join_predictions
from threefold.parts import Parts, Truth, assemble
from threefold.predictions import Predictions

Classes = Sequence[str] | str | Path


def read_predictions(
    source: str | Path, *, labels: str | Path | None = None, classes: Classes | None = None
) -> Predictions:
    """Read predictions of one or more members from a file: .npz, .npy, .csv, .parquet, .json (timm) or .pt.

    The content decides what it is; a name that says otherwise is an error. A single member without a name is called
    as the file is.

    Args:
        source: the file.
        labels: where the file has none: a CSV file with `label`, and `id` (or `path`) unless its rows are in the
            file's order; or "folder", which takes each row's label from the class folder in its id.
        classes: names of the columns where the file has none: a sequence, or a text file with one name a line.

    Raises:
        DataError: the file is missing, damaged or not known, or what it says cannot be used.
    """
    path = Path(source)
    content = content_of(path)
    truth = _truth(labels)
    names = _class_names(classes)
    if (
        content == "npz"
        and truth is None
        and names is None
        and _is_plain(headers := npz_headers(path))
    ):
        found = Predictions.load(path)  # threefold's own file, or one with the same arrays
        named = "members" in headers
    else:
        parts = _parts(path, content)
        named = parts[0].members is not None
        members = [assemble(part, truth, names) for part in parts]
        try:
            found = join_predictions(members)
        except DataError as error:
            raise DataError("the members do not fit together", where=path, got=error) from None
    return found if named or len(found.members) > 1 else replace(found, members=(path.stem,))


def _is_plain(headers: dict[str, np.dtype[Any]]) -> bool:
    """Whether an .npz has numbers as labels, text as classes, and no array that needs more than Predictions.load."""
    text = headers.get("classes", np.dtype(np.str_)).kind == "U"
    return (
        text
        and headers.get("labels", np.dtype("U")).kind in "iu"
        and headers.keys() <= {*ARRAYS} - {"paths"}
    )


def _parts(path: Path, content: str) -> list[Parts]:
    where = str(path)
    if content == "npz":
        return [from_arrays(read_npz(path), where)]
    if content == "pt":
        return [from_arrays(read_pt(path), where)]
    if content == "npy":
        return [from_arrays({"probs": read_npy(path)}, where)]
    read = {"csv": read_csv, "parquet": read_parquet, "json": read_json}[content]
    return from_table(read(path, number_columns))


def _truth(labels: str | Path | None) -> Truth | Literal["folder"] | None:
    """The table of labels."""
    if labels is None or labels == "folder":
        return None if labels is None else "folder"

    def choose(header: Sequence[str], where: str) -> Sequence[str]:
        if "label" not in header:
            raise DataError(
                "the table of labels has no column label",
                where=where,
                expected="id,label",
                got=", ".join(header)[:80],
            )
        return []

    path = Path(labels)
    content = content_of(path)
    if content not in ("csv", "parquet"):
        raise DataError(
            "labels must be a table", where=path, expected=".csv or .parquet", got=content
        )
    table: Table = (read_csv if content == "csv" else read_parquet)(path, choose)
    return Truth(
        str(path),
        table.text.get("id", table.text.get("path")),
        table.text["label"],
        table.text.get("group"),
    )


def _class_names(classes: Classes | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if not isinstance(classes, str | Path):
        return tuple(map(str, classes))
    try:
        names = Path(classes).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        got = getattr(error, "strerror", "") or "not UTF-8"
        raise DataError(
            "cannot read the class names",
            where=classes,
            expected="a text file, one name a line",
            got=got,
        ) from None
    return tuple(name for name in names if name)


# writing --------------------------------------------------------------------------------------------------------------


def write_predictions(rows: Predictions, path: str | Path) -> None:
    """Write .npz, .csv or .parquet, whole or not at all; `read_predictions` gives back the same.

    Tables have one row per id and member. Probabilities are written with 9 digits in CSV, which give the same float32.

    Raises:
        DataError: another suffix, or a name that a table cannot hold.
        RunError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        rows.save(path)
    elif suffix in (".csv", ".parquet"):
        _check_names(rows, path)
        write_bytes(path, (_csv if suffix == ".csv" else _parquet)(rows, path))
    else:
        raise DataError(
            "unknown format",
            where=path,
            expected=".npz, .csv or .parquet",
            got=suffix or "no suffix",
        )


def _check_names(rows: Predictions, path: Path) -> None:
    taken = next((name for name in rows.classes if is_no_class(name)), None)
    if taken is not None:
        raise DataError(
            "a class has the name of a column",
            where=path,
            got=taken or "an empty name",
            fix="write .npz",
        )
    every = [*rows.ids, *rows.members, *(rows.groups or ()), *rows.classes]
    bad = next((name for name in every if not name or "\0" in name or _is_broken(name)), None)
    if bad is not None:
        raise DataError(
            "a name cannot be written to a table", where=path, got=f"{bad!a}", fix="write .npz"
        )


def _is_broken(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _columns(rows: Predictions, member: int) -> dict[str, Any]:
    """The columns of one member before its probabilities."""
    n = len(rows)
    columns: dict[str, Any] = {
        "id": rows.ids,
        "label": [rows.classes[label] for label in rows.labels],
    }
    if rows.groups is not None:
        columns["group"] = rows.groups
    if rows.folds is not None:
        columns["fold"] = rows.folds.tolist()
    roles = getattr(rows, "roles", None)
    if roles is not None:
        columns["roles"] = [
            "".join(f"{role:x}" for role in of_row) for of_row in roles.T.tolist()
        ]  # a digit, 0 to f, for each fold
    columns["member"] = [rows.members[member]] * n
    if (rows.protocol, rows.kind) != ("honest", "foreign"):
        columns |= {"protocol": [rows.protocol] * n, "kind": [rows.kind] * n}
    return columns


def _csv(rows: Predictions, path: Path) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    line = ",".join(["%.9g"] * len(rows.classes))
    for member, probs in enumerate(rows.probs):
        columns = _columns(rows, member)
        if not member:
            writer.writerow([*columns, *rows.classes])
        for cells, values in zip(zip(*columns.values(), strict=True), probs.tolist(), strict=True):
            writer.writerow([*cells, *(line % tuple(values)).split(",")])
    return stream.getvalue().encode()


def _parquet(rows: Predictions, path: Path) -> bytes:
    arrow, parquet = pyarrow(), pyarrow(".parquet")
    tables = [
        arrow.table(
            {
                **_columns(rows, member),
                **dict(zip(rows.classes, np.ascontiguousarray(probs.T), strict=True)),
            }
        )
        for member, probs in enumerate(rows.probs)
    ]
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.concat_tables(tables), sink)
    return bytes(sink.getvalue())
