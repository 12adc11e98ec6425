"""Claims of jobs: files that let exactly one process do a job, wherever the processes run.

A claim of job J is the file `J.0` in a folder that all processes reach. It is made by a hard link,
or where the file system has none, by opening a file that must not exist: one process succeeds, all
others fail. Its owner changes the file's time every few seconds. A claim whose owner is dead is
never deleted: whoever takes the job over makes `J.1`, in the same way, so again exactly one process
succeeds. The owner of a job is the one with the highest number.

No clock is compared with another. A process believes that an owner is dead if it ran on this
machine and does not exist any more, or if the file has not changed while this process waited for
`lease` seconds of its own. If an owner comes back after that (a machine that was asleep), it finds
that there is a higher number, and stops before it writes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from threefold.errors import RunError
from threefold.recipe.recipe import Job, fold_name

LEASE: Final = 60.0
"""Seconds without a sign of life after which the owner of a claim counts as dead."""

BEAT: Final = 5.0
"""Seconds between two signs of life; more than the coarsest times of file systems."""


class ClaimLostError(RunError):
    """Another process has taken a job over, because this one gave no sign of life."""


@dataclass(frozen=True)
class _Owner:
    """Who holds a claim, as its file says."""

    name: str = ""
    place: str = ""
    process: int = 0
    started: str = ""
    released: bool = False


@dataclass
class _Sight:
    """What a process saw of a claim when it last changed, and when, by its own clock."""

    mark: tuple[int, ...]
    since: float


class Claim:
    """A job that belongs to this process until `release`; a context manager.

    Args:
        path: the file.
        number: of the claim among those of the job.
        owner: this process.
        beat: seconds between two signs of life.
    """

    def __init__(self, path: Path, number: int, owner: _Owner, beat: float) -> None:
        self.path, self.number = path, number
        self._owner, self._beat = owner, beat
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_mine(self) -> bool:
        """Whether no process has taken the job over."""
        return not self._path_of(self.number + 1).exists()

    def check(self) -> None:
        """Stop before anything is written for a job that was taken over.

        Raises:
            ClaimLostError: it was.
        """
        if not self.is_mine:
            raise ClaimLostError(
                "another process has taken the job over",
                where=self.path.name.rpartition(".")[0],
                fix="nothing: the other process does it",
            )

    def release(self) -> None:
        """Let others have the job, if it is not done."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.is_mine:
            released = _Owner(**{**vars(self._owner), "released": True})
            with suppress(OSError):  # then others wait until the lease is over
                _replace(self.path, released)

    def _path_of(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name.rpartition('.')[0]}.{number}")

    def _give_signs(self) -> None:
        while not self._over.wait(self._beat):
            with suppress(OSError):
                os.utime(self.path)


@dataclass
class Claims:
    """The claims of a run's jobs, as one process sees them.

    Args:
        folder: of the claims' files; need not exist.
        lease: seconds without a sign of life after which an owner counts as dead.
        beat: seconds between two signs of life.
    """

    folder: Path
    lease: float = LEASE
    beat: float = BEAT
    _seen: dict[Job, _Sight] = field(default_factory=dict)

    def claim(self, job: Job, *, takes_over: bool = False) -> Claim | None:
        """Claim a job; None if it belongs to another process that may be alive.

        Whoever gets it must look again whether it is done.

        Args:
            job: the job.
            takes_over: whether it is known that whoever had it before is dead.

        Raises:
            RunError: the folder cannot be written.
        """
        number = self._last(job)
        if number >= 0 and not takes_over and not self._is_free(job, self._path(job, number)):
            return None
        owner = _Owner(uuid.uuid4().hex, this_place(), os.getpid(), _started(os.getpid()))
        path = self._path(job, number + 1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_made = _make(path, owner)
        except OSError as error:
            raise RunError(
                "cannot write",
                where=path,
                got=error,
                fix="free disk space or make the run folder writable, then run the same command "
                "again",
            ) from None
        return Claim(path, number + 1, owner, self.beat) if is_made else None

    def _path(self, job: Job, number: int) -> Path:
        return self.folder / f"{job.member}.{fold_name(job.fold)}.{job.stage}.{number}"

    def _last(self, job: Job) -> int:
        """Number of a job's latest claim; -1 without any."""
        number = -1
        while self._path(job, number + 1).exists():
            number += 1
        return number

    def _is_free(self, job: Job, path: Path) -> bool:
        """Whether the owner of the latest claim has released it, or is dead."""
        owner = _read(path)
        if owner.released or _is_dead(owner):
            return True
        try:
            status = path.stat()
        except OSError:  # cannot be seen just now
            return False
        mark, now = (status.st_ino, status.st_mtime_ns), time.monotonic()
        sight = self._seen.get(job)
        if sight is None or sight.mark != mark:
            self._seen[job] = _Sight(mark, now)
            return False
        return now - sight.since >= self.lease


def this_place() -> str:
    """Return what tells whether a process number means the same process here as there.

    It is empty where the system does not say; then only signs of life count.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str:
    """When a process began, in ticks since the machine did; empty if it has ended."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _is_dead(owner: _Owner) -> bool:
    """Whether an owner was a process of this machine that has ended."""
    is_here = bool(owner.place) and owner.place == this_place()
    return is_here and _started(owner.process) != owner.started


def _read(path: Path) -> _Owner:
    """Who holds a claim; a nameless owner if that is not written yet, or cannot be read."""
    try:
        return _Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Owner()


def _make(path: Path, owner: _Owner) -> bool:
    """Make a claim's file with its content; False if there is one."""
    temporary = path.with_name(f".{path.name}.{owner.name}")
    try:
        temporary.write_text(json.dumps(vars(owner)), encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:  # or made just now, if a network lost the answer and asked again
            return temporary.stat().st_nlink == 2
        except OSError:  # a file system without hard links
            return _make_exclusively(path, owner)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _make_exclusively(path: Path, owner: _Owner) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(vars(owner)))
    except FileExistsError:
        return False
    return True


def _replace(path: Path, owner: _Owner) -> None:
    temporary = path.with_name(f".{path.name}.{owner.name}")
    temporary.write_text(json.dumps(vars(owner)), encoding="utf-8")
    os.replace(temporary, path)
