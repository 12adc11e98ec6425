"""The folder of a run: the one reader and writer of its files, without torch.

What is written is remembered, so that one command never reads back its own files. A job is one
stage of one member in one fold; its `done.json` is written last, so a job that has one is complete.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Final, Self

import numpy as np

from threefold.data.group_file import GROUP_FILE
from threefold.data.in_memory import DATA_FOLDER, is_stored_data
from threefold.errors import DamagedFileError, RunError, refuse_address
from threefold.files import delete_leftovers, exclusive, real_path
from threefold.json_files import read_json
from threefold.object_store import INDEX
from threefold.predictions.manifest import LOCK, MANIFEST
from threefold.predictions.multilabel import AnyPredictions, MultilabelPredictions
from threefold.predictions.predictions import Predictions
from threefold.predictions.records import (
    VERSION,
    FirstOpening,
    Opening,
    RunInfo,
    TestLedger,
)
from threefold.predictions.results_schema import ChosenViews
from threefold.predictions.run_results import RunResults
from threefold.recipe.recipe import Recipe
from threefold.recipe.subset import known_digests, with_dependents
from threefold.suffixes import ARCHIVES

OPENED_ONCE = ("train", "reproduce", "export")
"""Verbs whose question is fixed before they open the test rows: repeating one is not counted."""


EXPORTED: Final = ("model.onnx", "report.html")
"""Files of the manifest that are not made by training."""

_FIRST: Final = (GROUP_FILE, MANIFEST, LOCK, INDEX)
"""Files that may be there before the recipe."""


@dataclass(frozen=True, eq=False)
class ChosenAnswers:
    """What the chosen ensemble answers on its headline rows: probs (n, k), labels (n,), n ids."""

    probs: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]


def default_run_folder(data: Path) -> Path:
    """Return the run folder of a folder or table: runs/NAME, but never inside the images.

    Where the current folder is the images' or inside it, `runs` lies beside the images.
    """
    images = real_path(data)
    name = images.name
    if images.is_file():
        name = name.removesuffix(next((s for s in ARCHIVES if name.lower().endswith(s)), ""))
        name = Path(name).stem if name == images.name else name
    if not data.exists():  # a data set of the hub with its configuration, or a range of shards
        name = re.sub(r"\W+", "-", name.removesuffix(".tar")).strip("-") or "run"
    target = Path("runs") / name
    if real_path(target).is_relative_to(images):
        target = Path(os.path.relpath(images.parent / "runs" / name))
    return target


def _precedes_run(entry: Path) -> bool:
    """Whether a file or folder may be there before a run: its groups, or data from memory.

    Or what a process left that was killed before it had written the recipe.
    """
    if entry.name in _FIRST or (entry.name.startswith(".") and entry.suffix == ".tmp"):
        return True
    return entry.name == DATA_FOLDER and is_stored_data(entry)


class RunFolder(RunResults):
    """The files of one run.

    Args:
        path: the folder, which need not exist yet.
        recipe: its recipe, where that is known; by default `recipe.toml` in it.

    Attributes:
        accepted_edit: whether `create` found another name, budget or comment in recipe.toml.
    """

    def __init__(self, path: str | Path, recipe: Recipe | None = None) -> None:
        super().__init__(path)
        self.accepted_edit = False
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
            refuse_address(path, RunError)
            fix = "give the folder that `threefold train --out` or `threefold fit` made"
            if folder.path.suffix == ".onnx":
                fix += "; an exported file answers images: `threefold predict`, threefold.load"
            elif folder.path.exists():
                images = shlex.quote(str(path))
                fix += f"; to train on a folder of images run `threefold fit {images}`"
            raise RunError(
                "not a run folder", where=folder.path, expected="recipe.toml in it", fix=fix
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
            RunError: the folder belongs to another recipe, its recipe was edited after the run
                began, it is not a run, or it cannot be written.
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
            folder.check_digest(started)
            if folder.is_recipe_edited:
                folder.accepted_edit = True
                folder.record(["recipe.toml"])
            folder.recipe = folder.without_left_out(recipe)
        else:
            folder.check_new()
            folder.write_file("recipe.toml", recipe.dump(header).encode())
        return folder

    def check_recipe(self) -> Recipe:
        """Read recipe.toml, and check that it is still what the run wrote.

        Raises:
            RunError: it was edited.
            RecipeError: it cannot be read, or is no recipe.
        """
        file = self.path / "recipe.toml"
        whole = Recipe.load(file)
        if self.has("run.json"):
            self.verify("run.json")
        self.check_digest(whole)
        if self.is_recipe_edited:
            raise RunError(
                "the recipe was edited after the run began",
                where=file,
                expected=f"SHA-256 {self.manifest['recipe.toml'][0][:12]}, as in {MANIFEST}",
                got="another name, budget or comment",
                fix=f"undo the change, or accept it with `{self.train_command()}`",
            )
        return whole

    def check_digest(self, whole: Recipe) -> None:
        """Check that a recipe is the one that the run began with, but for its name and budget.

        A run whose tuned members are to follow began with its probes alone, and one may go on
        without members that were left out. Keys that came with a later version have their defaults.

        Raises:
            RunError: it is another one.
        """
        if not (self.path / "run.json").exists():
            return
        known = [*known_digests(whole), *known_digests(self.without_left_out(whole))]
        if self.info.digest not in known:
            raise RunError(
                "the recipe was edited after the run began",
                where=self.path / "recipe.toml",
                expected=f"digest {self.info.digest[:12]}, as in run.json",
                got=f"digest {known[0][:12]}",
                fix="undo the change, or train the new recipe with another --out",
            )

    @property
    def left_out(self) -> dict[str, str]:
        """Members that the run goes on without, and why."""
        return dict(self.info.left_out) if (self.path / "run.json").exists() else {}

    def without_left_out(self, recipe: Recipe) -> Recipe:
        """Return the recipe without the members that were left out, and those that need them."""
        names = with_dependents(recipe, self.left_out)
        return recipe.without(names) if names else recipe

    @property
    def is_recipe_edited(self) -> bool:
        """Whether recipe.toml is not the file that the run wrote."""
        try:
            self.verify("recipe.toml")
        except DamagedFileError:
            return True
        return False

    def check_new(self) -> None:
        """Check that a run can be started here: it has at most its file of groups and its data.

        What a process left that was killed before its run began is deleted.

        Raises:
            RunError: it has other files.
        """
        for name in ("recipe.toml", GROUP_FILE, DATA_FOLDER):
            delete_leftovers(self.path, name)
        if self.path.is_dir() and not all(map(_precedes_run, self.path.iterdir())):
            raise RunError(
                "the folder is not empty and not a run",
                where=self.path,
                fix="choose another --out",
            )

    def replace_recipe(self, recipe: Recipe, header: str = "") -> None:
        """Write another recipe in place of the run's: that of its probes alone."""
        if (self.path / "run.json").exists():
            self.write_info(self.info.replace(digest=recipe.digest()))
        self.write_file("recipe.toml", recipe.dump(header).encode())
        self.recipe = recipe

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock of a killed process is released.

        Temporary files that killed processes left are deleted.

        Raises:
            RunError: another process holds the lock, or the folder cannot be written.
        """
        busy = RunError(
            "another process is at work in this run",
            where=self.path,
            fix="wait for it, or choose another --out",
        )
        fix = "make the run folder writable, or copy it to where it can be written"
        with exclusive(self.path / ".lock", busy, fix):
            delete_leftovers(self.path)
            yield

    # Recipe and records

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, without members that were left out or follow later (`Results.pending`)."""
        recipe = self.without_left_out(self.check_recipe())
        pending = self.any_results.pending if self.has_results else ()
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
        path = self.path / "run.json"
        with self.advising(path):
            self.verify("run.json")
            return RunInfo.parse(read_json(path), path)

    def write_info(self, info: RunInfo) -> None:
        """Write run.json."""
        self.write_record("run.json", info)
        self.info = info

    @property
    def is_finished(self) -> bool:
        """Whether all members were trained and scored."""
        return self.has_results and not self.any_results.pending

    @property
    def is_whole(self) -> bool:
        """Whether the run is finished, and no file that training writes was deleted since."""
        if not self.is_finished or not (self.path / "run.json").exists():
            return False
        names = ["chosen.npz", "ensemble.npz", "thumbs.npz"]
        names += [name for name in self.manifest if name not in EXPORTED]
        if any(counts.score for counts in self.info.roles.values()):
            names.append("oof.npz")
        if self.info.n_test:
            names.append("test.npz")
        return all((self.path / name).exists() for name in names) and all(
            self.is_done(job) for job in self.recipe.jobs(self.info.folds)
        )

    @cached_property
    def chosen_views(self) -> ChosenViews | None:
        """The chosen number of test-time views (views.json); None if there was no choice."""
        path = self.path / "views.json"
        if not self.has("views.json"):
            return None
        with self.advising(path, self.rescoring(path)):
            self.verify("views.json")
            return ChosenViews.parse(read_json(path), path)

    def rescoring(self, path: Path) -> str:
        """Return how a file that scoring writes, and that may be absent, is made anew."""
        results = self.path / "results.json"
        return f"delete {path} and {results} and run `{self.train_command()}`"

    def write_views(self, views: ChosenViews) -> None:
        """Write views.json."""
        self.write_record("views.json", views)
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

    def _read_predictions(self, kind: str) -> Predictions | None:
        name = f"{kind}.npz"
        if not self.has(name):
            return None
        with self.advising_predictions(name):
            return Predictions.load(self.verify(name))

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

    def write_predictions(self, rows: AnyPredictions) -> None:
        """Write oof.npz or test.npz, by the kind of the rows."""
        self.write_file(f"{rows.kind}.npz", rows.to_bytes())
        if isinstance(rows, MultilabelPredictions):
            self.__dict__.pop("multilabel_oof", None)  # read again when it is asked for
        elif rows.kind == "test":
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
        arrays = self.read_arrays("chosen.npz")
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
        self.write_arrays("chosen.npz", probs=probs, labels=rows.labels, ids=ids)
        self.chosen = ChosenAnswers(probs, rows.labels, rows.ids)

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
            self.write_record("ledger.json", ledger)

    def test_opened(self) -> FirstOpening | None:
        """Return when the test rows were first opened, and how often; None if never."""
        return TestLedger(version=VERSION, test_opened=self._openings()).first()

    def rebuild_ledger(self, first: FirstOpening | None) -> None:
        """Write ledger.json again, from what results.json knows of it.

        Args:
            first: the first opening and the number of all; None = nothing is known.
        """
        path = self.path / "ledger.json"
        self.forget([path.name])
        path.unlink(missing_ok=True)
        if first is not None:
            opening = Opening(at=first.at, by=first.by, rows=first.rows)
            others = opening.replace(by="lost")
            openings = (opening, *[others] * (first.times - 1))
            self.write_record(path.name, TestLedger(version=VERSION, test_opened=openings))

    def _openings(self) -> tuple[Opening, ...]:
        if not self.has("ledger.json"):
            return ()
        path = self.path / "ledger.json"
        doctor = shlex.join(["threefold", "doctor", str(self.path), "--mend"])
        fix = f"restore it; or run `{doctor}`, which writes what results.json knows of it"
        with self.advising(path, fix):
            self.verify("ledger.json")
            return TestLedger.parse(read_json(path), path).test_opened


def _differences(first: Recipe, second: Recipe) -> Iterator[str]:
    """Yield the paths of the values in which two recipes differ."""
    left, right = first.model_dump(mode="json"), second.model_dump(mode="json")
    for key in left:
        if left[key] == right[key] or key in ("name", "budget_minutes", "cluster"):
            continue
        if isinstance(left[key], dict) and isinstance(right[key], dict):
            names = [k for k in left[key] if left[key][k] != right[key].get(k)]
            yield from (f"{key}.{k}" for k in names if (key, k) != ("train", "devices"))
        else:
            yield key
