"""The recipe: one TOML file that describes a whole run, read strictly into frozen models.

An unknown key is an error that names the nearest known one. `--set a.b=c` changes one value; a list
of tables is addressed by index or by name (`members.lite0.img_size=64`). Imports no torch, so that
planning is instant.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomli_w
from pydantic import Field, ValidationError, model_validator

from threefold.errors import RecipeError, refuse_address
from threefold.files import read_text
from threefold.names import find_repeated
from threefold.recipe.checks import (
    check_cached,
    check_distill,
    check_folds,
    check_pseudo_labels,
    check_task,
    with_task_defaults,
)
from threefold.recipe.cluster import ClusterSpec
from threefold.recipe.ensemble import EnsembleSpec
from threefold.recipe.errors import explain_errors
from threefold.recipe.members import check_members, take_over
from threefold.recipe.overrides import apply_override
from threefold.recipe.schema import (
    AugmentSpec,
    DataSpec,
    DistillSpec,
    FeatureSpec,
    FoldSpec,
    MemberSpec,
    Name,
    PseudoLabelSpec,
    Section,
    StageSpec,
    TrainSpec,
    ViewSpec,
)


class Job(NamedTuple):
    """The unit of work and of resumption: one stage of one member in one fold (-1 = refit)."""

    member: str
    fold: int
    stage: str

    @property
    def path(self) -> str:
        """Folder of this job, relative to the run folder."""
        return f"jobs/{self.member}/{fold_name(self.fold)}/{self.stage}"


def fold_name(fold: int) -> str:
    """Return the name of a fold's folder: fold0, fold1, ... or refit."""
    return "refit" if fold < 0 else f"fold{fold}"


class Recipe(Section):
    """Everything about a run. `Recipe.load` reads one; `dump` writes the resolved copy."""

    name: Name = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    protocol: Literal["honest", "paper"] = "honest"
    """honest = scored rows choose nothing; paper = selects on them, as the authors did."""
    budget_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Limit on the wall time of training; stages are cut short to meet it (0 = none)."""
    data: DataSpec = DataSpec()
    folds: FoldSpec = FoldSpec()
    augment: AugmentSpec = AugmentSpec()
    features: FeatureSpec = FeatureSpec()
    views: ViewSpec = ViewSpec()
    train: TrainSpec = TrainSpec()
    cluster: ClusterSpec = ClusterSpec()
    ensemble: EnsembleSpec = EnsembleSpec()
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1)]
    members: Annotated[tuple[MemberSpec, ...], Field(min_length=1)]
    pseudo_labels: PseudoLabelSpec | None = None
    """Pseudo-labelling; without this table no member learns from unlabelled images."""
    distill: DistillSpec | None = None
    """Distillation settings; without this table all members learn from labels."""

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, tree: Any) -> Any:
        """Add what the task, or another member, says of keys that are not given."""
        return take_over(with_task_defaults(tree))

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for what, names in (
            ("stages", [s.name for s in self.stages]),
            ("members", [m.name for m in self.members]),
        ):
            repeated = ", ".join(sorted(find_repeated(names)))
            if repeated:
                raise ValueError(f"{what} need different names; repeated: {repeated}")
        check_folds(self.folds, self.data, self.views, self.distill, self.protocol)
        check_members(self)
        check_cached(self.stages, self.augment, self.protocol, self.folds)
        protocol, distill = self.protocol, self.distill
        taught = {"distill": distill, "pseudo_labels": self.pseudo_labels}
        check_task(self.data, self.train, self.ensemble, self.views, self.members, taught)
        if distill is not None:
            check_distill(distill, self.members, self.stages_of, protocol)
        if self.pseudo_labels is not None:
            check_pseudo_labels(self.pseudo_labels, self.members, self.teachers, protocol, distill)
        if self.train.optimizer == "adam-keras" and self.train.weight_decay:
            raise ValueError(
                "adam-keras, the paper's optimizer, has no weight decay; set train.weight_decay = 0"
            )
        if self.views.n > 1 and self.views.kind != "random-crops":
            raise ValueError(
                f"views.kind = {self.views.kind} ignores views.n, which counts random crops; "
                "set views.n = 1"
            )
        if self.views.choose and self.views.kind == "center" and self.views.upsample == 1.0:
            raise ValueError(
                "views.choose has nothing to choose from; set views.kind to more than center"
            )
        return self

    @property
    def combined(self) -> tuple[str, ...]:
        """Members that ensembles combine: ensemble.members, or all with their own backbone."""
        return self.ensemble.members or tuple(m.name for m in self.members if not m.joins)

    def stages_of(self, member: str) -> tuple[StageSpec, ...]:
        """Return a member's stages: those that name it, or else those that name no member."""
        own = tuple(s for s in self.stages if member in s.members)
        return own or tuple(s for s in self.stages if not s.members)

    def is_frozen(self, member: str) -> bool:
        """Whether a member's backbone keeps its pretrained weights: its last stage is a head's."""
        return self.stages_of(member)[-1].kind == "head"

    @property
    def probes(self) -> tuple[str, ...]:
        """Members that train only a head, on labelled images: their answers come first, and others
        start from them."""
        return tuple(
            m.name
            for m in self.members
            if self.is_frozen(m.name) and not self.uses_pseudo_labels(m.name)
        )

    @property
    def teachers(self) -> tuple[str, ...]:
        """Members that answer unlabelled images: those before the first that learns from them."""
        taught = [i for i, m in enumerate(self.members) if self.uses_pseudo_labels(m.name)]
        return tuple(m.name for m in self.members[: taught[0]] if not m.joins) if taught else ()

    def uses_pseudo_labels(self, member: str) -> bool:
        """Whether a member also learns from unlabelled images."""
        return self.pseudo_labels is not None and member in self.pseudo_labels.members

    def without(self, members: Collection[str]) -> Recipe:
        """Return the recipe of the other members, with the stages and tables that they read.

        Args:
            members: names to leave out; nothing that stays may join, start from or learn from one.
        """
        kept = [m for m in self.members if m.name not in members]
        names = {m.name for m in kept}
        stages = []
        for stage in self.stages:
            named = tuple(name for name in stage.members if name in names)
            if named or not stage.members:
                stages.append(stage.model_copy(update={"members": named}))
        combined = tuple(name for name in self.ensemble.members if name in names)
        top = min(self.ensemble.top, len(combined or kept))
        ensemble = self.ensemble.model_copy(update={"members": combined, "top": top})
        update = {"members": tuple(kept), "stages": tuple(stages), "ensemble": ensemble}
        if self.pseudo_labels is not None:
            taught = tuple(name for name in self.pseudo_labels.members if name in names)
            fewer = self.pseudo_labels.model_copy(update={"members": taught})
            update["pseudo_labels"] = fewer if taught else None
        kinds = {stage.kind for m in kept for stage in self.stages_of(m.name)}
        if "head" not in kinds:
            update["features"] = FeatureSpec()
        elif kinds == {"head"} and not self.features.copies:
            update["augment"] = AugmentSpec()
        tree = self.model_copy(update=update)
        return Recipe.model_validate(tree.model_dump(mode="json", exclude_none=True))

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a TOML recipe and apply `a.b=c` overrides.

        Raises:
            RecipeError: the file is missing or not TOML, or has unknown keys or wrong values.
        """
        try:
            tree = tomllib.loads(read_text(Path(path)))
        except OSError as error:
            refuse_address(path, RecipeError)
            raise RecipeError(
                "cannot read the recipe",
                where=path,
                got=error,
                fix="give the path of a .toml file",
            ) from None
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
            raise RecipeError("the recipe is not valid TOML", where=path, got=error) from None
        return cls.parse(tree, overrides, where=str(path))

    @classmethod
    def parse(
        cls, tree: dict[str, Any], overrides: Iterable[str] = (), where: str = "recipe"
    ) -> Recipe:
        """Build a recipe from a tree of plain values; `overrides` are `a.b=c` strings.

        Raises:
            RecipeError: an override cannot be applied, or a key or value is wrong.
        """
        for override in overrides:
            apply_override(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(
                "the recipe is invalid",
                where=where,
                got=explain_errors(error.errors(), cls),
            ) from None

    @classmethod
    def check_keys(cls, tree: dict[str, Any], overrides: Iterable[str], where: str) -> None:
        """Check overrides for unknown keys and wrong types, not whether values go together.

        Raises:
            RecipeError: as `parse` does.
        """
        for override in overrides:
            apply_override(tree, override)
        try:
            cls.model_validate(tree)
        except ValidationError as error:
            wrong = [e for e in error.errors() if e["type"] not in ("value_error", "missing")]
            if wrong:
                got = explain_errors(wrong, cls)
                raise RecipeError("the recipe is invalid", where=where, got=got) from None

    def jobs(self, folds: int | None = None) -> list[Job]:
        """Return every job in order of execution.

        Args:
            folds: number of folds where the data decide it (leave-one-group-out, column).
        """
        numbers = list(range(folds or self.folds.k)) + ([-1] if self.folds.final == "refit" else [])
        return [
            Job(m.name, f, s.name)
            for m in self.members
            for f in numbers
            if not m.folds or f in m.folds
            for s in self.stages_of(m.name)
        ]

    def member(self, name: str) -> MemberSpec:
        """Return the member of that name."""
        return next(m for m in self.members if m.name == name)

    def stage(self, name: str) -> StageSpec:
        """Return the stage of that name."""
        return next(s for s in self.stages if s.name == name)

    def soft(self, member: str) -> DistillSpec | None:
        """Return a student's distillation settings; None for members that learn from labels."""
        if self.distill is not None and self.distill.student == member:
            return self.distill
        return None

    def seed_name(self, member: str) -> str:
        """Return the name that seeds a member: its own, or for a twin the student's."""
        if self.distill is not None and member == self.distill.twin:
            return self.distill.student
        return member

    def digest(self, *, as_given: bool = False) -> str:
        """Return the SHA-256 of everything but the name, the budget and where jobs are done.

        Args:
            as_given: leave out keys that were not given. A run folder has every key of the version
                that began it, so this is the digest of then, whatever keys have come since.
        """
        excluded: Any = dict.fromkeys(("name", "budget_minutes", "cluster"), True)
        excluded["train"] = {"devices"}
        tree = self.model_dump(
            mode="json", exclude=excluded, exclude_none=True, exclude_unset=as_given
        )
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def dump(self, header: str = "") -> str:
        """Return the recipe as TOML, with every default written out, below `header` as comments."""
        comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
        return comments + tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
