"""A run: its jobs, the rows of its folds, its networks and the pipeline that they make."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.group_file import GROUP_FILE
from threefold.data.in_memory import find_stored_data
from threefold.data.load import load_data
from threefold.data.splits import Roles, assign_roles, refit_roles
from threefold.data.unlabelled import with_unlabelled
from threefold.errors import RunError
from threefold.files import cache_folder
from threefold.models.member import (
    JointMember,
    Member,
    assemble_member,
    build_joint,
    build_member,
    load_head,
    load_weights,
)
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.models.shared import HeadsPipeline, SharedBackbone
from threefold.models.views import Views
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.recipe.schema import MemberSpec
from threefold.saved_run import SavedRun
from threefold.training.execution import Execution
from threefold.training.features.frozen import frozen_backbone, frozen_digest
from threefold.training.pixel_cache import PixelCache
from threefold.training.progress.watcher import Watcher
from threefold.training.squares import Squares


class Run(SavedRun):
    """A run: its folder, its images and its networks.

    Make one with `Run.create`, read one with `Run.open`. A notebook shows its scores as a table.

    Args:
        folder: the files of the run.
        watcher: follows the training.
        sources: the images, where they have been read already: those that the recipe names, or a
            part of them for the teachers of a student.
        deadline: a time.monotonic() value by which training must end, besides the recipe's budget.
        execution: where its jobs are to be done.
    """

    def __init__(
        self,
        folder: RunFolder,
        watcher: Watcher | None = None,
        sources: Sources | None = None,
        deadline: float = math.inf,
        execution: Execution | None = None,
    ) -> None:
        super().__init__(folder)
        self.watcher = watcher or Watcher()
        self.deadline = deadline
        self.execution = execution or Execution()
        if sources is not None:
            self.sources = sources

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        out: str | Path,
        watcher: Watcher | None = None,
        header: str = "",
        sources: Sources | None = None,
        execution: Execution | None = None,
    ) -> Run:
        """Start a run folder, or continue one that the same recipe has started.

        Raises:
            RunError: the folder belongs to another recipe, is not a run, or cannot be written.
        """
        folder = RunFolder.create(out, recipe, header)
        run = cls(folder, watcher, sources, execution=execution)
        if folder.accepted_edit:
            run.watcher.note(
                f"{run.dir / 'recipe.toml'} was edited after the run began, in its name, its "
                "budget or its comments: the new text is used from now on"
            )
        return run

    @cached_property
    def sources(self) -> Sources:
        """The images that the recipe names."""
        return self.read_sources()

    def read_sources(self, root: str = "") -> Sources:
        """Read and verify the images that the recipe names.

        Args:
            root: where they are; empty = where the recipe says.

        Raises:
            DataError: images or labels are missing, unreadable or inconsistent.
        """
        # A run that has been moved still has the groups that its plan wrote.
        data, own = self.recipe.data, self.dir / GROUP_FILE
        if Path(data.group_file).name == GROUP_FILE and self.folder.has(GROUP_FILE):
            self.folder.verify(GROUP_FILE, "restore it: it decides the folds of the run")
        if data.group_file and own.exists() and not Path(data.group_file).expanduser().exists():
            data = data.model_copy(update={"group_file": str(own)})
        data = data.model_copy(update={"root": root or find_stored_data(data.root, self.dir)})
        has_begun = (self.dir / "run.json").exists()
        return load_data(data, self.recipe.seed, self.folder.info.classes if has_begun else ())

    @cached_property
    def all_sources(self) -> Sources:
        """The images that the recipe names, and the unlabelled ones for pseudo labels.

        Raises:
            DataError: an unlabelled image cannot be used, or is a labelled one, too.
        """
        spec = self.recipe.pseudo_labels
        if spec is None:
            return self.sources
        return with_unlabelled(self.sources, spec.images, self.recipe.data.bad_images)

    @property
    def unlabelled(self) -> ImageDataset:
        """The images for pseudo labels, of a recipe that has them."""
        return self.all_sources.part("unlabelled")

    @cached_property
    def unlabelled_digest(self) -> str:
        """SHA-256 of the names and contents of the unlabelled images."""
        images, digest = self.unlabelled, hashlib.sha256()
        for row, name in enumerate(images.ids):
            digest.update(f"{name}\0{images.content_hash(row)}\0".encode())
        return digest.hexdigest()

    @cached_property
    def roles(self) -> dict[int, Roles]:
        """Rows of each fold by role; -1 = refit."""
        train, spec = self.sources.train, self.recipe.folds
        folds = assign_roles(
            train.truth,
            train.groups,
            spec,
            self.recipe.protocol,
            self.recipe.seed,
            train.classes,
            train.folds,
        )
        roles = dict(enumerate(folds))
        if spec.final == "refit":
            roles[-1] = refit_roles(
                train.truth, train.groups, spec, self.recipe.seed, train.classes
            )
        return roles

    @cached_property
    def scored(self) -> np.ndarray:
        """The training rows that a fold scores, in ascending order: all, or those held out."""
        rows = [roles.score for roles in self.roles.values()]
        return np.sort(np.concatenate(rows))

    @property
    def jobs(self) -> list[Job]:
        """Every job of the run, in order of execution."""
        return self.recipe.jobs(sum(fold >= 0 for fold in self.roles))

    def all_views(self, member: MemberSpec) -> Views:
        """Return all test-time views that the recipe names for a member."""
        return Views(self.recipe.views, member.img_size, self.recipe.seed)

    def views(self, member: MemberSpec) -> Views:
        """Return the chosen test-time views of a member."""
        chosen = self.folder.chosen_views if self.recipe.views.choose else None
        count = chosen.views if chosen is not None else None
        return Views(self.recipe.views, member.img_size, self.recipe.seed, count)

    @property
    def pixel_folder(self) -> Path:
        """Where the decoded images are while the run trains."""
        return self.dir / "cache"

    @cached_property
    def squares(self) -> Squares:
        """The squares of large photographs that were decoded before, by this run or a plan."""
        return Squares(cache_folder("features"))

    def open_pixels(self) -> PixelCache:
        """Open the decoded images; none is decoded yet."""
        return PixelCache(self.all_sources, self.all_views, self.pixel_folder, self.squares)

    @property
    def final_folds(self) -> list[int]:
        """The folds whose networks answer on new images: the refit (-1), or all."""
        return [-1] if self.recipe.folds.final == "refit" else list(range(self.folder.info.folds))

    def networks(self, spec: MemberSpec) -> int:
        """Count the trained networks of a member that answer on new images."""
        return sum(fold < 0 or not spec.folds or fold in spec.folds for fold in self.final_folds)

    def build(
        self, spec: MemberSpec, num_classes: int, *, pretrained: bool = False
    ) -> Member | JointMember:
        """Build a member's network with a fresh head, or the joint network of those it joins."""
        if not spec.joins:
            return build_member(spec, num_classes, pretrained=pretrained)
        bases = [
            build_member(self.recipe.member(name), num_classes, pretrained=False)
            for name in spec.joins
        ]
        return build_joint(spec.head, bases, num_classes)

    def last_job(self, member: str, fold: int) -> Job:
        """Return the job whose weights a member has in a fold at the end."""
        return Job(member, fold, self.recipe.stages_of(member)[-1].name)

    def load_member(self, spec: MemberSpec, fold: int, num_classes: int) -> Member | JointMember:
        """Load a trained network of one fold, in eval mode on the CPU.

        Raises:
            RunError: it is missing or damaged.
        """
        return self.load_job(self.last_job(spec.name, fold), num_classes)

    def load_job(
        self,
        job: Job,
        num_classes: int,
        file: str = "weights.safetensors",
        backbone: Any | None = None,
    ) -> Member | JointMember:
        """Load the network that a job ended with, in eval mode on the CPU.

        After a stage of kind `head` it is the run's frozen backbone with the head of the job.

        Args:
            job: a finished job.
            num_classes: number of logits k.
            file: name of the weights' file; a head stage also has `start.safetensors`, the head
                fitted without the select rows.
            backbone: the frozen backbone, if it has been loaded already; it is not copied.

        Raises:
            RunError: a file is missing or damaged.
        """
        spec = self.recipe.member(job.member)
        path = self.folder.verify_job(job) / file
        if self.recipe.stage(job.stage).kind == "head":
            if backbone is None:
                backbone = frozen_backbone(self.folder, spec)
            member = assemble_member(spec, backbone, num_classes)
            load_head(member, path)
            return member.eval()
        network = self.build(spec, num_classes)
        load_weights(network, path)
        return network.eval()

    def pipeline(self, combiner: Combiner, members: Sequence[str] | None = None) -> Pipeline:
        """Build the deployable module of a combiner and its members (by default the recipe's)."""
        classes = self.folder.info.classes
        names = list(members if members is not None else self.recipe.combined)
        everyone = [m.name for m in self.recipe.members]
        rows = [everyone.index(name) for name in names]
        # (folds, names, members): the share of each network in each named member's answer.
        mixing = np.stack([stand_ins(self.recipe, fold)[rows] for fold in self.final_folds])
        folds, network_weights = {}, []
        for j, spec in enumerate(self.recipe.members):
            weights = mixing[:, :, j]
            used = weights.any(1)
            if used.any():
                folds[spec.name] = np.array(self.final_folds)[used].tolist()
                network_weights.append(weights[used])
        parts = self._parts(folds)
        if list(parts) == names and (mixing == mixing[0]).all():
            return Pipeline(parts, combiner, classes, names)
        weights = np.concatenate(network_weights).T / len(mixing)
        return Pipeline(parts, combiner, classes, names, weights)

    def shared_key(self, spec: MemberSpec) -> tuple[str, int, str]:
        """Return what members with a frozen backbone must have in common to share it.

        Its weights, the input size and the resize.

        Raises:
            RunError: the run has no such backbone.
        """
        return frozen_digest(self.folder, spec), spec.img_size, spec.resize

    def _parts(self, folds: Mapping[str, list[int]]) -> dict[str, MemberPipeline | HeadsPipeline]:
        """Build the networks of a pipeline's members, by the folds of each member.

        Members with the same frozen backbone, input size and resize share it.
        """
        num_classes, task = len(self.folder.info.classes), self.recipe.data.task
        parts: dict[str, MemberPipeline | HeadsPipeline] = {}
        shared: dict[tuple[str, int, str], SharedBackbone] = {}
        for name, numbers in folds.items():
            spec = self.recipe.member(name)
            views = self.views(spec)
            if not self.recipe.is_frozen(name):
                networks = [self.load_member(spec, fold, num_classes) for fold in numbers]
                predictors = [Predictor(network, views, task) for network in networks]
                parts[name] = MemberPipeline(predictors, views.canvas, spec.resize)
                continue
            key = self.shared_key(spec)
            if key not in shared:
                member = assemble_member(spec, frozen_backbone(self.folder, spec), num_classes)
                shared[key] = SharedBackbone(member, views, spec.resize)
            backbone = shared[key].backbone
            jobs = [self.last_job(name, fold) for fold in numbers]
            heads = [self.load_job(job, num_classes, backbone=backbone).head for job in jobs]
            parts[name] = HeadsPipeline(shared[key], heads, task)
        return parts


def stand_ins(recipe: Recipe, fold: int) -> np.ndarray:
    """Return weights (m, m): the share of member j's network of this fold in member i's answer.

    The identity, except for members that are not in the fold: the mean of those that are stands in
    for them. So the mean over all members is the mean over those present (the paper's Table 3:
    three members in some folds, one in the others).

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
