"""Images in parquet files, and data sets of the Hugging Face hub: both are tables of Arrow.

Image files stay encoded in the table (for parquet in memory, for the hub in a memory-mapped file) and are decoded one
by one. pyarrow and datasets are extras of this package and are imported only here, when they are needed.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.errors import DataError
from threefold.listing import PARTS, EncodedImages, ListedImage, Listing, shorten

_IMAGES = ("image", "img", "picture", "photo")
_LABELS = ("label", "labels", "fine_label", "class")


class _Part(NamedTuple):
    """Rows of one file or of one split."""

    name: str
    """Where they come from, for ids and messages."""
    part: str
    """train or test, where no column says it."""
    table: Any
    """Arrow table."""
    names: list[str] | None
    """Names of whole-number labels."""


def _imported(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(
            f"the package {package} is not installed", fix=f'pip install "threefold[{extra}]"'
        ) from None


# parquet --------------------------------------------------------------------------------------------------------------


def list_parquet(root: Path) -> Listing:
    """Rows of a parquet file, or of all .parquet files in a folder.

    Columns: `image` (bytes of an image file, or the hub's struct of bytes and path) or `path` (relative to the file);
    `label` (text or whole number; names are taken from the hub's metadata where a file has them); and, if wanted,
    `id`, `group` and `split` (train, val, test). Without `split` a file whose name begins with one is of that part.

    Raises:
        DataError: pyarrow is not installed, a file cannot be read, columns or cells are missing, or ids repeat.
    """
    parquet = _imported("pyarrow.parquet", "parquet")
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise DataError("there are no .parquet files", where=root)
    parts = []
    for file in files:
        try:
            table = parquet.read_table(file)
        except Exception as error:  # pyarrow raises errors of many types on damaged files
            raise DataError(
                "cannot read the parquet file", where=file, got=str(error)[:200]
            ) from None
        begin = re.match(r"[a-z]+", file.stem.lower())
        parts.append(
            _Part(str(file), PARTS.get(begin.group() if begin else "", "train"), table, None)
        )
    folder = root if root.is_dir() else root.parent
    return _listing([part._replace(names=_hub_names(part.table)) for part in parts], folder)


def _hub_names(table: Any) -> list[str] | None:
    """Class names in the metadata that the hub's library writes, if they are there."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[_column(table, _LABELS)]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


# hub ------------------------------------------------------------------------------------------------------------------


def list_huggingface(name: str) -> Listing:
    """A data set of the Hugging Face hub, or of a folder that its library reads.

    Code that a data set brings along is never run. Of its features the image and the class label are used, and a
    column `group` if there is one; the validation split is trained on.

    Args:
        name: `owner/name`, or `owner/name:configuration`.

    Raises:
        DataError: datasets is not installed, the data set cannot be loaded, or it has no image or no label.
    """
    hub = _imported("datasets", "hf")
    path, _, configuration = name.partition(":")
    try:
        loaded = hub.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises errors of many types, for networks as for files
        got = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise DataError("cannot load the data set", where=name, got=got) from None
    parts = []
    for split, rows in loaded.items():
        images = [
            column for column, feature in rows.features.items() if isinstance(feature, hub.Image)
        ]
        labels = [
            column
            for column, feature in rows.features.items()
            if isinstance(feature, hub.ClassLabel)
        ]
        label = next((column for column in (*_LABELS, *labels) if column in rows.features), None)
        if len(images) != 1 or label is None or split.lower() not in PARTS:
            raise DataError(
                "the data set is not one image and one label a row",
                where=f"{name}, split {split}",
                expected=f"splits {', '.join(PARTS)}, one image feature, a label",
                got=", ".join(rows.features),
            )
        names = rows.features[label].names if label in labels else None
        table = rows.data.table.rename_columns(
            [
                {images[0]: "image", label: "label"}.get(
                    column, f"other {column}" if column in ("image", "label") else column
                )
                for column in rows.data.column_names
            ]
        )
        parts.append(_Part(split, PARTS[split.lower()], table, names))
    return _listing(parts, None)


# Rows -----------------------------------------------------------------------------------------------------------------


def _column(table: Any, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in table.column_names), "")


def _listing(parts: list[_Part], folder: Path | None) -> Listing:
    """Items of all rows; `folder` is where paths begin, None where the hub's library has made them."""
    cells: list[Any] = []
    starts: list[int] = []
    items: list[ListedImage] = []
    for part in parts:
        image = _column(part.table, _IMAGES)
        starts.append(len(items))
        cells.append(part.table.column(image) if image else None)
        items += _items(part, image, len(items), folder)
    if len({cell is None for cell in cells}) > 1:
        raise DataError(
            "some files hold images and others name them", got=shorten(part.name for part in parts)
        )
    if len({item.id for item in items}) < len(items):
        raise DataError("ids are not unique", where=shorten(part.name for part in parts))
    if cells[0] is None:
        absent = [item.id for item in items if not item.path.is_file()]
        if absent:
            raise DataError(
                f"{len(absent)} files of the table do not exist", where=folder, got=shorten(absent)
            )
        return Listing(items, [])

    def read(row: int) -> bytes:
        at = int(np.searchsorted(starts, row, side="right")) - 1
        return _bytes(
            cells[at][row - starts[at]].as_py(),
            f"{parts[at].name} row {row - starts[at]}",
            folder is None,
        )

    named = next((part.names for part in parts if part.names), [])
    used = {item.label for item in items}
    classes = tuple(name for name in named if name in used) if used <= set(named) else ()
    return Listing(items, [], classes, EncodedImages(read, np.arange(len(items))))


def _items(part: _Part, image: str, start: int, folder: Path | None) -> Iterator[ListedImage]:
    """The rows of one part, without their images."""
    label = _column(part.table, _LABELS)
    if not label or not (image or "path" in part.table.column_names):
        raise DataError(
            "the table has not the columns that are needed",
            where=part.name,
            expected="image or path, and label [id] [group] [split]",
            got=", ".join(part.table.column_names),
        )
    columns = {
        name: part.table.column(source).to_pylist()
        for name, source in (
            ("label", label),
            *((name, name) for name in ("path", "id", "group", "split")),
        )
        if source in part.table.column_names
    }
    for row in range(part.table.num_rows):
        cells = {name: column[row] for name, column in columns.items()}
        where = f"{part.name} row {row}"
        split = str(cells.get("split", part.part)).lower()
        if split not in PARTS or any(cells[name] is None for name in cells):
            raise DataError(
                "the table has a row that cannot be used",
                where=where,
                expected=f"no empty cell, split one of {', '.join(PARTS)}",
                got=", ".join(f"{name} {value}" for name, value in cells.items()),
            )
        path = str(cells.get("path", ""))
        name = str(cells.get("id", path or f"{PARTS[split]}/{start + row:07d}"))
        yield ListedImage(
            name,
            folder / path if folder and path and not image else Path(name),
            _label(cells["label"], part.names, where),
            PARTS[split],
            str(cells["group"]) if "group" in cells else None,
            start + row,
        )


def _label(value: object, names: list[str] | None, where: str) -> str:
    """The class name that a cell stands for."""
    if isinstance(value, int) and not isinstance(value, bool):
        if names is not None and not 0 <= value < len(names):
            raise DataError(
                "a label has no name", where=where, expected=f"0 to {len(names) - 1}", got=value
            )
        return names[value] if names is not None else str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError("a label is neither text nor a whole number", where=where, got=repr(value))
    return value.strip()


def _bytes(cell: Any, where: str, may_open: bool) -> bytes:
    """The image file in a cell; only what the hub's library wrote may point to a file."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None and may_open and isinstance(cell, dict) and cell.get("path"):
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise DataError(
                "cannot read the file", where=cell["path"], got=error.strerror or error
            ) from None
    if not isinstance(content, bytes):
        raise DataError(
            "the cell has no image", where=where, expected="bytes", got=type(content).__name__
        )
    return content
