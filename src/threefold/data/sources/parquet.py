"""Images in parquet files, and data sets of the Hugging Face hub; both are Arrow tables.

Images stay encoded in the table (parquet: in memory, hub: in a memory-mapped file) and are decoded
one by one. pyarrow and datasets are optional and imported only when they are needed.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.data.sources.columns import check_fold_column, find_columns, note_unread
from threefold.data.sources.csv_table import parse_fold
from threefold.data.sources.folder import (
    EncodedImages,
    ListedImage,
    Listing,
    find_absent,
    read_file,
)
from threefold.data.split_names import EXPECTED, PARTS, split_of
from threefold.errors import DataError, shorten
from threefold.names import find_repeated, normalise_name

_IMAGE_COLUMNS = ("image", "img", "picture", "photo")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


class _Table(NamedTuple):
    """The rows of a file or of a split."""

    name: str
    """The file or split, for messages."""
    part: str
    """`train` or `test`, for rows without a `split` cell."""
    rows: Any
    """Arrow table."""
    label_names: list[str] | None
    """Names of whole-number labels."""


def _import_optional(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        what = f"the package {name.partition('.')[0]} is not installed"
        raise DataError(what, fix=f'pip install "threefold[{extra}]"') from None


def list_parquet(root: Path, fold_column: str = "") -> Listing:
    """List the rows of a parquet file, or of all .parquet files in a folder.

    Columns: `image` (bytes of an image file, or the hub's struct of bytes and path) or `path`
    (relative to the file); `label` (text or whole number); optionally `id`, `group` and `split`
    (train, val, test). Names of number labels are taken from the hub's metadata in the file.
    Without `split`, the beginning of the file's name decides.

    Args:
        root: a file or a folder.
        fold_column: the column with the fold of each training row; empty = none.

    Raises:
        DataError: pyarrow is not installed, a file cannot be read, columns or cells are missing,
            or ids repeat.
    """
    parquet = _import_optional("pyarrow.parquet", "parquet")
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    # Reading a pipe or a device could block for ever.
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError("there are no .parquet files", where=root)
    tables = []
    for file in files:
        try:
            rows = parquet.read_table(file)
        except Exception as error:  # pyarrow raises errors of many types on damaged files
            got = str(error)[:200]
            raise DataError("cannot read the parquet file", where=file, got=got) from None
        first_word = re.split(r"[^a-z]", file.stem.lower(), maxsplit=1)[0]
        part = PARTS[split_of(first_word) or "train"]
        tables.append(_Table(str(file), part, rows, label_names=_hub_label_names(rows)))
    return _list_tables(tables, root if root.is_dir() else root.parent, fold_column)


def _hub_label_names(rows: Any) -> list[str] | None:
    """Class names in the metadata that the hub's library writes, if there are any."""
    try:
        features = json.loads((rows.schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[_find_column(rows, _LABEL_COLUMNS)]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def list_huggingface(name: str, fold_column: str = "") -> Listing:
    """List a data set of the Hugging Face hub, or of a folder that its library reads.

    Code in the data set is never run. The image and the class label are used, and a column `group`
    if there is one. The validation split belongs to the training part.

    Args:
        name: `owner/name`, or `owner/name:configuration`.
        fold_column: the column with the fold of each training row; empty = none.

    Raises:
        DataError: datasets is not installed, the data set cannot be loaded, or it has no image or
            no label.
    """
    hub = _import_optional("datasets", "hf")
    path, _, configuration = name.partition(":")
    try:
        dataset = hub.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises errors of many types, for networks and files
        got = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise DataError("cannot load the data set", where=name, got=got) from None
    tables = [_hub_table(hub, name, split, dataset[split]) for split in dataset]
    return _list_tables(tables, None, fold_column)


def _hub_table(hub: Any, name: str, split: str, dataset: Any) -> _Table:
    """Give a split's image and label columns the names that `_list_tables` expects."""
    features = dataset.features
    images = [column for column in features if isinstance(features[column], hub.Image)]
    labels = [column for column in features if isinstance(features[column], hub.ClassLabel)]
    label = next((column for column in (*_LABEL_COLUMNS, *labels) if column in features), None)
    name_of_split = split_of(split)
    if len(images) != 1 or label is None or name_of_split is None:
        raise DataError(
            "the data set is not one image and one label per row",
            where=f"{name}, split {split}",
            expected=f"splits {EXPECTED}, one image feature, a label",
            got=", ".join(features),
        )
    new_names = {"image": "other image", "label": "other label"}
    new_names |= {images[0]: "image", label: "label"}
    columns = dataset.data.column_names
    rows = dataset.data.table.rename_columns([new_names.get(name, name) for name in columns])
    label_names = features[label].names if label in labels else None
    return _Table(split, PARTS[name_of_split], rows, label_names)


def _find_column(rows: Any, names: tuple[str, ...]) -> str:
    """The first of these columns that the table has, or an empty string."""
    return next((name for name in names if name in rows.column_names), "")


def _list_tables(tables: list[_Table], folder: Path | None, fold_column: str) -> Listing:
    """List the rows of all tables.

    Args:
        tables: files or splits.
        folder: what paths are relative to; None for tables that the hub's library has written.
        fold_column: the column with the fold of each training row; empty = none.
    """
    columns: list[Any] = []
    starts: list[int] = []
    items: list[ListedImage] = []
    for table in tables:
        image_column = _find_column(table.rows, _IMAGE_COLUMNS)
        columns.append(table.rows.column(image_column) if image_column else None)
        starts.append(len(items))
        items += _list_rows(table, bool(image_column), len(items), folder, fold_column)
    where = shorten(table.name for table in tables)
    notes = _note_unread(tables[0], fold_column, is_hub=folder is None)
    if len({column is None for column in columns}) > 1:
        raise DataError("some files hold images and others name them", got=where)
    if find_repeated(item.id for item in items):
        raise DataError("ids are not unique", where=where)
    if columns[0] is None:
        absent = find_absent(items)
        if absent:
            what = f"{len(absent)} files of the table do not exist"
            raise DataError(what, where=folder, got=shorten(absent))
        return Listing(items, notes)

    def read(row: int) -> bytes:
        at = int(np.searchsorted(starts, row, side="right")) - 1
        row_of_table = row - starts[at]
        cell = columns[at][row_of_table].as_py()
        where = f"{tables[at].name} row {row_of_table}"
        return _read_image(cell, where, may_open=folder is None)

    label_names = next((table.label_names for table in tables if table.label_names), [])
    labels = {item.label for item in items}
    classes: tuple[str, ...] = ()
    if labels <= set(label_names):
        classes = tuple(name for name in label_names if name in labels)
    return Listing(items, notes, classes, EncodedImages(read, np.arange(len(items))))


def _find_known(table: _Table, fold_column: str, is_hub: bool) -> dict[str, str]:
    """The table's names of the columns path, id, group and split, as far as it has them.

    Nobody can rename a column of the hub, so that a near miss is not refused there.
    """
    header, known = table.rows.column_names, ("path", "id", "group", "split")
    if is_hub:
        header = [name for name in header if name in known]
    return find_columns(header, known, fold_column, table.name)


def _note_unread(table: _Table, fold_column: str, is_hub: bool) -> list[str]:
    """A note of the columns that are not read."""
    known = _find_known(table, fold_column, is_hub).values()
    read = [_find_column(table.rows, names) for names in (_IMAGE_COLUMNS, _LABEL_COLUMNS)]
    return note_unread(table.rows.column_names, [*known, *read, fold_column])


def _list_rows(
    table: _Table, has_images: bool, start: int, folder: Path | None, fold_column: str
) -> Iterator[ListedImage]:
    """List the rows of one table, which begin at row `start` of all tables."""
    label_column = _find_column(table.rows, _LABEL_COLUMNS)
    known = _find_known(table, fold_column, is_hub=folder is None)
    if not label_column or not (has_images or "path" in known):
        raise DataError(
            "the table lacks required columns",
            where=table.name,
            expected="image or path, and label [id] [group] [split]",
            got=", ".join(table.rows.column_names),
        )
    columns = {"label": table.rows.column(label_column).to_pylist()}
    for meaning, name in known.items():
        columns[meaning] = table.rows.column(name).to_pylist()
    folds: list[Any] | None = None
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
        image_id = str(cells.get("id", path or f"{PARTS[split]}/{start + row:07d}"))
        yield ListedImage(
            id=image_id,
            path=folder / path if folder and path and not has_images else Path(image_id),
            label=normalise_name(_parse_label(cells["label"], table.label_names, where)),
            part=PARTS[split],
            group=str(cells["group"]) if "group" in cells else None,
            row=start + row,
            fold=fold,
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


def _read_image(cell: Any, where: str, may_open: bool) -> bytes:
    """The image file in a cell.

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
        raise DataError("the cell has no image", where=where, expected="bytes", got=got)
    return content
