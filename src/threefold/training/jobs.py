"""All jobs of a run, from its images to its out-of-fold predictions and run.json."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

import torch

from threefold.predictions.records import VERSION, RoleCounts, RunInfo
from threefold.recipe.recipe import Job, fold_name
from threefold.training.checks import check_trainable
from threefold.training.disk_space import check_space
from threefold.training.distillation import Distillation
from threefold.training.distributed.ranks import current_ranks
from threefold.training.executors.base import Executor
from threefold.training.executors.local import LocalExecutor
from threefold.training.executors.make import make_executor
from threefold.training.executors.order import count_work
from threefold.training.head_jobs import open_features, prepare_features
from threefold.training.job import tidy_job
from threefold.training.left_out import JobMemoryError, free_memory, leave_out, stay_without
from threefold.training.pixel_cache import PixelCache
from threefold.training.provenance import commit, data_digest, hardware, versions
from threefold.training.pseudo_labels import Caches
from threefold.training.results.diagnostics import DataDiagnostics, inspect_data
from threefold.training.results.out_of_fold import assemble
from threefold.training.run import Run
from threefold.training.run_images import check_images, contents_digest


def train_members(run: Run, *, keep_cache: bool = False) -> DataDiagnostics:
    """Run every job that is missing, then write run.json, oof.npz, test.npz and duplicates.json.

    A member that does not fit into memory is left out (`left_out.leave_out`), unless several
    processes train it together.

    Args:
        run: the run.
        keep_cache: leave the decoded images in the run folder, for members that follow.

    Returns:
        What the run reports about its images.

    Raises:
        JobMemoryError: no member is left that fits into memory.
        ThreefoldError: bad data, a full disk, weights that cannot be loaded.
    """
    check_trainable(run.recipe)
    executor = make_executor(run)
    run.watcher.begin(run.dir, run.recipe)
    for note in _notes(run):
        run.watcher.note(note)
    stay_without(run)
    check_space(run)
    _write_info(run)
    distillation = Distillation.from_run(run)
    if distillation is not None:
        distillation.prepare(partial(_train_teachers, executor))
    cache = _run_jobs(executor, run, may_leave_out=current_ranks().world_size == 1)
    diagnostics = inspect_data(run, cache)
    if not keep_cache:
        cache.remove()
    return diagnostics


def remove_cache(run: Run) -> None:
    """Delete the decoded images that `train_members` may have left in the run folder."""
    run.open_pixels().remove()


def _train_teachers(executor: Executor, run: Run) -> None:
    """Train a run of teachers up to its out-of-fold predictions."""
    _write_info(run)
    _run_jobs(executor, run).remove()


def _run_jobs(executor: Executor, run: Run, *, may_leave_out: bool = False) -> PixelCache:
    """Run every job that is missing, then write oof.npz and test.npz; returns the image cache."""
    cache = run.open_pixels()
    while (error := _try_jobs(executor, run, run.jobs, cache)) is not None:
        if not may_leave_out:
            raise error
        if not executor.computes_features:  # else the jobs run on other machines
            run.watcher.note(f"{error.what}: {error.where} is tried once more, alone")
            jobs = [job for job in run.jobs if job == error.job or run.folder.is_done(job)]
            error = _try_jobs(LocalExecutor(), run, jobs, cache)
        if error is not None:
            leave_out(run, error)
    for job in run.jobs:
        tidy_job(run, job)
    assemble(run)
    return cache


def _try_jobs(
    executor: Executor, run: Run, jobs: Sequence[Job], cache: PixelCache
) -> JobMemoryError | None:
    """Run some jobs of a run that are missing; returns the error if one needs too much memory."""
    features = open_features(run)
    run.watcher.plan(run.jobs, [count_work(run, job) for job in run.jobs])
    try:
        if not executor.computes_features:
            prepare_features(run, features, jobs)
        executor.run(run, jobs, Caches(cache, features))
    except JobMemoryError as error:
        error.__context__ = None  # which keeps, as its traceback does, what the attempt has used
        return error.with_traceback(None)
    finally:
        del features
        free_memory()
    return None


def _notes(run: Run) -> list[str]:
    """The notes of the data, and a warning if groups may be split between fit and score rows."""
    notes = [*run.all_sources.notes, *run.sources.warnings]
    if run.sources.train.groups is not None and run.recipe.folds.scheme == "stratified":
        notes.append(
            "the images have groups, but folds.scheme = stratified lets a group be in fit and in "
            "score; set folds.scheme = grouped"
        )
    return notes


def _write_info(run: Run) -> None:
    """Write run.json, if the images are those that the run started with."""
    sources = run.sources
    check_images(run)
    left_out = run.folder.left_out
    roles = {
        fold_name(fold): RoleCounts(fit=len(r.fit), select=len(r.select), score=len(r.score))
        for fold, r in run.roles.items()
    }
    info = RunInfo(
        version=VERSION,
        digest=run.recipe.digest(),
        data=data_digest(sources),
        contents=contents_digest(sources),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        hardware=hardware(),
        threads=torch.get_num_threads(),
        commit=commit(),
        classes=sources.train.classes,
        n_train=len(sources.train),
        n_test=len(sources.test) if sources.test is not None else 0,
        folds=sum(fold >= 0 for fold in run.roles),
        notes=tuple(_notes(run)),
        skipped=tuple(f"{bad.path}: {bad.reason}" for bad in run.all_sources.skipped),
        roles=roles,
        **({"left_out": left_out} if left_out else {}),
    )
    run.folder.write_info(info)
