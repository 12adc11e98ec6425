"""Find a learning rate for a stage: a range test from the network that the stage starts from.

What the stage goes on from is trained first, in one fold and a temporary folder: the heads of its
probe, which costs seconds, or the stages before. No run folder is written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import nn

from threefold.arguments import parse_minutes, split_names
from threefold.data.detect_source import seems_data
from threefold.data.in_memory import store_data
from threefold.errors import DataError, RecipeError, RunError, refuse_address, shorten
from threefold.files import TemporaryFolder
from threefold.recipe.lookup import packaged_names, resolve
from threefold.recipe.recipe import Job, Recipe
from threefold.recipe.schema import StageSpec
from threefold.training.checks import check_trainable
from threefold.training.executors.local import LocalExecutor
from threefold.training.executors.order import count_work, jobs_before
from threefold.training.head_jobs import open_features, prepare_features, start_head
from threefold.training.planning.basis import Quality
from threefold.training.planning.plan import plan_folder
from threefold.training.planning.range_test import SETTLED, RangeTest, sweep_stage
from threefold.training.progress.terminal_watcher import show_progress
from threefold.training.progress.watcher import Watcher
from threefold.training.pseudo_labels import Caches, find_pseudo_labels
from threefold.training.run import Run
from threefold.training.stages.start import job_seed, start_stage
from threefold.training.stages.task import StageTask

if TYPE_CHECKING:
    from threefold.data.dataset import Sources
    from threefold.report.chart_files import Chart

LOW: Final = 1e-7
"""First learning rate of the test."""

HIGH: Final = 10.0
"""Its last one, if the loss does not diverge before."""

STEPS: Final = 100
"""Steps between the two."""

_FEWEST_STEPS: Final = 2 * SETTLED


@dataclass(frozen=True, eq=False)
class FoundLearningRate:
    """What a range test says about the learning rate of a stage.

    A notebook shows its chart.

    Attributes:
        member: name of the member.
        stage: name of the stage.
        fold: whose rows the steps were taken on.
        recipe_rate: the stage's own learning rate, the highest that its schedule reaches.
        schedule: the stage's.
        planned: steps up to the highest rate.
        test: rates, losses and what they suggest.
    """

    member: str
    stage: str
    fold: int
    recipe_rate: float
    schedule: str
    planned: int
    test: RangeTest

    @property
    def suggestion(self) -> float | None:
        """The lower of `steepest` and `minimum_tenth`; None if the loss does not fall."""
        return self.test.suggestion

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most steeply."""
        return self.test.steepest

    @property
    def minimum_tenth(self) -> float | None:
        """A tenth of the rate at which the smoothed loss is lowest."""
        return self.test.minimum_tenth

    @property
    def override(self) -> str:
        """The suggestion as an override of the recipe; empty without one."""
        if self.suggestion is None:
            return ""
        return f"stages.{self.stage}.lr={self.suggestion:.2g}"

    def plot(self) -> Chart:
        """Draw the losses against the learning rate, with both suggestions and the recipe's."""
        from threefold.report.lr_chart import plot_learning_rates

        return plot_learning_rates(self._curve, self._marks)

    def save(self, path: str | Path) -> Path:
        """Write the chart as .svg or .png, and return its path.

        Raises:
            RunError: the name has another ending, or the file cannot be written.
        """
        from threefold.report.lr_chart import save_learning_rates

        return save_learning_rates(Path(path), self._curve, self._marks)

    @property
    def _curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.test.rates, self.test.losses, self.test.smoothed

    @property
    def _marks(self) -> dict[str, float]:
        """Names and rates of what the chart marks."""
        marks = {
            "steepest": self.steepest,
            "minimum / 10": self.minimum_tenth,
            "recipe": self.recipe_rate,
        }
        return {name: rate for name, rate in marks.items() if rate is not None}

    def _repr_svg_(self) -> str:
        return self.plot().svg


def find_learning_rate(
    source: Any,
    *,
    labels: Any = None,
    member: str = "",
    stage: str = "",
    overrides: str | Sequence[str] = (),
    budget: str | float = "20m",
    members: str | Sequence[str] = (),
    quality: Quality = "good",
    steps: int = STEPS,
    low: float = LOW,
    high: float = HIGH,
    progress: bool = True,
    watcher: Watcher | None = None,
) -> FoundLearningRate:
    """Test growing learning rates on copies of the network that a stage starts from.

    Args:
        source: a `Recipe`, a recipe file or the name of a packaged recipe; a run folder, of which
            the recipe is used; or images as `threefold.fit` takes them, for which a recipe is
            planned.
        labels: of images in memory, as `fit` takes them.
        member: name of the member; by default the first that is tuned.
        stage: name of the stage; by default the member's first that has a learning rate.
        overrides: `a.b=c` changes to the recipe.
        budget: for which the recipe of images is planned, as `fit` takes it.
        members: timm names for that plan.
        quality: of that plan.
        steps: number of steps, each with one batch.
        low: learning rate of the first step.
        high: learning rate of the last one, if the loss does not diverge before.
        progress: show notes and a progress bar.
        watcher: follows the training in place of the bar.

    Raises:
        RecipeError: there is no such member or stage, or the stage has no learning rate, because
            its head is fitted exactly.
        ThreefoldError: recipe or images cannot be used; the message says what to do.
    """
    rates = _rates(steps, low, high)
    changes = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    with (
        TemporaryFolder() as folder,
        show_progress(watcher, progress) as follower,
    ):
        path = Path(folder)
        if not isinstance(source, str | Path | Recipe):
            source = store_data(source, labels, path / "data")
        elif labels is not None:
            raise DataError("labels are given for images in memory only", got=source)
        recipe, sources = _open(
            source, changes, parse_minutes(budget), split_names(members), quality, follower
        )
        chosen = choose_stage(recipe, member, stage)
        check_trainable(recipe)
        run = Run.create(recipe, path / "run", follower, sources=sources)
        return _test(run, *chosen, rates)


def choose_stage(recipe: Recipe, member: str = "", stage: str = "") -> tuple[str, StageSpec]:
    """Choose a member, and a stage of it that has a learning rate.

    Args:
        recipe: what to choose from.
        member: its name; empty = the first that is tuned, or else the first with a learning rate.
        stage: its name; empty = the member's first with a learning rate.

    Raises:
        RecipeError: there is none.
    """
    for kind, name, known in (
        ("member", member, [spec.name for spec in recipe.members]),
        ("stage", stage, [spec.name for spec in recipe.stages]),
    ):
        if name and name not in known:
            raise RecipeError(f"no such {kind}", expected=shorten(known), got=name)
    pairs = [
        (spec.name, its_stage)
        for spec in recipe.members
        for its_stage in recipe.stages_of(spec.name)
        if member in ("", spec.name) and stage in ("", its_stage.name)
    ]
    if not pairs:
        raise RecipeError(
            "the member has no such stage",
            where=f"member {member}",
            expected=shorten(its_stage.name for its_stage in recipe.stages_of(member)),
            got=stage,
        )
    steppable = [
        (name, its_stage)
        for name, its_stage in pairs
        if its_stage.kind == "tune" or not recipe.member(name).head.is_linear
    ]
    if not steppable:
        name, its_stage = pairs[0]
        raise RecipeError(
            "a linear head is fitted exactly (logistic regression), without a learning rate",
            where=f"member {name}, stage {its_stage.name}",
            fix="name a stage of kind tune, or a member with another head; a plan tunes networks "
            "with a larger --budget, and not with --quality fast",
        )
    tuned = [pair for pair in steppable if pair[1].kind == "tune"]
    name, chosen = (tuned or steppable)[0]
    if recipe.soft(name) is not None:
        raise RecipeError(
            "the test has no teacher for a student to learn from",
            where=f"member {name}",
            fix="name another member, such as its twin, or leave out the distill table",
        )
    return name, chosen


def _test(run: Run, member: str, stage: StageSpec, rates: np.ndarray) -> FoundLearningRate:
    """Train what a stage goes on from, then take the steps."""
    spec = run.recipe.member(member)
    job = Job(member, spec.folds[0] if spec.folds else 0, stage.name)
    before = jobs_before(run, job)
    if any(run.recipe.stage(other.stage).kind == "tune" for other in before):
        names = shorten(f"{other.member} {other.stage}" for other in before)
        run.watcher.note(f"the stage goes on from others, which are trained first: {names}")
    caches = Caches(run.open_pixels(), open_features(run))
    batch = spec.batch_size or run.recipe.train.batch_size
    work = [*(count_work(run, other) for other in before), len(rates) * batch]
    run.watcher.plan([*before, job], work)
    prepare_features(run, caches.features, before)
    LocalExecutor().run(run, before, caches)
    run.watcher.job(job, skipped=False)
    network, task = _start(run, job, caches)
    test = sweep_stage(network, task, rates.tolist())
    if len(test.rates) < _FEWEST_STEPS:
        raise RunError(
            "the loss diverged at once",
            where=f"member {member}, stage {stage.name}",
            got=f"{len(test.rates)} steps from a learning rate of {rates[0]:.2g}",
            fix="begin the test at a lower rate (--low)",
        )
    return FoundLearningRate(
        member=member,
        stage=stage.name,
        fold=job.fold,
        recipe_rate=task.stage.lr,
        schedule=task.stage.schedule,
        planned=len(rates),
        test=test,
    )


def _start(run: Run, job: Job, caches: Caches) -> tuple[nn.Module, StageTask]:
    """The network of a stage, or the head of one of kind head, and what it is trained on."""
    if run.recipe.stage(job.stage).kind == "tune":
        start = start_stage(run, job, caches)
        return start.member, start.task
    pseudo = find_pseudo_labels(run, job.member, job.fold, caches)
    return start_head(run, job, caches.features, job_seed(run, job), pseudo)


def _rates(steps: int, low: float, high: float) -> np.ndarray:
    """The learning rates, evenly spaced in their logarithm."""
    if steps < _FEWEST_STEPS:
        raise RecipeError(
            "too few steps", where="steps", expected=f"{_FEWEST_STEPS} or more", got=steps
        )
    if not 0 < low < high < float("inf"):
        raise RecipeError(
            "the rates must grow",
            where="low, high",
            expected="0 < low < high",
            got=f"{low}, {high}",
        )
    return np.geomspace(low, high, steps)


def _open(
    source: str | Path | Recipe,
    overrides: tuple[str, ...],
    minutes: float,
    members: tuple[str, ...],
    quality: Quality,
    watcher: Watcher,
) -> tuple[Recipe, Sources | None]:
    """The recipe of a source, and its images where they have been read already."""
    if isinstance(source, Recipe):
        tree = source.model_dump(mode="json", exclude_none=True)
        return Recipe.parse(tree, overrides), None
    path = Path(source)
    if (path / "recipe.toml").is_file():
        run = Run.open(path)
        recipe = Recipe.load(path / "recipe.toml", overrides)
        return recipe, run.sources if recipe.data == run.recipe.data else None
    if path.suffix.lower() == ".toml" or str(source) in packaged_names():
        return resolve(str(source), overrides), None
    if not (path.exists() or seems_data(str(source))):
        refuse_address(source)
        raise RecipeError(
            "no such folder, table or recipe",
            got=source,
            expected="images as for fit, a run folder, a .toml file, or a name that `threefold "
            "list recipes` shows",
        )
    plan = plan_folder(source, minutes, members, overrides, quality, watcher)
    return plan.recipe, plan.sources
