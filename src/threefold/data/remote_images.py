"""Images on an object store: copied once into the cache of each machine that needs them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final

from threefold.errors import DataError
from threefold.files import one_at_a_time, real_path
from threefold.object_store import LocalCopy, ObjectFolder, local_copy_of, url_of
from threefold.suffixes import ARCHIVES, ARRAYS, TABLES

BUCKETS: Final = "buckets"
"""Kind of the cache's folder."""

_ALONE: Final = (*ARCHIVES, ARRAYS)
"""Files that hold all images themselves; a table names files beside it."""


def local_path(root: str | Path) -> Path:
    """Return where images are on this machine, and copy those that a URL names.

    What was copied before is not copied again; what was changed or added since is.

    Args:
        root: a path, or the URL of a folder, an archive, a table or an npz file.

    Raises:
        DataError: there is nothing at the URL.
        RunError: the object store does not answer.
        MissingExtraError: the package for such URLs is not installed.
    """
    url = url_of(root)
    if not url:
        return Path(root).expanduser()
    name = ""
    if url.lower().endswith((*_ALONE, *TABLES)):
        url, _, name = url.rpartition("/")
    folder = local_copy_of(url, BUCKETS)
    with one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        copy = LocalCopy(ObjectFolder(url), folder)
        is_alone = name.lower().endswith(_ALONE)
        objects = copy.store.list(name if is_alone else "")
        if not objects or (name and name not in objects):
            raise DataError("nothing at this URL", where=root, expected="a folder, or a file")
        copy.pull(objects)
        if not is_alone:
            copy.drop([known for known in copy.known - objects.keys() if _is_inside(known)])
    return folder / name


def _is_inside(name: str) -> bool:
    """Whether a name is that of an image or table, which may have been deleted at the URL."""
    return not PurePosixPath(name).name.startswith(".")


def as_url(path: str, root: str | Path) -> str:
    """Return the URL of a file of a local copy; other paths as they are.

    Args:
        path: of the copy of `root`, or of a table in it.
        root: what `local_path` was given.
    """
    url = url_of(root)
    if not url:
        return path
    copy = real_path(local_copy_of(url, BUCKETS))
    if Path(path).is_relative_to(copy) and Path(path) != copy:
        return f"{url}/{Path(path).relative_to(copy).as_posix()}"
    return url
