"""Images in parquet files, by row: their bytes, their paths, or their addresses.

The bytes of small tables are kept in memory. Those of large ones are copied once into the cache
(`image_store`): a row of a parquet file can be read only with all those that are compressed with
it. pyarrow is optional and imported only when it is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from threefold.counting import report
from threefold.data.sources.columns import NO_NAMES, NamedColumns, find_columns
from threefold.data.sources.folder import Listing
from threefold.data.sources.image_store import ImageStore, StoredRows
from threefold.data.sources.image_tables import (
    ImageTable,
    encoded_image,
    import_optional,
    label_cells,
    list_tables,
)
from threefold.data.sources.label_sets import LabelCells
from threefold.data.split_names import PARTS, split_of
from threefold.errors import DataError
from threefold.files import real_path

MEMORY_BYTES: Final = 1 << 28
"""Largest size of the images of all files that are kept in memory."""

_IMAGE_COLUMNS = ("image", "img", "picture", "photo")
_BATCH = 64
"""Images in memory while they are copied."""
_KNOWN = ("path", "label", "id", "group", "split")


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
    return list_tables(tables, root if root.is_dir() else root.parent, named)


def _parquet_tables(root: Path, named: NamedColumns, has_images: bool = True) -> list[ImageTable]:
    """Read a parquet file, or all in a folder; without images, only the other columns."""
    parquet = import_optional("pyarrow.parquet", "parquet")
    files = _parquet_files(root)
    tables = []
    images: list[str] = []
    for file in files:
        schema = _read(parquet.read_schema, file)
        image, columns = _find_known(schema, named, str(file))
        others = [name for name in schema.names if not _is_encoded(schema.field(name).type)]
        rows = _read(partial(parquet.read_table, columns=[n for n in others if n != image]), file)
        first_word = re.split(r"[^a-z]", file.stem.lower(), maxsplit=1)[0]
        part = PARTS[split_of(first_word) or "train"]
        names = _hub_label_names(schema, columns.get("label", ""))
        images.append(image)
        tables.append(ImageTable(str(file), part, rows, columns, image, names, schema.names))
    if not has_images:
        return tables
    sizes = [_image_bytes(file, image) for file, image in zip(files, images, strict=True)]
    read = _with_images if sum(sizes) <= MEMORY_BYTES else _with_copies
    return [
        read(file, table) if table.image else table
        for file, table in zip(files, tables, strict=True)
    ]


def _image_bytes(file: Path, image: str) -> int:
    """Return the bytes of a file's column of images, uncompressed; 0 if it has none."""
    if not image:
        return 0
    parquet = import_optional("pyarrow.parquet", "parquet")
    groups = _read(parquet.read_metadata, file)
    size = 0
    for number in range(groups.num_row_groups):
        group = groups.row_group(number)
        for column in (group.column(i) for i in range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] == image:
                size += column.total_uncompressed_size
    return size


def _with_images(file: Path, table: ImageTable) -> ImageTable:
    """Read the column of images into memory."""
    parquet = import_optional("pyarrow.parquet", "parquet")
    read_table = _read(partial(parquet.read_table, columns=[table.image]), file)

    images = read_table.column(table.image)

    def read(row: int) -> bytes:
        return encoded_image(images[row].as_py(), f"{file} row {row}", may_open=False)

    return table._replace(read=read)


def _with_copies(file: Path, table: ImageTable) -> ImageTable:
    """Copy the images into the cache, unless that is done; an interrupted copy goes on."""
    image = table.image
    status = file.stat()
    origin = f"{real_path(file)} {status.st_size} {status.st_mtime_ns} {image}"
    store = ImageStore(origin)
    parquet = import_optional("pyarrow.parquet", "parquet")
    opened = _read(parquet.ParquetFile, file)
    count = opened.metadata.num_rows
    if not store.is_complete():
        with store.appending() as writer, opened:
            begin = 0
            for number in range(opened.num_row_groups):
                end = begin + opened.metadata.row_group(number).num_rows
                if end > writer.count:
                    for cell in _image_cells(opened, number, image, writer.count - begin):
                        where = f"{file} row {writer.count}"
                        try:
                            writer.append("", encoded_image(cell, where, may_open=False))
                        except DataError as error:
                            writer.append("", None, f"{error.what}, {error.got}")
                        report("images copied", writer.count, count)
                begin = end
            writer.finish()
    stored = StoredRows(store, count)
    for row, entry in enumerate(store.entries()):
        stored.place(entry, [row])
    return table._replace(read=stored.read, identify=stored.identify)


def _image_cells(opened: Any, group: int, image: str, first: int) -> Iterator[Any]:
    """Yield the images of a row group from a row of it on."""
    row = 0
    for batch in _read_batches(opened, group, image):
        for cell in batch.column(0):
            if row >= first:
                yield cell.as_py()
            row += 1


def _read_batches(opened: Any, group: int, image: str) -> Iterator[Any]:
    """Yield the images of a row group, few at a time."""
    batches = opened.iter_batches(_BATCH, row_groups=[group], columns=[image])
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except Exception as error:
            got = f"row group {group}: {error}"[:200]
            raise DataError("cannot read the parquet file", got=got) from None


def read_parquet_header(root: Path) -> list[str]:
    """Return the names of the columns of a parquet file, or of the first in a folder.

    Raises:
        DataError: pyarrow is not installed, or the file cannot be read.
    """
    parquet = import_optional("pyarrow.parquet", "parquet")
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


def _find_known(schema: Any, named: NamedColumns, where: str) -> tuple[str, dict[str, str]]:
    """Return the column of encoded images, or an empty string, and the other known columns."""
    header = schema.names
    encoded = [name for name in header if _is_encoded(schema.field(name).type)]
    images = [named.path] if named.path in encoded else []
    if not named.path:
        images = [name for name in header if name in _IMAGE_COLUMNS]
        images = [name for name in images if not _is_text(schema.field(name).type)][:1]
        images = images or (encoded if len(encoded) == 1 else [])
    known: tuple[str, ...] = _KNOWN if named.needs_label else ("path", "id")
    if images:  # a path is their name then, and no other column is
        named = named._replace(path="")
        if "path" not in {name.strip().lower() for name in header}:
            known = known[1:]
    others = [name for name in header if name not in images]
    return "".join(images), find_columns(others, known, named, where)


def _is_encoded(kind: Any) -> bool:
    """Whether a column holds bytes, or the hub's struct of bytes and path."""
    text = str(kind)
    return text in ("binary", "large_binary", "binary_view") or text.startswith("struct<bytes")


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view") or "values=string" in str(kind)


def _hub_label_names(schema: Any, label: str) -> list[str] | None:
    """Class names in the metadata that the hub's library writes, if there are any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        names = feature.get("feature", feature)["names"]  # a list of labels has a feature inside
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def read_parquet_label_cells(root: Path, named: NamedColumns) -> LabelCells:
    """Read what can be the labels of parquet files, without a look at the images.

    Raises:
        DataError: pyarrow is not installed, or a file cannot be read.
    """
    return label_cells(_parquet_tables(root, named, has_images=False), named)
