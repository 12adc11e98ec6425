"""Find the image files in a folder: one walk for every verb, which counts what it leaves out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from threefold.data.content_kinds import HEAD, find_format
from threefold.data.group_file import GROUP_FILE
from threefold.data.images import IMAGE_SUFFIXES
from threefold.errors import DataError, shorten
from threefold.names import count_of

_SYSTEM_NAMES = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__"),
}
"""Folders that systems and other programs keep beside files (lower case)."""

_TOOL_NAMES = {
    *(".git", ".hg", ".svn", ".dvc", ".ds_store", ".idea", ".vscode", ".venv", ".cache"),
    *(".ipynb_checkpoints", ".thumbnails", ".thumbs", ".picasaoriginals", ".appledouble"),
    *(".trash", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems", ".sync"),
    *(".documentrevisions-v100", ".dropbox.cache", ".stfolder", ".stversions"),
}
"""Hidden folders that never hold a class (lower case)."""

HIDDEN = "hidden files and folders"
RUNS = "folders of runs"
NOT_REGULAR = "pipes and devices"
OTHER = "files that are not images"
_ONE = {
    HIDDEN: "hidden file or folder",
    RUNS: "folder of runs",
    NOT_REGULAR: "pipe or device",
    OTHER: "file that is not an image",
}
"""What one of each kind is called."""


class LeftOut(NamedTuple):
    """A file or a folder that is not read."""

    path: Path
    reason: str


def list_entries(
    folder: Path, left_out: list[LeftOut] | None = None
) -> tuple[list[Path], list[Path]]:
    """List folders and files in a folder, sorted by name.

    Hidden entries, those of the system and run folders of threefold are left out.

    Args:
        folder: the folder.
        left_out: what is left out is added to it.

    Raises:
        DataError: the folder cannot be read, or a name is not valid Unicode.
    """
    folders, files = list_names(str(folder), left_out)
    return [folder / name for name in folders], [folder / name for name in files]


def list_names(folder: str, left_out: list[LeftOut] | None = None) -> tuple[list[str], list[str]]:
    """List the names of folders and files, as `list_entries`; quick for a million files.

    The kind of an entry comes with its name, so that no file is looked at.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError("cannot read the folder", where=folder, got=error) from None
    for entry in entries:
        name = entry.name
        # Such a file can be opened, but its name cannot be printed or written to a run's files.
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            where = f"{folder}: {name!a}"
            raise DataError("a file name is not valid Unicode", where=where, fix="rename the file")
        is_folder = _is_kind(entry.is_dir)
        reason = ""
        if name[0] == "." or name.lower() in _SYSTEM_NAMES:
            reason = HIDDEN
        elif is_folder and is_run_folder(Path(entry.path)):
            reason = RUNS
        elif not is_folder and not _is_kind(entry.is_file) and not entry.is_symlink():
            reason = NOT_REGULAR
        if not reason:
            (folders if is_folder else files).append(name)
        elif left_out is not None:
            left_out.append(LeftOut(Path(entry.path), reason))
    return folders, files


def _is_kind(question: Callable[[], bool]) -> bool:
    """Ask for the kind of an entry; a link in a circle has none."""
    try:
        return question()
    except OSError:
        return False


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run of threefold, which is never data.

    The plan of a run may write its file of groups before there is a recipe.
    """
    if (folder / "recipe.toml").is_file():
        return True
    return (folder / GROUP_FILE).is_file() and os.listdir(folder) == [GROUP_FILE]


def is_tool_folder(folder: Path) -> bool:
    """Whether a hidden folder is one that version control, viewers or systems make."""
    return folder.name.lower() in _TOOL_NAMES


def is_image(path: Path) -> bool:
    """Whether a file is an image: by its suffix, or by its first bytes if it has none.

    A number after a dot, as in `IMG.0042`, is no suffix.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if re.search("[a-z]", suffix):
        return False
    try:
        # Reading a pipe or a device could block for ever.
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return find_format(stream.read(HEAD)) != ""
    except OSError:
        return False


def walk_images(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    """List the image files at any depth, sorted within each folder.

    Links are followed, and each folder is entered once.

    Args:
        folder: where to begin.
        left_out: what is left out is added to it.

    Raises:
        DataError: a folder cannot be read, or a name is not valid Unicode.
    """
    return [Path(name) for name in walk_names(str(folder), left_out)]


def walk_names(folder: str, left_out: list[LeftOut]) -> list[str]:
    """List the paths of image files as texts, as `walk_images`."""
    images: list[str] = []
    seen: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        current = stack.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = list_names(current, left_out)
        stack += [os.path.join(current, name) for name in reversed(folders)]
        prefix = os.path.join(current, "")
        for name in files:
            path = prefix + name
            if name[name.rfind(".") :].lower() in IMAGE_SUFFIXES or is_image(Path(path)):
                images.append(path)
            else:
                left_out.append(LeftOut(Path(path), OTHER))
    return images


def iterate_images(folder: Path, left_out: list[LeftOut]) -> Iterator[Path]:
    """Yield the image files at any depth in the order of their paths, a folder at a time.

    Args:
        folder: where to begin.
        left_out: what is left out is added to it.

    Raises:
        DataError: a folder cannot be read, or a name is not valid Unicode.
    """
    seen: set[tuple[int, int]] = set()
    stack: list[tuple[Path, bool]] = [(folder, True)]  # the next one last
    while stack:
        path, is_folder = stack.pop()
        if not is_folder:
            if is_image(path):
                yield path
            else:
                left_out.append(LeftOut(path, OTHER))
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = list_entries(path, left_out)
        entries = [*((path, True) for path in folders), *((path, False) for path in files)]
        stack += sorted(entries, reverse=True)


def describe_left_out(left_out: Iterable[LeftOut], outside: Iterable[Path] = ()) -> list[str]:
    """Return one sentence for each reason, with the number and the kinds of what was left out.

    Args:
        left_out: what a walk has left out. Hidden files that are not images are not worth a word.
        outside: further files, of which those count that are not images.
    """
    by_reason: dict[str, list[Path]] = {}
    for path, reason in left_out:
        if reason != HIDDEN or path.is_dir() or is_image(path):
            by_reason.setdefault(reason, []).append(path)
    others = [path for path in outside if not is_image(path)]
    if others:
        by_reason.setdefault(OTHER, []).extend(others)
    return [_describe(reason, paths) for reason, paths in sorted(by_reason.items())]


def _describe(reason: str, paths: list[Path]) -> str:
    names = {path.name for path in paths}
    if reason == OTHER:
        names = {path.suffix.lower() or path.name for path in paths}
    ignored = count_of(len(paths), f"{_ONE[reason]} was", f"{reason} were")
    return f"{ignored} ignored: {shorten(sorted(names))}"
