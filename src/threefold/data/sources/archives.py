"""Unpack zip and tar archives in a stream, within bounds, and never outside the target folder.

Zip, tar, tar.gz and tar.bz2 files are recognised by their content. Only folders and plain files are
accepted. That is stricter than tarfile's `data` filter, which also accepts links within the target,
strips leading slashes instead of refusing the name, and limits neither the number nor the size of
the members. Sizes are counted on what is really decompressed. Memory stays at about one block.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from threefold.errors import DataError
from threefold.files import TemporaryFolder

_BLOCK = 1 << 20
_LARGEST_DIRECTORY = 1 << 28
_BOMB = "the archive unpacks to far more than its size, as a decompression bomb does"


class ArchiveLimits(NamedTuple):
    """What an archive may hold.

    A decompression bomb is far beyond the defaults; the largest data set of the paper
    (iNaturalist 2019) is far below.
    """

    max_members: int = 1_000_000
    """Files and folders together."""
    max_ratio: int = 100
    """Unpacked bytes per byte of the archive; images have a ratio of about 1, MNIST of 5."""
    min_budget: int = 1 << 26
    """Unpacked bytes that are allowed whatever the ratio."""
    disk_reserve: int = 1 << 28
    """Bytes of the disk that stay free."""


LIMITS = ArchiveLimits()
"""The default limits."""


class ArchiveMember(NamedTuple):
    """A plain file of an archive; it must be read before the next member is requested."""

    name: str
    """Relative POSIX path without `.` and `..`."""
    size: int
    """Bytes that the archive declares; the stream never gives more."""
    stream: IO[bytes]


def safe_name(name: str) -> str:
    """Normalise a member's name to a relative POSIX path; empty for the root itself.

    Raises:
        DataError: the name leads out of the folder, or is not a valid file name on every system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    unsafe = (
        name.startswith("/")
        or ".." in parts
        or any(re.match(r".:", part) for part in parts)
        or re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", name)
        or any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    )
    if unsafe:
        raise DataError("the archive has a member with an unsafe name", got=repr(name[:200]))
    return "/".join(parts)


def unpack_beside(archive: Path) -> Path:
    """Unpack an archive into `<archive>.unpacked` beside it; see `unpack`."""
    return unpack(archive, archive.with_name(archive.name + ".unpacked"))


def unpack(archive: Path, target: Path, limits: ArchiveLimits = LIMITS) -> Path:
    """Unpack an archive into a new folder, which is complete or absent.

    A folder of that name that exists already counts as unpacked by an earlier call.

    Args:
        archive: zip, tar, tar.gz or tar.bz2 file.
        target: the new folder.
        limits: what the archive may hold.

    Returns:
        `target`.

    Raises:
        DataError: the archive is damaged, unsafe or beyond the limits, or the disk is full or
            read-only.
    """
    if target.is_dir():
        return target
    fix = "free disk space, or unpack it by hand into a writable folder"
    with (
        _one_line_errors(archive, "cannot unpack the archive", fix),
        TemporaryFolder(target) as folder,
    ):
        partial = Path(folder) / "content"
        partial.mkdir()
        for member in _members(archive, limits):
            _write(partial / member.name, member, limits.disk_reserve)
        os.replace(partial, target)
    return target


def _write(path: Path, member: ArchiveMember, disk_reserve: int) -> None:
    """Write a member to a new file if the disk has room for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    except (FileExistsError, NotADirectoryError):
        raise DataError("the archive has a member twice", got=path.name) from None
    with file:
        if shutil.disk_usage(path.parent).free < member.size + disk_reserve:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for block in _blocks(member.stream):
            file.write(block)


def read_members(archive: Path, names: Iterable[str], max_bytes: int = 1 << 28) -> dict[str, bytes]:
    """Read the files with these base names into memory; the first of each name counts.

    Args:
        archive: zip, tar, tar.gz or tar.bz2 file.
        names: base names.
        max_bytes: the largest size of one file.

    Returns:
        Content by base name; names that the archive does not have are absent.

    Raises:
        DataError: the archive is damaged, unsafe or beyond the limits, or a file is too large.
    """
    names = set(names)
    contents: dict[str, bytes] = {}
    with _one_line_errors(archive, "cannot read the archive"):
        for member in _members(archive, LIMITS):
            base = PurePosixPath(member.name).name
            if base in names and base not in contents:
                if member.size > max_bytes:
                    raise DataError("the archive has a member that is too large", got=member.name)
                contents[base] = b"".join(_blocks(member.stream))
    return contents


def iter_members(archive: Path, limits: ArchiveLimits = LIMITS) -> Iterator[ArchiveMember]:
    """Iterate over the plain files of an archive, in its order.

    Raises:
        DataError: the archive is damaged, unsafe or beyond the limits.
    """
    with _one_line_errors(archive, "cannot read the archive"):
        yield from _members(archive, limits)


@contextmanager
def _one_line_errors(archive: Path, what: str, fix: str = "") -> Iterator[None]:
    """Turn every error of the readers into a DataError that names the archive."""
    try:
        yield
    except DataError as error:
        raise DataError("cannot use the archive", where=archive, got=error) from None
    except OSError as error:
        # gzip and bz2 report damaged data as an OSError without a number.
        if error.errno is None:
            raise DataError("the archive is damaged", where=archive, got=error) from None
        raise DataError(what, where=archive, got=error, fix=fix) from None
    except (
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        struct.error,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        got = str(error) or type(error).__name__
        raise DataError("the archive is damaged", where=archive, got=got) from None


def _members(archive: Path, limits: ArchiveLimits) -> Iterator[ArchiveMember]:
    with open(archive, "rb") as file:
        magic = file.read(512)
        budget = max(limits.min_budget, limits.max_ratio * os.fstat(file.fileno()).st_size)
        file.seek(0)
        if magic[:4] in (b"PK\3\4", b"PK\5\6"):
            yield from _zip_members(file, limits, budget)
        elif magic[:2] == b"\x1f\x8b":
            yield from _tar_members(cast(IO[bytes], gzip.GzipFile(fileobj=file)), limits, budget)
        elif magic[:3] == b"BZh":
            yield from _tar_members(bz2.BZ2File(file), limits, budget)
        elif magic[257:262] == b"ustar":
            yield from _tar_members(file, limits, budget)
        else:
            expected = "a .zip, .tar, .tar.gz or .tar.bz2 file"
            raise DataError("the file is not a supported archive", expected=expected)


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block


def _check_count(count: int, limits: ArchiveLimits) -> None:
    if count > limits.max_members:
        expected = f"{limits.max_members:,} at most"
        raise DataError("the archive has too many members", expected=expected)


class _BoundedReader(io.RawIOBase):
    """A forward-only stream that counts its bytes and refuses large reads.

    tarfile reads an extension header in one call, whatever length the archive declares for it.
    """

    def __init__(self, stream: IO[bytes], budget: int) -> None:
        self._stream, self._budget, self._position = stream, budget, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _BLOCK:
            raise ValueError(f"a header of {size} bytes")
        block = self._stream.read(size)
        self._position += len(block)
        if self._position > self._budget:
            raise DataError(_BOMB, expected=f"{self._budget:,} bytes at most")
        return block

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < self._position:
            raise ValueError("a member that begins before the end of another")
        while self._position < offset and self.read(min(_BLOCK, offset - self._position)):
            pass
        return self._position


def _tar_members(stream: IO[bytes], limits: ArchiveLimits, budget: int) -> Iterator[ArchiveMember]:
    reader = cast(IO[bytes], _BoundedReader(stream, budget))
    with tarfile.open(fileobj=reader, mode="r:") as tar:
        count = 0
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
            count += 1
            _check_count(count, limits)
            name = safe_name(info.name)
            if info.isdir():
                continue
            content = tar.extractfile(info) if info.isreg() and not info.issparse() else None
            if content is None or not name:
                raise _not_a_plain_file(name, f"type {info.type!r} {info.linkname}".rstrip())
            yield ArchiveMember(name, info.size, content)
        # The checksum of the compressed stream is at its end.
        for _ in _blocks(reader):
            pass


def _zip_members(file: IO[bytes], limits: ArchiveLimits, budget: int) -> Iterator[ArchiveMember]:
    _check_directory_size(file)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        _check_count(len(infos), limits)
        # zipfile gives no more bytes than the directory declares.
        if sum(info.file_size for info in infos) > budget:
            raise DataError(_BOMB, expected=f"{budget:,} bytes at most")
        for info in infos:
            name = safe_name(info.filename)
            if info.is_dir():
                continue
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            if not plain or not name or info.orig_filename.rstrip("\0") != info.filename:
                raise _not_a_plain_file(name, "a link or a special file")
            supported = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if info.flag_bits & 1:
                fix = "unpack it with its password, and give the folder"
                raise DataError("its files need a password", got=name, fix=fix)
            if not supported:
                raise _not_a_plain_file(name, "packed by an unsupported method")
            with archive.open(info) as content:
                yield ArchiveMember(name, info.file_size, content)


def _not_a_plain_file(name: str, kind: str) -> DataError:
    return DataError("the archive has a member that is no plain file", got=f"{name} ({kind})")


def _check_directory_size(file: IO[bytes]) -> None:
    """Refuse a zip with an oversized directory, because zipfile reads the directory at once."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 65_557 - 76))  # the longest end record, and its 64-bit variant
    tail = file.read()
    record = tail.rfind(b"PK\5\6")
    if record < 0:
        raise zipfile.BadZipFile("no directory at its end")
    (size,) = struct.unpack_from("<L", tail, record + 12)
    record64 = tail.rfind(b"PK\6\6", 0, record)
    if size == 0xFFFFFFFF and record64 >= 0:
        (size,) = struct.unpack_from("<Q", tail, record64 + 40)
    if size > _LARGEST_DIRECTORY:
        raise DataError("the archive has too many members", got=f"a directory of {size:,} bytes")
    file.seek(0)
