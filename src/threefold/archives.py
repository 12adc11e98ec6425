"""Archives from elsewhere: unpacked in a stream, within bounds, and never outside of the folder that was asked for.

Zip, tar, tar.gz and tar.bz2 are read; the content decides which it is. Only folders and plain files come out: links,
devices, absolute names, `..`, drives and backslashes are refused, as are encrypted members and names that stand there
twice. A bomb is met by counting what really comes out, not by believing headers. Memory stays at about one block.
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

_BLOCK = 1 << 20
_FORMATS = "a .zip, .tar, .tar.gz or .tar.bz2 file"


class Limits(NamedTuple):
    """What an archive may hold; a bomb is far beyond, the largest data set (iNaturalist 2019) far below."""

    members: int = 1_000_000
    """Files and folders together."""
    ratio: int = 100
    """Bytes that come out for each byte of the archive; images come out at about 1, the idx files of MNIST at 5."""
    small: int = 1 << 26
    """Bytes that any archive may unpack to, whatever its ratio."""
    reserve: int = 1 << 28
    """Bytes of free disk that are left alone."""


LIMITS = Limits()
"""The limits that hold where none are given."""


class Member(NamedTuple):
    """One plain file of an archive, to be read before the next one is asked for."""

    name: str
    """Relative POSIX path without `.` and `..`."""
    stream: IO[bytes]


def safe_name(name: str) -> str:
    """The relative POSIX path that a name stands for; empty for the root itself.

    Raises:
        DataError: the name would lead out of the folder, or cannot be a file name on every system.
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


def unpacked(archive: Path) -> Path:
    """The folder beside an archive that it is unpacked into, `<archive>.unpacked`; see `unpack`."""
    return unpack(archive, archive.with_name(archive.name + ".unpacked"))


def unpack(archive: Path, target: Path, limits: Limits = LIMITS) -> Path:
    """Unpack an archive into a new folder, which is whole or absent.

    A folder of that name that exists already is taken as what an earlier call unpacked.

    Args:
        archive: zip, tar, tar.gz or tar.bz2.
        target: the new folder.
        limits: what the archive may hold.

    Returns:
        `target`.

    Raises:
        DataError: the archive is damaged, unsafe or beyond the limits, or the disk is full or cannot be written.
    """
    if target.is_dir():
        return target
    growing = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _as_data_errors(archive):
            for member in members(archive, limits):
                _write(growing / member.name, member.stream, limits)
        with _writing(growing):
            growing.mkdir(exist_ok=True)  # an archive may be empty
            os.replace(growing, target)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return target


def _write(path: Path, stream: IO[bytes], limits: Limits) -> None:
    """A new file; the free disk is looked at before each block."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "xb")  # noqa: SIM115 (closed by the with below; reading the stream fails in another way)
    with file:
        while block := stream.read(_BLOCK):
            with _writing(path):
                if shutil.disk_usage(path.parent).free < len(block) + limits.reserve:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.write(block)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise DataError("the archive has a member twice", got=path.name) from None
    except OSError as error:
        raise DataError(
            "cannot unpack the archive",
            where=path,
            got=error.strerror or error,
            fix="free disk space, or unpack it by hand into a folder that can be written",
        ) from None


def read_members(archive: Path, names: Iterable[str], largest: int = 1 << 28) -> dict[str, bytes]:
    """The files of these base names, in memory; the first of each name counts.

    Args:
        archive: zip, tar, tar.gz or tar.bz2.
        names: base names.
        largest: bytes that one file may have.

    Returns:
        Content by base name; what the archive does not have is absent.

    Raises:
        DataError: the archive is damaged, unsafe or beyond the limits, or a file is too large.
    """
    wanted = set(names)
    found: dict[str, bytes] = {}
    with _as_data_errors(archive):
        for member in members(archive):
            base = PurePosixPath(member.name).name
            if base in wanted and base not in found:
                found[base] = _read(member.stream, largest)
                if len(found[base]) > largest:
                    raise DataError(
                        "the archive has a member that is too large", got=f"{member.name}"
                    )
    return found


def _read(stream: IO[bytes], largest: int) -> bytes:
    """At most one block more than `largest`, in blocks."""
    whole = bytearray()
    while len(whole) <= largest and (block := stream.read(_BLOCK)):
        whole += block
    return bytes(whole)


def members(archive: Path, limits: Limits = LIMITS) -> Iterator[Member]:
    """The plain files of an archive, in its order.

    Raises:
        DataError: the archive is damaged, unsafe or beyond the limits.
    """
    with _as_data_errors(archive), open(archive, "rb") as file:
        head = file.read(262 + 512)
        budget = _Budget(archive, os.fstat(file.fileno()).st_size, limits)
        file.seek(0)
        if head[:4] in (b"PK\3\4", b"PK\5\6"):
            yield from _zip_members(file, budget)
        elif head[:2] == b"\x1f\x8b":
            yield from _tar_members(cast(IO[bytes], gzip.GzipFile(fileobj=file)), budget)
        elif head[:3] == b"BZh":
            yield from _tar_members(bz2.BZ2File(file), budget)
        elif head[257:262] == b"ustar":
            yield from _tar_members(file, budget)
        else:
            raise DataError("not an archive that is read", where=archive, expected=_FORMATS)


@contextmanager
def _as_data_errors(archive: Path) -> Iterator[None]:
    """What the readers raise on damaged archives, as one DataError that names the archive."""
    try:
        yield
    except DataError as error:
        if str(archive) in str(error):
            raise
        raise DataError("cannot use the archive", where=archive, got=error) from None
    except OSError as error:
        what = "the archive is damaged" if error.errno is None else "cannot read the archive"
        raise DataError(what, where=archive, got=error.strerror or error) from None
    except (
        EOFError,
        RecursionError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        zlib.error,
        tarfile.TarError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            "the archive is damaged", where=archive, got=str(error) or type(error).__name__
        ) from None


class _Budget:
    """Counts what comes out of an archive and stops at its limits."""

    def __init__(self, archive: Path, size: int, limits: Limits) -> None:
        self.archive, self.limits = archive, limits
        self.bytes_left = max(limits.small, limits.ratio * size)
        self.members_left = limits.members

    def count(self) -> None:
        """One more member."""
        self.members_left -= 1
        if self.members_left < 0:
            raise DataError(
                "the archive has too many members",
                where=self.archive,
                expected=f"{self.limits.members:,} at most",
            )

    def spend(self, n: int) -> None:
        """So many more bytes."""
        self.bytes_left -= n
        if self.bytes_left < 0:
            raise DataError(
                "the archive unpacks to far more than its size, as a decompression bomb does",
                where=self.archive,
                expected=f"{self.limits.ratio} bytes for each byte at most",
            )


class _Forward(io.RawIOBase):
    """A stream that goes forward only, in bounded reads, and pays for every byte.

    A tar header may claim any length for the extra header that follows; tarfile would read it whole.
    """

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream, self._budget, self._at = stream, budget, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _BLOCK:
            raise ValueError(f"a header of {size} bytes")
        block = self._stream.read(size)
        self._at += len(block)
        self._budget.spend(len(block))
        return block

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < self._at:
            raise ValueError("a member that begins before the end of another")
        while self._at < offset and self.read(min(_BLOCK, offset - self._at)):
            pass
        return self._at


def _tar_members(stream: IO[bytes], budget: _Budget) -> Iterator[Member]:
    forward = _Forward(stream, budget)
    with tarfile.open(fileobj=cast(IO[bytes], forward), mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            budget.count()
            name = safe_name(info.name)
            if info.isdir():
                continue
            content = (
                tar.extractfile(info) if info.isreg() and not info.issparse() and name else None
            )
            if content is None:
                raise DataError(
                    "the archive has a member that is no plain file", got=f"{name} ({_kind(info)})"
                )
            yield Member(name, content)
        while forward.read(_BLOCK):  # the checksum of the compressed stream stands at its end
            pass


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym():
        return f"a symbolic link to {info.linkname}"
    if info.islnk():
        return f"a hard link to {info.linkname}"
    return "a device" if info.isdev() else "a special file"


def _zip_members(file: IO[bytes], budget: _Budget) -> Iterator[Member]:
    _require_small_directory(file)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            budget.count()
            name = safe_name(info.filename)
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            plain = (
                kind in (0, stat.S_IFREG)
                and info.orig_filename.rstrip("\0") == info.filename
                and name
            )
            if (
                not plain
                or info.flag_bits & 1
                or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            ):
                what = (
                    "a link or a special file"
                    if not plain
                    else "encrypted, or packed by a method that is not read"
                )
                raise DataError(
                    "the archive has a member that is no plain file", got=f"{name} ({what})"
                )
            with archive.open(info) as content:
                yield Member(name, cast(IO[bytes], _Counted(content, budget)))


class _Counted(io.RawIOBase):
    """A stream that pays for every byte that is read."""

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(min(size, _BLOCK) if size >= 0 else _BLOCK)
        self._budget.spend(len(block))
        return block


def _require_small_directory(file: IO[bytes]) -> None:
    """zipfile reads the table of members at once, however long it claims to be: bound it first."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 65_557 - 76))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise zipfile.BadZipFile("no table of members at its end")
    (size,) = struct.unpack_from("<L", tail, at + 12)
    wide = tail.rfind(b"PK\6\6", 0, at)
    if size == 0xFFFFFFFF and wide >= 0:
        (size,) = struct.unpack_from("<Q", tail, wide + 40)
    if size > 1 << 28:
        raise DataError("the archive has too many members", got=f"a table of {size:,} bytes")
    file.seek(0)
