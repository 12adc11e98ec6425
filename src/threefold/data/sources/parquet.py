"""Images in parquet files, and data sets of the Hugging Face hub; both are Arrow tables.

Images stay encoded in the table (parquet: in memory, hub: in a memory-mapped file) and are decoded
one by one. pyarrow and datasets are optional and imported only when they are needed.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.data.sources.columns import (
    NO_NAMES,
    NamedColumns,
    check_fold_column,
    find_columns,
    note_columns,
    note_unread,
    require_columns,
)
from threefold.data.sources.csv_table import parse_fold
from threefold.data.sources.folder import (
    EncodedImages,
    ListedImage,
    Listing,
    find_absent,
    read_file,
)
from threefold.data.sources.label_sets import (
    LabelCells,
    LabelSet,
    LabelSets,
    join_labels,
    read_label_sets,
)
from threefold.data.sources.named_files import find_by_name
from threefold.data.split_names import EXPECTED, PARTS, split_of
from threefold.errors import DataError, shorten
from threefold.names import find_repeated, normalise_name

_IMAGE_COLUMNS = ("image", "img", "picture", "photo")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_KNOWN = ("path", "label", "id", "group", "split")
_PLAIN = ("bool", "int", "uint", "float", "double", "halffloat", "string", "large_string")
"""Beginnings of the types of columns that can hold 0 and 1."""


class _Table(NamedTuple):
    """The rows of a file or of a split."""

    name: str
    """The file or split, for messages."""
    part: str
    """`train` or `test`, for rows without a `split` cell."""
    rows: Any
    """Arrow table."""
    columns: dict[str, str]
    """The table's own names of path, label, id, group and split, as far as it has them."""
    image: str
    """The column of encoded images; empty = files that `path` names."""
    label_names: list[str] | None
    """Names of whole-number labels."""


def _import_optional(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        what = f"the package {name.partition('.')[0]} is not installed"
        raise DataError(what, fix=f'pip install "threefold[{extra}]"') from None


def list_parquet(root: Path, named: NamedColumns = NO_NAMES) -> Listing:
    """List the rows of a parquet file, or of all .parquet files in a folder.

    Columns: `image` (bytes of an image file, or the hub's struct of bytes and path) or `path`
    (relative to the file; see `named_files`); `label` (text or whole number); optionally `id`,
    `group` and `split` (train, val, test). The first three can have other usual names (`columns`).
    Names of number labels are taken from the hub's metadata in the file. Without `split`, the
    beginning of the file's name decides. Where images have any number of labels (`named.task`), a
    cell of labels is a list, or a text that names them all; or there is a column of 0 and 1 for
    each label.

    Args:
        root: a file or a folder.
        named: the columns that the recipe names.

    Raises:
        DataError: pyarrow is not installed, a file cannot be read or has no rows, columns or cells
            are missing, or ids repeat.
    """
    tables = _parquet_tables(root, named)
    if not any(table.rows.num_rows for table in tables):
        raise DataError("the table has no rows", where=root, expected="a row for each image")
    return _list_tables(tables, root if root.is_dir() else root.parent, named)


def _parquet_tables(root: Path, named: NamedColumns) -> list[_Table]:
    """Read a parquet file, or all in a folder."""
    parquet = _import_optional("pyarrow.parquet", "parquet")
    tables = []
    for file in _parquet_files(root):
        rows = _read(parquet.read_table, file)
        first_word = re.split(r"[^a-z]", file.stem.lower(), maxsplit=1)[0]
        part = PARTS[split_of(first_word) or "train"]
        image, columns = _find_known(rows, named, str(file))
        names = _hub_label_names(rows, columns.get("label", ""))
        tables.append(_Table(str(file), part, rows, columns, image, names))
    return tables


def read_parquet_header(root: Path) -> list[str]:
    """Return the names of the columns of a parquet file, or of the first in a folder.

    Raises:
        DataError: pyarrow is not installed, or the file cannot be read.
    """
    parquet = _import_optional("pyarrow.parquet", "parquet")
    return list(_read(parquet.read_schema, _parquet_files(root)[0]).names)


def _parquet_files(root: Path) -> list[Path]:
    """Return a file, or all .parquet files in a folder; a DataError if there are none."""
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    # Reading a pipe or a device could block for ever.
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError("there are no .parquet files", where=root)
    return files


def _read(function: Callable[[Path], Any], file: Path) -> Any:
    """Call a reader of pyarrow, which raises errors of many types on damaged files."""
    try:
        return function(file)
    except Exception as error:
        got = str(error)[:200]
        raise DataError("cannot read the parquet file", where=file, got=got) from None


def _find_known(rows: Any, named: NamedColumns, where: str) -> tuple[str, dict[str, str]]:
    """Return the column of encoded images, or an empty string, and the other known columns."""
    header = rows.column_names
    encoded = [name for name in header if _is_encoded(rows.schema.field(name).type)]
    images = [named.path] if named.path in encoded else []
    if not named.path:
        images = [name for name in header if name in _IMAGE_COLUMNS]
        images = [name for name in images if not _is_text(rows.schema.field(name).type)][:1]
        images = images or (encoded if len(encoded) == 1 else [])
    known: tuple[str, ...] = _KNOWN
    if images:  # a path is their name then, and no other column is
        named = named._replace(path="")
        if "path" not in {name.strip().lower() for name in header}:
            known = _KNOWN[1:]
    others = [name for name in header if name not in images]
    return "".join(images), find_columns(others, known, named, where)


def _is_encoded(kind: Any) -> bool:
    """Whether a column holds bytes, or the hub's struct of bytes and path."""
    text = str(kind)
    return text in ("binary", "large_binary", "binary_view") or text.startswith("struct<bytes")


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view") or "values=string" in str(kind)


def _hub_label_names(rows: Any, label: str) -> list[str] | None:
    """Class names in the metadata that the hub's library writes, if there are any."""
    try:
        features = json.loads((rows.schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        names = feature.get("feature", feature)["names"]  # a list of labels has a feature inside
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def list_huggingface(name: str, named: NamedColumns = NO_NAMES) -> Listing:
    """List a data set of the Hugging Face hub, or of a folder that its library reads.

    Code in the data set is never run. The image and the class label are used, and a column `group`
    if there is one. The validation split belongs to the training part.

    Args:
        name: `owner/name`, or `owner/name:configuration`.
        named: the columns that the recipe names.

    Raises:
        DataError: datasets is not installed, the data set cannot be loaded, or it has no image or
            no label.
    """
    dataset = _load_hub(name)
    tables = [_hub_table(name, split, dataset[split], named) for split in dataset]
    return _list_tables(tables, None, named)


def read_hub_header(name: str) -> list[str]:
    """Return the names of the columns of a data set of the hub, which is loaded for that.

    Raises:
        DataError: datasets is not installed, or the data set cannot be loaded.
    """
    dataset = _load_hub(name)
    return list(dataset[next(iter(dataset))].features)


def _load_hub(name: str) -> Any:
    """Load the splits of a data set; the hub's library keeps them in its cache."""
    hub = _import_optional("datasets", "hf")
    path, _, configuration = name.partition(":")
    try:
        return hub.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises errors of many types, for networks and files
        got = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise DataError(
            "cannot load the data set",
            where=name,
            got=got,
            fix="give an existing folder or table, or owner/name of a data set on the Hugging Face "
            "hub",
        ) from None


def _hub_table(name: str, split: str, dataset: Any, named: NamedColumns) -> _Table:
    """Find the image and the label of a split.

    Nobody can rename a column of the hub, so that no near miss is refused there.
    """
    hub = _import_optional("datasets", "hf")
    features = dataset.features
    where = f"{name}, split {split}"
    images = [column for column in features if isinstance(features[column], hub.Image)]
    labels = [column for column in features if isinstance(_inner(features[column]), hub.ClassLabel)]
    for meaning, column in (("path", named.path), ("label", named.label)):
        if column and column not in features:
            raise DataError(
                f"the data set has no column {column}",
                where=where,
                got=", ".join(features),
                fix=f"correct data.{meaning}_column",
            )
    images = [named.path] if named.path else images
    label = next((column for column in (*_LABEL_COLUMNS, *labels) if column in features), None)
    label = named.label or label
    name_of_split = split_of(split)
    if len(images) != 1 or label is None or name_of_split is None:
        raise DataError(
            "the data set is not one image and one label per row",
            where=where,
            expected=f"splits {EXPECTED}, one image feature, a label",
            got=", ".join(features),
            fix="name the columns in data.path_column and data.label_column",
        )
    columns = {key: key for key in ("id", "group", "split") if key in features} | {"label": label}
    label_names = _inner(features[label]).names if label in labels else None
    part = PARTS[name_of_split]
    return _Table(split, part, dataset.data.table, columns, images[0], label_names)


def _inner(feature: Any) -> Any:
    """Return what a list of the hub is a list of, or the feature itself."""
    return getattr(feature, "feature", feature)


def _list_tables(tables: list[_Table], folder: Path | None, named: NamedColumns) -> Listing:
    """List the rows of all tables.

    Args:
        tables: files or splits.
        folder: what paths are relative to; None for tables that the hub's library has written.
        named: the columns that the recipe names.
    """
    columns: list[Any] = []
    starts: list[int] = []
    items: list[ListedImage] = []
    sets = _label_sets(tables, named)
    for table in tables:
        columns.append(table.rows.column(table.image) if table.image else None)
        starts.append(len(items))
        items += _list_rows(table, len(items), folder, named, sets)
    where = shorten(table.name for table in tables)
    first = tables[0]
    notes = note_columns(first.columns)
    known = [*first.columns.values(), first.image, named.fold, *sets.columns]
    notes += note_unread(first.rows.column_names, known)
    notes += [sets.note] if sets.note else []
    if len({column is None for column in columns}) > 1:
        raise DataError("some files hold images and others name them", got=where)
    if find_repeated(item.id for item in items):
        raise DataError("ids are not unique", where=where)
    if columns[0] is None:
        assert folder is not None  # tables of the hub hold images
        items, found = find_by_name(items, folder, where)
        notes += found
        absent = find_absent(items)
        if absent:
            what = f"{len(absent)} files of the table do not exist"
            raise DataError(what, where=folder, got=shorten(absent))
        return Listing(items, notes, sets.names)

    def read(row: int) -> bytes:
        at = int(np.searchsorted(starts, row, side="right")) - 1
        row_of_table = row - starts[at]
        cell = columns[at][row_of_table].as_py()
        where = f"{tables[at].name} row {row_of_table}"
        return _read_image(cell, where, may_open=folder is None)

    label_names = next((table.label_names for table in tables if table.label_names), [])
    labels = {label for item in items for label in item.labels or (item.label,)}
    classes = sets.names
    if not classes and labels - {""} <= set(label_names):
        classes = tuple(name for name in label_names if name in labels)
    return Listing(items, notes, classes, EncodedImages(read, np.arange(len(items))))


def _label_sets(tables: Sequence[_Table], named: NamedColumns) -> LabelSets:
    """Read any number of labels per row of all tables; empty for one label, or without labels."""
    if named.task != "multilabel":
        return LabelSets([])
    cells, others, _ = _label_cells(tables, named)
    return read_label_sets(cells, others, named.separator) or LabelSets([])


def _label_cells(tables: Sequence[_Table], named: NamedColumns) -> LabelCells:
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


def _texts_of_labels(table: _Table) -> list[str | LabelSet]:
    """Return the cells of a table's column of labels: texts, or lists of labels."""
    cells = table.rows.column(table.columns["label"]).to_pylist()
    if table.label_names is None and not any(isinstance(cell, list) for cell in cells):
        return [_cell_text(cell) for cell in cells]
    lists = [cell if isinstance(cell, list) or cell is None else [cell] for cell in cells]
    return [_parse_labels(cell, table, row) for row, cell in enumerate(lists)]


def _cell_text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def read_parquet_label_cells(root: Path, named: NamedColumns) -> LabelCells:
    """Read what can be the labels of parquet files, without a look at the images.

    Raises:
        DataError: pyarrow is not installed, or a file cannot be read.
    """
    return _label_cells(_parquet_tables(root, named), named)


def read_hub_label_cells(name: str, named: NamedColumns) -> LabelCells:
    """Read what can be the labels of a data set of the hub, which is loaded for that.

    Raises:
        DataError: datasets is not installed, or the data set cannot be loaded.
    """
    dataset = _load_hub(name)
    return _label_cells([_hub_table(name, s, dataset[s], named) for s in dataset], named)


def _parse_labels(cell: Any, table: _Table, row: int) -> LabelSet:
    """Return the labels of a cell that is a list."""
    where = f"{table.name} row {row}"
    values = [value for value in cell or [] if value is not None]
    labels = [normalise_name(_parse_label(value, table.label_names, where)) for value in values]
    return tuple(dict.fromkeys(labels))


def _list_rows(
    table: _Table, start: int, folder: Path | None, named: NamedColumns, sets: LabelSets
) -> Iterator[ListedImage]:
    """List the rows of one table, which begin at row `start` of all tables."""
    found = {"path": table.image, **table.columns} if table.image else dict(table.columns)
    found |= {"label": "label"} if sets.note else {}
    require_columns(found, table.rows.column_names, named, table.name)
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
        image_id = str(cells.get("id", path or f"{PARTS[split]}/{start + row:07d}"))
        labels = sets.sets[start + row] if sets.note else None
        if labels is None:
            label = normalise_name(_parse_label(cells["label"], table.label_names, where))
        else:
            label = join_labels(labels)
        yield ListedImage(
            id=image_id,
            path=folder / path if folder and path and not table.image else Path(image_id),
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
