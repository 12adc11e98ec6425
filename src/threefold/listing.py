"""Which images there are, and what their folders or a table say of them; no image is opened here."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError
from threefold.images import IMAGE_SUFFIXES

_PARTS = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}
_SHOWN = 10


class Item(NamedTuple):
    """One listed image; `part` is train or test, `group` what the source says of it, `row` its place in a table."""

    id: str
    path: Path
    label: str
    part: str
    group: str | None = None
    row: int = -1


class Encoded(Sequence[bytes]):
    """Image files that lie in a table: each is read when it is asked for, and none is kept.

    Args:
        read: gives the bytes of the image file in a row of the table.
        rows: the rows of the table (n), in order.
    """

    def __init__(self, read: Callable[[int], bytes], rows: NDArray[np.int64]) -> None:
        self._read, self._rows = read, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> Encoded: ...
    def __getitem__(self, at: SupportsIndex | slice) -> bytes | Encoded:
        return (
            Encoded(self._read, self._rows[at])
            if isinstance(at, slice)
            else self._read(int(self._rows[at]))
        )

    def take(self, at: NDArray[np.int64] | Sequence[int]) -> Encoded:
        """The images at these positions, in this order."""
        return Encoded(self._read, self._rows[np.asarray(at, dtype=np.int64)])


class Listing(NamedTuple):
    """The images of a source, and sentences about what was joined or ignored."""

    items: list[Item]
    notes: list[str]
    classes: tuple[str, ...] = ()
    """Official order of the class names; empty = natural order of the labels."""
    encoded: Encoded | None = None
    """Every image of a table, where the items are rows and not files; `Item.path` is then only a name."""


class Pixels(NamedTuple):
    """Decoded images of one part of a data set."""

    images: NDArray[np.uint8]
    """(n, h, w) or (n, h, w, 3)."""
    labels: NDArray[np.int64]
    """(n,)"""
    ids: tuple[str, ...]


class Decoded(NamedTuple):
    """A data set whose official files hold pixels and no image files."""

    train: Pixels
    test: Pixels
    classes: tuple[str, ...]
    notes: list[str]


def shorten(names: Iterable[str]) -> str:
    """The first few names of many, and how many more there are."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )


def list_folder(root: Path) -> Listing:
    """Images in class folders (at any depth) below `root`, or below its train/ [val/] [test/].

    Ids are POSIX paths relative to `root`. Hidden files are not looked at; other files that are no images, and
    images outside of class folders, are counted in the notes. `val` belongs to `train`.

    Raises:
        DataError: no such folder, one that cannot be read, no class folders, or a class folder without images.
    """
    if not os.path.isdir(root):
        is_file = os.path.isfile(root)
        raise DataError(
            "data.root is not a folder" if is_file else "the image folder does not exist",
            where=root,
            fix='for a CSV file set data.source = "csv"' if is_file else "correct data.root",
        )
    folders, outside = _entries(root)
    parts, notes = _parts_of(root, folders)
    items, others = [], []
    for folder in parts or [root]:
        class_folders, files = _entries(folder) if parts else (folders, [])
        outside += files
        if not class_folders:
            raise DataError(
                "there are no class folders",
                where=folder,
                fix="make one folder per class, with its images",
            )
        for class_folder in class_folders:
            images, rest = _walk(class_folder)
            others += rest
            if not images:
                raise DataError(
                    "the class folder has no images",
                    where=class_folder,
                    fix="add images or remove it",
                )
            part = _PARTS[folder.name.lower()] if parts else "train"
            items += [
                Item(path.relative_to(root).as_posix(), path, class_folder.name, part)
                for path in images
            ]
    return Listing(items, notes + _ignored(outside, others))


def _ignored(outside: list[Path], others: list[Path]) -> list[str]:
    """Notes about files that are not used."""
    notes = []
    strays = [path.name for path in outside if _is_image(path)]
    if strays:
        notes.append(
            f"{len(strays)} images outside of class folders were ignored: {shorten(strays)}"
        )
    others = others + [path for path in outside if not _is_image(path)]
    if others:
        kinds = sorted({path.suffix.lower() or path.name for path in others})
        notes.append(f"{len(others)} files that are not images were ignored: {shorten(kinds)}")
    return notes


def _parts_of(root: Path, folders: list[Path]) -> tuple[list[Path], list[str]]:
    """The folders train, val, test if the root is split into them; a class may have such a name if it holds images."""
    parts = []
    for folder in folders:
        if folder.name.lower() in _PARTS:
            inside, files = _entries(folder)
            if inside and not any(map(_is_image, files)):
                parts.append(folder)
    if not parts:
        return [], []
    if len(parts) < len(folders) or "train" not in {folder.name.lower() for folder in parts}:
        raise DataError(
            "the folder is neither split nor one folder per class",
            where=root,
            expected="only class folders, or only train/ [val/] [test/] with class folders in each",
            got=shorten(f"{folder.name}/" for folder in folders),
        )
    joined = [folder.name for folder in parts if _PARTS[folder.name.lower()] != folder.name.lower()]
    return parts, [
        f"{name}/ was joined with train/: each fold takes its own rows to choose on"
        for name in joined
    ]


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files and other files at any depth; links are followed, but no folder is entered twice."""
    images: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()
    ahead = [folder]
    while ahead:
        here = ahead.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = _entries(here)
        ahead += reversed(folders)
        for path in files:
            (images if _is_image(path) else others).append(path)
    return images, others


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files in a folder, sorted by name, without hidden ones."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(
            "cannot read the folder", where=folder, got=error.strerror or error
        ) from None
    for name in names:
        # Such names can be opened but neither printed nor written into a run's files.
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataError(
                "a file name is not valid Unicode",
                where=f"{folder}: {name!a}",
                fix="rename the file",
            )
    paths = [folder / name for name in names if not name.startswith(".") and name != "__MACOSX"]
    return [path for path in paths if os.path.isdir(path)], [
        path for path in paths if not os.path.isdir(path)
    ]


def list_csv(table: Path) -> Listing:
    """Rows `path,label[,group][,split]` of a CSV file (UTF-8, header first); paths are relative to its folder.

    Ids are the paths as POSIX, with `.` and `..` resolved. Other columns are not looked at.

    Raises:
        DataError: the file cannot be read, columns or cells are missing, a path stands there twice or does not exist.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
            _require_columns(columns, table)
            items = [_item(row, table, reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "cannot read the CSV file", where=table, got=getattr(error, "strerror", "") or error
        ) from None
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError("paths stand in the CSV file twice", where=table, got=shorten(twice))
    absent = [item.id for item in items if not item.path.is_file()]
    if absent:
        raise DataError(
            f"{len(absent)} files of the CSV file do not exist", where=table, got=shorten(absent)
        )
    return Listing(items, [])


def _require_columns(columns: list[str], table: Path) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise DataError(
            f"the CSV file has no column {' and '.join(missing)}",
            where=table,
            expected="path,label[,group][,split]",
            got=",".join(columns) or "an empty file",
        )


def _item(row: dict[str, str | None], table: Path, line: int) -> Item:
    """One row; csv puts surplus cells under the key None, and None into missing cells."""
    surplus = None in row
    cells = {name: (row[name] or "").strip() for name in row if name is not None}
    part = cells.get("split", "train").lower()
    needed = [name for name in ("path", "label", "group") if name in cells]
    if surplus or part not in _PARTS or not all(cells[name] for name in needed):
        raise DataError(
            "the CSV file has a row that cannot be used",
            where=f"{table} line {line}",
            expected=f"{len(cells)} cells, {', '.join(needed)} not empty, split one of {', '.join(_PARTS)}",
            got=",".join(cells.values()) + (" and surplus cells" if surplus else ""),
        )
    name = Path(os.path.normpath(cells["path"])).as_posix()
    return Item(name, table.parent / name, cells["label"], _PARTS[part], cells.get("group"))
