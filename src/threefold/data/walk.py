"""Find the image files in a folder: one walk for every verb, which counts what it leaves out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from threefold.data.content_kinds import HEAD, find_format
from threefold.data.group_file import GROUP_FILE
from threefold.data.images import IMAGE_SUFFIXES
from threefold.errors import DataError, shorten

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
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError("cannot read the folder", where=folder, got=error) from None
    folders: list[Path] = []
    files: list[Path] = []
    for name in names:
        # Such a file can be opened, but its name cannot be printed or written to a run's files.
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            where = f"{folder}: {name!a}"
            raise DataError("a file name is not valid Unicode", where=where, fix="rename the file")
        path = folder / name
        is_folder = os.path.isdir(path)
        reason = ""
        if name.startswith(".") or name.lower() in _SYSTEM_NAMES:
            reason = HIDDEN
        elif is_folder and is_run_folder(path):
            reason = RUNS
        elif not is_folder and not os.path.isfile(path) and not os.path.islink(path):
            reason = NOT_REGULAR
        if not reason:
            (folders if is_folder else files).append(path)
        elif left_out is not None:
            left_out.append(LeftOut(path, reason))
    return folders, files


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
    if re.search("[a-z]", suffix):
        return suffix in IMAGE_SUFFIXES
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
    images: list[Path] = []
    seen: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        current = stack.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = list_entries(current, left_out)
        stack += reversed(folders)
        for path in files:
            if is_image(path):
                images.append(path)
            else:
                left_out.append(LeftOut(path, OTHER))
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
    return f"{len(paths)} {reason} were ignored: {shorten(sorted(names))}"
