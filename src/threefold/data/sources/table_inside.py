"""A table of images that comes in a folder or an archive together with its images.

Kaggle hands out data sets like this: train.csv, sample_submission.csv, and a folder of images that
are not in class folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from threefold.data.sources.columns import NO_NAMES, find_columns
from threefold.data.sources.csv_table import read_header, read_label_cells
from threefold.data.sources.folder import list_folder
from threefold.data.sources.one_hot import class_columns
from threefold.data.sources.parquet import read_parquet_header
from threefold.data.sources.unpacked import unpacked_folder
from threefold.data.walk import list_entries
from threefold.errors import DataError, shorten
from threefold.suffixes import CSV_TABLES, TABLES, is_archive

_NOT_LABELS: Final = ("test", "sample", "submission")
"""Beginnings of the names of tables that have no labels, or made-up ones."""


def find_table(path: Path) -> Path | None:
    """Return the table of a folder or archive whose images are not in class folders.

    Args:
        path: a folder, or an archive, which is unpacked into the cache.

    Returns:
        The table; None if there is none, or if there are class folders.

    Raises:
        DataError: several tables have a column of paths and one of labels; or the archive or the
            folder cannot be read.
    """
    folder = unpacked_folder(path) if is_archive(path) else path
    tables = [file for file in list_entries(folder)[1] if _has_labels(file)]
    if not tables or _has_class_folders(folder):
        return None
    if len(tables) > 1:
        raise DataError(
            "no class folders, and several tables of images",
            where=path,
            expected="one table with a path and a label for each image",
            got=shorten(file.name for file in tables),
            fix="give the table itself; an archive must be unpacked for that",
        )
    return tables[0]


def locate_table(path: Path) -> Path:
    """Return the file of a table, which may be in an archive; errors as `find_table`."""
    if not is_archive(path):
        return path
    table = find_table(path)
    if table is None:
        raise DataError("the archive has no table of images", where=path)
    return table


def _has_labels(file: Path) -> bool:
    """Whether a file is a table with a column of paths, and one of labels or one for each."""
    suffix = file.suffix.lower()
    if suffix not in TABLES or file.stem.lower().startswith(_NOT_LABELS):
        return False
    try:
        header = read_header(file) if suffix in CSV_TABLES else read_parquet_header(file)
    except DataError:
        return False
    try:
        found = find_columns(header, ("path", "label"), NO_NAMES, file.name).keys()
        if found != {"path"} or suffix not in CSV_TABLES:
            return {"path", "label"} <= found
        return bool(class_columns(read_label_cells(file, NO_NAMES).columns))
    except DataError:  # such as two candidates, which is said when the table is read
        return True


def _has_class_folders(folder: Path) -> bool:
    """Whether a folder has folders of two classes or more; one alone holds the table's images."""
    try:
        items = list_folder(folder).items
    except DataError:
        return False
    return len({item.label for item in items}) > 1
