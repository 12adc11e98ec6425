"""The manifest of a run: SHA-256 of its files, so that a changed or foreign one is found.

`manifest.json` has the hash of every file outside the job folders, and of each job's `done.json`,
which has those of the job's other files (`job_files`). It is written before the file itself, with
the hash of what the file replaces: a process that is killed in between leaves a file that has one
of the two. A file that is not in the manifest is read as it is.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from threefold.errors import DamagedFileError, RunError
from threefold.files import exclusive, real_path, sha256, unreadable, write_bytes
from threefold.json_files import json_bytes, read_json
from threefold.npz_files import array_bytes, read_arrays
from threefold.predictions.records import VERSION, Record, VersionedRecord, seal

MANIFEST: Final = "manifest.json"
"""Name of the file in a run folder."""

LOCK: Final = ".manifest.lock"
"""Held by the process that changes the manifest."""

ABSENT: Final = ""
"""In place of a hash: there may be no such file, because the first one is being written."""

PATIENCE: Final = 60.0
"""Seconds to wait for another process that changes the manifest."""


class Manifest(VersionedRecord):
    """manifest.json: the SHA-256 by path of a file; two while the second is being replaced."""

    files: dict[str, tuple[str, ...]]


class ManifestFiles:
    """The files of a run folder that its manifest covers.

    Args:
        path: the run folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest: tuple[object, dict[str, tuple[str, ...]]] = (None, {})

    def train_command(self) -> str:
        """Return the command that completes the run; teachers are trained with their student."""
        run = self.path
        if run.parent.name == "teachers" and (run.parent.parent / "recipe.toml").exists():
            run = run.parent.parent
        return shlex.join(["threefold", "train", str(run / "recipe.toml"), "--out", str(run)])

    @contextmanager
    def advising(self, path: Path, fix: str = "") -> Iterator[None]:
        """Say how a damaged file of the run is made anew."""
        try:
            yield
        except DamagedFileError as error:
            deletion = f"delete {path} and " if os.path.lexists(path) else ""
            fix = fix or f"{deletion}run `{self.train_command()}`, which writes it again"
            raise error.with_fix(fix) from None

    # Reading

    @property
    def manifest(self) -> dict[str, tuple[str, ...]]:
        """The hashes by path; empty for a run without a manifest.

        Raises:
            RunError: the manifest is damaged or cannot be read.
        """
        path = self.path / MANIFEST
        signature = _signature(path)
        if self._manifest[0] != signature or signature is None:
            files: dict[str, tuple[str, ...]] = {}
            if signature is not None:
                results = self.path / "results.json"
                fix = f"delete {path} and {results} and run `{self.train_command()}`"
                with self.advising(path, fix):
                    files = Manifest.parse(read_json(path), path).files
            self._manifest = (signature, files)
        return self._manifest[1]

    def has(self, name: str) -> bool:
        """Whether there is a file, or should be one."""
        hashes = self.manifest.get(name)
        if hashes is not None and ABSENT not in hashes:
            return True
        return os.path.lexists(self.path / name)

    def verify(self, name: str, fix: str = "") -> Path:
        """Compare a file with the manifest, and return its path.

        Args:
            name: path of the file in the run folder.
            fix: how it is made anew, by default by the training of the run.

        Raises:
            RunError: it is missing or changed, or cannot be read.
        """
        path = self.path / name
        hashes = self.manifest.get(name)
        if hashes is None:
            return path
        with self.advising(path, fix):
            if not os.path.lexists(path):
                raise DamagedFileError("a file of the run is missing", where=path)
            try:
                found = sha256(path)
            except OSError as error:
                raise unreadable("cannot read", path, error) from None
            if found not in hashes:
                raise DamagedFileError(
                    "the file was changed since the run wrote it, or is that of another run",
                    where=path,
                    expected=f"SHA-256 {hashes[0][:12]}, as in {MANIFEST}",
                    got=f"SHA-256 {found[:12]}",
                )
        return path

    def is_intact(self, name: str) -> bool:
        """Whether there is a file, as the run wrote it.

        Raises:
            RunError: it cannot be read.
        """
        try:
            return self.has(name) and os.path.lexists(self.verify(name))
        except DamagedFileError:
            return False

    def read_arrays(self, name: str, fix: str = "") -> dict[str, np.ndarray]:
        """Read an .npz file of the run.

        Raises:
            RunError: the file is missing or damaged.
        """
        with self.advising(self.path / name, fix):
            return read_arrays(self.verify(name))

    # Writing

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file of the run, and its hash into the manifest.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        path, digest = self.path / name, hashlib.sha256(content).hexdigest()
        with self._changing_manifest() as files:
            before = files.get(name) or (_digest_of(path),)
            files[name] = (digest, *(old for old in before[:1] if old != digest))
        write_bytes(path, content)
        with self._changing_manifest(durable=False) as files:
            files[name] = (digest,)

    def write_record(self, name: str, record: Record) -> None:
        """Write a JSON file of the run with its checksum."""
        self.write_file(name, json_bytes(seal(record.as_json())))

    def write_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write an .npz file of the run."""
        self.write_file(name, array_bytes(**arrays))

    @contextmanager
    def recording(self, name: str) -> Iterator[Path]:
        """Record the hash of a file that the caller writes; until then it has none.

        If that fails, the file must be as it was.
        """
        before = self.manifest.get(name)
        self.forget([name])
        try:
            yield self.path / name
        except BaseException:
            if before is not None:
                with suppress(RunError), self._changing_manifest() as files:
                    files[name] = before
            raise
        self.record([name])

    def record(self, names: Iterable[str]) -> None:
        """Write the hashes of files as they are now into the manifest.

        Raises:
            RunError: a file cannot be read, or the manifest cannot be written.
        """
        digests = {}
        for name in names:
            try:
                digests[name] = (sha256(self.path / name),)
            except OSError as error:
                raise unreadable("cannot read", self.path / name, error) from None
        if any(self.manifest.get(name) != digest for name, digest in digests.items()):
            with self._changing_manifest() as files:
                files.update(digests)

    def record_new(self, names: Iterable[str]) -> None:
        """Record the files among these that exist and are not in the manifest yet."""
        known = self.manifest
        self.record(n for n in names if n not in known and (self.path / n).is_file())

    def write_target(self, target: Path, content: bytes) -> None:
        """Write a file that may lie in the run folder or elsewhere."""
        if real_path(target).parent == real_path(self.path):
            self.write_file(target.name, content)
        else:
            write_bytes(target, content)

    def forget(self, names: Iterable[str]) -> None:
        """Take files out of the manifest, because they are about to be replaced."""
        known = [name for name in names if name in self.manifest]
        if known:
            with self._changing_manifest() as files:
                for name in known:
                    files.pop(name, None)

    @contextmanager
    def _changing_manifest(self, durable: bool = True) -> Iterator[dict[str, tuple[str, ...]]]:
        """Yield the hashes, which are written afterwards, while other processes wait.

        Args:
            durable: what is written must outlast a loss of power.
        """
        busy = RunError(
            "another process changes the manifest of the run",
            where=self.path / LOCK,
            fix="wait for it, then run the same command again",
        )
        fix = "make the run folder writable, or copy it to where it can be written"
        with exclusive(self.path / LOCK, busy, fix, PATIENCE):
            files = dict(self.manifest)
            yield files
            tree = seal(Manifest(version=VERSION, files=files).as_json())
            write_bytes(self.path / MANIFEST, json_bytes(tree), durable=durable)


def _signature(path: Path) -> object:
    """Return what changes with a file, or None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None if not os.path.lexists(path) else path
    return status.st_ino, status.st_mtime_ns, status.st_size


def _digest_of(path: Path) -> str:
    """Return the hash of a file that may be absent."""
    with suppress(OSError):
        return sha256(path)
    return ABSENT
