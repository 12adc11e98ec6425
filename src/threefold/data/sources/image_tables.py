"""Arrow tables of images: rows of parquet files or of a data set of the hub, with their labels.

The images themselves stay where they are and are read one by one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.data.sources.addresses import check_address, is_address, list_files, name_address
from threefold.data.sources.columns import (
    NamedColumns,
    check_fold_column,
    note_columns,
    note_unread,
    require_columns,
)
from threefold.data.sources.csv_table import parse_fold
from threefold.data.sources.folder import EncodedImages, ListedImage, Listing, read_file
from threefold.data.sources.label_sets import (
    LabelCells,
    LabelSet,
    LabelSets,
    join_labels,
    read_label_sets,
)
from threefold.data.split_names import EXPECTED, PARTS, split_of
from threefold.errors import DataError, MissingImageError, shorten
from threefold.extras import install_command
from threefold.names import find_repeated, normalise_name

_PLAIN = ("bool", "int", "uint", "float", "double", "halffloat", "string", "large_string")
"""Beginnings of the types of columns that can hold 0 and 1."""


class ImageTable(NamedTuple):
    """The rows of a file or of a split."""

    name: str
    """The file or split, for messages."""
    part: str
    """`train` or `test`, for rows without a `split` cell."""
    rows: Any
    """Arrow table of all columns but that of the images, which it may have, too."""
    columns: dict[str, str]
    """The table's own names of path, label, id, group and split, as far as it has them."""
    image: str
    """The column of encoded images; empty = files or addresses that `path` names."""
    label_names: list[str] | None
    """Names of whole-number labels."""
    header: Sequence[str]
    """Names of all columns."""
    read: Callable[[int], bytes] | None = None
    """Returns the encoded image of a row; None where `image` is empty."""
    identify: Callable[[int], bytes] | None = None
    """Returns what changes when the image of a row may have changed; None = unknown."""


def import_optional(name: str, extra: str) -> Any:
    """Import a package; a DataError names the extra that has it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        what = f"the package {name.partition('.')[0]} is not installed"
        raise DataError(what, fix=install_command(extra)) from None


def list_tables(tables: list[ImageTable], folder: Path | None, named: NamedColumns) -> Listing:
    """List the rows of all tables.

    Args:
        tables: files or splits.
        folder: what paths are relative to; None for tables that the hub's library has written.
        named: the columns that the recipe names.
    """
    starts: list[int] = []
    items: list[ListedImage] = []
    addresses: dict[int, str] = {}
    sets = _label_sets(tables, named)
    for table in tables:
        starts.append(len(items))
        items += _list_rows(table, len(items), folder, named, sets, addresses)
    where = shorten(table.name for table in tables)
    first = tables[0]
    notes = note_columns(first.columns)
    known = [*first.columns.values(), first.image, named.fold, *sets.columns]
    notes += note_unread(first.header, known, has_groups="group" in first.columns)
    notes += [sets.note] if sets.note else []
    if len({not table.image for table in tables}) > 1:
        raise DataError("some files hold images and others name them", got=where)
    if find_repeated(item.id for item in items):
        raise DataError("ids are not unique", where=where)
    if not first.image:
        assert folder is not None  # tables of the hub hold images
        listing = list_files(items, addresses, folder, where, "the table", named.try_again)
        return listing._replace(notes=notes + listing.notes, classes=sets.names)

    def read(row: int) -> bytes:
        at = int(np.searchsorted(starts, row, side="right")) - 1
        read_row = tables[at].read
        assert read_row is not None
        return read_row(row - starts[at])

    def identify(row: int) -> bytes:
        at = int(np.searchsorted(starts, row, side="right")) - 1
        identify_row = tables[at].identify
        return b"" if identify_row is None else identify_row(row - starts[at])

    label_names = next((table.label_names for table in tables if table.label_names), [])
    labels = {label for item in items for label in item.labels or (item.label,)}
    classes = sets.names
    if not classes and labels - {""} <= set(label_names):
        classes = tuple(name for name in label_names if name in labels)
    return Listing(items, notes, classes, EncodedImages(read, np.arange(len(items)), identify))


def _label_sets(tables: Sequence[ImageTable], named: NamedColumns) -> LabelSets:
    """Read any number of labels per row of all tables; empty for one label, or without labels."""
    if named.task != "multilabel":
        return LabelSets([])
    cells, others, _ = label_cells(tables, named)
    return read_label_sets(cells, others, named.separator) or LabelSets([])


def label_cells(tables: Sequence[ImageTable], named: NamedColumns) -> LabelCells:
    """Read what can be the labels of all tables."""
    if all("label" in table.columns for table in tables):
        listed = [cell for table in tables for cell in _texts_of_labels(table)]
        return LabelCells(listed, {}, tables[0].columns["label"])
    columns: dict[str, list[str]] = {}
    for number, table in enumerate(tables):
        read = {*table.columns.values(), table.image, named.fold}
        for name in table.rows.column_names:
            if name in read or not str(table.rows.schema.field(name).type).startswith(_PLAIN):
                continue
            texts = map(_cell_text, table.rows.column(name).to_pylist())
            if not number or name in columns:
                columns.setdefault(name, []).extend(texts)
    count = sum(table.rows.num_rows for table in tables)
    return LabelCells(None, {name: c for name, c in columns.items() if len(c) == count})


def _texts_of_labels(table: ImageTable) -> list[str | LabelSet]:
    """Return the cells of a table's column of labels: texts, or lists of labels."""
    cells = table.rows.column(table.columns["label"]).to_pylist()
    if table.label_names is None and not any(isinstance(cell, list) for cell in cells):
        return [_cell_text(cell) for cell in cells]
    lists = [cell if isinstance(cell, list) or cell is None else [cell] for cell in cells]
    return [_parse_labels(cell, table, row) for row, cell in enumerate(lists)]


def _cell_text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _parse_labels(cell: Any, table: ImageTable, row: int) -> LabelSet:
    """Return the labels of a cell that is a list."""
    where = f"{table.name} row {row}"
    values = [value for value in cell or [] if value is not None]
    labels = [normalise_name(_parse_label(value, table.label_names, where)) for value in values]
    return tuple(dict.fromkeys(labels))


def _list_rows(
    table: ImageTable,
    start: int,
    folder: Path | None,
    named: NamedColumns,
    sets: LabelSets,
    addresses: dict[int, str],
) -> Iterator[ListedImage]:
    """List the rows of one table, which begin at row `start` of all tables.

    Paths that are addresses are added to `addresses`, by row.
    """
    found = {"path": table.image, **table.columns} if table.image else dict(table.columns)
    found |= {"label": "label"} if sets.note else {}
    require_columns(found, table.header, named, table.name)
    columns = {
        meaning: table.rows.column(name).to_pylist()
        for meaning, name in table.columns.items()
        if meaning != "label" or not sets.note
    }
    folds: list[Any] | None = None
    fold_column = named.fold
    if fold_column in table.rows.column_names:
        folds = table.rows.column(fold_column).to_pylist()
    for row in range(table.rows.num_rows):
        cells = {name: column[row] for name, column in columns.items()}
        where = f"{table.name} row {row}"
        split = split_of(str(cells.get("split", table.part)))
        if split is None or any(cell is None for cell in cells.values()):
            raise DataError(
                "the table has an invalid row",
                where=where,
                expected=f"no empty cell, split one of {EXPECTED}",
                got=", ".join(f"{name} {value}" for name, value in cells.items()),
            )
        fold = None
        if fold_column and PARTS[split] == "train":
            check_fold_column(table.rows.column_names, fold_column, table.name)
            fold = parse_fold(folds[row] if folds else None, fold_column, where)
        path = str(cells.get("path", ""))
        if not table.image and is_address(path):
            addresses[start + row] = path
            check_address(path, where)
            path = name_address(path)
        image_id = str(cells.get("id", path or f"{PARTS[split]}/{start + row:07d}"))
        has_file = path and not table.image and start + row not in addresses
        labels = sets.sets[start + row] if sets.note else None
        if labels is None:
            label = ""
            if named.needs_label:
                label = normalise_name(_parse_label(cells["label"], table.label_names, where))
        else:
            label = join_labels(labels)
        yield ListedImage(
            id=image_id,
            path=str(folder / path) if folder and has_file else image_id,
            label=label,
            part=PARTS[split],
            group=str(cells["group"]) if "group" in cells else None,
            row=start + row,
            fold=fold,
            labels=labels,
        )


def _parse_label(value: object, label_names: list[str] | None, where: str) -> str:
    """The class name of a label cell."""
    if isinstance(value, int) and not isinstance(value, bool):
        if label_names is None:
            return str(value)
        if not 0 <= value < len(label_names):
            expected = f"0 to {len(label_names) - 1}"
            raise DataError("a label has no name", where=where, expected=expected, got=value)
        return label_names[value]
    if not isinstance(value, str) or not value.strip():
        what = "a label is neither text nor a whole number"
        raise DataError(what, where=where, got=repr(value))
    return value.strip()


def encoded_image(cell: Any, where: str, may_open: bool) -> bytes:
    """Return the image file in a cell.

    Args:
        cell: bytes, or the hub's struct of bytes and path.
        where: the row, for messages.
        may_open: whether the path may be opened; only for tables that the hub's library wrote, so
            that a parquet file cannot name any file of this machine.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    if content is None and path and may_open:
        return read_file(Path(path))
    if not isinstance(content, bytes):
        got = type(content).__name__
        raise MissingImageError("the cell has no image", where=where, expected="bytes", got=got)
    return content
