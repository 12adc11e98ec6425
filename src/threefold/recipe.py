"""The recipe: one TOML file that says everything about a run, read strictly into frozen models.

An unknown key is an error that names the nearest known one. `--set a.b=c` changes one value; lists of tables are
addressed by index or by name (`members.lite0.img_size=64`). Imports no torch, so that planning is instant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, ValidationError, model_validator

from threefold.errors import RecipeError
from threefold.overrides import apply_override
from threefold.sections import (
    WITH_GROUPS,
    AugmentSpec,
    DataSpec,
    DistillSpec,
    EnsembleSpec,
    FoldSpec,
    HeadKind,
    HeadSpec,
    MemberSpec,
    Method,
    Name,
    Section,
    StackedSpec,
    StageSpec,
    TrainSpec,
    ViewSpec,
)

__all__ = [
    "AugmentSpec",
    "DataSpec",
    "DistillSpec",
    "EnsembleSpec",
    "FoldSpec",
    "HeadKind",
    "HeadSpec",
    "Job",
    "MemberSpec",
    "Method",
    "Recipe",
    "StackedSpec",
    "StageSpec",
    "TrainSpec",
    "ViewSpec",
    "fold_name",
    "packaged",
    "packaged_names",
    "parse_minutes",
    "resolve",
]

_PACKAGED = Path(__file__).parent / "recipes"


class Job(NamedTuple):
    """The unit of work and of resumption: one stage of one member in one fold (fold -1 = refit on all rows)."""

    member: str
    fold: int
    stage: str

    @property
    def path(self) -> str:
        """Folder of this job below the run folder."""
        return f"jobs/{self.member}/{fold_name(self.fold)}/{self.stage}"


def fold_name(fold: int) -> str:
    """Name of a fold's folder: fold0, fold1, ... or refit."""
    return "refit" if fold < 0 else f"fold{fold}"


class Recipe(Section):
    """The whole of a run. Load with `Recipe.load`, write the resolved copy with `dump`."""

    name: Name = "run"
    seed: int = 0
    protocol: Literal["honest", "paper"] = "honest"
    """honest = nothing is chosen on the rows that are scored; paper = selects on them, as the authors did."""
    budget_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Bound on the wall time of training; stages are cut short to keep it (0 = none)."""
    data: DataSpec = DataSpec()
    folds: FoldSpec = FoldSpec()
    augment: AugmentSpec = AugmentSpec()
    views: ViewSpec = ViewSpec()
    train: TrainSpec = TrainSpec()
    ensemble: EnsembleSpec = EnsembleSpec()
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1)]
    members: Annotated[tuple[MemberSpec, ...], Field(min_length=1)]
    distill: DistillSpec | None = None
    """Who teaches one of the members; without this table all learn from labels."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for what, names in (
            ("stages", [s.name for s in self.stages]),
            ("members", [m.name for m in self.members]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(
                    f"{what} need different names, {', '.join(twice)} stands there twice"
                )
        self._check_folds()
        self._check_members()
        self._check_distill()
        if self.train.optimizer == "adam-keras" and self.train.weight_decay:
            raise ValueError(
                "adam-keras, the paper's optimizer, has no weight decay; set train.weight_decay = 0"
            )
        if self.views.n > 1 and self.views.kind != "random-crops":
            raise ValueError(
                f"views.n counts random crops and would be ignored by views.kind = {self.views.kind}; set views.n = 1"
            )
        if self.views.choose and self.views.kind == "center" and self.views.upsample == 1.0:
            raise ValueError(
                "views.choose has nothing to choose from: set views.kind to other views than center"
            )
        return self

    def _check_folds(self) -> None:
        if (
            self.folds.k == 1
            and self.protocol == "honest"
            and self.folds.scheme != "leave-one-group-out"
        ):
            raise ValueError(
                "folds.k = 1 leaves no out-of-fold rows; the honest protocol needs folds.k >= 2"
            )
        if self.folds.scheme != "stratified" and not (
            self.data.group_regex or self.data.source in WITH_GROUPS
        ):
            raise ValueError(
                f"folds.scheme = {self.folds.scheme} needs groups: set data.group_regex, or use a CSV with a group column"
            )
        if self.folds.scheme == "stratified" and self.data.group_regex:
            raise ValueError(
                "data.group_regex is given, but folds.scheme = stratified would ignore it; set folds.scheme = grouped"
            )

    def _check_members(self) -> None:
        """What the parts of the recipe say of members: those named exist, and can be joined, trained and combined."""
        known = {m.name: m for m in self.members}
        named = [
            ("ensemble.members", self.ensemble.members),
            *((f"stage {s.name}", s.members) for s in self.stages),
        ]
        for where, names in [*named, *((f"member {m.name}, joins", m.joins) for m in self.members)]:
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{where} names {name}, which is no member; there are {', '.join(known)}"
                    )
        for member in self.members:
            if not self.stages_of(member.name):
                raise ValueError(
                    f"member {member.name} has no stage: every stage names other members"
                )
            if member.folds and self.folds.final == "refit":
                raise ValueError(
                    f"member {member.name} is in some folds only, which folds.final = refit would ignore"
                )
            for name in member.joins:
                self._check_join(member, known[name])
        if self.ensemble.top > len(self.combined):
            raise ValueError(
                f"ensemble.top = {self.ensemble.top}, but there are {len(self.combined)} members to combine"
            )

    def _check_distill(self) -> None:
        """The student and its twin are members, of one kind in all else, and the run is honest."""
        spec = self.distill
        if spec is None:
            return
        if self.protocol == "paper":
            raise ValueError(
                "distill needs protocol = honest: a student is compared on rows that nothing was chosen on"
            )
        names = [m.name for m in self.members]
        for key, name in (("student", spec.student), ("twin", spec.twin)):
            if name not in names and (key == "student" or name):
                raise ValueError(
                    f"distill.{key} names {name}, which is no member; there are {', '.join(names)}"
                )
        student = self.member(spec.student)
        if student.joins or student.folds:
            raise ValueError(
                "distill.student has a backbone of its own and is in all folds: leave out joins and folds"
            )
        if spec.twin and (
            spec.twin == spec.student
            or self.member(spec.twin).model_copy(update={"name": spec.student}) != student
            or self.stages_of(spec.twin) != self.stages_of(spec.student)
        ):
            raise ValueError(
                f"distill.twin differs from {spec.student} in its name only, or the comparison means nothing"
            )

    def _check_join(self, member: MemberSpec, base: MemberSpec) -> None:
        where = f"member {member.name} joins {base.name}, which"
        if base.joins or self.members.index(base) > self.members.index(member):
            raise ValueError(
                f"{where} must be a member with a backbone of its own that comes before it"
            )
        if (base.img_size, base.resize) != (member.img_size, member.resize):
            raise ValueError(
                f"{where} must have the same img_size and resize: one batch of images goes into all"
            )
        if base.folds and not (member.folds and set(member.folds) <= set(base.folds)):
            raise ValueError(
                f"{where} is in folds {list(base.folds)} only; give {member.name} the same"
            )

    @property
    def combined(self) -> tuple[str, ...]:
        """Names of the members that ensembles combine: those of ensemble.members, or all with a backbone of their own."""
        return self.ensemble.members or tuple(m.name for m in self.members if not m.joins)

    def stages_of(self, member: str) -> tuple[StageSpec, ...]:
        """The stages that a member goes through: those that name it, else those that name no member."""
        own = tuple(s for s in self.stages if member in s.members)
        return own or tuple(s for s in self.stages if not s.members)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a TOML recipe and apply `a.b=c` overrides.

        Raises:
            RecipeError: the file is missing, not TOML, has unknown keys or wrong values.
        """
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(
                "cannot read the recipe",
                where=path,
                got=error.strerror or error,
                fix="give the path of a .toml file",
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError("the recipe is not valid TOML", where=path, got=error) from None
        return cls.parse(tree, overrides, where=str(path))

    @classmethod
    def parse(
        cls, tree: dict[str, Any], overrides: Iterable[str] = (), where: str = "recipe"
    ) -> Recipe:
        """Build a recipe from a tree of plain values; `overrides` are `a.b=c` strings."""
        for override in overrides:
            apply_override(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(
                "the recipe is not usable",
                where=where,
                got="; ".join(map(_explain, error.errors())),
            ) from None

    def jobs(self, folds: int | None = None) -> list[Job]:
        """Every job in the order of execution; `folds` where the data decide their number (leave-one-group-out)."""
        numbers = list(range(folds or self.folds.k)) + ([-1] if self.folds.final == "refit" else [])
        return [
            Job(m.name, f, s.name)
            for m in self.members
            for f in numbers
            if not m.folds or f in m.folds
            for s in self.stages_of(m.name)
        ]

    def member(self, name: str) -> MemberSpec:
        """The member of that name."""
        return next(m for m in self.members if m.name == name)

    def soft(self, member: str) -> DistillSpec | None:
        """How a member learns from another run's ensemble; None for members that learn from labels."""
        return self.distill if self.distill is not None and self.distill.student == member else None

    def seed_name(self, member: str) -> str:
        """Whose name a member's seeds are made of: its own, for a twin the student's."""
        return (
            self.distill.student
            if self.distill is not None and member == self.distill.twin
            else member
        )

    def digest(self) -> str:
        """SHA-256 of all that says what is trained; the name and the budget, which only cuts it short, are left out."""
        tree = self.model_dump(mode="json", exclude={"name", "budget_minutes"}, exclude_none=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def dump(self, header: str = "") -> str:
        """The resolved recipe as TOML text, every default written out; `header` becomes comments above it."""
        comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
        return comments + _toml(self.model_dump(mode="json", exclude_none=True))


def _explain(error: Any) -> str:
    """One pydantic error as `path: what, did you mean`."""
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    known = list(_fields_at(error["loc"][:-1]))
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    return f"{path}: unknown key" + (
        f", did you mean {near[0]}?" if near else f", known are {', '.join(known)}"
    )


def _fields_at(loc: tuple[Any, ...]) -> Iterable[str]:
    """Field names of the section that a pydantic error location points into."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, str):
            hint = section.model_fields[part].annotation
            section = next(
                (
                    a
                    for a in (hint, *get_args(hint))
                    if isinstance(a, type) and issubclass(a, Section)
                ),
                hint,
            )
    return list(section.model_fields)


def _toml(tree: dict[str, Any], prefix: str = "") -> str:
    """Write a tree of plain values as TOML: values first, then tables, then lists of tables."""
    lines, tables = [], []
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            tables.append(f"\n[{key}]\n{_toml(value, key)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables += [f"\n[[{key}]]\n{_toml(item, key)}" for item in value]
        else:
            lines.append(f"{key} = {_value(value)}\n")
    return "".join(lines + tables)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # a JSON string, number or boolean is also TOML


def packaged(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe that comes with threefold, by name (`demo`).

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in packaged_names():
        raise RecipeError(
            "no such recipe",
            got=name,
            expected=f"a .toml file or one of {', '.join(packaged_names())}",
        )
    return Recipe.load(_PACKAGED / f"{name}.toml", overrides)


def packaged_names() -> list[str]:
    """Names of the recipes that come with threefold."""
    return sorted(str(p.relative_to(_PACKAGED).with_suffix("")) for p in _PACKAGED.rglob("*.toml"))


def resolve(text: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by file path or by the name of a packaged one."""
    return Recipe.load(text, overrides) if text.endswith(".toml") else packaged(text, overrides)


def parse_minutes(text: str) -> float:
    """Minutes of a duration: 90s, 20m, 2h, or a number of minutes.

    Raises:
        RecipeError: it is none.
    """
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1.0)
    try:
        minutes = float(number) * unit
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        raise RecipeError(
            "not a duration", where="--budget", got=text, expected="90s, 20m, 2h or 0"
        )
    return minutes
