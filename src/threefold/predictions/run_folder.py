"""The folder of a run: the one reader and writer of its files, without torch.

What is written is remembered, so that one command never reads back its own files. A job is one
stage of one member in one fold; its `done.json` is written last, so a job that has one is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np

from threefold.data.group_file import GROUP_FILE
from threefold.errors import RunError
from threefold.files import read_arrays, read_json, sha256, write_arrays, write_bytes, write_json
from threefold.predictions.predictions import Predictions
from threefold.predictions.records import (
    VERSION,
    FirstOpening,
    JobRecord,
    Opening,
    Record,
    RunInfo,
    TestLedger,
    seal,
)
from threefold.predictions.results_schema import ChosenViews, Results
from threefold.recipe import Job, Recipe, fold_name

OPENED_ONCE = ("train", "reproduce", "export")
"""Verbs whose question is fixed before they open the test rows: repeating one is not counted."""


@dataclass(frozen=True, eq=False)
class ChosenAnswers:
    """What the chosen ensemble answers on its headline rows: probs (n, k), labels (n,), n ids."""

    probs: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]


def default_run_folder(data: Path) -> Path:
    """Return the run folder of a folder of images: runs/NAME, but never inside the images.

    Where the current folder is the images' or inside it, `runs` lies beside the images.
    """
    images = data.resolve()
    target = Path("runs") / images.name
    if target.resolve().is_relative_to(images):
        target = Path(os.path.relpath(images.parent / "runs" / images.name))
    return target


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, which need not exist yet.
        recipe: its recipe, where that is known; by default `recipe.toml` in it.
    """

    def __init__(self, path: str | Path, recipe: Recipe | None = None) -> None:
        self.path = Path(path)
        if recipe is not None:
            self.recipe = recipe

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return an existing run folder.

        Raises:
            RunError: there is no run.
        """
        folder = cls(path)
        if not (folder.path / "recipe.toml").is_file():
            raise RunError(
                "not a run folder",
                where=folder.path,
                expected="recipe.toml in it",
                fix="give the folder that `threefold train --out` or `threefold fit` made",
            )
        return folder

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, header: str = "") -> Self:
        """Start a run folder, or return one that the same recipe has started.

        Args:
            path: the folder.
            recipe: what the run does.
            header: comment lines above the recipe's copy.

        Raises:
            RunError: the folder belongs to another recipe, is not a run, or cannot be written.
        """
        folder = cls(path, recipe)
        file = folder.path / "recipe.toml"
        if file.exists():
            started = Recipe.load(file)
            if started.digest() != recipe.digest():
                raise RunError(
                    "the folder holds a run of another recipe",
                    where=folder.path,
                    got=f"differs in {', '.join(_differences(started, recipe))}",
                    fix="choose another --out, or delete the folder",
                )
        else:
            folder.check_new()
            write_bytes(file, recipe.dump(header).encode())
        return folder

    def check_new(self) -> None:
        """Check that a run can be started here: the folder has at most its file of groups.

        Raises:
            RunError: it has other files.
        """
        if self.path.is_dir() and any(entry.name != GROUP_FILE for entry in self.path.iterdir()):
            raise RunError(
                "the folder is not empty and not a run",
                where=self.path,
                fix="choose another --out",
            )

    def replace_recipe(self, recipe: Recipe, header: str = "") -> None:
        """Write another recipe in place of the run's, for example one with fewer members."""
        write_bytes(self.path / "recipe.toml", recipe.dump(header).encode())
        self.recipe = recipe

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock of a killed process is released.

        Raises:
            RunError: another process holds the lock.
        """
        from filelock import FileLock, Timeout  # not needed to read a run

        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with suppress(NotImplementedError):  # a file system without locks
                lock.acquire()
        except Timeout:
            raise RunError(
                "another process is at work in this run",
                where=self.path,
                fix="wait for it, or choose another --out",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def train_command(self) -> str:
        """Return the command that completes the run."""
        return f"threefold train {self.path / 'recipe.toml'} --out {self.path}"

    # Recipe and records

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, without the members that are still to be trained (`Results.pending`)."""
        recipe = Recipe.load(self.path / "recipe.toml")
        pending = self.results.pending if self.has_results else ()
        return recipe.without(pending) if pending else recipe

    @property
    def header(self) -> list[str]:
        """The comment lines above the recipe: the reasons of a plan."""
        lines = (self.path / "recipe.toml").read_text(encoding="utf-8").splitlines()
        return [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines)]

    @property
    def folds_reason(self) -> str:
        """Why the plan chose how rows are put into folds; empty where no plan did."""
        start = f"folds.scheme = {self.recipe.folds.scheme}: "
        reasons = [line.removeprefix(start) for line in self.header if line.startswith(start)]
        return reasons[0] if reasons else ""

    @cached_property
    def info(self) -> RunInfo:
        """The data, versions and machine of the run (run.json)."""
        return RunInfo.parse(read_json(self.path / "run.json"), self.path / "run.json")

    def write_info(self, info: RunInfo) -> None:
        """Write run.json."""
        self._write("run.json", info)
        self.info = info

    @property
    def has_results(self) -> bool:
        """Whether there are results, of all members or of the first (`Results.pending`)."""
        return (self.path / "results.json").exists()

    @property
    def is_finished(self) -> bool:
        """Whether all members were trained and scored."""
        return self.has_results and not self.results.pending

    def check_finished(self, what: str = "the run is not complete") -> None:
        """Raise a RunError that says `what` unless the run has results."""
        if not self.has_results:
            raise RunError(what, where=self.path, fix=self.train_command())

    @cached_property
    def results(self) -> Results:
        """Everything that was measured (results.json)."""
        path = self.path / "results.json"
        return Results.parse(read_json(path), path)

    def write_results(self, results: Results) -> None:
        """Write results.json."""
        self._write("results.json", results)
        self.results = results

    def add_results(self, step: str, seconds: float, **changes: Any) -> None:
        """Add the duration of a step, and values that it brought, to results.json."""
        durations = {**self.results.seconds, step: seconds}
        self.write_results(self.results.replace(seconds=durations, **changes))

    @cached_property
    def chosen_views(self) -> ChosenViews | None:
        """The chosen number of test-time views (views.json); None if there was no choice."""
        path = self.path / "views.json"
        return ChosenViews.parse(read_json(path), path) if path.exists() else None

    def write_views(self, views: ChosenViews) -> None:
        """Write views.json."""
        self._write("views.json", views)
        self.chosen_views = views

    # Predictions

    @cached_property
    def oof(self) -> Predictions | None:
        """The members' out-of-fold predictions, if there are any."""
        return self._read_predictions("oof")

    @property
    def test(self) -> Predictions | None:
        """The members' predictions on the test rows, if there are any and they are not sealed."""
        return None if self.is_sealed else self.all_test

    @cached_property
    def all_test(self) -> Predictions | None:
        """The members' predictions on the test rows, sealed or not: for the last step of a run."""
        return self._read_predictions("test")

    @property
    def is_sealed(self) -> bool:
        """Whether test rows stay unread, because members are still to be trained."""
        return self.has_results and bool(self.results.pending)

    def _read_predictions(self, kind: str) -> Predictions | None:
        path = self.path / f"{kind}.npz"
        return Predictions.load(path) if path.exists() else None

    def predictions(self, kind: str = "oof") -> Predictions:
        """Return the out-of-fold ("oof") or test ("test") predictions of the members.

        Raises:
            RunError: the run is not complete, or has no such rows.
        """
        rows = self.test if kind == "test" else self.oof
        if rows is None:
            raise RunError(
                f"no {kind} predictions",
                where=self.path,
                expected=f"{kind}.npz",
                fix=f"run `{self.train_command()}` to its end; "
                "a run without a test split has only oof",
            )
        return rows

    def headline_rows(self) -> Predictions:
        """Return the predictions that the headline is about: test, or oof without a test split.

        Raises:
            RunError: the run is not complete.
        """
        return self.test if self.test is not None else self.predictions("oof")

    def write_predictions(self, rows: Predictions) -> None:
        """Write oof.npz or test.npz, by the kind of the rows."""
        rows.save(self.path / f"{rows.kind}.npz")
        if rows.kind == "test":
            self.all_test = rows
        else:
            self.oof = rows

    @cached_property
    def chosen(self) -> ChosenAnswers:
        """The chosen ensemble's calibrated answers on the headline rows (chosen.npz).

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self.path / "chosen.npz"
        arrays = read_arrays(path)
        names = ("probs", "labels", "ids")
        if not arrays.keys() >= set(names):
            raise RunError(
                "arrays are missing", where=path, expected=", ".join(names), got=", ".join(arrays)
            )
        return ChosenAnswers(arrays["probs"], arrays["labels"], tuple(map(str, arrays["ids"])))

    def chosen_predictions(self) -> Predictions:
        """Return the chosen ensemble's answers as the only member of the headline rows.

        Raises:
            RunError: the run is not complete.
        """
        name = f"{self.results.chosen} (chosen)"
        return replace(self.headline_rows(), probs=self.chosen.probs[None], members=(name,))

    def write_chosen(self, rows: Predictions, probs: np.ndarray) -> None:
        """Write chosen.npz: the chosen ensemble's answers (n, k) on the headline rows."""
        ids = np.array(rows.ids)
        write_arrays(self.path / "chosen.npz", probs=probs, labels=rows.labels, ids=ids)
        self.chosen = ChosenAnswers(probs, rows.labels, rows.ids)

    # Jobs

    def job_folder(self, job: Job) -> Path:
        """Return the folder of a job's files."""
        return self.path / job.path

    def is_done(self, job: Job) -> bool:
        """Whether a job is complete: it or a later stage, which took its weights over, has them."""
        stages = [stage.name for stage in self.recipe.stages_of(job.member)]
        later = stages[stages.index(job.stage) :]
        folders = [self.job_folder(job._replace(stage=stage)) for stage in later]
        return (folders[0] / "done.json").exists() and any(
            (folder / "done.json").exists() and (folder / "weights.safetensors").exists()
            for folder in folders
        )

    def finish_job(self, job: Job, seconds: float) -> None:
        """Write done.json with the hashes of the job's files."""
        folder = self.job_folder(job)
        hashes = {
            path.name: sha256(path)
            for path in sorted(folder.iterdir())
            if path.name != "done.json" and not path.name.startswith(".")
        }
        record = JobRecord(job=job._asdict(), seconds=seconds, files=hashes)
        write_json(folder / "done.json", record.as_json())

    def job_record(self, job: Job) -> JobRecord:
        """Read the done.json of a job."""
        path = self.job_folder(job) / "done.json"
        return JobRecord.parse(read_json(path), path)

    def verify_job(self, job: Job) -> Path:
        """Check a finished job's files against their hashes, and return its folder.

        Raises:
            RunError: a file is missing or was changed.
        """
        folder = self.job_folder(job)
        for name, expected in self.job_record(job).files.items():
            path = folder / name
            if not path.exists() or sha256(path) != expected:
                raise RunError(
                    "a file of a finished job is missing or damaged",
                    where=path,
                    fix=f"delete {folder.parent} and run the same command again",
                )
        return folder

    def histories(self) -> dict[Job, dict[str, Any]]:
        """Read the training history of every job that has one, in the order of their folders."""
        histories = {}
        for file in sorted(self.path.glob("jobs/*/*/*/history.json")):
            member, fold, stage = file.parts[-4:-1]
            number = -1 if fold == fold_name(-1) else int(fold.removeprefix("fold"))
            histories[Job(member, number, stage)] = read_json(file)
        return histories

    # The test rows

    def open_test(self, by: str, rows: int) -> None:
        """Note in ledger.json that a verb opens the test rows.

        Args:
            by: the verb; the first training and each of OPENED_ONCE are noted once.
            rows: number of rows.
        """
        openings = self._openings()
        if by == "train":
            is_repeated = bool(openings)
        else:
            is_repeated = by in OPENED_ONCE and any(opening.by == by for opening in openings)
        if not is_repeated:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            opening = Opening(at=now, by=by, rows=rows)
            ledger = TestLedger(version=VERSION, test_opened=(*openings, opening))
            self._write("ledger.json", ledger)

    def test_opened(self) -> FirstOpening | None:
        """Return when the test rows were first opened, and how often; None if never."""
        return TestLedger(version=VERSION, test_opened=self._openings()).first()

    def _openings(self) -> tuple[Opening, ...]:
        path = self.path / "ledger.json"
        return TestLedger.parse(read_json(path), path).test_opened if path.exists() else ()

    def _write(self, name: str, record: Record) -> None:
        write_json(self.path / name, seal(record.as_json()))


def _differences(first: Recipe, second: Recipe) -> Iterator[str]:
    """Yield the paths of the values in which two recipes differ."""
    left, right = first.model_dump(mode="json"), second.model_dump(mode="json")
    for key in left:
        if left[key] == right[key] or key in ("name", "budget_minutes"):
            continue
        if isinstance(left[key], dict) and isinstance(right[key], dict):
            yield from (f"{key}.{k}" for k in left[key] if left[key][k] != right[key].get(k))
        else:
            yield key
