"""Verify every image of a source once: decode it, and take its SHA-256; the cache remembers it.

An image is verified again when its file has another size or time than before. So the first start
on a data set reads and decodes everything, and later ones ask the file system only. An interrupted
verification goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from threefold.counting import counted
from threefold.data.images import BadImage, check_hashed, map_in_threads
from threefold.data.sources.folder import EncodedImages, ListedImage, contents_of
from threefold.errors import DataError, MissingImageError, shorten
from threefold.files import cache_folder
from threefold.machine import decoding_threads
from threefold.names import count_of

VERIFIED: Final = "verified"
"""Kind of the cache's folder."""

SETTLED: Final = 2.0
"""Seconds since the last change of a file, below which a second change could have the same time."""
_SAVE_SECONDS: Final = 5.0
_MAX_STALE: Final = 100_000
"""Records of images that are no longer there, from which the file is written anew."""


class Verified(NamedTuple):
    """What is known of the images of a source."""

    bad: list[BadImage]
    """Those that cannot be used, or whose suffix names another format."""
    digests: NDArray[np.bytes_]
    """(n,) S16: the first bytes of the SHA-256 of each encoded image; empty where it is unread."""

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which images can be read, (n,)."""
        usable: NDArray[np.bool_] = self.digests != b""
        return usable


def refuse_bad(bad: Sequence[BadImage], count: int) -> DataError:
    """The error of a source that may have no bad images.

    Args:
        bad: the images.
        count: of all images.
    """
    return DataError(
        f"{len(bad)} of {count} images cannot be used",
        got=shorten(f"{image.path} ({image.reason})" for image in bad),
        fix='repair, rename or remove them, or set data.bad_images = "skip"',
    )


def note_misleading_names(bad: list[BadImage]) -> list[str]:
    """Note readable files whose suffix names another format."""
    named = [f"{image.path} ({image.reason})" for image in bad if image.readable]
    read = count_of(len(named), "image was read", "images were read")
    return [f"{read} despite a misleading suffix: {shorten(named)}"] if named else []


def verify_images(
    items: Sequence[ListedImage],
    encoded: EncodedImages | None,
    origin: str,
    fresh: bool = False,
) -> Verified:
    """Decode every image that is not known to be sound.

    Args:
        items: the images.
        encoded: their bytes, where they are no files.
        origin: the source, which the cache's file is named after.
        fresh: decode all of them, known or not.
    """
    contents = contents_of(items, encoded)
    identities = identify_images(items, contents)
    known = Known(origin)
    digests = known.find(identities)
    if fresh:
        digests[:] = b""
    unknown = np.flatnonzero(digests == b"")

    def check(at: int) -> tuple[BadImage | None, bytes]:
        row = int(unknown[at])
        if contents is None:
            return check_hashed(Path(items[row].path))
        try:
            content = contents[row]
        except MissingImageError as error:
            reason = f"{error.what}: {error.got}" if error.got else error.what
            return BadImage(items[row].id, reason), b""
        return check_hashed(items[row].id, content)

    bad: list[BadImage] = []
    if len(unknown):
        checked = map_in_threads(check, len(unknown), decoding_threads())
        done = len(items) - len(unknown)
        with known.appending(len(items)) as save:
            for row, (image, digest) in zip(
                unknown, counted(checked, "images verified", len(items), done), strict=True
            ):
                digests[row] = digest[:16]
                if image is not None:
                    bad.append(image)
                elif identities[row]:
                    save(identities[row], digest[:16])
    return Verified(bad, digests)


def identify_images(
    items: Sequence[ListedImage], contents: EncodedImages | None
) -> NDArray[np.bytes_]:
    """Return what changes when an image may have changed, (n,) S16; empty where that is unknown."""
    identities = np.zeros(len(items), "S16")
    settled = (time.time() - SETTLED) * 1e9
    for row, item in enumerate(counted(items, "images looked up", len(items))):
        if contents is not None:
            name = contents.identity(row)
        else:
            name = b""
            with suppress(OSError, ValueError):
                status = os.stat(item.path)
                if max(status.st_mtime_ns, status.st_ctime_ns) < settled:
                    times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
                    name = f"{item.path}\0{times}".encode("utf-8", "surrogatepass")
        if name:
            identities[row] = hashlib.blake2b(name, digest_size=16).digest()
    return identities


class Known:
    """The sound images of a source that the cache remembers: 32 bytes for each.

    Args:
        origin: the source.
    """

    def __init__(self, origin: str) -> None:
        digest = hashlib.sha256(origin.encode("utf-8", "surrogatepass")).hexdigest()
        self.path = cache_folder(VERIFIED) / f"{digest[:32]}.bin"
        self.count = 0

    def find(self, identities: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
        """Return the digest of each image that is known, (n,) S16; empty for the others."""
        digests = np.zeros(len(identities), "S16")
        try:
            # A killed process may leave half a record at the end.
            content = np.fromfile(self.path, np.uint8)
        except OSError:
            return digests
        records = content[: len(content) // 32 * 32].reshape(-1, 32)
        self.count = len(records)
        if not len(records):
            return digests
        names = np.ascontiguousarray(records[:, :16]).view("S16").ravel()
        order = np.argsort(names, kind="stable")
        # The last of equal ones: what was learned later.
        places = np.searchsorted(names, identities, side="right", sorter=order) - 1
        places = order[places.clip(min=0)]
        found = (names[places] == identities) & (identities != b"")
        values = np.ascontiguousarray(records[:, 16:]).view("S16").ravel()
        digests[found] = values[places[found]]
        return digests

    @contextmanager
    def appending(self, count: int) -> Iterator[Callable[[bytes, bytes], None]]:
        """Yield what remembers an image; a cache that cannot be written is no error.

        Args:
            count: of the source's images; many more records are from earlier states of it.
        """
        waiting: list[bytes] = []
        saved = time.monotonic()
        mode = "wb" if self.count > count + _MAX_STALE else "ab"

        def save(identity: bytes, digest: bytes) -> None:
            nonlocal saved
            waiting.append(identity.ljust(16, b"\0") + digest.ljust(16, b"\0"))
            if time.monotonic() - saved > _SAVE_SECONDS:
                flush()
                saved = time.monotonic()

        def flush() -> None:
            nonlocal mode
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, mode) as file:
                    file.truncate(file.tell() // 32 * 32)
                    file.seek(0, os.SEEK_END)
                    file.write(b"".join(waiting))
                mode = "ab"
            waiting.clear()

        try:
            yield save
        finally:
            flush()
