"""The verbs as functions: fit, train, export, distill and report."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from threefold.arguments import parse_devices, parse_minutes, split_names
from threefold.data.dataset import Sources
from threefold.data.group_file import GROUP_FILE
from threefold.errors import RecipeError, RunError
from threefold.exporting.export import export
from threefold.files import real_path
from threefold.predictions.remote_run import run_folder_at
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.report.pages import write_report
from threefold.training.distillation import open_teacher
from threefold.training.execution import Execution
from threefold.training.jobs import remove_cache, train_members
from threefold.training.planning.basis import Quality, finishing_seconds
from threefold.training.planning.plan import plan_folder
from threefold.training.planning.resumed_recipe import LEFT_OUT, read_resumed_recipe
from threefold.training.progress.terminal_watcher import show_progress
from threefold.training.progress.trackers import TrackedWatcher
from threefold.training.progress.watcher import Watcher
from threefold.training.results.diagnostics import DataDiagnostics
from threefold.training.results.scoring import headline, score_run
from threefold.training.run import Run
from threefold.training.run_data import place_data
from threefold.training.student_recipe import student_recipe

LEAST_TUNING_SECONDS = 10.0
"""Less time than this is not worth starting to tune."""


def fit(
    data: Any,
    out: str | Path | None = None,
    *,
    labels: Any = None,
    budget: str | float = "20m",
    members: str | Sequence[str] = (),
    overrides: str | Sequence[str] = (),
    quality: Quality = "good",
    log: str | Sequence[str] = (),
    devices: str | int | None = None,
    progress: bool = True,
    watcher: Watcher | None = None,
    execution: Execution | None = None,
    began: float | None = None,
) -> Run:
    """Plan, train, ensemble, export and report on labelled images, within a time budget.

    Heads on frozen features come first. Their ensemble is scored, exported and reported at once, so
    that there is an answer early; tuned networks then improve it in the time that is left.

    Args:
        data: class folders, or train/ [val/] test/ with class folders inside, or an archive of
            them; a CSV, TSV, parquet or npz file; shards of WebDataset; `owner/name` on the Hugging
            Face hub, or hf://datasets/owner/name. Or what
            is in memory: a DataFrame of pandas or polars, a list of paths or images, pairs of image
            and label, or an array (n, h, w, 3) or (n, h, w), uint8 (`in_memory.store_data`).
        out: the run folder, by default runs/NAME, or runs/memory-HASH for what is in memory; an
            interrupted run in it is resumed with its own recipe, and a finished one is returned as
            it is.
        labels: of what is in memory: n texts or whole numbers, or where images have any number of
            labels n lists of them, or 0 and 1 (n, k); of a DataFrame the name of a column, or None
            for the usual names.
        budget: limit of the wall time: 90s, 20m, 2h, or a number of minutes; 0 = none.
        members: timm names; by default three EfficientNet-Lite. `auto` chooses by measurement.
        overrides: `a.b=c` changes to the planned recipe.
        quality: fast = heads on frozen features only; good; best = larger images, more epochs.
        log: experiment trackers that receive the numbers, too: tensorboard, mlflow, wandb.
        devices: how many jobs are trained at the same time, or all; None = as in the recipe.
        progress: show notes and a progress bar.
        watcher: follows the training in place of the bar.
        execution: where the jobs are done, such as `Execution("ray")`.
        began: the time.monotonic() value from which the budget counts; None = this call.

    Raises:
        ThreefoldError: the folder or the recipe cannot be used; the message says what to do.
    """
    if quality not in get_args(Quality):
        expected = ", ".join(get_args(Quality))
        raise RecipeError("unknown quality", where="quality", expected=expected, got=quality)
    changes = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    minutes, began = parse_minutes(budget), time.monotonic() if began is None else began
    with (
        run_folder_at(out) as (place, url),
        show_progress(watcher, progress) as follower,
        TrackedWatcher(follower, split_names(log)) as tracked,
    ):
        target, source = place_data(data, labels, place)
        where = (execution or Execution()).at(url, parse_devices(devices))
        names = split_names(members)
        run = _fit(source, target, minutes, began, names, changes, quality, tracked, where)
        _tell_findings(run)
        return run


def _fit(
    folder: str | Path,
    out: Path,
    minutes: float,
    began: float,
    members: tuple[str, ...],
    overrides: tuple[str, ...],
    quality: Quality,
    watcher: Watcher,
    execution: Execution | None,
) -> Run:
    """Do what `fit` says, within a number of minutes (0 = no limit) since it began."""
    if (out / "recipe.toml").exists():
        # A new plan could differ, since it depends on the speed of the machine.
        recipe = read_resumed_recipe(out, Path(folder), members, overrides)
        header, sources = "", None
    else:
        RunFolder(out).check_new()
        group_file = out / GROUP_FILE
        plan = plan_folder(folder, minutes, members, overrides, quality, watcher, group_file, began)
        for decision in plan.decisions:
            watcher.note(f"{decision.key} = {decision.value}: {decision.reason}")
        recipe, header, sources = plan.recipe, plan.explain(), plan.sources
    deadline = math.inf
    if minutes:
        deadline = began + 60 * minutes
    run = Run.create(recipe, out, watcher, header, sources, execution)
    if run.folder.is_whole:
        watcher.note(f"{out} is finished, with its own recipe; --out NAME trains another run")
        finish(run)
        return run
    images = run.all_sources  # unlabelled images that cannot be used are refused before any work
    early = None if run.folder.is_finished else _answer_early(run, run.sources, deadline)
    if early is not None:
        if early.folder.is_finished:
            return early
        deadline -= _seconds_to_finish(early, run)
        if deadline - time.monotonic() < LEAST_TUNING_SECONDS:
            return _settle(early)
        run = Run.create(recipe, out, watcher, sources=run.sources, execution=execution)
        run.deadline, run.all_sources = deadline, images  # without members that were left out
    with run.folder.locked():
        _train_and_score(run)
    finish(run)
    return run


def _answer_early(run: Run, sources: Sources, deadline: float) -> Run | None:
    """Train, score, export and report the probes of a run, before anything is tuned.

    From here on there is an honest, complete answer in the folder. Test rows stay sealed, unless
    the time is up already, so that this answer is the final one.

    Args:
        run: the run of all members.
        sources: its labelled images.
        deadline: the time.monotonic() value at which the whole job ends.

    Returns:
        The run of the probes; None if the run has nothing but probes, or none.
    """
    probes = run.recipe.probes
    pending = tuple(m.name for m in run.recipe.members if m.name not in probes)
    # The paper's protocol selects on the test rows, which an early answer must not see.
    if not probes or not pending or run.recipe.protocol == "paper":
        return None
    folder = RunFolder(run.dir, run.recipe.without(pending))
    early = Run(folder, run.watcher, sources, execution=run.execution)
    if not folder.has_results:
        with folder.locked():
            diagnostics = train_members(early, keep_cache=True)
            networks = len(early.recipe.members) + len(run.recipe.members)
            time_left = deadline - time.monotonic() - finishing_seconds(networks)
            time_for_both = time_left >= LEAST_TUNING_SECONDS
            if time_for_both:
                score_run(early, diagnostics, pending)
        if not time_for_both:
            return _settle(early, diagnostics)
    if early.folder.any_results.export is None or not (run.dir / "report.html").exists():
        finish(early)
        run.watcher.note(
            f"a first answer is in {run.dir / 'model.onnx'}: {headline(early)}; tuning follows"
        )
    return early


def _seconds_to_finish(early: Run, run: Run) -> float:
    """Predict how long scoring, export and report of all members take, from those of the probes."""
    seconds = early.folder.any_results.seconds
    fixed = seconds.get("ensemble", 0.0) + seconds.get("report", 0.0)
    growth = sum(1 if run.recipe.is_frozen(m.name) else run.networks(m) for m in run.recipe.members)
    return 1.5 * fixed + seconds.get("export", 0.0) * growth / len(early.recipe.members)


def _settle(early: Run, diagnostics: DataDiagnostics | None = None) -> Run:
    """Make the probes' answer the final one, because the time is up; opens the test rows."""
    early.watcher.note("no time is left for tuning: the probes' answer is final")
    early.folder.replace_recipe(early.recipe, "\n".join([*early.folder.header, LEFT_OUT]))
    with early.folder.locked():
        diagnostics = diagnostics or train_members(early)
        remove_cache(early)  # before the run is finished, so that a kill leaves none
        score_run(early, diagnostics, ())
    finish(early)
    return early


def train(
    recipe: Recipe,
    out: str | Path,
    watcher: Watcher | None = None,
    header: str = "",
    sources: Sources | None = None,
    *,
    devices: str | int | None = None,
    progress: bool = True,
    execution: Execution | None = None,
) -> Run:
    """Train every member in every fold, then ensemble and score them.

    An interrupted run is resumed, and deleted files are written again; a finished run is returned
    at once.

    Args:
        recipe: what to run.
        out: the run folder, or its URL on an object store; one of the same recipe is continued.
        watcher: follows the training in place of the bar.
        header: comment lines for the recipe's copy in the run folder.
        sources: the recipe's images, where they have been read and verified already.
        devices: how many jobs are trained at the same time, or all; None = as in the recipe.
        progress: show notes and a progress bar.
        execution: where the jobs are done, such as `Execution("ray")`.

    Raises:
        ThreefoldError: the recipe, data or folder cannot be used, or another process is at work in
            the folder; the message says what to do.
    """
    with run_folder_at(out) as (place, url), show_progress(watcher, progress) as follower:
        where = (execution or Execution()).at(url, parse_devices(devices))
        run = Run.create(recipe, place or out, follower, header, sources, where)
        if not run.folder.is_whole:
            with run.folder.locked():
                _train_and_score(run)
        if run.folder.any_results.export is None and (run.dir / "model.onnx").exists():
            finish(run)  # the file is that of a first answer, or its export was cut short
        _tell_findings(run)
    return run


def _tell_findings(run: Run) -> None:
    """Say what the scores cannot: copies across splits and the like; notes on reading were said."""
    for note in run.folder.any_results.notes:
        if note not in run.folder.info.notes:
            run.watcher.note(note)


def _train_and_score(run: Run, pending: tuple[str, ...] = ()) -> None:
    """Run the missing jobs, score the ensembles and write the results.

    Args:
        run: the run.
        pending: members that follow later; until then the test rows stay sealed.
    """
    score_run(run, train_members(run, keep_cache=bool(pending)), pending)


def finish(run: Run) -> None:
    """Export a trained run, unless its file is there and intact, and write its report."""
    if run.folder.any_results.export is None or not run.folder.is_intact("model.onnx"):
        export(run)
    report(run)


def report(run: Run, out: Path | None = None) -> Path:
    """Write the HTML report of a run and return its path, by default report.html in the folder."""
    start = time.monotonic()
    path = write_report([run.folder], out)
    try:
        run.folder.add_results("report", time.monotonic() - start)
    except RunError as error:
        if real_path(path).parent == real_path(run.dir):
            raise
        run.watcher.note(f"the run does not record this report: {error}")
    return path


def distill(
    run: str | Path,
    student: str,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    progress: bool = True,
    watcher: Watcher | None = None,
    execution: Execution | None = None,
) -> Run:
    """Train one network on a run's out-of-fold ensemble probabilities, and its twin on labels.

    The result is a run like any other (it can be resumed, reported, exported, compared and served).
    Its results.json has the comparison with the ensemble under `distill`.

    Args:
        run: the folder of the finished run that teaches.
        student: a member of that run, to be trained again with its head, or a timm name (which gets
            a linear head).
        out: the new run folder (default: beside the run, named after both).
        overrides: `a.b=c` changes to the student's recipe, such as distill.alpha=0.9 or
            members.student.img_size=64.
        progress: show notes and a progress bar.
        watcher: follows the training in place of the bar.
        execution: where the jobs are done.

    Raises:
        RunError: the run cannot teach, or its images have changed.
        RecipeError: the student is unknown, or an override cannot be used.
    """
    teacher = open_teacher(run)
    recipe = student_recipe(teacher, str(run), student, overrides)
    target = Path(out) if out is not None else default_folder(run, student)
    # An unknown student is an error before teachers are trained.
    Run(RunFolder(target, recipe)).build(recipe.members[0], 2, pretrained=True)
    header = f"made by threefold distill {run} --student {student}"
    with show_progress(watcher, progress) as follower:
        student_run = train(recipe, target, follower, header, execution=execution)
        finish(student_run)
        _add_file_sizes(student_run, teacher)
    return student_run


def default_folder(run: str | Path, student: str) -> Path:
    """Return the default folder of a student: beside the run, named after both."""
    folder = real_path(Path(run))
    return folder.parent / f"{folder.name}-{re.sub(r'[^A-Za-z0-9_.-]', '-', student)}"


def _add_file_sizes(run: Run, teacher: Run) -> None:
    """Add the sizes of both exported files to the results of a student."""
    distillation = run.results.distill
    assert distillation is not None
    folders = {distillation.student: run.dir, distillation.teacher.name: teacher.dir}
    costs = []
    for cost in distillation.costs:
        path = folders[cost.name] / "model.onnx" if cost.name in folders else None
        if path is not None and path.is_file():
            costs.append(cost.replace(bytes=path.stat().st_size))
        else:
            costs.append(cost)
    distillation = distillation.replace(costs=tuple(costs))
    run.folder.write_results(run.results.replace(distill=distillation))
