"""Files of tables (CSV, parquet, JSON), read without trust and without pandas.

What the columns mean is not known here: `adapters` says that.
"""

from __future__ import annotations

import csv
import importlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from threefold.containers import WHOLE, limit
from threefold.errors import DataError

MAX_JSON: Final = 256 << 20
"""JSON is parsed whole and takes about ten times its size."""

_NUMBERS = ("float", "double", "halffloat", "int", "uint")
_TEXTS = ("string", "large_string", "dictionary", "list", "large_list", "fixed_size_list")
"""How Arrow's names of types begin."""


class Table(NamedTuple):
    """Columns of one file.

    Attributes:
        where: the file, for messages.
        text: cells of the columns that are not numbers, as text (lists where a cell holds several values).
        names: the q number columns, in the order of the file.
        numbers: (n, q) floats.
    """

    where: str
    text: dict[str, list[Any]]
    names: tuple[str, ...]
    numbers: np.ndarray


Chooser = Callable[[Sequence[str], str], Sequence[str]]
"""Given all column names and the file, the names of those that hold numbers; raises where it does not know the table."""


def check_names(names: Sequence[str], where: str | Path) -> None:
    """Column names as they must be.

    Raises:
        DataError: no names, one of them empty, or twice the same.
    """
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        mark = next(mark for mark in ";\t|" if mark in names[0])
        got = "tabs" if mark == "\t" else mark
        raise DataError(
            "the columns are not separated by commas",
            where=where,
            got=got,
            fix='to_csv(..., sep=",")',
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice and twice[0]:
        raise DataError("two columns have the same name", where=where, got=twice[0])
    if not names or "" in names:
        fix = "leave the row numbers out: to_csv(..., index=False)"
        raise DataError(
            "a column has no name",
            where=where,
            got=",".join(names)[:80] or "an empty line",
            fix=fix,
        )


def read_csv(path: Path, choose: Chooser) -> Table:
    """A CSV file: UTF-8 (with or without BOM), commas, a header, one cell per column in every row.

    Raises:
        DataError: not such a file, no rows, an empty cell, or text in a number column.
    """
    where = str(path)
    limit(path.stat().st_size, path)
    numbers = array("d")
    shared: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            check_names(header, path)
            names = tuple(choose(header, where))
            at = [header.index(name) for name in names]
            others = [i for i, name in enumerate(header) if name not in set(names)]
            text: list[list[str]] = [[] for _ in others]
            count = 0
            for row in reader:
                if not row:
                    continue  # an empty line, as at the end of many files
                count += 1
                if len(row) != len(header):
                    expected = f"{len(header)} cells as in the header"
                    raise DataError(
                        "a row has too many or too few cells",
                        where=f"{path} line {reader.line_num}",
                        expected=expected,
                        got=len(row),
                    )
                if "" in row:
                    raise DataError(
                        "a cell is empty",
                        where=f"{path} line {reader.line_num}",
                        got=f"column {header[row.index('')]}",
                    )
                for cells, i in zip(text, others, strict=True):
                    cells.append(shared.setdefault(row[i], row[i]))  # ids come back once per member
                try:
                    numbers.extend([float(row[i]) for i in at])
                except ValueError:
                    _refuse_text(row, header, at, f"{path} line {reader.line_num}")
    except UnicodeDecodeError as error:
        raise DataError(
            "the CSV file is not UTF-8",
            where=path,
            got=f"byte {error.object[error.start]:#x}",
            fix='to_csv(..., encoding="utf-8")',
        ) from None
    except (OSError, csv.Error) as error:
        raise DataError(
            "cannot read the CSV file", where=path, got=getattr(error, "strerror", "") or error
        ) from None
    if not count:
        raise DataError("the table has a header and no rows", where=path, fix=WHOLE)
    columns = {header[i]: cells for i, cells in zip(others, text, strict=True)}
    return Table(
        where, columns, names, np.frombuffer(numbers, np.float64).reshape(count, len(names))
    )


def _refuse_text(row: list[str], header: list[str], at: list[int], where: str) -> None:
    for i in at:
        try:
            float(row[i])
        except ValueError:
            comma = row[i].count(",") == 1 and row[i].replace(",", "").isdigit()
            fix = "write decimal points, not commas" if comma else ""
            raise DataError(
                "a number column holds text",
                where=f"{where}, column {header[i]}",
                expected="a probability",
                got=row[i][:60],
                fix=fix,
            ) from None


def read_parquet(path: Path, choose: Chooser) -> Table:
    """A parquet file as a table.

    Raises:
        DataError: pyarrow is not installed, the file is damaged or too large, has an empty cell, or columns that are
            neither text nor numbers.
    """
    parquet = pyarrow(".parquet")
    try:
        with parquet.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            check_names(header, path)
            names = tuple(choose(header, str(path)))
            rows = int(file.metadata.num_rows)
            limit(rows * len(header) * 8, path)
            limit(
                sum(
                    file.metadata.row_group(i).total_byte_size
                    for i in range(file.metadata.num_row_groups)
                ),
                path,
            )
            table = file.read()
        _refuse_cells(table, names, path)
        text = {name: _cells(table.column(name)) for name in header if name not in names}
        numbers = np.empty((rows, len(names)), np.float64)
        for i, name in enumerate(names):
            numbers[:, i] = table.column(name).to_numpy()
    except DataError:
        raise
    except (
        Exception
    ) as error:  # pyarrow raises errors of many types on damaged files, some only as cells are read
        raise DataError(
            "cannot read the parquet file", where=path, got=str(error)[:160], fix=WHOLE
        ) from None
    return Table(str(path), text, names, numbers)


def _refuse_cells(table: Any, names: Sequence[str], path: Path) -> None:
    """No rows, empty cells, and columns of types that are not expected."""
    if not table.num_rows:
        raise DataError("the table has a header and no rows", where=path, fix=WHOLE)
    for name in table.column_names:
        column, where = table.column(name), f"{path}, column {name}"
        kind = str(column.type)
        if column.null_count:
            raise DataError("a cell is empty", where=where, got=f"{column.null_count} empty cells")
        if name in names and not kind.startswith(_NUMBERS):
            raise DataError("a number column holds something else", where=where, got=kind)
        if name not in names and not kind.startswith((*_NUMBERS, *_TEXTS)):
            raise DataError("a column is neither text nor numbers", where=where, got=kind)


def _cells(column: Any) -> list[Any]:
    return [cell if isinstance(cell, list) else str(cell) for cell in column.to_pylist()]


def pyarrow(part: str = "") -> Any:
    """The pyarrow module, which is an extra of this package.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("pyarrow" + part)
    except ImportError:
        raise DataError(
            "parquet needs the package pyarrow", fix="pip install 'threefold[parquet]'"
        ) from None


def read_json(path: Path, choose: Chooser) -> Table:
    """A table in one of pandas' JSON forms: {name: row}, [row, ...] or {columns: [...], data: [[...], ...]}.

    In the first form the names of the rows become the column `filename`.

    Raises:
        DataError: not JSON, too large, another form, no rows, or rows that differ in their columns.
    """
    if path.stat().st_size > MAX_JSON:
        got = f"{path.stat().st_size >> 20} MiB"
        raise DataError(
            "the JSON file is too large",
            where=path,
            expected=f"at most {MAX_JSON >> 20} MiB",
            got=got,
            fix="save .csv or .parquet",
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise DataError("the JSON file names a thing twice", where=path, got=twice[0])
        return dict(pairs)

    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "cannot read the JSON file", where=path, got=str(error)[:160], fix=WHOLE
        ) from None
    rows = _rows(tree)
    if not rows:
        raise DataError("the JSON file is not a table", where=path, expected="rows with columns")
    header = list(rows[0])
    check_names(header, path)
    names = tuple(choose(header, str(path)))
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
            if (
                isinstance(row[name], bool)
                or not isinstance(row[name], int | float)
                or abs(row[name]) > 1e300
            ):
                raise DataError(
                    "a number column holds something else",
                    where=f"{path} row {i}, column {name}",
                    got=str(row[name])[:60],
                )
            numbers[i, j] = row[name]
    text = {
        name: [row[name] if isinstance(row[name], list) else str(row[name]) for row in rows]
        for name in header
        if name not in names
    }
    return Table(str(path), text, names, numbers)


def _rows(tree: Any) -> list[dict[str, Any]]:
    """The rows of any of the three forms; none where it is no table."""
    rows: Iterable[Any] = tree if isinstance(tree, list) else ()
    if (
        isinstance(tree, dict)
        and isinstance(tree.get("columns"), list)
        and isinstance(tree.get("data"), list)
    ):
        header = [str(name) for name in tree["columns"]]
        whole = all(isinstance(row, list) and len(row) == len(header) for row in tree["data"])
        rows = [dict(zip(header, row, strict=True)) for row in tree["data"]] if whole else ()
    elif isinstance(tree, dict) and all(isinstance(row, dict) for row in tree.values()):
        rows = [{"filename": name, **row} for name, row in tree.items()]
    rows = list(rows)
    return rows if all(isinstance(row, dict) for row in rows) else []
