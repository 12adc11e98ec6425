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
from threefold.models.member import JointMember, Member, load_weights, save_weights
from threefold.models.pipeline import FirstViews, Predictor, pick_device
from threefold.models.split import LateBlocks
from threefold.models.views import Views, view_counts
from threefold.predictions.records import VERSION, RoleCounts, RunInfo
from threefold.recipe import Job, fold_name
from threefold.recipe_schema import MemberSpec, StageSpec
from threefold.training.activations import cached_activations, cached_blocks, predict_late
from threefold.training.checks import check_trainable
from threefold.training.diagnostics import DataDiagnostics, inspect_data
from threefold.training.distillation import Distillation
from threefold.training.features import FeatureCache
from threefold.training.head_jobs import (
    EPOCHS,
    answer_features,
    open_features,
    prepare_features,
    start_of_tuning,
    train_head,
)
from threefold.training.heads import START_FILE
from threefold.training.out_of_fold import assemble
from threefold.training.pixel_cache import PixelCache, PixelRows, join_rows
from threefold.training.predict import predict_images
from threefold.training.provenance import commit, hardware, stable_seed, versions
from threefold.training.pseudo_labels import Caches, PseudoLabels, find_pseudo_labels
from threefold.training.run import Run
from threefold.training.stage_task import StageOutcome, StageTask
from threefold.training.stages import train_stage
from threefold.training.truth import right_share

RESUME_FILE = ".resume"
"""State of a stage that is being trained, in its job's folder."""

PRECISION_FILE = "precision.json"
"""The precision that each network is trained in, where the recipe leaves the choice."""


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


def _train_teachers(run: Run) -> None:
    """Train a run of teachers up to its out-of-fold predictions."""
    _write_info(run)
    _run_jobs(run).remove()


def _run_jobs(run: Run) -> PixelCache:
    """Run every job that is missing, then write oof.npz and test.npz; returns the image cache."""
    cache = PixelCache(run.all_sources, run.all_views, run.dir / "cache")
    features = open_features(run)
    jobs = run.jobs
    run.watcher.plan(jobs, [_work(run, job) for job in jobs])
    prepare_features(run, features)
    budget = _TimeBudget(run, jobs)
    for job in jobs:
        done = run.folder.is_done(job)
        run.watcher.job(job, skipped=done)
        if done:
            continue
        deadline = budget.deadline(job)
        if run.recipe.stage(job.stage).kind == "head":
            _run_head_job(run, job, cache, features, deadline)
        else:
            _run_job(run, job, cache, features, deadline)
    assemble(run)
    return cache


def _notes(run: Run) -> list[str]:
    """The notes of the data, and a warning if groups may be split between fit and score rows."""
    notes = [*run.all_sources.notes, *run.sources.warnings]
    if run.sources.train.groups is not None and run.recipe.folds.scheme == "stratified":
        notes.append(
            "the images have groups, but folds.scheme = stratified lets a group be in fit and in "
            "score; set folds.scheme = grouped"
        )
    return notes


def _work(run: Run, job: Job) -> int:
    """Most images that a job trains on, over all its epochs; a linear head has one."""
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
        self.work_left = {job: _work(run, job) for job in jobs if not run.folder.is_done(job)}

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
    began, recipe, spec = time.monotonic(), run.recipe, run.recipe.member(job.member)
    stages = recipe.stages_of(job.member)
    number = [stage.name for stage in stages].index(job.stage)
    stage = stages[number]
    roles = run.roles[job.fold]
    seed = _seed(run, job)
    torch.manual_seed(seed)
    folder = run.folder.job_folder(job)
    previous = job._replace(stage=stages[number - 1].name) if number else None
    pseudo = find_pseudo_labels(run, job.member, job.fold, Caches(cache, features))
    member = _start(run, spec, job.fold, previous, features)
    activations, count = None, 0
    if stage.cached:
        count = cached_blocks(member, stage)
        more = () if pseudo is None else (pseudo.rows,)
        activations = cached_activations(
            features, spec, count, roles.fit, roles.select, stage.epochs, *more
        )
        fit, select = cache.labels(roles.fit), cache.labels(roles.select)
    else:
        fit = cache.rows("train", spec, roles.fit, side=stage.img_size)
        select = cache.select(spec, roles)
    task = StageTask(
        stage=stage,
        recipe=recipe,
        fit=_with_unlabelled(cache, spec, stage, fit, pseudo),
        select=select,
        seed=seed,
        num_classes=len(run.sources.train.classes),
        # The probe that a member starts from has an answer of its own. A first stage need not beat
        # it: networks that are as good but different make the better ensemble.
        first=number == 0,
        batch_size=spec.batch_size,
        deadline=deadline,
        watcher=run.watcher,
        teacher_probs=_teacher_probs(run, job),
        resume_path=folder / RESUME_FILE,
        network=" + ".join(spec.joins) or spec.backbone,
        precision_file=run.dir / PRECISION_FILE,
        activations=activations,
        targets=None if pseudo is None else pseudo.targets_after(fit.labels),
    )
    outcome = train_stage(member, task)
    save_weights(outcome.state, folder / "weights.safetensors")
    write_json(folder / "history.json", outcome.history)
    answer = partial(_answer, member, spec, cache, features, count)
    score = answer("train", roles.score) if len(roles.score) else None
    correct = _correct(run, roles, outcome, previous, score)
    write_arrays(folder / "choice.npz", **correct)
    if number == len(stages) - 1:
        if _has_plain_views(run, spec):
            probs = _plain_probs(run, roles, answer, score)
        else:
            probs = _predict(run, member, spec, roles, cache)
        _write_probs(folder, probs)
    run.folder.finish_job(job, outcome.elapsed_before + time.monotonic() - began)
    (folder / RESUME_FILE).unlink(missing_ok=True)
    if previous is not None:  # the weights of this stage replace those of the last
        (run.folder.job_folder(previous) / "weights.safetensors").unlink(missing_ok=True)


def _with_unlabelled(
    cache: PixelCache,
    spec: MemberSpec,
    stage: StageSpec,
    fit: PixelRows,
    pseudo: PseudoLabels | None,
) -> PixelRows:
    """Add the unlabelled images that a fold learns from, with their most likely classes."""
    if pseudo is None:
        return fit
    labels = np.concatenate([fit.labels, pseudo.labels])
    if stage.cached:  # its images are in the cache of activations
        return PixelRows(np.zeros((len(labels), 0, 0, 3), np.uint8), labels)
    more = cache.rows("unlabelled", spec, pseudo.rows, side=stage.img_size)
    return PixelRows(join_rows(fit.pixels, more.pixels), labels)


def _seed(run: Run, job: Job) -> int:
    """Seed of all random draws of a job; a twin has those of its student."""
    recipe = run.recipe
    return stable_seed(recipe.seed, recipe.seed_name(job.member), str(job.fold), job.stage)


def _run_head_job(
    run: Run, job: Job, cache: PixelCache, features: FeatureCache, deadline: float
) -> None:
    """Train a head on cached features and write its files; done.json last."""
    began, spec, roles = time.monotonic(), run.recipe.member(job.member), run.roles[job.fold]
    seed, folder = _seed(run, job), run.folder.job_folder(job)
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


def _teacher_probs(run: Run, job: Job) -> np.ndarray | None:
    """A teacher's probabilities on the fit rows (n, k), for a student."""
    distillation = Distillation.from_run(run)
    if distillation is None or not run.recipe.soft(job.member):
        return None
    return distillation.targets(job.fold).probs_of(run.roles[job.fold].fit)


def _start(
    run: Run, spec: MemberSpec, fold: int, previous: Job | None, features: FeatureCache
) -> nn.Module:
    """Build the network that a stage starts from.

    It has the weights of the stage before; in a first stage those of the member that it starts
    from or the members that it joins, or else pretrained ones. After a stage of kind head it has
    the head that has not seen the select rows, on which this stage is judged.
    """
    first_stage, start = run.recipe.stages_of(spec.name)[0], spec.starts_from
    pretrained = previous is None and not start
    member = run.build(spec, len(run.sources.train.classes), pretrained=pretrained)
    is_after_head = (
        previous is not None and first_stage.kind == "head" and previous.stage == first_stage.name
    )
    if is_after_head or (previous is None and start and run.recipe.is_frozen(start)):
        member.load_state_dict(start_of_tuning(run, spec, fold, features))
    elif previous is not None:
        load_weights(member, run.folder.verify_job(previous) / "weights.safetensors")
    elif start:
        folder = run.folder.verify_job(run.last_job(start, fold))
        load_weights(member, folder / "weights.safetensors")
    elif isinstance(member, JointMember):
        k = len(run.sources.train.classes)
        bases = [run.load_member(run.recipe.member(name), fold, k) for name in spec.joins]
        member.bases = nn.ModuleList(bases)
    member = member.to(device=pick_device(run.recipe.train.device))
    return member.to(memory_format=torch.channels_last)


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
