"""Files that a page sends, in pieces, into a folder of their own."""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from threefold.data.sources.archives import safe_name
from threefold.errors import DataError
from threefold.files import real_path
from threefold.machine import free_disk
from threefold.serving.limits import Refusal

_FILES: Final = "images"
"""Folder of an upload's files, and the name of what came without one."""


class UploadLimits(NamedTuple):
    """What an upload may hold."""

    files: int = 1_000_000
    bytes: int = 200 * 2**30
    disk_reserve: int = 2**29
    """Bytes of the disk that stay free."""


@dataclass
class _Upload:
    """Sizes of the files that have arrived, by name."""

    sizes: dict[str, int] = field(default_factory=dict)
    total: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Uploads:
    """Receives files; none of them can land outside the folder of its upload.

    Args:
        folder: where each upload gets a folder; need not exist.
        limits: of one upload.
    """

    def __init__(self, folder: Path, limits: UploadLimits | None = None) -> None:
        self.folder, self.limits = folder, limits or UploadLimits()
        self._open: dict[str, _Upload] = {}

    def begin(self) -> str:
        """Start an upload; returns its name."""
        name = secrets.token_hex(8)
        try:
            (self.folder / name / _FILES).mkdir(parents=True)
        except OSError as error:
            raise _not_written(error) from None
        self._open[name] = _Upload()
        return name

    def write(self, upload: str, name: str, offset: int, content: bytes) -> int:
        """Write a piece of a file; a piece that comes again replaces what followed from there.

        Args:
            upload: of `begin`.
            name: relative path of the file, with /.
            offset: where the piece begins; at most the bytes that have arrived.
            content: the piece.

        Returns:
            The size of the file so far.

        Raises:
            Refusal: there is no such upload, the name leads out of it, a piece is missing, the
                limits are exceeded, or the disk is full.
        """
        record, path = self._find(upload), self._place(upload, name)
        key = str(path)
        with record.lock:
            size = record.sizes.get(key, 0)
            if offset > size:
                raise Refusal(409, "gap", f"{size} bytes have arrived, not {offset}", name)
            grown = offset + len(content) - size
            if record.total + grown > self.limits.bytes:
                most = f"an upload may have at most {self.limits.bytes:,} bytes"
                raise Refusal(413, "too_many_bytes", most)
            if key not in record.sizes and len(record.sizes) >= self.limits.files:
                most = f"an upload may have at most {self.limits.files:,} files"
                raise Refusal(413, "too_many_files", most)
            if free_disk(self.folder) < len(content) + self.limits.disk_reserve:
                raise Refusal(503, "disk", "the disk is nearly full; free space, then try again")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "r+b" if key in record.sizes else "xb") as file:
                    file.truncate(offset)
                    file.seek(offset)
                    file.write(content)
            except OSError as error:
                raise _not_written(error, name) from None
            record.sizes[key] = offset + len(content)
            record.total += grown
            return record.sizes[key]

    def finish(self, upload: str) -> Path:
        """End an upload; returns its only file or folder, or the folder of all.

        Raises:
            Refusal: there is no such upload, or nothing has arrived.
        """
        record = self._find(upload)
        if not record.sizes:
            raise Refusal(400, "empty", "no file has arrived")
        del self._open[upload]
        folder = self.folder / upload / _FILES
        entries = list(folder.iterdir())
        return entries[0] if len(entries) == 1 else folder

    def discard(self, upload: str) -> None:
        """Delete what has arrived of an upload that is not finished."""
        self._find(upload)
        del self._open[upload]
        shutil.rmtree(self.folder / upload, ignore_errors=True)

    def delete_with(self, path: Path) -> None:
        """Delete the finished upload that a path is in; any other path stays."""
        resolved, folder = real_path(path), real_path(self.folder)
        if resolved.is_relative_to(folder) and resolved != folder:
            first = resolved.relative_to(folder).parts[0]
            shutil.rmtree(folder / first, ignore_errors=True)

    def _find(self, upload: str) -> _Upload:
        if upload not in self._open:
            raise Refusal(404, "no_upload", "no such upload; begin again")
        return self._open[upload]

    def _place(self, upload: str, name: str) -> Path:
        try:
            safe = safe_name(name)
        except DataError:
            safe = ""
        # Hidden files are the marks of file managers; with them, a plain name could be one of ours.
        if not safe or len(safe) > 1000 or re.search(r"(^|/)\.", safe):
            raise Refusal(400, "bad_name", "a file name that cannot be used", name[:200])
        return self.folder / upload / _FILES / safe


def _not_written(error: OSError, name: str | None = None) -> Refusal:
    return Refusal(503, "file", f"cannot write: {error.strerror or error}", name)
