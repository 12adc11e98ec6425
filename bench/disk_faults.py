"""Faults of a disk in this process: one write below some folders fails, or all from there on.

Openings, renames, deletions and new folders are seen by an audit hook, whichever library asks for
them; the bytes of files by a class in place of `io.FileIO`. What a library of C++ opens itself is
seen by neither: `full_disk.py` runs those on a disk that is really full.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

GROWS: Final = ("create", "mkdir", "write", "allocate", "fsync", "link")
CHANGES: Final = (
    *(kind for kind in GROWS if kind != "fsync"),
    *("open", "rename", "remove", "rmdir", "truncate", "touch"),
)

KINDS: Final = {
    "os.mkdir": "mkdir",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "os.truncate": "truncate",
    "os.utime": "touch",
}

FAULTS: Final[dict[str, tuple[bool, tuple[str, ...]]]] = {
    # A full disk stays full, but what is there can be renamed and deleted.
    "ENOSPC": (True, GROWS),
    "EDQUOT": (True, GROWS),
    "EROFS": (True, CHANGES),
    # A folder without the right to write: its open files can still be written.
    "EACCES": (True, ("create", "mkdir", "rename", "remove", "rmdir", "link")),
    "EXDEV": (True, ("rename", "link")),
    # One bad block.
    "EIO": (False, ("open", "create", "write", "fsync", "rename", "mkdir", "allocate")),
}
"""Name of the error -> whether it lasts, and what it hits."""


class Fault(NamedTuple):
    """What fails, and when."""

    name: str
    """Key of FAULTS."""
    at: int
    """Number of the operation, from 0, among those that the error hits; -1 = none fails."""


class DiskFaults:
    """Counts the operations that an error hits, and fails from one of them on.

    Args:
        folders: only what lies below them counts.
        fault: what fails.
        note: called with the name and the path of each operation.
    """

    def __init__(
        self, folders: Sequence[Path], fault: Fault, note: Callable[[str], object] = lambda _: None
    ) -> None:
        self.folders = [os.path.abspath(folder) + os.sep for folder in folders]
        self.fault, self.note = fault, note
        self.number = getattr(errno, fault.name)
        self.lasts, self.hits = FAULTS[fault.name]
        self.count, self.is_active = 0, False

    def install(self) -> None:
        """Watch this process, for ever."""
        sys.addaudithook(self._audit)
        for module in (builtins, io):
            module.open = self._open  # type: ignore[assignment]
        for name, kind in {"fsync": "fsync", "fdatasync": "fsync", "write": "write"}.items():
            self._wrap(name, kind, 0)
        self._wrap("posix_fallocate", "allocate", 0)
        self._wrap("sendfile", "write", 0)
        self._wrap("ftruncate", "truncate", 0)

    def meet(self, kind: str, path: Any) -> None:
        """Count an operation, and fail if it is its turn.

        Raises:
            OSError: the injected one.
        """
        if kind not in self.hits or not self._is_watched(path):
            return
        text = os.fsdecode(path)
        self.note(f"{kind} {text}")
        here, self.count = self.count, self.count + 1
        if here == self.fault.at or (self.is_active and self.lasts):
            self.is_active = True
            self.note("FAILED")
            raise OSError(self.number, os.strerror(self.number), text)

    def _is_watched(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        whole = os.path.abspath(os.fsdecode(path))
        return any(whole.startswith(folder) for folder in self.folders)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if changes and self._is_watched(path):
                self.meet("open" if os.path.exists(path) else "create", path)
        elif event == "os.rename":
            self.meet("rename", arguments[1])
        elif event in ("os.link", "os.symlink"):
            self.meet("link", arguments[1])
        elif event in KINDS and os.path.lexists(arguments[0]) == (event != "os.mkdir"):
            # As in Linux, a folder that exists, or a file that does not, is the first reason.
            self.meet(KINDS[event], arguments[0])

    def _wrap(self, name: str, kind: str, position: int) -> None:
        """Put a function of `os` that takes a descriptor behind `meet`."""
        original = getattr(os, name, None)
        if original is None:
            return

        def replacement(*arguments: Any, **named: Any) -> Any:
            target = arguments[position]
            number = target if isinstance(target, int) else target.fileno()
            self.meet(kind, _path_of(number))
            return original(*arguments, **named)

        setattr(os, name, replacement)

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """Open as `open` does; the bytes of a watched file go through `meet`."""
        path = _path_of(file) if isinstance(file, int) else file
        if not set(mode) & set("wax+") or not self._is_watched(path):
            return _OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _WatchedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.faults, raw.path = self, path
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffer = io.BufferedRandom if "+" in mode else io.BufferedWriter
        stream: Any = buffer(raw, size)
        if "b" in mode:
            return stream
        text = io.TextIOWrapper(stream, encoding, errors, newline, buffering == 1)
        text.mode = mode  # type: ignore[misc]
        return text


class _WatchedFile(io.FileIO):
    faults: DiskFaults
    path: Any

    def write(self, data: Any) -> int:
        self.faults.meet("write", self.path)
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.faults.meet("truncate", self.path)
        return super().truncate(size)


_OPEN: Final = builtins.open


def _path_of(descriptor: Any) -> Any:
    """Return the path of an open file; None if it has none."""
    try:
        return os.readlink(f"/proc/self/fd/{int(descriptor)}")
    except (OSError, ValueError, TypeError):
        return None
