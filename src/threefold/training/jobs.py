"""Run the jobs of a run in order, each once: train a stage, save it, predict after the last one."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from threefold.data.dataset import Sources
from threefold.data.splits import Roles
from threefold.errors import RunError
from threefold.files import write_arrays, write_json
from threefold.models.member import Member, save_weights
from threefold.models.pipeline import FirstViews, Predictor, pick_device
from threefold.models.split import LateBlocks
from threefold.models.views import Views, view_counts
from threefold.predictions.records import VERSION, RoleCounts, RunInfo
from threefold.recipe import Job, fold_name
from threefold.recipe_schema import MemberSpec
from threefold.training.checks import check_trainable
from threefold.training.distillation import Distillation
from threefold.training.features.activations import predict_late
from threefold.training.features.cache import FeatureCache
from threefold.training.features.heads import START_FILE
from threefold.training.head_jobs import (
    EPOCHS,
    answer_features,
    open_features,
    prepare_features,
    train_head,
)
from threefold.training.pixel_cache import PixelCache
from threefold.training.predict import predict_images
from threefold.training.provenance import commit, hardware, versions
from threefold.training.pseudo_labels import Caches, find_pseudo_labels
from threefold.training.results.diagnostics import DataDiagnostics, inspect_data
from threefold.training.results.out_of_fold import assemble
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.start import job_seed, previous_job, start_stage
from threefold.training.stages.task import StageOutcome
from threefold.training.truth import right_share

RESUME_FILE = ".resume"
"""State of a stage that is being trained, in its job's folder."""


def train_members(run: Run, *, keep_cache: bool = False) -> DataDiagnostics:
    """Run every job that is missing, then write run.json, oof.npz, test.npz and duplicates.json.

    Args:
        run: the run.
        keep_cache: leave the decoded images in the run folder, for members that follow.

    Returns:
        What the run reports about its images.

    Raises:
        ThreefoldError: bad data, a full disk, weights that cannot be loaded.
    """
    check_trainable(run.recipe)
    run.watcher.begin(run.dir, run.recipe)
    for note in _notes(run):
        run.watcher.note(note)
    _write_info(run)
    distillation = Distillation.from_run(run)
    if distillation is not None:
        distillation.prepare(_train_teachers)
    cache = _run_jobs(run)
    diagnostics = inspect_data(run, cache)
    if not keep_cache:
        cache.remove()
    return diagnostics


def remove_cache(run: Run) -> None:
    """Delete the decoded images that `train_members` may have left in the run folder."""
    _open_pixels(run).remove()


def _open_pixels(run: Run) -> PixelCache:
    return PixelCache(run.all_sources, run.all_views, run.dir / "cache")


def _train_teachers(run: Run) -> None:
    """Train a run of teachers up to its out-of-fold predictions."""
    _write_info(run)
    _run_jobs(run).remove()


def _run_jobs(run: Run) -> PixelCache:
    """Run every job that is missing, then write oof.npz and test.npz; returns the image cache."""
    cache, features = _open_pixels(run), open_features(run)
    run.watcher.plan(run.jobs, [count_work(run, job) for job in run.jobs])
    run_jobs(run, run.jobs, Caches(cache, features))
    assemble(run)
    return cache


def run_jobs(run: Run, jobs: Sequence[Job], caches: Caches) -> None:
    """Run those of some jobs that are missing.

    Args:
        run: the run; its watcher knows the jobs.
        jobs: in the order of the run's.
        caches: of the run's images.

    Raises:
        ThreefoldError: weights cannot be loaded, or numbers diverge.
    """
    prepare_features(run, caches.features, jobs)
    budget = _TimeBudget(run, jobs)
    for job in jobs:
        done = run.folder.is_done(job)
        run.watcher.job(job, skipped=done)
        if done:
            continue
        run_one = _run_head_job if run.recipe.stage(job.stage).kind == "head" else _run_job
        run_one(run, job, caches.pixels, caches.features, budget.deadline(job))


def _notes(run: Run) -> list[str]:
    """The notes of the data, and a warning if groups may be split between fit and score rows."""
    notes = [*run.all_sources.notes, *run.sources.warnings]
    if run.sources.train.groups is not None and run.recipe.folds.scheme == "stratified":
        notes.append(
            "the images have groups, but folds.scheme = stratified lets a group be in fit and in "
            "score; set folds.scheme = grouped"
        )
    return notes


def count_work(run: Run, job: Job) -> int:
    """Return the most images that a job trains on, over all its epochs; a linear head has one."""
    stage, head = run.recipe.stage(job.stage), run.recipe.member(job.member).head
    epochs = stage.epochs
    if stage.kind == "head":
        epochs = 1 if head.is_linear else epochs or EPOCHS
    unlabelled = len(run.unlabelled) if run.recipe.uses_pseudo_labels(job.member) else 0
    return epochs * (len(run.roles[job.fold].fit) + unlabelled)


class _TimeBudget:
    """Shares out the time budget: a job gets its part of what is left, by epochs times images."""

    def __init__(self, run: Run, jobs: Sequence[Job]) -> None:
        self.end = math.inf
        if run.recipe.budget_minutes:
            done = [run.folder.job_record(job) for job in jobs if run.folder.is_done(job)]
            spent = sum(record.seconds for record in done)
            self.end = time.monotonic() + run.recipe.budget_minutes * 60 - spent
        self.end = min(self.end, run.deadline)
        self.work_left = {job: count_work(run, job) for job in jobs if not run.folder.is_done(job)}

    def deadline(self, job: Job) -> float:
        """The time.monotonic() value at which a job must stop."""
        if math.isinf(self.end):
            return math.inf
        now, total = time.monotonic(), sum(self.work_left.values())
        return now + max(0.0, self.end - now) * self.work_left.pop(job) / total


def _run_job(
    run: Run, job: Job, cache: PixelCache, features: FeatureCache, deadline: float
) -> None:
    """Train one stage and write its files: weights, history, predictions; done.json last."""
    began, spec, roles = time.monotonic(), run.recipe.member(job.member), run.roles[job.fold]
    folder, previous = run.folder.job_folder(job), previous_job(run.recipe, job)
    member, task, count = start_stage(
        run, job, Caches(cache, features), deadline=deadline, resume_path=folder / RESUME_FILE
    )
    outcome = train_stage(member, task)
    save_weights(outcome.state, folder / "weights.safetensors")
    write_json(folder / "history.json", outcome.history)
    answer = partial(_answer, member, spec, cache, features, count)
    score = answer("train", roles.score) if len(roles.score) else None
    correct = _correct(run, roles, outcome, previous, score)
    write_arrays(folder / "choice.npz", **correct)
    if job == run.last_job(job.member, job.fold):
        if _has_plain_views(run, spec):
            probs = _plain_probs(run, roles, answer, score)
        else:
            probs = _predict(run, member, spec, roles, cache)
        _write_probs(folder, probs)
    run.folder.finish_job(job, outcome.elapsed_before + time.monotonic() - began)
    (folder / RESUME_FILE).unlink(missing_ok=True)
    if previous is not None:  # the weights of this stage replace those of the last
        (run.folder.job_folder(previous) / "weights.safetensors").unlink(missing_ok=True)


def _run_head_job(
    run: Run, job: Job, cache: PixelCache, features: FeatureCache, deadline: float
) -> None:
    """Train a head on cached features and write its files; done.json last."""
    began, spec, roles = time.monotonic(), run.recipe.member(job.member), run.roles[job.fold]
    seed, folder = job_seed(run, job), run.folder.job_folder(job)
    torch.manual_seed(seed)
    pseudo = find_pseudo_labels(run, job.member, job.fold, Caches(cache, features))
    outcome = train_head(run, job, features, seed, deadline, folder / RESUME_FILE, pseudo)
    save_weights(outcome.start, folder / START_FILE)
    save_weights(outcome.answer, folder / "weights.safetensors")
    write_json(folder / "history.json", outcome.history)
    write_arrays(folder / "choice.npz", **outcome.correct)
    if job == run.last_job(job.member, job.fold):
        if _has_plain_views(run, spec):
            answer = partial(answer_features, outcome.member, spec, features)
            score = answer("train", roles.score) if len(roles.score) else None
            probs = _plain_probs(run, roles, answer, score)
        else:
            member = outcome.member.to(pick_device(run.recipe.train.device))
            probs = _predict(run, member, spec, roles, cache)
        _write_probs(folder, probs)
    run.folder.finish_job(job, outcome.elapsed_before + time.monotonic() - began)
    (folder / RESUME_FILE).unlink(missing_ok=True)


def _write_probs(folder: Path, probs: Mapping[str, np.ndarray]) -> None:
    """Write a job's probabilities.

    Raises:
        RunError: some are not numbers, so the job is not finished.
    """
    for kind in ("score", "test"):
        if not np.isfinite(probs.get(kind, 0.0)).all():
            raise RunError(
                f"answers on {kind} rows are not numbers",
                where=folder,
                got="NaN",
                fix="lower the lr of the stages, or set train.clip_grad = 1.0",
            )
    write_arrays(folder / "probs.npz", **probs)


def _has_plain_views(run: Run, spec: MemberSpec) -> bool:
    """Whether a member answers on the whole image only, as it is trained."""
    views = run.all_views(spec)
    return views.count == 1 and views.canvas == spec.img_size and not run.recipe.views.choose


def _answer(
    member: nn.Module,
    spec: MemberSpec,
    cache: PixelCache,
    features: FeatureCache,
    count: int,
    split: str,
    rows: np.ndarray,
) -> np.ndarray:
    """Probabilities (r, k) without views; `count` first blocks are read from the cache."""
    if count and isinstance(member, Member):
        activations = features.blocks(split, spec, rows, count)
        return predict_late(LateBlocks(member, count), activations, features.recipe.data.task)
    predictor = Predictor(member, None, features.recipe.data.task)
    return predict_images(predictor, cache.rows(split, spec, rows).pixels)


def _correct(
    run: Run,
    roles: Roles,
    outcome: StageOutcome,
    previous: Job | None,
    score: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Which select rows and score rows the stage's weights answer correctly, without views.

    The two show how optimistic the choice of the weights was.

    Args:
        run: the run.
        roles: the rows of the fold.
        outcome: of the stage.
        previous: the job of the stage before, or None.
        score: (r, k) answers on the score rows, or None without any.
    """
    if previous is not None and not outcome.history["accepted"]:
        path = run.folder.job_folder(previous) / "choice.npz"
        if path.exists():
            return run.folder.read_job_arrays(previous, "choice.npz")
    arrays = {"select": outcome.correct}
    if score is not None:
        arrays["score"] = right_share(score, run.sources.train.truth[roles.score])
    return arrays


def _plain_probs(
    run: Run,
    roles: Roles,
    answer: Callable[[str, np.ndarray], np.ndarray],
    score: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """As `_predict`, of a member without views whose score rows are answered already."""
    arrays = {"rows": roles.score}
    if score is not None:
        arrays["score"] = score[None]
    if run.sources.test is not None:
        arrays["test"] = answer("test", np.arange(len(run.sources.test)))[None]
    return arrays


def _predict(
    run: Run, member: nn.Module, spec: MemberSpec, roles: Roles, cache: PixelCache
) -> dict[str, np.ndarray]:
    """Probabilities (c, r, k) on the fold's score rows and the test rows, per number of views."""
    arrays = {"rows": roles.score}
    if len(roles.score):
        arrays["score"] = _by_views(run, member, spec, cache, "train", roles.score)
    test = run.sources.test
    if test is not None:
        arrays["test"] = _by_views(run, member, spec, cache, "test", np.arange(len(test)))
    return arrays


def _by_views(
    run: Run, member: nn.Module, spec: MemberSpec, cache: PixelCache, split: str, rows: np.ndarray
) -> np.ndarray:
    """Probabilities (c, r, k), c for the numbers of views to choose from, or 1."""
    device = next(member.parameters()).device
    task = run.recipe.data.task
    all_views = Predictor(member, run.all_views(spec).to(device), task)
    pixels = cache.rows(split, spec, rows, views=True).pixels
    if not run.recipe.views.choose:
        return predict_images(all_views, pixels)[None]
    counts = view_counts(run.recipe.views)
    first_views = FirstViews(all_views, [count for count in counts if count])
    probs = predict_images(first_views, pixels).swapaxes(0, 1)
    if counts[0]:
        return probs
    no_views = Views(run.recipe.views, spec.img_size, run.recipe.seed, 0).to(device)
    pixels = cache.rows(split, spec, rows).pixels
    whole = predict_images(Predictor(member, no_views, task), pixels)
    return np.concatenate([whole[None], probs])


def _data_digest(sources: Sources) -> str:
    """SHA-256 of the images' names, labels, groups and folds; their pixels do not count."""
    parts = [
        (d.ids, d.truth.tolist(), d.groups, *(() if d.folds is None else (d.folds,)))
        for d in (sources.train, sources.test)
        if d is not None
    ]
    return hashlib.sha256(repr((sources.train.classes, parts)).encode()).hexdigest()


def _write_info(run: Run) -> None:
    """Write run.json, if the images are those that the run started with."""
    sources = run.sources
    data = _data_digest(sources)
    if (run.dir / "run.json").exists() and run.folder.info.data != data:
        raise RunError(
            "the images have changed since the run began",
            where=run.dir,
            got=f"{len(sources.train)} training images, other names or labels than before",
            fix="restore them, or choose another --out",
        )
    roles = {
        fold_name(fold): RoleCounts(fit=len(r.fit), select=len(r.select), score=len(r.score))
        for fold, r in run.roles.items()
    }
    info = RunInfo(
        version=VERSION,
        digest=run.recipe.digest(),
        data=data,
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
    )
    run.folder.write_info(info)
