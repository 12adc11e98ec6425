"""Folders of this machine, for people to pick their images in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from threefold.serving.limits import Refusal
from threefold.suffixes import ARCHIVES, ARRAYS, TABLES

FILES: Final = (*ARCHIVES, *TABLES, ARRAYS)
"""Suffixes of the files that are listed: archives, tables and arrays."""
LISTED: Final = 500
"""Most entries of each kind."""


def list_places(path: str) -> dict[str, Any]:
    """List what a folder has that can be images for a run; hidden entries are left out.

    Args:
        path: the folder; empty = the current one.

    Returns:
        `path` in full, its `parent` (empty at the top), names of `folders` and `files`, and
        `more`: how many entries are not listed.

    Raises:
        Refusal: it is no folder, or cannot be read.
    """
    folder = Path(path).expanduser() if path else Path.cwd()
    try:
        folder = folder.resolve(strict=True)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be read"
        raise Refusal(404, "no_folder", f"{path}: {reason}"[:300]) from None
    folders = sorted((e.name for e in visible if _is_folder(e)), key=str.casefold)
    names = (e.name for e in visible if e.name.lower().endswith(FILES) and not _is_folder(e))
    files = sorted(names, key=str.casefold)
    return {
        "path": str(folder),
        "parent": "" if folder.parent == folder else str(folder.parent),
        "separator": os.sep,
        "folders": folders[:LISTED],
        "files": files[:LISTED],
        "more": max(0, len(folders) - LISTED) + max(0, len(files) - LISTED),
    }


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
