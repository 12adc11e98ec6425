"""Images in class folders, and the types that every source returns.

Nothing here opens an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from threefold.counting import report
from threefold.data.split_names import PARTS, hold_the_same, split_of
from threefold.data.walk import (
    RUNS,
    LeftOut,
    describe_left_out,
    is_image,
    is_tool_folder,
    list_entries,
    list_names,
    walk_images,
    walk_names,
)
from threefold.errors import DataError, MissingImageError, shorten
from threefold.names import count_of, normalise_name
from threefold.suffixes import TABLES


class ListedImage(NamedTuple):
    """One image of a source, not opened yet."""

    id: str
    path: str
    """Of the file. A text, since a million objects of pathlib take a gigabyte."""
    label: str
    part: str
    """`train` or `test`."""
    group: str | None = None
    row: int = -1
    """Row in a table, for an image that is no file of its own."""
    fold: str | None = None
    """The user's own fold, for a training image of a table with a fold column."""
    labels: tuple[str, ...] | None = None
    """All its labels, where images have any number of them; `label` then names them in one."""


class EncodedImages(Sequence[bytes]):
    """Image files inside a table, each read on access.

    Args:
        read: returns the encoded image of a row.
        rows: rows of the table (n,).
        identify: returns what changes when the image of a row may have changed, without reading
            it; None = nothing is known.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        rows: NDArray[np.int64],
        identify: Callable[[int], bytes] | None = None,
    ) -> None:
        self._read, self._rows, self._identify = read, rows, identify

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> EncodedImages: ...
    def __getitem__(self, at: SupportsIndex | slice) -> bytes | EncodedImages:
        if isinstance(at, slice):
            return EncodedImages(self._read, self._rows[at], self._identify)
        return self._read(int(self._rows[at]))

    def take(self, at: NDArray[np.int64] | Sequence[int]) -> EncodedImages:
        """Select the images at these positions, in this order."""
        rows = self._rows[np.asarray(at, dtype=np.int64)]
        return EncodedImages(self._read, rows, self._identify)

    def identity(self, at: int) -> bytes:
        """Return what changes when the image at a position may have changed; empty if unknown."""
        return self._identify(int(self._rows[at])) if self._identify is not None else b""


class FilePaths(Sequence[Path]):
    """Paths of files, which are kept as texts and become objects on access.

    Args:
        names: the paths (n,).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: SupportsIndex) -> Path: ...
    @overload
    def __getitem__(self, at: slice) -> FilePaths: ...
    def __getitem__(self, at: SupportsIndex | slice) -> Path | FilePaths:
        return FilePaths(self.names[at]) if isinstance(at, slice) else Path(self.names[at])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FilePaths):
            return self.names == other.names
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self.names)

    def take(self, at: NDArray[np.int64] | Sequence[int]) -> FilePaths:
        """Select the paths at these positions, in this order."""
        return FilePaths([self.names[i] for i in at])


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
    """(n,), or zeros and ones (n, k) where images have any number of labels."""
    ids: tuple[str, ...]


class ArrayDataset(NamedTuple):
    """A data set whose official files hold pixels instead of image files."""

    train: ImageArrays
    test: ImageArrays | None
    classes: tuple[str, ...]
    notes: list[str]


def contents_of(
    items: Sequence[ListedImage], encoded: EncodedImages | None
) -> EncodedImages | None:
    """Return the encoded images of table rows; None if the items are files."""
    return None if encoded is None else encoded.take([item.row for item in items])


def find_absent(items: Iterable[ListedImage]) -> list[str]:
    """Ids of items whose file does not exist."""
    return [item.id for item in items if not os.path.isfile(item.path)]


def read_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        MissingImageError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingImageError("cannot read the file", where=path, got=error) from None


# Folders


def list_folder(root: Path) -> Listing:
    """List the images in class folders (at any depth) in `root`, or in its train/ [val/] [test/].

    Ids are POSIX paths relative to `root`. The notes count what is left out: hidden files, runs of
    threefold, other files that are not images, and images outside class folders. `val` is part of
    `train`; `split_names` has the spellings.

    Raises:
        DataError: there is no such folder, it cannot be read, it has no class folders, a class
            folder has no images, or the folders read like parts of a data set.
    """
    if os.path.isfile(root):
        raise DataError(
            "a file and no folder of images",
            where=root,
            fix='for a table name it .csv or .parquet; in a recipe also set data.source = "csv"',
        )
    if not os.path.isdir(root):
        raise DataError(
            "the image folder does not exist",
            where=root,
            fix="give the path of a folder with one folder of images per class (in a recipe, "
            "data.root)",
        )
    left_out: list[LeftOut] = []
    folders, files = list_entries(root, left_out)
    folders = [folder for folder in folders if not _holds_runs(folder, left_out)]
    splits = _find_splits(root, folders)
    notes = [
        f"{split.folder.relative_to(root)}/ was joined with train/: each fold takes its own rows "
        "to choose on"
        for split in splits
        if split.name == "val"
    ]
    items: list[ListedImage] = []
    skip = len(os.path.join(str(root), ""))
    outside = list(files)
    for split in splits or [_Split(root, "train")]:
        class_folders = folders
        if splits:
            class_folders, files = list_entries(split.folder, left_out)
            outside += files
        for class_folder in _class_folders(split.folder, class_folders):
            images = walk_names(str(class_folder), left_out)
            if not images:
                fix = "add images or remove it"
                raise DataError("the class folder has no images", where=class_folder, fix=fix)
            label, part = normalise_name(class_folder.name), PARTS[split.name]
            for path in images:
                name = path[skip:] if os.sep == "/" else path[skip:].replace(os.sep, "/")
                items.append(ListedImage(name, path, label, part))
            report("images listed", len(items))
    _refuse_hidden_classes(left_out, [root, *(split.folder for split in splits)])
    return Listing(items, notes + _note_strays(outside) + describe_left_out(left_out, outside))


class _Split(NamedTuple):
    """The class folders of one split."""

    folder: Path
    name: str
    """train, val or test."""


def _no_class_folders(folder: Path) -> DataError:
    """Say what a folder without class folders holds instead, and what can be done with that."""
    images = sum(map(is_image, list_entries(folder)[1]))
    if not images:
        fix = "make one folder per class, with its images"
        return DataError("there are no class folders", where=folder, fix=fix)
    tables: list[str] = []
    with suppress(DataError):  # nobody asked for the folder above
        beside = list_entries(folder.absolute().parent)[1]
        tables = [file.name for file in beside if file.suffix.lower() in TABLES]
    return DataError(
        "there are no class folders",
        where=folder,
        expected="one folder per class, or a table with the label of each image",
        got=f"{count_of(images, 'image')} without labels",
        fix=(f"fit a table beside it: {shorten(tables)}; " if tables else "")
        + f"to classify these images: threefold predict MODEL {folder}",
    )


def _class_folders(folder: Path, folders: list[Path]) -> list[Path]:
    """Return the class folders in a folder of a split, or in the root.

    Raises:
        DataError: there are none, or they read like parts of a data set.
    """
    if not folders:
        raise _no_class_folders(folder)
    contents = []
    for class_folder in folders:
        inside, files = list_entries(class_folder)
        if any(map(is_image, files)):
            return folders
        contents.append([path.name for path in inside])
    if len(folders) == 1 and len(contents[0]) > 1:
        raise DataError(
            "there is only one class folder, and it holds folders",
            where=folder,
            expected="one folder per class",
            got=f"{folders[0].name}/ with {shorten(f'{name}/' for name in contents[0])}",
            fix=f"give {folders[0]} in place of {folder}",
        )
    if hold_the_same(contents):
        names = shorten(f"{path.name}/" for path in folders)
        raise DataError(
            "the folders read like parts of one data set, not like classes",
            where=folder,
            expected="one folder per class, or train/ [val/] [test/] with class folders in each",
            got=f"{names}, which all hold {shorten(f'{name}/' for name in contents[0])}",
            fix="name the parts train/, val/ and test/; for folds of your own list the images in a "
            "CSV file with a column for data.fold_column",
        )
    return folders


def _holds_runs(folder: Path, left_out: list[LeftOut]) -> bool:
    """Whether a folder holds nothing but runs, which are added to what is left out."""
    with suppress(OSError), os.scandir(folder) as found:
        # Most folders have an image, which tells at once.
        if any(entry.is_file() and not entry.name.startswith(".") for entry in found):
            return False
    inside: list[LeftOut] = []
    entries = list_names(str(folder), inside)
    runs = [entry for entry in inside if entry.reason == RUNS]
    if not runs or any(entries):
        return False
    left_out += runs
    return True


def _refuse_hidden_classes(left_out: list[LeftOut], parents: list[Path]) -> None:
    """Refuse a hidden folder with images beside the class folders: it may be a class."""
    for path, _ in left_out:
        is_beside = path.parent in parents and path.name.startswith(".") and path.is_dir()
        if is_beside and not is_tool_folder(path) and walk_images(path, []):
            raise DataError(
                "a hidden folder beside the class folders holds images",
                where=path,
                expected="class folders whose names do not begin with a dot",
                fix="rename it if it is a class, else move it away",
            )


def _note_strays(outside: list[Path]) -> list[str]:
    """Note images outside class folders."""
    strays = [path.name for path in outside if is_image(path)]
    if not strays:
        return []
    images = count_of(
        len(strays), "image outside class folders was", "images outside class folders were"
    )
    return [f"{images} ignored: {shorten(strays)}"]


def _find_splits(root: Path, folders: list[Path]) -> list[_Split]:
    """Find the folders of splits; none if `root` holds class folders.

    A class may be called `test` if its folder holds images directly, unless there is a `train`
    beside it.

    Raises:
        DataError: some folders are splits and others are not, or splits have no class folders.
    """
    named = {folder: split_of(folder.name) for folder in folders}
    splits = []
    flat = []
    for folder, name in named.items():
        if name is None:
            continue
        found = _descend(folder, name)
        if found is not None:
            splits.append(_Split(found, name))
        else:
            flat.append(folder)
    names = set(named.values())
    is_split = bool(splits) or ("train" in names and len(names - {None}) > 1)
    if not is_split:
        return []
    if flat or len(splits) < len(folders) or "train" not in {split.name for split in splits}:
        fix = "make class folders in each; move what belongs to neither away"
        if flat:
            fix = (
                f"make one folder per class in {shorten(f'{path.name}/' for path in flat)}, or "
                "list the images in a CSV file path,label,split; move images without labels away"
            )
        raise DataError(
            "the folder is neither split nor one folder per class",
            where=root,
            expected="only class folders, or only train/ [val/] [test/] with class folders in each",
            got=shorten(f"{folder.name}/" for folder in folders),
            fix=fix,
        )
    return splits


def _descend(folder: Path, name: str) -> Path | None:
    """Return the folder of a split's class folders, which archives wrap once more, or None."""
    inside, files = list_entries(folder)
    if not inside or any(map(is_image, files)):
        return None
    if len(inside) == 1 and split_of(inside[0].name) == name:
        return _descend(inside[0], name)
    return folder
