"""Verify every file of a run folder, and remove what is damaged so that it can be made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from threefold.data.group_file import GROUP_FILE
from threefold.errors import DamagedFileError, RunError, ThreefoldError
from threefold.files import sha256, unreadable
from threefold.json_files import read_json
from threefold.predictions.manifest import MANIFEST
from threefold.predictions.records import (
    BackboneRecord,
    DuplicatesRecord,
    FirstOpening,
    read_choices,
)
from threefold.predictions.run_folder import EXPORTED, RunFolder
from threefold.recipe.recipe import Job, Recipe

LEDGER: Final = "ledger.json"

CHOICES: Final = ("features.json", "precision.json")
"""Records of what was measured, which have checksums of their own."""

_ORIGINALS: Final = ("recipe.toml", GROUP_FILE)
"""Files that nothing can make again."""

_UNVERIFIED: Final = (MANIFEST, *CHOICES)
"""Files of a run that are not hashed, or hash themselves."""

_PLACES: Final = ("jobs", "backbones", "cache", "data", "teachers", "targets", "pseudo_labels")
"""Folders in a run folder whose files are known in other ways."""


class Fault(NamedTuple):
    """A file of a run that is missing or damaged."""

    path: Path
    problem: str
    """One line: what is wrong, expected, got, how to mend it."""
    deletions: tuple[Path, ...]
    """What is deleted so that it is made again."""
    can_mend: bool
    """Whether `doctor --mend` makes it again."""


class RunCheck(NamedTuple):
    """What the check of a run folder found."""

    verified: int
    """Number of files that have the hash that they were written with."""
    faults: tuple[Fault, ...]
    unknown: tuple[str, ...]
    """Files in the folder that are not of the run."""


def check_run(path: str | Path) -> RunCheck:
    """Verify every file of a run folder.

    Raises:
        RunError: there is no run.
    """
    folder = RunFolder.open(path)
    checker = _Checker(folder)
    checker.check()
    faults, verified = checker.faults, checker.verified
    for nested in sorted(folder.path.glob("teachers/*/recipe.toml")):
        inner = check_run(nested.parent)
        faults += inner.faults
        verified += inner.verified
    return RunCheck(verified, tuple(faults), tuple(_unknown_files(folder)))


def remove_damaged(path: str | Path, check: RunCheck) -> list[Path]:
    """Delete what is damaged and can be made again by training, export and report.

    A damaged ledger is written again from what results.json knows of it.

    Args:
        path: the run folder.
        check: what `check_run` found in it.

    Returns:
        What was deleted.

    Raises:
        RunError: another process is at work in the run, or something cannot be deleted.
    """
    folder, deleted = RunFolder.open(path), []
    with folder.locked():
        for deletion in dict.fromkeys(p for fault in check.faults for p in fault.deletions):
            if os.path.lexists(deletion):
                _delete(deletion)
                deleted.append(deletion)
        if any(fault.path == folder.path / LEDGER for fault in check.faults):
            first: FirstOpening | None = None
            with suppress(RunError):
                first = folder.any_results.test_opened
            folder.rebuild_ledger(first)
    return deleted


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise RunError("cannot delete", where=path, got=error) from None


class _Checker:
    """Collects what is wrong with one run folder, its teachers not included."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.faults: list[Fault] = []
        self.verified = 0
        self._seen: set[Path] = set()

    def check(self) -> None:
        """Check all files."""
        folder = self.folder
        if self._try(folder.path / MANIFEST, lambda: folder.manifest) is None:
            return  # nothing can be compared with it
        recipe = self._try(folder.path / "recipe.toml", folder.check_recipe)
        if recipe is None:  # perhaps only run.json is damaged
            with suppress(ThreefoldError):
                recipe = Recipe.load(folder.path / "recipe.toml")
        if folder.has_results and not os.path.lexists(folder.path / MANIFEST):
            self._add(DamagedFileError("there is no manifest", where=folder.path / MANIFEST))
        for name in sorted(folder.manifest):
            if not name.startswith("jobs/"):
                self._try(folder.path / name, partial(folder.verify, name), 1)
        self._records()
        if recipe is not None:
            self._jobs(recipe)
        for record in sorted(folder.path.glob("backbones/*.json")):
            self._try(record.with_suffix(".safetensors"), partial(_check_backbone, record), 1)

    def _records(self) -> None:
        """Read the JSON files, which have checksums, and compare what they have in common."""
        folder = self.folder
        if folder.has("run.json"):
            self._try(folder.path / "run.json", lambda: folder.info)
        if folder.has("results.json"):
            self._try(folder.path / "results.json", lambda: folder.any_results)
        self._try(folder.path / LEDGER, folder.test_opened)
        self._try(folder.path / "views.json", lambda: folder.chosen_views)
        for name in CHOICES:
            if folder.has(name):
                self._try(folder.path / name, partial(read_choices, folder.path / name))
        copies = folder.path / "duplicates.json"
        if copies.exists():
            self._try(copies, lambda: DuplicatesRecord.parse(read_json(copies), copies))
        with suppress(ThreefoldError):
            if folder.is_finished and folder.any_results.digest != folder.info.digest:
                self._add(
                    DamagedFileError(
                        "the results are those of another recipe",
                        where=folder.path / "results.json",
                        expected=f"digest {folder.info.digest[:12]}, as in run.json",
                        got=f"digest {folder.any_results.digest[:12]}",
                    )
                )

    def _jobs(self, recipe: Recipe) -> None:
        """Check the files of all jobs that are done, and that a finished run has all."""
        folder = self.folder
        folds, is_finished = None, False
        with suppress(ThreefoldError):
            recipe = folder.without_left_out(recipe)
            folds, is_finished = folder.info.folds, folder.is_finished
        for job in recipe.jobs(folds):
            done = f"{job.path}/done.json"
            if folder.has(done):
                self._try(folder.path / done, partial(self._check_job, recipe, job))
            elif is_finished:
                self._add(DamagedFileError("a job is missing", where=folder.path / done))

    def _check_job(self, recipe: Recipe, job: Job) -> None:
        """Check a job's files. The weights of a stage are deleted once the next has its own."""
        folder, stages = self.folder, [stage.name for stage in recipe.stages_of(job.member)]
        later = stages[stages.index(job.stage) + 1 :]
        is_replaced = any(folder.has(f"{job._replace(stage=s).path}/done.json") for s in later)
        names = [
            name
            for name in folder.job_record(job).files
            if not (is_replaced and name == "weights.safetensors")
        ]
        for name in names:
            folder.verify_job(job, name)
        self.verified += 1 + len(names)

    def _try(self, path: Path, action: Callable[[], Any], files: int = 0) -> Any:
        """Return what an action returns; None if it finds a fault."""
        try:
            value = action()
        except ThreefoldError as error:
            self._add(error, path)
            return None
        except OSError as error:
            self._add(RunError("cannot read", where=error.filename or path, got=error), path)
            return None
        self.verified += files
        return value

    def _add(self, error: ThreefoldError, path: Path | None = None) -> None:
        """Add a fault, each file once."""
        where = Path(str(error.where)) if error.where else path
        where = path if path is not None and not where else where
        assert where is not None
        if where in self._seen:
            return
        self._seen.add(where)
        damaged = isinstance(error, DamagedFileError)
        deletions = tuple(_deletions(self.folder, where)) if damaged else ()
        can_mend = damaged and (where.name == LEDGER or bool(deletions))
        problem = error if error.fix or can_mend else error.with_fix("restore it from a copy")
        self.faults.append(Fault(where, str(problem), deletions, can_mend))


def _check_backbone(record: Path) -> None:
    """Compare a frozen backbone with its record."""
    path = record.with_suffix(".safetensors")
    expected = BackboneRecord.parse(read_json(record), record).sha256
    try:
        found = sha256(path)
    except OSError as error:
        raise unreadable("cannot read a frozen backbone", path, error) from None
    if found != expected:
        raise DamagedFileError("a frozen backbone is damaged", where=path)


def _deletions(folder: RunFolder, path: Path) -> Iterator[Path]:
    """Yield what to delete so that a file is made again; nothing if that is not possible."""
    try:
        parts = path.relative_to(folder.path).parts
    except ValueError:
        return
    if not parts or path.name in _ORIGINALS or path.name == LEDGER or parts[0] == "data":
        return
    jobs = folder.path / "jobs"
    if parts[0] == "jobs" and len(parts) > 2:
        yield jobs / parts[1] / parts[2]
        return
    yield path
    if path.name == MANIFEST:
        yield folder.path / "results.json"
    with suppress(ThreefoldError):
        recipe = Recipe.load(folder.path / "recipe.toml")
        if parts[0] == "backbones" and path.suffix == ".json":
            for member in recipe.members:  # whose heads fit one backbone only
                if any(stage.kind == "head" for stage in recipe.stages_of(member.name)):
                    yield jobs / member.name
        if parts[0] == "pseudo_labels":
            for member in recipe.members:
                if recipe.uses_pseudo_labels(member.name):
                    yield jobs / member.name / path.stem


def _unknown_files(folder: RunFolder) -> Iterator[str]:
    """Yield names of files at the top of the folder that are not of the run."""
    with suppress(RunError, OSError):
        known = {*folder.manifest, *_UNVERIFIED, *EXPORTED}
        for entry in sorted(folder.path.iterdir()):
            if entry.name.startswith(".") and entry.name.endswith(".lock"):
                continue
            if entry.name not in known and entry.name not in _PLACES:
                yield entry.name
