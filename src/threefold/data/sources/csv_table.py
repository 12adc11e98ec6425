"""Images that a CSV file lists with their labels. Nothing here opens an image."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from threefold.data.sources.addresses import (
    check_address,
    is_address,
    list_files,
    name_address,
)
from threefold.data.sources.columns import (
    NO_NAMES,
    NamedColumns,
    check_fold_column,
    count_known,
    find_columns,
    note_columns,
    note_unread,
    require_columns,
)
from threefold.data.sources.folder import ListedImage, Listing
from threefold.data.sources.label_sets import (
    LabelCells,
    LabelSet,
    LabelSets,
    join_labels,
    read_label_sets,
)
from threefold.data.sources.one_hot import class_columns, one_hot_labels
from threefold.data.split_names import EXPECTED, PARTS, split_of
from threefold.errors import DataError, shorten
from threefold.files import read_text
from threefold.names import find_repeated, normalise_name

MAX_TABLE_BYTES = 1 << 30
"""Largest CSV file."""

SEPARATORS: Final = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
"""What can separate the cells of a table."""

_LONGEST_HEADER = 1 << 20


def list_csv(table: Path, named: NamedColumns = NO_NAMES) -> Listing:
    """List the rows `path,label[,group][,split]` of a CSV file (with a header).

    Cells are separated by commas, tabs, semicolons or vertical bars. Paths are relative to the
    file. Ids are the paths as POSIX, with `.` and `..` resolved. The columns of the path and the
    label can have other usual names (`columns`); capitals do not matter. Other columns are noted;
    those that seem to be a split, group or fold are refused.

    A name without its folder or its suffix, such as `image_id`, is looked for below the table's
    folder. In place of `label` there can be a column of 0 and 1 for each class, as in the files of
    ISIC. Where images have any number of labels (`named.task`), a row may have several 1 or none,
    and a cell of labels may name several or be empty.

    Args:
        table: the CSV file, in UTF-8, or in UTF-16 with its mark.
        named: the columns that the recipe names. Cells of the fold column are ignored in test rows.

    Raises:
        DataError: the file cannot be read or has no rows, columns or cells are missing, a path is
            repeated, does not exist or fits several files, or a row has several classes.
    """
    try:
        reader, header = _open_table(table)
        known = ("path", "label", "group", "split") if named.needs_label else ("path",)
        columns = find_columns(header, known, named, str(table))
        rows: dict[int, dict[str, str | None]] = {}
        for row in reader:
            rows[reader.line_num] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the CSV file", where=table, got=error) from None
    sets, classes = LabelSets([]), []
    if named.task == "multilabel":
        sets = _label_sets(rows, columns, header, named)
    elif named.needs_label:
        classes = _mark_one_hot(rows, columns, header, named.fold, table)
    found = columns | ({"label": "label"} if sets.note else {})
    require_columns(found, header, named, str(table), ", or a column of 0 and 1 for each class")
    check_fold_column(header, named.fold, str(table))
    if not rows:
        raise DataError(
            "the table has no rows", where=table, expected="a row for each image below the header"
        )
    _refuse_other_separator(rows, header, reader.reader.dialect.delimiter, table)
    labels: Sequence[LabelSet | None] = sets.sets or [None] * len(rows)
    items = [
        _parse_row(row, columns, table, line, named.fold, several)
        for (line, row), several in zip(rows.items(), labels, strict=True)
    ]
    repeated = find_repeated(item.id for item in items)
    if repeated:
        raise DataError("the CSV file repeats paths", where=table, got=shorten(repeated))
    paths = ((row[columns["path"]] or "").strip() for row in rows.values())
    addresses = {row: path for row, path in enumerate(paths) if is_address(path)}
    kind = "the CSV file"
    listing = list_files(items, addresses, table.parent, str(table), kind, named.try_again)
    notes = listing.notes
    notes += note_columns(columns)
    read = [*columns.values(), *classes, *sets.columns, named.fold]
    notes += note_unread(header, read, has_groups="group" in columns)
    if classes:
        notes.append(f"the classes are {len(classes)} columns of 0 and 1: {shorten(classes)}")
    notes += [sets.note] if sets.note else []
    return listing._replace(notes=notes, classes=sets.names)


def _open_table(table: Path) -> tuple[csv.DictReader[str], list[str]]:
    """Return a reader of the rows of a table, and the names of its columns.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is in another encoding.
        csv.Error: its quotes do not match.
    """
    text = read_text(table, MAX_TABLE_BYTES)
    stream = io.StringIO(text, newline="")
    reader = csv.DictReader(
        stream, skipinitialspace=True, strict=True, delimiter=_find_separator(text)
    )
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    return reader, header


def read_header(table: Path) -> list[str]:
    """Return the names of the columns of a CSV file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return _open_table(table)[1]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the CSV file", where=table, got=error) from None


def _find_separator(text: str) -> str:
    """Return the sign that separates the columns of the header.

    It gives the most columns with usual names, and else the most; a comma where there is none.
    """
    line = next((line for line in text[:_LONGEST_HEADER].splitlines() if line.strip()), "")
    headers = {sign: _split(line, sign) for sign in SEPARATORS}
    return max(SEPARATORS, key=lambda sign: (count_known(headers[sign]), len(headers[sign])))


def _split(line: str, sign: str) -> list[str]:
    """Return the cells of a line, in which a quoted cell may have the sign, too."""
    return next(csv.reader([line], delimiter=sign, skipinitialspace=True), [])


def _refuse_other_separator(
    rows: dict[int, dict[str, str | None]], header: list[str], sign: str, table: Path
) -> None:
    """Refuse a row whose cells are separated by another sign than those of the header."""
    for line, row in rows.items():
        cells = [cell for name, cell in row.items() if name is not None and cell is not None]
        if len(cells) != 1 or len(header) < 2:
            continue
        other = [o for o in SEPARATORS if o != sign and len(_split(cells[0], o)) == len(header)]
        if other:
            raise DataError(
                "the separators are mixed",
                where=f"{table} line {line}",
                expected=f"{SEPARATORS[sign]}, as in the header",
                got=SEPARATORS[other[0]],
            )


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
        columns: the known columns; `label` is added.
        header: names of all columns.
        fold_column: the column with the folds; empty = none.
        table: the file.

    Returns:
        The classes; none if the table is not of that kind.

    Raises:
        DataError: a row has several classes, or none.
    """
    if "label" in columns or "path" not in columns:
        return []
    cells = _free_columns(rows, columns, header, fold_column)
    classes = class_columns(cells)
    if classes:
        lines = [f"line {line}" for line in rows]
        labels = one_hot_labels(cells, classes, lines, str(table))
        for row, label in zip(rows.values(), labels, strict=True):
            row["label"] = label
        columns["label"] = "label"
    return classes


def _free_columns(
    rows: dict[int, dict[str, str | None]],
    columns: dict[str, str],
    header: list[str],
    fold_column: str,
) -> dict[str, list[str]]:
    """Return the cells of the columns that have no known meaning, by name."""
    read = {*columns.values(), fold_column}
    return {
        name: [(row[name] or "").strip() for row in rows.values()]
        for name in header
        if name not in read
    }


def _label_sets(
    rows: dict[int, dict[str, str | None]],
    columns: dict[str, str],
    header: list[str],
    named: NamedColumns,
) -> LabelSets:
    """Read any number of labels per row; empty if the table has no column of labels."""
    cells, others = _label_cells(rows, columns, header, named.fold)
    return read_label_sets(cells, others, named.separator) or LabelSets([])


def _label_cells(
    rows: dict[int, dict[str, str | None]],
    columns: dict[str, str],
    header: list[str],
    fold_column: str,
) -> tuple[list[str] | None, dict[str, list[str]]]:
    """Return the cells of the column of labels, and else the columns that can be labels."""
    if "label" in columns:
        return [(row[columns["label"]] or "").strip() for row in rows.values()], {}
    return None, _free_columns(rows, columns, header, fold_column)


def read_label_cells(table: Path, named: NamedColumns) -> LabelCells:
    """Read what can be the labels of a CSV file, without a look at its images.

    Raises:
        DataError: the file cannot be read, or two columns have one meaning.
    """
    try:
        reader, header = _open_table(table)
        columns = find_columns(header, ("path", "label", "group", "split"), named, str(table))
        rows = dict(enumerate(reader))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the CSV file", where=table, got=error) from None
    cells, others = _label_cells(rows, columns, header, named.fold)
    return LabelCells(cells, others, columns.get("label", ""))


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
    row: dict[str, str | None],
    columns: dict[str, str],
    table: Path,
    line: int,
    fold_column: str,
    labels: LabelSet | None = None,
) -> ListedImage:
    """Check a row; `labels` are given where it has any number of them."""
    # csv collects surplus cells under the key None, and fills missing cells with None.
    surplus = None in row
    cells = {name: (row[name] or "").strip() for name in row if name is not None}
    values = {meaning: cells[name] for meaning, name in columns.items()}
    split = split_of(values.get("split", "train"))
    required = [name for name in ("path", "label", "group") if name in values]
    if labels is not None:
        required = [name for name in required if name != "label"]
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
    if is_address(values["path"]):
        check_address(values["path"], f"{table} line {line}")
        name = name_address(values["path"])
        path = Path(name)
    else:
        name = Path(os.path.normpath(values["path"])).as_posix()
        path = _find_file(table.parent, name)
    return ListedImage(
        id=name,
        path=str(path),
        label=normalise_name(values.get("label", "")) if labels is None else join_labels(labels),
        part=part,
        group=values.get("group"),
        fold=fold,
        labels=labels,
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
