"""Folders on object stores (S3, GCS and what else fsspec knows), named by URL in place of a path.

An object store has no rename and no locks, but puts a whole object or none. So a folder there is
copied to a local one, worked on, and copied back; what completes it is copied last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from threefold.errors import RunError, ThreefoldError
from threefold.extras import require_package
from threefold.files import cache_folder, temporary_path
from threefold.json_files import write_json

EXTRAS: Final = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra that each scheme needs; those missing here need a package of fsspec's."""

SCHEMES: Final = (*EXTRAS, "abfs", "abfss", "az", "hdfs", "memory")
"""The schemes of URLs that name a folder on an object store."""

_URL = re.compile(rf"({'|'.join(SCHEMES)}):/{{1,2}}([^/].*)")

_BATCH: Final = 256
"""Objects copied at a time."""

INDEX: Final = ".objects.json"
"""File of a local copy: what the objects were when they were copied."""


def url_of(path: str | Path) -> str:
    """Return the URL that a path is, also as pathlib writes it, with one slash; empty if none."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else ""


def local_copy_of(url: str, kind: str) -> Path:
    """Return the folder of the user's cache for the copy of a folder on an object store."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2]) or "root"
    return cache_folder(kind) / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class StoredObject:
    """An object of a folder.

    Attributes:
        size: in bytes.
        mark: what changes when it is written anew: its ETag, or its time.
    """

    size: int
    mark: str


def _stored(info: Mapping[str, Any]) -> StoredObject:
    """What fsspec says about an object."""
    names = ("ETag", "etag", "md5Hash", "LastModified", "created", "mtime")
    mark = next((info[name] for name in names if info.get(name)), "")
    return StoredObject(int(info.get("size") or 0), str(mark).strip('"'))


class ObjectFolder:
    """A folder on an object store.

    Args:
        url: such as s3://BUCKET/NAME. Credentials and endpoint are those that fsspec finds
            (for S3: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws).

    Raises:
        MissingExtraError: the package for such URLs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        scheme, _, self._root = url.partition("://")
        extra, fix = EXTRAS.get(scheme, ""), "pip install fsspec"
        fsspec = require_package("fsspec", f"{scheme}:// needs", extra=extra, fix=fix)
        try:
            # Objects change behind this process, so nothing that was listed is kept.
            options = {"use_listings_cache": False}
            self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        except ImportError:
            package = "s3fs" if extra == "s3" else "gcsfs" if extra == "gcs" else "its package"
            require_package(package, f"{scheme}:// needs", extra=extra, fix=fix)
            raise

    def list(self, below: str = "") -> dict[str, StoredObject]:
        """Return the objects of the folder, or of one below it, by their names in the folder.

        Raises:
            RunError: they cannot be listed, or the copy of one would be outside of a local folder.
        """
        start = f"{self._root}/{below}".rstrip("/")
        with self._explaining(start):
            try:
                found = self._files.find(start, detail=True)
            except FileNotFoundError:
                return {}
        prefix = self._root.rstrip("/") + "/"
        objects = {}
        for path, info in found.items():
            name = path.lstrip("/").removeprefix(prefix.lstrip("/"))
            if name.endswith("/"):  # an empty object that consoles make to show a folder
                continue
            self._check_name(name)
            objects[name] = _stored(info)
        return objects

    def _check_name(self, name: str) -> None:
        """Refuse a name that is no path below a folder: a store takes any text as a name.

        Raises:
            RunError: it is none.
        """
        if {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
            raise RunError(
                "an object's name is no path below a folder",
                where=self.url,
                expected="names without empty parts, `.`, `..` and backslashes",
                got=repr(name),
                fix="rename or delete the object",
            )

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Copy objects into a local folder; each local file is whole or not there.

        Raises:
            RunError: an object cannot be read, or a file not written.
        """
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            targets = [folder / name for name in batch]
            parts = [*map(temporary_path, targets)]
            with self._explaining(batch[0]):
                for path in targets:
                    path.parent.mkdir(parents=True, exist_ok=True)
                self._files.get([f"{self._root}/{name}" for name in batch], [*map(str, parts)])
                for part, path in zip(parts, targets, strict=True):
                    os.replace(part, path)

    def put(self, name: str, folder: Path) -> StoredObject:
        """Copy a local file to the object of the same name, and look whether it is there.

        Raises:
            RunError: the object cannot be written.
        """
        with self._explaining(name):
            content = (folder / name).read_bytes()
            self._files.pipe_file(f"{self._root}/{name}", content)
            written = _stored(self._files.info(f"{self._root}/{name}"))
        if written.size != len(content):
            raise RunError(
                "an object was not written whole",
                where=f"{self.url}/{name}",
                expected=f"{len(content):,} bytes",
                got=f"{written.size:,}",
                fix="run the same command again",
            )
        return written

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects that may be gone already.

        Raises:
            RunError: one cannot be deleted.
        """
        for name in names:
            with self._explaining(name):
                try:
                    self._files.rm_file(f"{self._root}/{name}")
                except FileNotFoundError:
                    continue

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        """Say in one line what an object store refuses."""
        try:
            yield
        except ThreefoldError:
            raise
        except FileNotFoundError:
            if name.startswith(self._root):
                raise
            raise RunError("no such bucket or object", where=f"{self.url}/{name}") from None
        except Exception as error:  # of as many kinds as there are stores
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                "the object store does not answer or refuses",
                where=self.url,
                got=f"{type(error).__name__}: {reason}",
                fix="check the name of the bucket, the credentials and the endpoint (for S3: "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)",
            ) from None


class LocalCopy:
    """A local copy of a folder on an object store, which knows what it has copied.

    Args:
        store: the folder there.
        folder: the local one.
    """

    def __init__(self, store: ObjectFolder, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._index: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if saved["url"] == store.url:
                self._index = saved["objects"]

    def pull(self, objects: dict[str, StoredObject]) -> list[str]:
        """Copy those of some objects that are new or changed there; returns their names."""
        wanted = [name for name, there in objects.items() if not self._has(name, there)]
        self.store.get(wanted, self.folder)
        for name in wanted:
            self._note(name, objects[name])
        if wanted:
            self._save()
        return wanted

    def push(self, names: Sequence[str]) -> list[str]:
        """Copy those of some files that are new or changed here, in their order."""
        changed = [name for name in names if self._is_changed(name)]
        for name in changed:
            self._note(name, self.store.put(name, self.folder))
        if changed:
            self._save()
        return changed

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects whose files were deleted here."""
        self.store.delete(names)
        for name in names:
            self._index.pop(name, None)
        self._save()

    def drop(self, names: Sequence[str]) -> None:
        """Delete files whose objects were deleted there."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            self._index.pop(name, None)
        self._save()

    @property
    def known(self) -> set[str]:
        """Names of what was copied, here or there."""
        return set(self._index)

    def _has(self, name: str, there: StoredObject) -> bool:
        entry, path = self._index.get(name), self.folder / name
        return (
            entry is not None
            and entry[:2] == [there.size, there.mark]
            and path.is_file()
            and path.stat().st_size == there.size
        )

    def _is_changed(self, name: str) -> bool:
        entry = self._index.get(name)
        return entry is None or entry[2] != _stamp(self.folder / name)

    def _note(self, name: str, there: StoredObject) -> None:
        self._index[name] = [there.size, there.mark, _stamp(self.folder / name)]

    def _save(self) -> None:
        write_json(self.folder / INDEX, {"url": self.store.url, "objects": self._index})


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written anew."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
