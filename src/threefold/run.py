"""The run folder: jobs that are named, independent and done once; predictions assembled out of fold.

A job is one stage of one member in one fold. Its `done.json` is written last, so what has it is whole, and running the
same command again does only what is missing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from threefold.augment import Augment, Views
from threefold.datasets import Sources, load_data
from threefold.errors import RunError
from threefold.files import read_arrays, read_json, sha256, write_arrays, write_bytes, write_json
from threefold.model import Member, build_member, load_weights, save_weights
from threefold.pipeline import Combiner, MemberPipeline, Pipeline
from threefold.pixels import Pixels
from threefold.predict import Predictor, pick_device, pick_precision, predict_probs, to_pixels
from threefold.predictions import Predictions
from threefold.provenance import commit, hardware, stable_seed, versions
from threefold.recipe import Job, MemberSpec, Recipe, fold_name
from threefold.splits import Roles, assign_roles, refit_roles
from threefold.stages import Silent, StageTask, Watcher, train_stage

FORMAT = 1
"""Version of the run folder's layout, raised when an older reader would misread it."""


class RunWatcher(Watcher, Protocol):
    """A watcher that is also told of jobs."""

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """The jobs to come, and how many images each will train on."""

    def job(self, job: Job, skipped: bool) -> None:
        """A job begins, or is skipped because it is done."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class SilentRun(Silent):
    """A run watcher that does nothing."""

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Ignore."""

    def job(self, job: Job, skipped: bool) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


@dataclass
class Run:
    """A run folder with its recipe. Make one with `Run.create`, read one with `Run.open`."""

    dir: Path
    recipe: Recipe
    watcher: RunWatcher = field(default_factory=SilentRun)

    @classmethod
    def create(cls, recipe: Recipe, out: str | Path, watcher: RunWatcher | None = None, header: str = "") -> Run:
        """Begin a run folder, or go on with one that was made by the same recipe.

        Raises:
            RunError: the folder belongs to another recipe, is not a run, or cannot be written.
        """
        run = cls(Path(out), recipe, watcher or SilentRun())
        if (run.dir / "recipe.toml").exists():
            before = Recipe.load(run.dir / "recipe.toml")
            if before.digest() != recipe.digest():
                raise RunError(
                    "the folder holds a run of another recipe",
                    where=run.dir,
                    got=f"differs in {', '.join(_differences(before, recipe))}",
                    fix="choose another --out, or delete the folder",
                )
        elif run.dir.is_dir() and any(run.dir.iterdir()):
            raise RunError("the folder is not empty and not a run", where=run.dir, fix="choose another --out")
        else:
            write_bytes(run.dir / "recipe.toml", recipe.dump(header).encode())
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read an existing run folder.

        Raises:
            RunError: there is no run.
        """
        folder = Path(path)
        if not (folder / "recipe.toml").is_file():
            raise RunError(
                "not a run folder",
                where=folder,
                expected="recipe.toml in it",
                fix="give the folder that `threefold train --out` or `threefold fit` made",
            )
        return cls(folder, Recipe.load(folder / "recipe.toml"))

    @cached_property
    def sources(self) -> Sources:
        """The images that the recipe names."""
        return load_data(self.recipe.data, self.recipe.seed)

    @cached_property
    def roles(self) -> dict[int, Roles]:
        """Rows of each fold by role; -1 = refit."""
        train, spec = self.sources.train, self.recipe.folds
        folds = assign_roles(train.labels, train.groups, spec, self.recipe.protocol, self.recipe.seed, train.classes)
        roles = dict(enumerate(folds))
        if spec.final == "refit":
            roles[-1] = refit_roles(train.labels, train.groups, spec, self.recipe.seed, train.classes)
        return roles

    @property
    def jobs(self) -> list[Job]:
        """Every job of the run, in order of execution."""
        return self.recipe.jobs(sum(fold >= 0 for fold in self.roles))

    def folder(self, job: Job) -> Path:
        """Where a job's files are."""
        return self.dir / job.path

    def done(self, job: Job) -> bool:
        """Whether a job is complete: its own weights are there, or those of a later stage that took them over."""
        stages = [stage.name for stage in self.recipe.stages]
        later = [self.folder(job._replace(stage=name)) for name in stages[stages.index(job.stage) :]]
        return (later[0] / "done.json").exists() and any(
            (f / "done.json").exists() and (f / "weights.safetensors").exists() for f in later
        )

    def predictions(self, kind: str = "oof") -> Predictions:
        """Out-of-fold ("oof") or test ("test") probabilities of the members.

        Raises:
            RunError: the run is not complete, or has no such rows.
        """
        path = self.dir / f"{kind}.npz"
        if not path.exists():
            raise RunError(
                f"no {kind} predictions",
                where=self.dir,
                fix=f"run `threefold train {self.dir / 'recipe.toml'} --out {self.dir}` to its end; a run without a test split has only oof",
            )
        return Predictions.load(path)

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        tree: dict[str, Any] = read_json(self.dir / "results.json")
        return tree

    def views(self, member: MemberSpec) -> Views:
        """The member's test-time views."""
        return Views(self.recipe.views, member.img_size, self.recipe.seed)

    def load_member(self, spec: MemberSpec, fold: int, num_classes: int) -> Member:
        """A trained fold model, in eval mode on the CPU.

        Raises:
            RunError: it is missing or damaged.
        """
        member = build_member(spec, num_classes, pretrained=False)
        path = self.folder(Job(spec.name, fold, self.recipe.stages[-1].name))
        verify(path)
        load_weights(member, path / "weights.safetensors")
        return member.eval()

    def pipeline(self, combiner: Combiner, members: Sequence[str] | None = None) -> Pipeline:
        """The deployable module of this run's members (all, or those named) and a combiner."""
        info = read_json(self.dir / "run.json")
        classes = tuple(info["classes"])
        folds = [-1] if self.recipe.folds.final == "refit" else range(info["folds"])
        parts = {}
        for spec in self.recipe.members:
            if members is None or spec.name in members:
                views = self.views(spec)
                nets = [Predictor(self.load_member(spec, fold, len(classes)), views) for fold in folds]
                parts[spec.name] = MemberPipeline(nets, views.canvas, spec.resize)
        return Pipeline(parts, combiner, classes)


def train_members(run: Run) -> None:
    """Do every job that is missing, then write run.json, oof.npz and test.npz.

    Raises:
        ThreefoldError: bad data, a full disk, weights that cannot be had.
    """
    sources = run.sources
    for note in [*sources.notes, *_group_note(run)]:
        run.watcher.note(note)
    _write_info(run)
    pixels = Pixels(run.sources, run.views, run.dir / "cache")
    jobs = run.jobs
    run.watcher.plan(jobs, [len(run.roles[j.fold].fit) * _epochs(run.recipe, j) for j in jobs])
    clock = _Clock(run, jobs)
    for job in jobs:
        skipped = run.done(job)
        run.watcher.job(job, skipped)
        if not skipped:
            _do(run, job, pixels, clock)
    assemble(run)
    write_arrays(run.dir / "thumbs.npz", **_preview(run, pixels))
    pixels.remove()


def _group_note(run: Run) -> list[str]:
    """A warning where the data have groups that the folds do not keep together."""
    if run.sources.train.groups is None or run.recipe.folds.scheme != "stratified":
        return []
    return [
        "the images have groups, but folds.scheme = stratified lets a group be in fit and in score; set folds.scheme = grouped"
    ]


def _epochs(recipe: Recipe, job: Job) -> int:
    return next(stage.epochs for stage in recipe.stages if stage.name == job.stage)


class _Clock:
    """Shares out the time budget: every job may use its part of what is left, by epochs times images."""

    def __init__(self, run: Run, jobs: Sequence[Job]) -> None:
        self.run = run
        spent = sum(read_json(run.folder(j) / "done.json")["seconds"] for j in jobs if run.done(j))
        self.end = time.monotonic() + run.recipe.budget_minutes * 60 - spent if run.recipe.budget_minutes else math.inf
        self.left = {j: _epochs(run.recipe, j) * len(run.roles[j.fold].fit) for j in jobs if not run.done(j)}

    def deadline(self, job: Job) -> float:
        """When this job must stop."""
        if math.isinf(self.end):
            return math.inf
        now, total = time.monotonic(), sum(self.left.values())
        return now + max(0.0, self.end - now) * self.left.pop(job) / total


def _do(run: Run, job: Job, pixels: Pixels, clock: _Clock) -> None:
    """One job: start weights -> stage -> weights, history, probabilities of the last stage, done.json."""
    began, recipe, spec = time.monotonic(), run.recipe, run.recipe.member(job.member)
    stages = [stage.name for stage in recipe.stages]
    number, roles, classes = stages.index(job.stage), run.roles[job.fold], run.sources.train.classes
    seed = stable_seed(recipe.seed, job.member, str(job.fold), job.stage)
    torch.manual_seed(seed)
    member = build_member(spec, len(classes), pretrained=number == 0)
    previous = run.folder(job._replace(stage=stages[number - 1]))
    if number:
        verify(previous)
        load_weights(member, previous / "weights.safetensors")
    device = pick_device(recipe.train.device)
    member.to(device=device).to(memory_format=torch.channels_last)
    task = StageTask(
        recipe.stages[number],
        recipe,
        pixels.rows("train", spec, roles.fit),
        pixels.select(spec, roles),
        seed,
        len(classes),
        first=number == 0,
        deadline=clock.deadline(job),
        watcher=run.watcher,
    )
    outcome = train_stage(member, task)
    folder = run.folder(job)
    save_weights(outcome.state, folder / "weights.safetensors")
    write_json(folder / "history.json", outcome.history)
    if number == len(stages) - 1:
        predictor = Predictor(member, run.views(spec).to(device))
        write_arrays(folder / "probs.npz", **_predict(run, predictor, spec, roles, pixels))
    hashes = {
        path.name: sha256(path)
        for path in sorted(folder.iterdir())
        if path.name != "done.json" and not path.name.startswith(".")
    }
    write_json(folder / "done.json", {"job": job._asdict(), "seconds": time.monotonic() - began, "files": hashes})
    if number:
        (previous / "weights.safetensors").unlink(missing_ok=True)  # the next stage has taken them over


def _predict(run: Run, predictor: Predictor, spec: MemberSpec, roles: Roles, pixels: Pixels) -> dict[str, np.ndarray]:
    """Probabilities on the rows that this fold scores, and on the test split."""
    precision = pick_precision(run.recipe.train.precision, next(predictor.parameters()).device)
    arrays = {"rows": roles.score}
    if len(roles.score):
        arrays["score"] = predict_probs(predictor, pixels.rows("train", spec, roles.score, views=True)[0], precision)
    if run.sources.test is not None:
        rows = np.arange(len(run.sources.test))
        arrays["test"] = predict_probs(predictor, pixels.rows("test", spec, rows, views=True)[0], precision)
    return arrays


def assemble(run: Run) -> None:
    """Put the folds together: oof.npz covers every row once, test.npz averages the fold models (or the refit one)."""
    train, test, stage = run.sources.train, run.sources.test, run.recipe.stages[-1].name
    arrays = {
        (m.name, f): read_arrays(run.folder(Job(m.name, f, stage)) / "probs.npz")
        for m in run.recipe.members
        for f in run.roles
    }
    names = tuple(m.name for m in run.recipe.members)
    common: dict[str, Any] = {"classes": train.classes, "members": names, "protocol": run.recipe.protocol}
    folds = [f for f, roles in run.roles.items() if f >= 0 and len(roles.score)]
    if folds:
        probs = np.full((len(names), len(train), len(train.classes)), np.nan, np.float32)
        owner = np.full(len(train), -1)
        for fold in folds:
            rows = run.roles[fold].score  # a partition: `assign_roles` has checked it
            owner[rows] = fold
            for index, name in enumerate(names):
                probs[index, rows] = arrays[name, fold]["score"]
        Predictions(
            probs=probs, labels=train.labels, ids=train.ids, groups=train.groups, folds=owner, kind="oof", **common
        ).save(run.dir / "oof.npz")
    if test is not None:
        final = [-1] if -1 in run.roles else list(run.roles)
        probs = np.stack(
            [np.mean([arrays[name, f]["test"] for f in final], axis=0, dtype=np.float32) for name in names]
        )
        Predictions(probs=probs, labels=test.labels, ids=test.ids, groups=test.groups, kind="test", **common).save(
            run.dir / "test.npz"
        )


def _preview(run: Run, pixels: Pixels, count: int = 16) -> dict[str, np.ndarray]:
    """A few training images as the network sees them, augmented, for the report."""
    spec = run.recipe.members[0]
    rows = np.linspace(0, len(run.sources.train) - 1, count).astype(int)
    images = to_pixels(pixels.rows("train", spec, rows)[0], torch.device("cpu"))
    seen = Augment(run.recipe.augment)(images, torch.Generator().manual_seed(run.recipe.seed))
    return {"preview": seen.round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()}


def verify(folder: Path) -> None:
    """Check a finished job's files against the hashes in its done.json.

    Raises:
        RunError: a file is missing or was changed.
    """
    for name, expected in read_json(folder / "done.json")["files"].items():
        path = folder / name
        if not path.exists() or sha256(path) != expected:
            raise RunError(
                "a file of a finished job is missing or damaged",
                where=path,
                fix=f"delete {folder.parent} and run the same command again",
            )


def _differences(a: Recipe, b: Recipe) -> Iterator[str]:
    """Paths of the values in which two recipes differ."""
    left, right = a.model_dump(mode="json"), b.model_dump(mode="json")
    for key in left:
        if left[key] != right[key] and key not in ("name", "budget_minutes"):
            inner = (
                [f"{key}.{k}" for k in left[key] if left[key][k] != right[key].get(k)]
                if isinstance(left[key], dict)
                else [key]
            )
            yield from inner


def _data_digest(sources: Sources) -> str:
    """SHA-256 of which images there are and what they show (their names and labels, not their pixels)."""
    parts = [(d.ids, d.labels.tolist(), d.groups) for d in (sources.train, sources.test) if d is not None]
    return hashlib.sha256(repr((sources.train.classes, parts)).encode()).hexdigest()


def _write_info(run: Run) -> None:
    """Write run.json; a run that goes on must find the images that it began with, or folds would be mixed up."""
    sources, path = run.sources, run.dir / "run.json"
    data = _data_digest(sources)
    if path.exists() and read_json(path).get("data") != data:
        raise RunError(
            "the images have changed since the run began",
            where=run.dir,
            got=f"{len(sources.train)} training images, other names or labels than before",
            fix="restore them, or choose another --out",
        )
    write_json(path, {
        "format": FORMAT, "digest": run.recipe.digest(), "data": data, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(), "threads": torch.get_num_threads(), "commit": commit(),
        "classes": list(sources.train.classes), "n_train": len(sources.train),
        "n_test": len(sources.test) if sources.test is not None else 0, "folds": sum(f >= 0 for f in run.roles),
        "notes": [*sources.notes, *_group_note(run)], "skipped": [f"{bad.path}: {bad.reason}" for bad in sources.skipped],
        "roles": {fold_name(f): {"fit": len(r.fit), "select": len(r.select), "score": len(r.score)} for f, r in run.roles.items()},
    })  # fmt: skip
