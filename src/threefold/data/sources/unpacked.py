"""A folder of images that comes as an archive, unpacked into the cache."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from threefold.data.sources.archives import unpack
from threefold.data.sources.folder import Listing, list_folder
from threefold.data.split_names import split_of
from threefold.data.walk import is_image, list_entries
from threefold.errors import DataError
from threefold.files import cache_folder, real_path, sha256
from threefold.suffixes import is_archive


def list_folder_or_archive(path: Path) -> Listing:
    """List the images of a folder, or of an archive of one; see `list_folder`.

    An archive is unpacked once, into the cache, in a folder named after the SHA-256 of its content.
    Nothing is written beside it. A single folder around all others does not count.

    Raises:
        DataError: the archive cannot be unpacked, or the folder cannot be used.
    """
    if not is_archive(path):
        return list_folder(path)
    listing = list_folder(unpacked_folder(path))
    note = f"the archive is unpacked in {cache_folder('archives') / _digest(path)}"
    return listing._replace(notes=[note, *listing.notes])


def unpacked_folder(path: Path) -> Path:
    """Unpack an archive, unless that is done; return the folder that holds its content.

    Raises:
        DataError: the archive cannot be unpacked.
    """
    folder = cache_folder("archives") / _digest(path)
    unpack(path, folder)
    return _without_wrapper(folder)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, read once as long as it does not change."""
    try:
        status = path.stat()
        return _digest_of(real_path(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError("cannot read the archive", where=path, got=error) from None


@lru_cache(maxsize=64)
def _digest_of(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def _without_wrapper(folder: Path) -> Path:
    """Return the folder itself, or the single one in it that holds folders but no images."""
    folders, files = list_entries(folder)
    if len(folders) != 1 or any(map(is_image, files)) or split_of(folders[0].name) is not None:
        return folder
    inside, files = list_entries(folders[0])
    if not inside or any(map(is_image, files)):
        return folder
    return _without_wrapper(folders[0])
