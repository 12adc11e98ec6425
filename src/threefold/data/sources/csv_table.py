"""Images that a CSV file lists with their labels. Nothing here opens an image."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from pathlib import Path

from threefold.data.sources.columns import check_fold_column, find_columns, note_unread
from threefold.data.sources.folder import ListedImage, Listing, find_absent
from threefold.data.sources.one_hot import class_columns, one_hot_labels
from threefold.data.split_names import EXPECTED, PARTS, split_of
from threefold.data.walk import is_image, list_entries
from threefold.errors import DataError, shorten
from threefold.files import read_text
from threefold.names import find_repeated, normalise_name

MAX_TABLE_BYTES = 1 << 30
"""Largest CSV file."""


def list_csv(table: Path, fold_column: str = "") -> Listing:
    """List the rows `path,label[,group][,split]` of a CSV file (with a header).

    Paths are relative to the CSV file. Ids are the paths as POSIX, with `.` and `..` resolved.
    Capitals in the names of columns do not matter. Other columns are noted; those that seem to be
    a split, group or fold are refused.

    In place of `label` there can be a column of 0 and 1 for each class, as in the files of ISIC,
    and in place of `path` a column `image`: names without suffix of files beside the table or in a
    folder there.

    Args:
        table: the CSV file, in UTF-8, or in UTF-16 with its mark.
        fold_column: the column with the fold of each training row; empty = none. Its cells in test
            rows are ignored.

    Raises:
        DataError: the file cannot be read, columns or cells are missing, a path is repeated or
            does not exist, or a row has several classes.
    """
    try:
        stream = io.StringIO(read_text(table, MAX_TABLE_BYTES), newline="")
        reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        columns = find_columns(header, ("path", "label", "group", "split"), fold_column, str(table))
        rows: dict[int, dict[str, str | None]] = {}
        for row in reader:
            rows[reader.line_num] = row
        classes = _mark_one_hot(rows, columns, header, fold_column, table)
        _require_columns(columns, header, table)
        check_fold_column(header, fold_column, str(table))
        items = [_parse_row(row, columns, table, line, fold_column) for line, row in rows.items()]
        if classes:
            items = _find_by_stem(items, table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the CSV file", where=table, got=error) from None
    repeated, absent = find_repeated(item.id for item in items), find_absent(items)
    if repeated:
        raise DataError("the CSV file repeats paths", where=table, got=shorten(repeated))
    if absent:
        what = f"{len(absent)} files of the CSV file do not exist"
        raise DataError(what, where=table, got=shorten(absent))
    notes = note_unread(header, [*columns.values(), *classes, fold_column])
    if classes:
        notes.append(f"the classes are {len(classes)} columns of 0 and 1: {shorten(classes)}")
    return Listing(items, notes)


def _mark_one_hot(
    rows: dict[int, dict[str, str | None]],
    columns: dict[str, str],
    header: list[str],
    fold_column: str,
    table: Path,
) -> list[str]:
    """Add a cell `label` to the rows of a table with one column per class.

    Args:
        rows: by line; changed where the table is of that kind.
        columns: the known columns; `label` and `path` are added.
        header: names of all columns.
        fold_column: the column with the folds; empty = none.
        table: the file.

    Returns:
        The classes; none if the table is not of that kind.

    Raises:
        DataError: a row has several classes, or none.
    """
    image = columns.get("path") or next((name for name in header if name.lower() == "image"), "")
    if "label" in columns or not image:
        return []
    read = {*columns.values(), image, fold_column}
    cells = {
        name: [(row[name] or "").strip() for row in rows.values()]
        for name in header
        if name not in read
    }
    classes = class_columns(cells)
    if classes:
        lines = [f"line {line}" for line in rows]
        labels = one_hot_labels(cells, classes, lines, str(table))
        for row, label in zip(rows.values(), labels, strict=True):
            row["label"] = label
        columns |= {"path": image, "label": "label"}
    return classes


def _find_by_stem(items: list[ListedImage], table: Path) -> list[ListedImage]:
    """Find the files of names without suffix: beside the table, or in a folder there.

    Raises:
        DataError: a name fits several files.
    """
    if not find_absent(items):
        return items
    folders, files = list_entries(table.parent)
    for folder in folders:
        files += list_entries(folder)[1]
    found: dict[str, list[Path]] = {}
    for path in filter(is_image, files):
        found.setdefault(path.stem, []).append(path)
    located = []
    for item in items:
        paths = found.get(item.id, [])
        if not os.path.isfile(item.path) and len(paths) > 1:
            raise DataError(
                "a name in the CSV file fits several images",
                where=f"{table}: {item.id}",
                got=shorten(path.relative_to(table.parent).as_posix() for path in paths),
                fix="give paths with folder and suffix, in a column path",
            )
        is_new = not os.path.isfile(item.path) and paths
        located.append(item._replace(path=paths[0]) if is_new else item)
    return located


def _require_columns(columns: dict[str, str], header: list[str], table: Path) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise DataError(
            f"the CSV file has no column {' and '.join(missing)}",
            where=table,
            expected="path,label[,group][,split], or path (or image) and a column of 0 and 1 for "
            "each class",
            got=",".join(header) or "an empty file",
        )


def parse_fold(cell: object, fold_column: str, where: str) -> str:
    """Return the name of the fold in a table's cell; whole numbers read alike in every type.

    Raises:
        DataError: the cell is empty.
    """
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas stores whole numbers as floats in a column with gaps
    name = "" if cell is None or cell != cell else str(cell).strip()
    if not name:
        raise DataError(
            f"an empty cell in the fold column {fold_column}",
            where=where,
            expected="a fold for every training row",
            fix="fill the cell, or set split = test for rows of the test part",
        )
    return name


def _parse_row(
    row: dict[str, str | None], columns: dict[str, str], table: Path, line: int, fold_column: str
) -> ListedImage:
    # csv collects surplus cells under the key None, and fills missing cells with None.
    surplus = None in row
    cells = {name: (row[name] or "").strip() for name in row if name is not None}
    values = {meaning: cells[name] for meaning, name in columns.items()}
    split = split_of(values.get("split", "train"))
    required = [name for name in ("path", "label", "group") if name in values]
    if surplus or split is None or not all(values[name] for name in required):
        expected = f"{len(cells)} cells, {', '.join(required)} not empty"
        raise DataError(
            "the CSV file has an invalid row",
            where=f"{table} line {line}",
            expected=f"{expected}, split one of {EXPECTED}",
            got=",".join(cells.values()) + (" and surplus cells" if surplus else ""),
        )
    part, fold = PARTS[split], None
    if fold_column and part == "train":
        fold = parse_fold(cells[fold_column], fold_column, f"{table} line {line}")
    name = Path(os.path.normpath(values["path"])).as_posix()
    return ListedImage(
        id=name,
        path=_find_file(table.parent, name),
        label=normalise_name(values["label"]),
        part=part,
        group=values.get("group"),
        fold=fold,
    )


def _find_file(folder: Path, name: str) -> Path:
    """Return the path of a file, whose accents macOS may write in another form than the table."""
    for form in (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))):
        try:
            if (folder / form).exists():
                return folder / form
        except (OSError, ValueError):  # no file can have such a name
            break
    return folder / name
