"""Read untrusted tables (CSV, parquet, JSON) without pandas.

`adapters` knows what the columns mean.
"""

from __future__ import annotations

import csv
import importlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from threefold.errors import DataError
from threefold.extras import install_command
from threefold.names import find_repeated
from threefold.predictions.array_files import COPY_FIX, check_size

MAX_JSON: Final = 256 << 20
"""Largest JSON file in bytes. It is parsed at once and takes about ten times its size."""

_NUMBERS = ("float", "double", "halffloat", "int", "uint")
_TEXTS = ("string", "large_string", "dictionary", "list", "large_list", "fixed_size_list")
"""Prefixes of the names of Arrow types."""


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of one file.

    Attributes:
        where: the file, for messages.
        text: cells of the columns that are not numbers, as text or, for several values, as lists.
        names: names of the q number columns, in the order of the file.
        numbers: (n, q) floats.
    """

    where: str
    text: dict[str, list[Any]]
    names: tuple[str, ...]
    numbers: np.ndarray


NumberColumns = Callable[[Sequence[str], str], Sequence[str]]
"""Maps all column names and the file to the names of the number columns; refuses unknown tables."""


def check_names(names: Sequence[str], where: str | Path) -> None:
    """Check that every column has a name of its own.

    Raises:
        DataError: there are no names, one is empty, or two are the same.
    """
    separators = [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]
    if separators:
        raise DataError(
            "the columns are not separated by commas",
            where=where,
            got="tabs" if separators[0] == "\t" else separators[0],
            fix='to_csv(..., sep=",")',
        )
    repeated = find_repeated(names)
    if repeated and repeated[0]:
        raise DataError("two columns have the same name", where=where, got=repeated[0])
    if not names or "" in names:
        raise DataError(
            "a column has no name",
            where=where,
            got=",".join(names)[:80] or "an empty line",
            fix="leave the row numbers out: to_csv(..., index=False)",
        )


def read_csv(path: Path, number_columns: NumberColumns) -> Table:
    """Read a CSV file: UTF-8 (with or without BOM), commas, a header, no empty cells.

    Raises:
        DataError: the file is not like that, has no rows, or has text in a number column.
    """
    check_size(path.stat().st_size, path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return _parse_csv(csv.reader(stream, strict=True), path, number_columns)
    except UnicodeDecodeError as error:
        raise DataError(
            "the CSV file is not UTF-8",
            where=path,
            got=f"byte {error.object[error.start]:#x}",
            fix='to_csv(..., encoding="utf-8")',
        ) from None
    except (OSError, csv.Error) as error:
        raise DataError("cannot read the CSV file", where=path, got=error) from None


def _parse_csv(reader: Any, path: Path, number_columns: NumberColumns) -> Table:
    header: list[str] = next(reader, [])
    check_names(header, path)
    names = tuple(number_columns(header, str(path)))
    position_of = {name: i for i, name in enumerate(header)}
    number_positions = [position_of[name] for name in names]
    is_number = set(names)
    text: dict[str, list[Any]] = {name: [] for name in header if name not in is_number}
    text_positions = [position_of[name] for name in text]
    numbers = array("d")
    shared: dict[str, str] = {}  # one copy of each text: every member repeats the ids
    count = 0
    for row in reader:
        if not row:
            continue  # many files end in an empty line
        count += 1
        where = f"{path} line {reader.line_num}"
        if len(row) != len(header):
            raise DataError(
                "a row has too many or too few cells",
                where=where,
                expected=f"{len(header)} cells as in the header",
                got=len(row),
            )
        if "" in row:
            raise DataError("a cell is empty", where=where, got=f"column {header[row.index('')]}")
        for cells, i in zip(text.values(), text_positions, strict=True):
            cells.append(shared.setdefault(row[i], row[i]))
        try:
            numbers.extend([float(row[i]) for i in number_positions])
        except ValueError:
            raise _text_in_number_column(row, header, number_positions, where) from None
    if not count:
        raise DataError("the table has a header and no rows", where=path, fix=COPY_FIX)
    values = np.frombuffer(numbers, np.float64).reshape(count, len(names))
    return Table(where=str(path), text=text, names=names, numbers=values)


def _text_in_number_column(
    row: list[str], header: list[str], positions: list[int], where: str
) -> DataError:
    """The error for a row that has text in a number column."""
    for i in positions:
        try:
            float(row[i])
        except ValueError:
            break
    has_comma = row[i].count(",") == 1 and row[i].replace(",", "").isdigit()
    return DataError(
        "a number column holds text",
        where=f"{where}, column {header[i]}",
        expected="a probability",
        got=row[i][:60],
        fix="write decimal points, not commas" if has_comma else "",
    )


def read_parquet(path: Path, number_columns: NumberColumns) -> Table:
    """Read a parquet file.

    Raises:
        DataError: pyarrow is not installed, the file is damaged or too large, a cell is empty, or a
            column holds neither text nor numbers.
    """
    parquet = import_pyarrow(".parquet")
    try:
        with parquet.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            check_names(header, path)
            names = tuple(number_columns(header, str(path)))
            rows = int(file.metadata.num_rows)
            check_size(rows * len(header) * 8, path)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            check_size(sum(group.total_byte_size for group in groups), path)
            table = file.read()
        _check_cells(table, names, path)
        is_number = set(names)
        text = {
            name: _as_text(table.column(name).to_pylist())
            for name in header
            if name not in is_number
        }
        numbers = np.empty((rows, len(names)), np.float64)
        for i, name in enumerate(names):
            numbers[:, i] = table.column(name).to_numpy()
    except DataError:
        raise
    except Exception as error:  # pyarrow raises many types, some only when cells are read
        raise DataError(
            "cannot read the parquet file", where=path, got=str(error)[:160], fix=COPY_FIX
        ) from None
    return Table(where=str(path), text=text, names=names, numbers=numbers)


def _check_cells(table: Any, names: Sequence[str], path: Path) -> None:
    """Refuse tables without rows, empty cells, and columns of unexpected types."""
    if not table.num_rows:
        raise DataError("the table has a header and no rows", where=path, fix=COPY_FIX)
    is_number = set(names)
    for name in table.column_names:
        column, where = table.column(name), f"{path}, column {name}"
        kind = str(column.type)
        if column.null_count:
            raise DataError("a cell is empty", where=where, got=f"{column.null_count} empty cells")
        if name in is_number and not kind.startswith(_NUMBERS):
            raise DataError("a number column holds something else", where=where, got=kind)
        if name not in is_number and not kind.startswith((*_NUMBERS, *_TEXTS)):
            raise DataError("a column is neither text nor numbers", where=where, got=kind)


def _as_text(cells: Iterable[Any]) -> list[Any]:
    """Cells as text; lists stay lists."""
    return [cell if isinstance(cell, list) else str(cell) for cell in cells]


def import_pyarrow(submodule: str = "") -> Any:
    """Import pyarrow, which is an extra of this package.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        return importlib.import_module("pyarrow" + submodule)
    except ImportError:
        raise DataError(
            "parquet needs the package pyarrow", fix=install_command("parquet")
        ) from None


def read_json(path: Path, number_columns: NumberColumns) -> Table:
    """Read a table in one of pandas' JSON forms.

    The forms are {name: row}, [row, ...] and {columns: [...], data: [[...], ...]}. In the first
    form the names of the rows become the column `filename`.

    Raises:
        DataError: the file is not JSON, too large or of another form, has no rows, or has rows that
            differ in their columns.
    """
    if path.stat().st_size > MAX_JSON:
        raise DataError(
            "the JSON file is too large",
            where=path,
            expected=f"at most {MAX_JSON >> 20} MiB",
            got=f"{path.stat().st_size >> 20} MiB",
            fix="save .csv or .parquet",
        )

    def refuse_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = find_repeated(name for name, _ in pairs)
        if repeated:
            raise DataError("the JSON file repeats a name", where=path, got=repeated[0])
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text, object_pairs_hook=refuse_repeated_names)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "cannot read the JSON file", where=path, got=str(error)[:160], fix=COPY_FIX
        ) from None
    rows = _json_rows(tree)
    if not rows:
        raise DataError("the JSON file is not a table", where=path, expected="rows with columns")
    header = list(rows[0])
    check_names(header, path)
    names = tuple(number_columns(header, str(path)))
    numbers = np.empty((len(rows), len(names)), np.float64)
    for i, row in enumerate(rows):
        if list(row) != header or None in row.values():
            raise DataError(
                "a row differs from the others or has an empty cell",
                where=f"{path} row {i}",
                expected=", ".join(header)[:80],
                got=", ".join(map(str, row.values()))[:80],
            )
        for j, name in enumerate(names):
            if not _is_number(row[name]):
                raise DataError(
                    "a number column holds something else",
                    where=f"{path} row {i}, column {name}",
                    got=str(row[name])[:60],
                )
            numbers[i, j] = row[name]
    is_number = set(names)
    columns = {
        name: _as_text(row[name] for row in rows) for name in header if name not in is_number
    }
    return Table(where=str(path), text=columns, names=names, numbers=numbers)


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that fits a float64."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not abs(value) > 1e300


def _json_rows(tree: Any) -> list[dict[str, Any]]:
    """The rows of a JSON tree in any of the three forms; empty if it is not a table."""
    rows: list[Any] = []
    if isinstance(tree, list):
        rows = tree
    elif isinstance(tree, dict):
        header, data = tree.get("columns"), tree.get("data")
        if isinstance(header, list) and isinstance(data, list):
            if all(isinstance(row, list) and len(row) == len(header) for row in data):
                rows = [dict(zip(map(str, header), row, strict=True)) for row in data]
        elif all(isinstance(row, dict) for row in tree.values()):
            rows = [{"filename": name, **row} for name, row in tree.items()]
    return rows if all(isinstance(row, dict) for row in rows) else []
