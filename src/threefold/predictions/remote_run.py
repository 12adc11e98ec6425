"""A run folder on an object store: its local copy, and what is copied when.

What completes a job, its done.json, is copied last; and before that its files are compared with the
hashes in it. So whoever sees a done.json there finds the files that belong to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from threefold.errors import DamagedFileError, RunError
from threefold.json_files import read_json
from threefold.object_store import LocalCopy, ObjectFolder, local_copy_of, url_of
from threefold.recipe.recipe import Job

_OWN: Final = ("cache/", ".claims/")
"""Folders of a run that stay where they are."""

_LAST: Final = ("results.json", "report.html")
"""Files of a run that are copied after all others."""


class RemoteRun:
    """A run folder on an object store, with a local copy.

    Args:
        url: of the run.
        folder: of the copy; by default one in the user's cache.
    """

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.url = url
        self.folder = folder or local_copy_of(url, "runs")
        self._copy = LocalCopy(ObjectFolder(url), self.folder)

    def pull(self, jobs: Sequence[Job] | None = None) -> None:
        """Copy what is new there.

        Args:
            jobs: those whose files are needed; None = all.

        Raises:
            RunError: the store refuses.
        """
        folders = None if jobs is None else tuple(f"{job.path}/" for job in jobs)
        there = {
            name: entry
            for name, entry in self._copy.store.list().items()
            if folders is None or not name.startswith("jobs/") or name.startswith(folders)
        }
        names = sorted(there, key=lambda name: name.endswith("/done.json"))
        self._copy.pull({name: there[name] for name in names})
        gone = [
            name
            for name in self._copy.known - there.keys()
            if folders is None or name.startswith(folders)
        ]
        self._copy.drop(gone)

    def push(self, jobs: Sequence[Job] | None = None) -> None:
        """Copy what is new here, each job's done.json after its other files.

        Args:
            jobs: those whose files may be new; None = all.

        Raises:
            RunError: the store refuses.
        """
        folders = None if jobs is None else tuple(f"{job.path}/" for job in jobs)
        here = [
            name
            for name in _files(self.folder)
            if folders is None or not name.startswith("jobs/") or name.startswith(folders)
        ]
        self._copy.push(sorted(here, key=_place))
        gone = [
            name
            for name in self._copy.known
            if name.startswith(folders or "jobs/") and not (self.folder / name).exists()
        ]
        self._copy.delete(gone)

    def push_state(self, job: Job, name: str) -> None:
        """Copy the saved state of a job that is not done, if it is new.

        Raises:
            RunError: the store refuses.
        """
        path = f"{job.path}/{name}"
        if (self.folder / path).exists():
            self._copy.push([path])

    def check(self, job: Job) -> None:
        """Compare the copied files of a finished job with the hashes in its done.json.

        Raises:
            RunError: one is missing or another; nothing of the job is kept then.
        """
        folder = self.folder / job.path
        try:
            files = read_json(folder / "done.json")["files"]
            for name, digest in files.items():
                path = folder / name
                # The weights of an earlier stage are deleted by the next one.
                if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                    raise DamagedFileError("a copied file is damaged", where=path)
        except (DamagedFileError, KeyError, TypeError) as error:
            names = [f"{job.path}/{path.name}" for path in folder.iterdir() if path.is_file()]
            self._copy.drop(names)
            raise RunError(
                "the files of a job on the object store do not belong together",
                where=f"{self.url}/{job.path}",
                got=error,
                fix=f"delete {self.url}/{job.path} and run the same command again",
            ) from None


def _files(folder: Path) -> Iterator[str]:
    """Names of the files of a run that are copied: no caches, no locks, no temporary files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_state = path.name == ".resume"
        if path.is_file() and not name.startswith(_OWN):
            if path.name.startswith(".") and not is_state:
                continue
            yield name


def _place(name: str) -> tuple[int, str]:
    """Place of a file in the order of copying."""
    if name in _LAST:
        return (2, name)
    return (1 if name.endswith("/done.json") else 0, name)


@contextmanager
def run_folder_at(out: str | Path | None) -> Iterator[tuple[str | Path | None, str]]:
    """Work in a run folder that may be on an object store.

    What is there is copied to this machine first, and what is new here is copied back at the end,
    also if the work is stopped.

    Args:
        out: a path, or the URL of a folder on an object store; None = not chosen yet.

    Yields:
        The local folder, or what is no URL as it is; and the URL, which is empty then.

    Raises:
        RunError: the object store refuses.
    """
    url = url_of(out) if isinstance(out, str | Path) else ""
    if not url:
        yield out, ""
        return
    remote = RemoteRun(url)
    remote.pull()
    try:
        yield remote.folder, url
    finally:
        if (remote.folder / "recipe.toml").exists():
            remote.push()
