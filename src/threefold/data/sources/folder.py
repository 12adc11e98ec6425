"""Images in class folders or in a CSV file, and the types that every source returns.

Nothing here opens an image.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from threefold.data.images import IMAGE_SUFFIXES
from threefold.errors import DataError, shorten
from threefold.names import find_repeated

PARTS = {
    "train": "train",
    "val": "train",
    "valid": "train",
    "validation": "train",
    "dev": "train",
    "test": "test",
}
"""Names of splits, and the part that each belongs to; folds take their own validation rows."""


class ListedImage(NamedTuple):
    """One image of a source, not opened yet."""

    id: str
    path: Path
    label: str
    part: str
    """`train` or `test`."""
    group: str | None = None
    row: int = -1
    """Row in a table, for an image that is no file of its own."""
    fold: str | None = None
    """The user's own fold, for a training image of a table with a fold column."""


class EncodedImages(Sequence[bytes]):
    """Image files inside a table, each read on access.

    Args:
        read: returns the encoded image of a row.
        rows: rows of the table (n,).
    """

    def __init__(self, read: Callable[[int], bytes], rows: NDArray[np.int64]) -> None:
        self._read, self._rows = read, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> EncodedImages: ...
    def __getitem__(self, at: SupportsIndex | slice) -> bytes | EncodedImages:
        if isinstance(at, slice):
            return EncodedImages(self._read, self._rows[at])
        return self._read(int(self._rows[at]))

    def take(self, at: NDArray[np.int64] | Sequence[int]) -> EncodedImages:
        """Select the images at these positions, in this order."""
        return EncodedImages(self._read, self._rows[np.asarray(at, dtype=np.int64)])


class Listing(NamedTuple):
    """The image files of a source, not opened yet."""

    items: list[ListedImage]
    notes: list[str]
    """Sentences about what was joined or ignored."""
    classes: tuple[str, ...] = ()
    """Official order of the class names; empty = natural order of the labels."""
    encoded: EncodedImages | None = None
    """The images of a table. `path` of its items is a name only, not a file."""


class ImageArrays(NamedTuple):
    """Decoded images of the train or test part of a data set."""

    images: NDArray[np.uint8]
    """(n, h, w) or (n, h, w, 3)."""
    labels: NDArray[np.int64]
    """(n,)"""
    ids: tuple[str, ...]


class ArrayDataset(NamedTuple):
    """A data set whose official files hold pixels instead of image files."""

    train: ImageArrays
    test: ImageArrays
    classes: tuple[str, ...]
    notes: list[str]


def find_absent(items: Iterable[ListedImage]) -> list[str]:
    """Ids of items whose file does not exist."""
    return [item.id for item in items if not item.path.is_file()]


def read_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("cannot read the file", where=path, got=error) from None


def is_image(path: Path) -> bool:
    """Whether the suffix of a file is that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def list_entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """List folders and files in a folder, sorted by name, without hidden ones.

    Raises:
        DataError: the folder cannot be read, or a name is not valid Unicode.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError("cannot read the folder", where=folder, got=error) from None
    for name in names:
        # Such a file can be opened, but its name cannot be printed or written to a run's files.
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            where = f"{folder}: {name!a}"
            raise DataError("a file name is not valid Unicode", where=where, fix="rename the file")
    paths = [folder / name for name in names if not name.startswith(".") and name != "__MACOSX"]
    folders = [path for path in paths if os.path.isdir(path)]
    return folders, [path for path in paths if not os.path.isdir(path)]


# Folders


def list_folder(root: Path) -> Listing:
    """List the images in class folders (at any depth) in `root`, or in its train/ [val/] [test/].

    Ids are POSIX paths relative to `root`. Hidden files are skipped. Other files that are not
    images, and images outside class folders, are counted in the notes. `val` is part of `train`.

    Raises:
        DataError: there is no such folder, it cannot be read, it has no class folders, or a class
            folder has no images.
    """
    if os.path.isfile(root):
        fix = 'for a CSV file set data.source = "csv"'
        raise DataError("data.root is not a folder", where=root, fix=fix)
    if not os.path.isdir(root):
        raise DataError("the image folder does not exist", where=root, fix="correct data.root")
    folders, files = list_entries(root)
    split_folders, notes = _find_splits(root, folders)
    items: list[ListedImage] = []
    outside, others = list(files), []
    for folder in split_folders or [root]:
        part = "train"
        class_folders = folders
        if split_folders:
            part = PARTS[folder.name.lower()]
            class_folders, files = list_entries(folder)
            outside += files
        if not class_folders:
            fix = "make one folder per class, with its images"
            raise DataError("there are no class folders", where=folder, fix=fix)
        for class_folder in class_folders:
            images, rest = walk_images(class_folder)
            others += rest
            if not images:
                fix = "add images or remove it"
                raise DataError("the class folder has no images", where=class_folder, fix=fix)
            for path in images:
                name = path.relative_to(root).as_posix()
                items.append(ListedImage(name, path, label=class_folder.name, part=part))
    return Listing(items, notes + _note_ignored(outside, others))


def _note_ignored(outside: list[Path], others: list[Path]) -> list[str]:
    """Notes about files that are not used.

    Args:
        outside: files outside class folders.
        others: files in class folders that are not images.
    """
    notes = []
    strays = [path.name for path in outside if is_image(path)]
    if strays:
        notes.append(f"{len(strays)} images outside class folders were ignored: {shorten(strays)}")
    others = others + [path for path in outside if not is_image(path)]
    if others:
        kinds = sorted({path.suffix.lower() or path.name for path in others})
        notes.append(f"{len(others)} files that are not images were ignored: {shorten(kinds)}")
    return notes


def _find_splits(root: Path, folders: list[Path]) -> tuple[list[Path], list[str]]:
    """Find the split folders and note what is joined; none if `root` holds class folders.

    A class may be called `test` if its folder holds images directly.
    """
    splits = []
    for folder in folders:
        if folder.name.lower() in PARTS:
            inside, files = list_entries(folder)
            if inside and not any(map(is_image, files)):
                splits.append(folder)
    if not splits:
        return [], []
    if len(splits) < len(folders) or "train" not in {folder.name.lower() for folder in splits}:
        raise DataError(
            "the folder is neither split nor one folder per class",
            where=root,
            expected="only class folders, or only train/ [val/] [test/] with class folders in each",
            got=shorten(f"{folder.name}/" for folder in folders),
        )
    notes = [
        f"{folder.name}/ was joined with train/: each fold takes its own rows to choose on"
        for folder in splits
        if PARTS[folder.name.lower()] != folder.name.lower()
    ]
    return splits, notes


def walk_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """List image files and other files at any depth.

    Links are followed, and each folder is entered once.

    Raises:
        DataError: a folder cannot be read, or a name is not valid Unicode.
    """
    images: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        current = stack.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = list_entries(current)
        stack += reversed(folders)
        for path in files:
            (images if is_image(path) else others).append(path)
    return images, others


# CSV


def list_csv(table: Path, fold_column: str = "") -> Listing:
    """List the rows `path,label[,group][,split]` of a CSV file (UTF-8, with a header).

    Paths are relative to the CSV file. Ids are the paths as POSIX, with `.` and `..` resolved.
    Other columns are ignored.

    Args:
        table: the CSV file.
        fold_column: the column with the fold of each training row; empty = none. Its cells in test
            rows are ignored.

    Raises:
        DataError: the file cannot be read, columns or cells are missing, or a path is repeated or
            does not exist.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            _check_columns(columns, table)
            check_fold_column(columns, fold_column, str(table))
            items = [_parse_row(row, table, reader.line_num, fold_column) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the CSV file", where=table, got=error) from None
    repeated, absent = find_repeated(item.id for item in items), find_absent(items)
    if repeated:
        raise DataError("the CSV file repeats paths", where=table, got=shorten(repeated))
    if absent:
        what = f"{len(absent)} files of the CSV file do not exist"
        raise DataError(what, where=table, got=shorten(absent))
    return Listing(items, [])


def _check_columns(columns: list[str], table: Path) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise DataError(
            f"the CSV file has no column {' and '.join(missing)}",
            where=table,
            expected="path,label[,group][,split]",
            got=",".join(columns) or "an empty file",
        )


def check_fold_column(columns: Sequence[str], fold_column: str, where: str) -> None:
    """Check that a table has the fold column that the recipe names.

    Raises:
        DataError: it has not.
    """
    if fold_column and fold_column not in columns:
        raise DataError(
            f"the table has no fold column {fold_column}",
            where=where,
            expected=f"a column {fold_column}",
            got=", ".join(columns),
            fix="correct data.fold_column",
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


def _parse_row(row: dict[str, str | None], table: Path, line: int, fold_column: str) -> ListedImage:
    # csv collects surplus cells under the key None, and fills missing cells with None.
    surplus = None in row
    cells = {name: (row[name] or "").strip() for name in row if name is not None}
    split = cells.get("split", "train").lower()
    required = [name for name in ("path", "label", "group") if name in cells]
    if surplus or split not in PARTS or not all(cells[name] for name in required):
        columns = f"{len(cells)} cells, {', '.join(required)} not empty"
        raise DataError(
            "the CSV file has an invalid row",
            where=f"{table} line {line}",
            expected=f"{columns}, split one of {', '.join(PARTS)}",
            got=",".join(cells.values()) + (" and surplus cells" if surplus else ""),
        )
    part, fold = PARTS[split], None
    if fold_column and part == "train":
        fold = parse_fold(cells[fold_column], fold_column, f"{table} line {line}")
    name = Path(os.path.normpath(cells["path"])).as_posix()
    return ListedImage(
        id=name,
        path=table.parent / name,
        label=cells["label"],
        part=part,
        group=cells.get("group"),
        fold=fold,
    )
