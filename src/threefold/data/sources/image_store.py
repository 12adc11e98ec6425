"""Encoded images that were copied once into the cache: one file of bytes, an index, hashes.

Sources that a network serves, or that can be read quickly only from the beginning to the end, are
copied here image by image, in the order in which they come. A killed process leaves complete
entries, and the next one appends to them. Each image is compared with its SHA-256 whenever it is
read, and each line of the index with its checksum. Memory holds 48 bytes for each image.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError, MissingImageError
from threefold.files import cache_folder
from threefold.json_files import read_json, write_json

STORES: Final = "images"
"""Kind of the cache's folder."""

_BYTES, _INDEX, _DONE, _ORIGIN, _LOCK = "images.bin", "index.txt", "done.json", "origin.txt", "lock"
_DISK_RESERVE = 1 << 28
"""Bytes of the disk that stay free."""
_FLUSH_BYTES, _FLUSH_SECONDS = 8 << 20, 1.0
"""What a killed process loses at most."""


class StoredImage(NamedTuple):
    """A line of the index."""

    key: str
    """Unique name; a later line replaces an earlier one."""
    size: int
    """Bytes of the encoded image; 0 where there is none."""
    sha256: str
    """Of the encoded image, in hexadecimal; empty where there is none."""
    error: str = ""
    """Why there is no image; one line."""
    cells: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """What else the source has on the image, such as its label."""


class ImageStore:
    """A folder of the cache with the images of one source.

    Args:
        origin: what the images come from, in words that do not change; the folder is named after
            its SHA-256, and says it in `origin.txt`.
    """

    def __init__(self, origin: str) -> None:
        digest = hashlib.sha256(origin.encode("utf-8", "surrogatepass")).hexdigest()
        self.origin, self.folder = origin, cache_folder(STORES) / digest[:32]

    def is_complete(self) -> bool:
        """Whether the whole source was copied."""
        return (self.folder / _DONE).is_file()

    def facts(self) -> dict[str, Any]:
        """What `finish` recorded.

        Raises:
            DataError: the record is damaged.
        """
        try:
            tree = read_json(self.folder / _DONE)
        except Exception as error:
            raise self._damaged(str(error)) from None
        if not isinstance(tree, dict):
            raise self._damaged(f"{_DONE} is no table")
        return tree

    def entries(self) -> Iterator[StoredImage]:
        """Yield the complete lines of the index whose bytes are there.

        Raises:
            DataError: a line is damaged, or the file of images has lost its end.
        """
        for entry, _ in self._lines(self._bytes_on_disk()):
            yield entry

    def _bytes_on_disk(self) -> int:
        try:
            return (self.folder / _BYTES).stat().st_size
        except OSError:
            return 0

    def _lines(self, available: int) -> Iterator[tuple[StoredImage, int]]:
        """Yield the entries, each with the position in the index after its line.

        A killed process may leave half a line, and lines before the bytes of their images; both
        are at the end. In a finished store they are damage.
        """
        end, position = 0, 0
        try:
            stream = open(self.folder / _INDEX, "rb")  # noqa: SIM115 (closed by the `with` below)
        except OSError:
            return
        with stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    break
                entry = self._parse(line, number)
                end += entry.size
                if end > available:
                    break
                position += len(line)
                yield entry, position
            else:
                return
        if self.is_complete():
            raise self._damaged("a file has lost its end")

    def _parse(self, line: bytes, number: int) -> StoredImage:
        checksum, _, body = line[:-1].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            raise self._damaged(f"line {number} of {_INDEX} is not what was written")
        key, size, digest, error, cells = json.loads(body)
        return StoredImage(key, size, digest, error, cells)

    def _damaged(self, got: str) -> DataError:
        return DataError(
            "the cached copy of the images is damaged",
            where=self.folder,
            got=got,
            fix="remove this folder and run the same command again: the images are copied anew",
        )

    @contextmanager
    def appending(self) -> Iterator[StoreWriter]:
        """Open the store to append images; another process that does so is waited for.

        What a killed process left behind the last complete entry is cut off.

        Raises:
            DataError: the cache cannot be written, or is damaged.
        """
        from filelock import FileLock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / _LOCK):
                (self.folder / _ORIGIN).write_text(self.origin + "\n", encoding="utf-8")
                entries, size, position = 0, 0, 0
                for entry, position in self._lines(self._bytes_on_disk()):  # noqa: B007
                    entries, size = entries + 1, size + entry.size
                for name, end in ((_BYTES, size), (_INDEX, position)):
                    with open(self.folder / name, "ab") as file:
                        file.truncate(end)
                with (
                    open(self.folder / _BYTES, "ab") as images,
                    open(self.folder / _INDEX, "ab") as index,
                ):
                    writer = StoreWriter(self, images, index, entries)
                    try:
                        yield writer
                    finally:
                        writer.flush()
        except OSError as error:
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> DataError:
        """The error of a cache that cannot be written."""
        return DataError(
            "cannot copy the images into the cache",
            where=self.folder,
            got=error,
            fix="free disk space, or name another folder in THREEFOLD_CACHE; what was copied is "
            "kept, and the same command goes on with it",
        )


class StoreWriter:
    """Appends images to a store; made by `ImageStore.appending`.

    Attributes:
        count: entries in the store, those that are not flushed included.
    """

    def __init__(self, store: ImageStore, images: IO[bytes], index: IO[bytes], count: int) -> None:
        self.count = count
        self._store, self._images, self._index = store, images, index
        self._lines: list[bytes] = []
        self._waiting = 0
        self._flushed = time.monotonic()

    def append(
        self,
        key: str,
        content: bytes | None,
        error: str = "",
        cells: dict[str, Any] | None = None,
    ) -> None:
        """Append an image, or the reason why there is none.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        content = content or b""
        digest = hashlib.sha256(content).hexdigest() if content else ""
        entry = [key, len(content), digest, error, cells or {}]
        body = json.dumps(entry, separators=(",", ":")).encode()
        self._images.write(content)
        self._lines.append(b"%08x %s\n" % (zlib.crc32(body), body))
        self.count += 1
        self._waiting += len(content)
        if self._waiting > _FLUSH_BYTES or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits: first the images, then the lines that name them."""
        if not self._lines:
            return
        if shutil.disk_usage(self._store.folder).free < self._waiting + _DISK_RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._images.flush()
        self._index.write(b"".join(self._lines))
        self._index.flush()
        self._lines, self._waiting, self._flushed = [], 0, time.monotonic()

    def finish(self, **facts: Any) -> None:
        """Record that the whole source was copied, with facts about it."""
        self.flush()
        for file in (self._images, self._index):
            os.fsync(file.fileno())
        write_json(self._store.folder / _DONE, {"entries": self.count, **facts})


class StoredRows:
    """Where the images of some rows are in a store.

    Args:
        store: the store.
        count: the number of rows, n.
        begin: where the first entry begins that is placed.

    Attributes:
        errors: why a row has no image, by row; only rows without an image.
    """

    def __init__(self, store: ImageStore, count: int, begin: int = 0) -> None:
        self.store = store
        self.errors: dict[int, str] = {}
        self._places: NDArray[np.int64] = np.full((count, 2), -1)
        self._digests = np.zeros((count, 32), np.uint8)
        self._end = begin

    def place(self, entry: StoredImage, rows: list[int]) -> None:
        """Take note of the next entry of the store, and of the rows that it belongs to."""
        for row in rows:
            self.errors.pop(row, None)
            self._places[row] = self._end, entry.size
            if entry.size:
                self._digests[row] = np.frombuffer(bytes.fromhex(entry.sha256), np.uint8)
            else:
                self.errors[row] = entry.error or "there is no image"
        self._end += entry.size

    def has(self, row: int) -> bool:
        """Whether the image of a row is in the store."""
        return bool(self._places[row, 1] > 0)

    def identify(self, row: int) -> bytes:
        """Return the SHA-256 of the image of a row; empty if there is none."""
        return self._digests[row].tobytes() if self.has(row) else b""

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row, compared with its SHA-256.

        Raises:
            MissingImageError: there is none.
        DataError: the copy is damaged.
        """
        if not self.has(row):
            got = self.errors.get(row, "it was not copied")
            raise MissingImageError("there is no image", where=f"row {row}", got=got)
        begin, size = self._places[row].tolist()
        path = self.store.folder / _BYTES
        content = read_part(path, begin, size)
        if hashlib.sha256(content).digest() != self._digests[row].tobytes():
            raise DataError(
                "the cached copy of an image is damaged",
                where=f"{path}, bytes {begin:,} to {begin + size:,}",
                got="another SHA-256 than when it was copied",
                fix=f"remove {self.store.folder} and run the same command again: the images are "
                "copied anew",
            )
        return content


def read_part(path: Path, begin: int, size: int) -> bytes:
    """Return some bytes of a file, which may be fewer at its end.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            parts = []
            while size and (block := file.read(size)):
                parts.append(block)
                size -= len(block)
            return parts[0] if len(parts) == 1 else b"".join(parts)
    except OSError as error:
        raise DataError("cannot read the file", where=path, got=error) from None
