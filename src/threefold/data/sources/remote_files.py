"""Large files at addresses, such as tar shards: downloaded once into the cache, and resumed."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from threefold.data.download import download_file
from threefold.data.published import RemoteFile
from threefold.data.sources.addresses import check_address, name_address
from threefold.errors import DataError
from threefold.files import cache_folder, temporary_path

FILES = "files"
"""Kind of the cache's folder."""


def fetch_file(address: str) -> Path:
    """Return the local copy of a file at an address.

    Of http and https an interrupted download goes on where it stopped; of a bucket the file is
    begun anew.

    Raises:
        DataError: it cannot be downloaded, or the cache cannot be written.
    """
    check_address(address, address)
    digest = hashlib.sha256(name_address(address).encode()).hexdigest()[:16]
    folder = cache_folder(FILES) / digest
    name = os.path.basename(urlsplit(address).path) or "file"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError("cannot write the cache", where=folder, got=error) from None
    if address.lower().startswith(("http:", "https:")):
        return download_file(RemoteFile(name, (address,)), folder)
    return _fetch_from_bucket(address, folder / name)


def _fetch_from_bucket(address: str, target: Path) -> Path:
    part = temporary_path(target)
    try:
        fsspec: Any = importlib.import_module("fsspec")
        with fsspec.open(address, "rb") as stream, open(part, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        os.replace(part, target)
    except Exception as error:  # each package of a bucket has errors of its own
        part.unlink(missing_ok=True)
        raise DataError(
            "cannot download the file",
            where=address.partition("?")[0],
            got=f"{type(error).__name__}: {error}",
            fix="pip install fsspec and its package for the bucket, such as s3fs or gcsfs"
            if isinstance(error, ImportError)
            else "check the address and the rights to read it",
        ) from None
    return target
