"""The run folder: jobs that are named, independent and done once, and what can be read from it when they are.

A job is one stage of one member in one fold. Its `done.json` is written last, so what has it is whole, and running the
same command again does only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from threefold.datasets import Sources, load_data
from threefold.errors import RunError
from threefold.files import read_json, sha256, write_bytes
from threefold.models__member import JointMember, Member, build_joint, build_member, load_weights
from threefold.models__pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.models__views import Views
from threefold.predictions import Predictions
from threefold.recipe import Job, Recipe
from threefold.recipe_schema import MemberSpec
from threefold.splits import Roles, assign_roles, refit_roles
from threefold.training__watcher import Watcher

FORMAT = 1
"""Version of the run folder's layout, raised when an older reader would misread it."""


@dataclass
class Run:
    """A run folder with its recipe. Make one with `Run.create`, read one with `Run.open`."""

    dir: Path
    recipe: Recipe
    watcher: Watcher = field(default_factory=Watcher)
    given: Sources | None = None
    """Images in place of reading those that the recipe names: the same, verified already, or a part of them, for the teachers of a student."""

    @classmethod
    def create(
        cls, recipe: Recipe, out: str | Path, watcher: Watcher | None = None, header: str = ""
    ) -> Run:
        """Begin a run folder, or go on with one that was made by the same recipe.

        Raises:
            RunError: the folder belongs to another recipe, is not a run, or cannot be written.
        """
        run = cls(Path(out), recipe, watcher or Watcher())
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
            raise RunError(
                "the folder is not empty and not a run", where=run.dir, fix="choose another --out"
            )
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other processes; a process that is killed lets go of it.

        Raises:
            RunError: another one holds it.
        """
        held = FileLock(self.dir / ".lock", timeout=0)
        try:
            with suppress(NotImplementedError):  # a file system without locks
                held.acquire()
        except Timeout:
            raise RunError(
                "another process is at work in this run",
                where=self.dir,
                fix="wait for it, or choose another --out",
            ) from None
        try:
            yield
        finally:
            held.release()

    @cached_property
    def sources(self) -> Sources:
        """The images that the recipe names."""
        return self.given or load_data(self.recipe.data, self.recipe.seed)

    @cached_property
    def roles(self) -> dict[int, Roles]:
        """Rows of each fold by role; -1 = refit."""
        train, spec = self.sources.train, self.recipe.folds
        folds = assign_roles(
            train.labels, train.groups, spec, self.recipe.protocol, self.recipe.seed, train.classes
        )
        roles = dict(enumerate(folds))
        if spec.final == "refit":
            roles[-1] = refit_roles(
                train.labels, train.groups, spec, self.recipe.seed, train.classes
            )
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
        stages = [stage.name for stage in self.recipe.stages_of(job.member)]
        later = [
            self.folder(job._replace(stage=name)) for name in stages[stages.index(job.stage) :]
        ]
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

    def all_views(self, member: MemberSpec) -> Views:
        """The member's test-time views, all that the recipe names."""
        return Views(self.recipe.views, member.img_size, self.recipe.seed)

    def views(self, member: MemberSpec) -> Views:
        """The member's test-time views, those that were chosen."""
        path = self.dir / "views.json"
        count = read_json(path)["views"] if self.recipe.views.choose and path.exists() else None
        return Views(self.recipe.views, member.img_size, self.recipe.seed, count)

    @property
    def final_folds(self) -> list[int]:
        """The fold models that answer on new images: the refitted one, or all."""
        return (
            [-1]
            if self.recipe.folds.final == "refit"
            else list(range(read_json(self.dir / "run.json")["folds"]))
        )

    def networks(self, spec: MemberSpec) -> int:
        """How many trained networks of a member answer on new images."""
        return sum(fold < 0 or not spec.folds or fold in spec.folds for fold in self.final_folds)

    def build(
        self, spec: MemberSpec, num_classes: int, *, pretrained: bool = False
    ) -> Member | JointMember:
        """A member's network with a fresh head; a member that joins others with theirs as they begin."""
        if not spec.joins:
            return build_member(spec, num_classes, pretrained=pretrained)
        bases = [
            build_member(self.recipe.member(name), num_classes, pretrained=False)
            for name in spec.joins
        ]
        return build_joint(spec.head, bases, num_classes)

    def last_job(self, member: str, fold: int) -> Job:
        """The job whose weights a member has in a fold when all is done."""
        return Job(member, fold, self.recipe.stages_of(member)[-1].name)

    def load_member(self, spec: MemberSpec, fold: int, num_classes: int) -> Member | JointMember:
        """A trained fold model, in eval mode on the CPU.

        Raises:
            RunError: it is missing or damaged.
        """
        member = self.build(spec, num_classes)
        path = self.folder(self.last_job(spec.name, fold))
        verify(path)
        load_weights(member, path / "weights.safetensors")
        return member.eval()

    def pipeline(self, combiner: Combiner, members: Sequence[str] | None = None) -> Pipeline:
        """The deployable module of a combiner and the members that it combines (by default the recipe's)."""
        classes = tuple(read_json(self.dir / "run.json")["classes"])
        names = list(members if members is not None else self.recipe.combined)
        everyone = [m.name for m in self.recipe.members]
        mixing = np.stack([stand_ins(self.recipe, fold) for fold in self.final_folds])[
            :, [everyone.index(n) for n in names]
        ]
        parts = {}
        for j, spec in enumerate(self.recipe.members):
            folds = [
                f
                for f, weights in zip(self.final_folds, mixing, strict=True)
                if weights[:, j].any()
            ]
            if folds:
                views = self.views(spec)
                nets = [
                    Predictor(self.load_member(spec, fold, len(classes)), views) for fold in folds
                ]
                parts[spec.name] = MemberPipeline(nets, views.canvas, spec.resize)
        weights = np.concatenate(
            [mixing[:, :, everyone.index(n)][mixing[:, :, everyone.index(n)].any(1)] for n in parts]
        )
        plain = list(parts) == names and bool((mixing == mixing[0]).all())
        return Pipeline(parts, combiner, classes, names, None if plain else weights.T / len(mixing))


def stand_ins(recipe: Recipe, fold: int) -> np.ndarray:
    """Weights (m, m): how much of member j's network of this fold goes into member i's answer.

    The identity, but for members that are not in the fold: for them the mean of those that are stands in, so that the mean
    over all members is the mean over those present (the paper's Table 3: three members in some folds, one in the others).

    Raises:
        RunError: no member that ensembles combine is in the fold.
    """
    members = recipe.members
    present = np.array([fold < 0 or not m.folds or fold in m.folds for m in members])
    others = present & np.array([m.name in recipe.combined for m in members])
    if not others.any():
        raise RunError(
            "a fold has no member",
            where=f"members.*.folds, fold {fold}",
            fix="let one member be in all folds",
        )
    return np.where(present[:, None], np.eye(len(members)), others / others.sum())


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
    left, right = (r.model_dump(mode="json") for r in (a, b))
    for key in left:
        if left[key] != right[key] and key not in ("name", "budget_minutes"):
            inner = (
                [f"{key}.{k}" for k in left[key] if left[key][k] != right[key].get(k)]
                if isinstance(left[key], dict) and isinstance(right[key], dict)
                else [key]
            )
            yield from inner
