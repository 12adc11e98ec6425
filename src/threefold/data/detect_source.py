"""Which kind of data a path or a name is: a folder, an archive, a table, arrays, or the hub's."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from threefold.data.remote_images import as_url, local_path
from threefold.data.sources.addresses import restore_address
from threefold.data.sources.columns import NamedColumns, find_fold_columns
from threefold.data.sources.csv_table import read_header, read_label_cells
from threefold.data.sources.hub import read_hub_header, read_hub_label_cells
from threefold.data.sources.hub_stream import is_stream, parse_address
from threefold.data.sources.label_sets import LabelCells, seems_multilabel
from threefold.data.sources.npz_file import read_npz_label_cells
from threefold.data.sources.parquet import read_parquet_header, read_parquet_label_cells
from threefold.data.sources.table_inside import find_table, locate_table
from threefold.data.sources.webdataset import holds_samples, is_shards
from threefold.errors import DataError, refuse_address, seems_address
from threefold.extras import install_command
from threefold.files import real_path
from threefold.object_store import url_of
from threefold.recipe.schema import DataSpec, Source
from threefold.suffixes import ARCHIVES, ARRAYS, CSV_TABLES, PARQUET_TABLES, is_archive

TABLES: Final[dict[str, Source]] = {
    **dict.fromkeys(CSV_TABLES, "csv"),
    **dict.fromkeys(PARQUET_TABLES, "parquet"),
    ARRAYS: "npz",
}
"""Source of a table or of arrays by the suffix of its file."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def detect_source(data: str | Path) -> DataSpec:
    """Return the `data` table of a recipe for a path, or for a name on the Hugging Face hub.

    Args:
        data: a folder of images or an archive of one, with class folders or a table inside; a CSV,
            TSV, parquet or npz file; shards of WebDataset, by a folder, a pattern or an address; or
            `owner/name` where nothing of that path exists, or hf://datasets/owner/name.

    Raises:
        DataError: it does not exist, or is another kind of file; or it can only be a name on the
            hub, and the package for that is not installed.
    """
    path = Path(data).expanduser()
    text = restore_address(data)
    if is_shards(text):
        return DataSpec(
            source="webdataset", root=text if seems_address(text) else os.path.abspath(path)
        )
    if url_of(data):
        spec = detect_source(local_path(data))
        return spec.model_copy(update={"root": as_url(spec.root, data)})
    if holds_samples(path):
        return DataSpec(source="webdataset", root=str(real_path(path)))
    if path.is_dir() or is_archive(path):
        spec = spec_of_table(path) or DataSpec(source="folder", root=str(path))
        return spec.model_copy(update={"root": str(real_path(Path(spec.root)))})
    if is_hub_name(data):
        if importlib.util.find_spec("datasets") is None:
            raise DataError(
                "no such folder or table; a data set of the Hugging Face hub needs a package",
                where=data,
                got="no package datasets",
                fix=f"correct the path, or: {install_command('hf')}",
            )
        if is_stream(text):
            parse_address(text)
            return DataSpec(source="huggingface", root=text)
        return DataSpec(source="huggingface", root=Path(data).as_posix())
    source = TABLES.get(path.suffix.lower())
    if source is None or not path.exists():
        refuse_address(data)
        expected = (
            f"a folder of class folders, a file ending in {', '.join((*TABLES, *ARCHIVES))}, or "
            "owner/name of a data set on the Hugging Face hub"
        )
        raise DataError(
            "not a folder or table of images" if path.exists() else "no such folder or table",
            where=data,
            expected=expected,
        )
    return DataSpec(source=source, root=str(real_path(path)))


def spec_of_table(path: Path) -> DataSpec | None:
    """Return the `data` table for a folder or archive with a table of images in it.

    Returns:
        None if there is no table, or if there are class folders.

    Raises:
        DataError: several tables fit; or the archive or the folder cannot be read.
    """
    table = find_table(path)
    if table is None:
        return None
    # An archive stays the root, since the cache that it is unpacked in may be emptied.
    root = path if is_archive(path) else table
    return DataSpec(source=TABLES[table.suffix.lower()], root=str(root))


def names_shards(data: str | Path) -> bool:
    """Whether data names shards of WebDataset: a pattern, an address, a tar file or a folder."""
    return is_shards(restore_address(data)) or holds_samples(Path(data).expanduser())


def seems_data(name: str) -> bool:
    """Whether a name is that of a folder, an archive or a table, or can only be one on the hub."""
    path = Path(name)
    is_file = path.exists() and name.lower().endswith((*TABLES, *ARCHIVES))
    return path.is_dir() or is_file or is_shards(restore_address(name)) or is_hub_name(name)


def is_hub_name(data: str | Path) -> bool:
    """Whether data can only be a name on the hub: `owner/name`, and no path to a file.

    In a folder that exists, a name that does not is a mistyped path.
    """
    if is_stream(str(data)):
        return True
    name = Path(data).as_posix()
    if not _HUB_NAME.fullmatch(name) or Path(data).exists():
        return False
    is_file = name.lower().endswith((*TABLES, *ARCHIVES))
    return not is_file and not Path(data).parent.is_dir()


def find_fold_column(spec: DataSpec) -> str:
    """Return the column of a table that seems to hold the user's own folds; empty if none does.

    Raises:
        DataError: the table cannot be read, or several columns do.
    """
    path = locate_table(local_path(spec.root))
    if spec.source == "csv":
        header = read_header(path)
    elif spec.source == "parquet":
        header = read_parquet_header(path)
    elif spec.source == "huggingface":
        header = read_hub_header(spec.root)
    else:
        return ""
    found = find_fold_columns(header)
    if len(found) > 1:
        raise DataError(
            f"{len(found)} columns can be the fold",
            where=spec.root,
            got=" and ".join(found),
            fix="choose one: --set data.fold_column=NAME",
        )
    return "".join(found)


class FoundTask(NamedTuple):
    """What the labels of a table are."""

    separator: str
    """Of the labels in a cell; empty = columns or lists hold them."""
    reason: str


def find_multilabel(spec: DataSpec) -> FoundTask | None:
    """Look whether the images of a table have any number of labels; None if each has one.

    A table that cannot be read is not one: the reader of its images says what is wrong with it.

    Args:
        spec: the `data` table of a recipe, with the columns that are named.
    """
    try:
        cells = _label_cells(spec)
        found = None if cells is None else seems_multilabel(cells)
    except DataError:
        return None
    return None if found is None else FoundTask(*found)


def _label_cells(spec: DataSpec) -> LabelCells | None:
    """Read what can be the labels of a source; None for one with a class for each image."""
    named = NamedColumns(
        spec.path_column or "",
        spec.label_column or "",
        spec.fold_column,
        has_recipe=False,
        group=spec.group_column or "",
    )
    if spec.source == "huggingface":
        return read_hub_label_cells(spec.root, named)
    if spec.source not in TABLES.values():
        return None
    path = locate_table(local_path(spec.root))
    if spec.source == "npz":
        return read_npz_label_cells(path)
    if spec.source == "parquet":
        return read_parquet_label_cells(path, named)
    return read_label_cells(path, named)
