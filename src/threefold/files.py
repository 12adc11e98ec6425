"""Atomic file writing and safe reading; everything a run writes goes through this module."""

from __future__ import annotations

import codecs
import errno
import functools
import glob
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from threefold.errors import DamagedFileError, RunError, is_out_of_memory, out_of_memory

CACHE_VARIABLE: Final = "THREEFOLD_CACHE"
"""Environment variable: the folder of caches (by default $XDG_CACHE_HOME/threefold, else
~/.cache/threefold)."""

_TEMPORARY = re.compile(r"\..+\.(?:([0-9a-f]{8})-)?(\d+)\.[^.]+\.tmp")
"""Names of temporary files and folders: the machine and the process that write them."""

_ABANDONED_SECONDS: Final = 24 * 3600.0
"""Age from which a temporary file of another machine, or of another container, is abandoned."""

_swept: set[Path] = set()
"""Folders in which this process has deleted what killed processes left."""

_NOT_REGULAR = "no regular file"

_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a flush that say that something is not on the disk."""

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Errors of a path where there is no file, but a folder or a circle of links, or nothing."""


def real_path(path: Path) -> Path:
    """Return an absolute path with its links followed, as far as they lead.

    `Path.resolve` raises a RuntimeError for a circle of links before Python 3.13.
    """
    return Path(os.path.realpath(path))


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file atomically: a crash leaves the old content or the new, never a part.

    Args:
        path: the file, whose folder is made if it is missing.
        data: its content.
        durable: the new content outlasts a loss of power from now on; otherwise the old one may
            come back.

    Raises:
        RunError: the disk is full or the folder is not writable.
    """
    with replacing(path, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file for writing that takes the place of `path` once all of it is written.

    Args:
        path: the file, whose folder is made if it is missing.
        durable: as for `write_bytes`.

    Raises:
        RunError: the disk is full or the folder is not writable.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            flush_folder(path.parent)
    except BaseException as error:  # a signal may come at any moment, too
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise RunError("cannot write", where=path, got=error) from None


def read_text(path: Path, max_bytes: int = 1 << 24) -> str:
    """Read a text file: UTF-8, or UTF-16 with its mark, as PowerShell and Excel write it.

    Args:
        path: the file; a pipe or a device, which could be read for ever, is refused.
        max_bytes: the largest size.

    Raises:
        OSError: the file cannot be read, is no regular file, or is too large.
        UnicodeDecodeError: it is in another encoding.
    """
    check_regular(path)
    if path.stat().st_size > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cached files, which need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "threefold" / kind


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which could be read for ever, before it is opened.

    Raises:
        OSError: the path is no regular file, or there is none.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, _NOT_REGULAR, str(path))


@contextmanager
def exclusive(path: Path, busy: RunError, fix: str, timeout: float = 0) -> Iterator[None]:
    """Hold the lock of a file; that of a killed process is released.

    Args:
        path: the lock file, which stays.
        busy: raised if another process holds it.
        fix: what to do if it cannot be written.
        timeout: seconds to wait for the other process.

    Raises:
        RunError: `busy`, or the file cannot be written.
    """
    from filelock import FileLock, Timeout  # not needed to read

    lock = FileLock(path, timeout=timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
    except Timeout:
        raise busy from None
    except OSError as error:
        raise RunError("cannot write", where=path, got=error, fix=fix) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let other processes wait that do the same work; that of a killed one is released.

    Where the lock cannot be held, nobody waits.

    Args:
        path: the lock file, which stays.
    """
    from filelock import FileLock  # not needed to read

    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def temporary_path(path: Path) -> Path:
    """Return where this thread writes a file before it takes the place of `path`."""
    return path.with_name(f".{path.name}.{_writer()}.{threading.get_ident()}.tmp")


class TemporaryFolder:
    """A new folder that is deleted in the end, as far as that is allowed.

    `tempfile.TemporaryDirectory` calls itself until Python's stack is full where it is not allowed.

    Args:
        target: a file that will come from the folder, which is made beside it; what killed
            processes left there is deleted. None = among the temporary files of the system.

    Attributes:
        name: path of the folder.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, target: Path | None = None) -> None:
        if target is None:
            self.name = tempfile.mkdtemp(prefix="threefold-")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(target.parent, target.name)
        prefix = f".{target.name}.{_writer()}."
        self.name = tempfile.mkdtemp(dir=target.parent, prefix=prefix, suffix=".tmp")

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.name, ignore_errors=True)


def delete_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders of processes that were killed.

    Those of running processes stay, and on systems that cannot tell, all of them. Those of other
    machines that share the folder stay for a day.

    Args:
        folder: where they are.
        name: only those of this file; empty = all, in all folders below, too.
    """
    pattern = f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"
    _delete_abandoned([*(folder.glob(pattern) if name else folder.rglob(pattern))])


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a file any more, as far as its age tells: it is older than a day."""
    try:
        return time.time() - path.lstat().st_mtime >= _ABANDONED_SECONDS
    except OSError:
        return False


def _delete_abandoned(paths: Iterable[Path]) -> None:
    for path in paths:
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        with suppress(OSError):
            if match[1] not in (None, _machine()):
                if not is_abandoned(path):
                    continue
            elif _may_run(int(match[2])):
                continue
            _delete(path)


def _sweep_once(folder: Path) -> None:
    """Delete what killed processes left in a folder, the first time that it is written to."""
    if folder not in _swept:
        _swept.add(folder)
        with suppress(OSError):
            _delete_abandoned([*folder.glob(".*.tmp")])


def _writer() -> str:
    """Name this process in the names of its temporary files."""
    return f"{_machine()}-{os.getpid()}"


@functools.cache
def _machine() -> str:
    """Tell this machine or container from others that may share a folder, in eight digits."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _may_run(process: int) -> bool:
    """Whether a process may be running on this machine."""
    if os.name != "posix":  # elsewhere the question would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def flush_folder(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power, where the system can.

    Raises:
        OSError: the disk is full or has failed, so that a new name may be lost.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _LOST:  # not every file system can
            raise
    finally:
        os.close(descriptor)


def flush_files(folder: Path) -> None:
    """Make sure that all files in a folder are on the disk.

    Raises:
        OSError: the disk is full or has failed.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def replace_all(files: Mapping[Path, Path], spare: Path) -> None:
    """Move finished files or folders to their places; if one cannot be, all are as before.

    Args:
        files: place of each by where it was written, on the same file system, in this order.
        spare: an empty folder on it for what is replaced, which the caller deletes.

    Raises:
        OSError: one cannot be moved.
    """
    kept: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        # No old file is ever beside a new one; the last one is first away and last in place.
        for number, target in enumerate(reversed([*files.values()])):
            if target.exists():
                os.replace(target, spare / f"{number}")
                kept.append((spare / f"{number}", target))
        for source, target in files.items():
            os.replace(source, target)
            placed.append(target)
        for folder in {target.parent for target in placed}:
            flush_folder(folder)
    except OSError:
        for target in placed:
            with suppress(OSError):
                _delete(target)
        for old, target in reversed(kept):
            with suppress(OSError):
                os.replace(old, target)
        raise


def _delete(path: Path) -> None:
    """Delete a file, or a folder with what is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def unreadable(what: str, path: Path, error: OSError) -> RunError:
    """Make the error of a file that is not there, is none, or cannot be read.

    Args:
        what: what is wrong.
        path: the file.
        error: of the operating system.

    Returns:
        A DamagedFileError if another file in its place would help.
    """
    if is_out_of_memory(error):
        return out_of_memory(path, error)
    if error.errno in _NO_FILE or error.strerror == _NOT_REGULAR:
        return DamagedFileError(what, where=path, got=error)
    fix = "make it readable for this user" if isinstance(error, PermissionError) else ""
    return RunError(what, where=path, got=error, fix=fix)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
