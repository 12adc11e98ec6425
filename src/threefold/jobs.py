"""Doing the jobs of a run, in order, each once: train a stage, save it, predict with the last one."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import torch
from torch import nn

from threefold.assembly import assemble
from threefold.datasets import Sources
from threefold.errors import RunError
from threefold.files import read_arrays, write_arrays, write_json
from threefold.findings import find_copies
from threefold.models__member import JointMember, load_weights, save_weights
from threefold.models__pipeline import (
    FirstViews,
    Predictor,
    pick_device,
    pick_precision,
    predict_probs,
    to_pixels,
)
from threefold.models__views import Views, view_counts
from threefold.pixels import Pixels
from threefold.predictions__results_schema import VERSION, RoleCounts, RunInfo
from threefold.provenance import commit, hardware, stable_seed, versions
from threefold.recipe import Job, Recipe, fold_name
from threefold.recipe_schema import MemberSpec
from threefold.run import Run
from threefold.splits import Roles
from threefold.stages import StageOutcome, StageTask, train_stage
from threefold.teachers import Teaching
from threefold.training__augment import Augment


def train_members(run: Run) -> None:
    """Do every job that is missing, then write run.json, oof.npz and test.npz.

    Raises:
        ThreefoldError: bad data, a full disk, weights that cannot be had.
    """
    sources = run.sources
    for note in [*sources.notes, *_group_note(run)]:
        run.watcher.note(note)
    _write_info(run)
    teaching = Teaching.of(run)
    if teaching is not None:
        teaching.prepare(_train_teachers)
    pixels = _do_all(run)
    write_arrays(run.dir / "thumbs.npz", **_preview(run, pixels))
    find_copies(run, pixels)
    pixels.remove()


def _train_teachers(run: Run) -> None:
    """Train a run of teachers as far as its out-of-fold answers."""
    _write_info(run)
    _do_all(run).remove()


def _do_all(run: Run) -> Pixels:
    """Every job that is missing, then oof.npz and test.npz; returns the cache."""
    pixels = Pixels(run.sources, run.all_views, run.dir / "cache")
    jobs = run.jobs
    run.watcher.plan(jobs, [len(run.roles[j.fold].fit) * _epochs(run.recipe, j) for j in jobs])
    clock = _Clock(run, jobs)
    for job in jobs:
        skipped = run.folder.is_done(job)
        run.watcher.job(job, skipped)
        if not skipped:
            _do(run, job, pixels, clock)
    assemble(run)
    return pixels


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
        spent = sum(run.folder.job_record(j).seconds for j in jobs if run.folder.is_done(j))
        self.end = (
            time.monotonic() + run.recipe.budget_minutes * 60 - spent
            if run.recipe.budget_minutes
            else math.inf
        )
        self.left = {
            j: _epochs(run.recipe, j) * len(run.roles[j.fold].fit)
            for j in jobs
            if not run.folder.is_done(j)
        }

    def deadline(self, job: Job) -> float:
        """When this job must stop."""
        if math.isinf(self.end):
            return math.inf
        now, total = time.monotonic(), sum(self.left.values())
        return now + max(0.0, self.end - now) * self.left.pop(job) / total


def _do(run: Run, job: Job, pixels: Pixels, clock: _Clock) -> None:
    """One job: start weights -> stage -> weights, history, probabilities of the last stage, done.json."""
    began, recipe, spec = time.monotonic(), run.recipe, run.recipe.member(job.member)
    stages = recipe.stages_of(job.member)
    number = [stage.name for stage in stages].index(job.stage)
    roles, classes = run.roles[job.fold], run.sources.train.classes
    seed = stable_seed(recipe.seed, recipe.seed_name(job.member), str(job.fold), job.stage)
    torch.manual_seed(seed)
    folder = run.folder.job_folder(job)
    previous = job._replace(stage=stages[number - 1].name) if number else None
    member = _start(run, spec, job.fold, previous)
    task = StageTask(
        stages[number],
        recipe,
        pixels.rows("train", spec, roles.fit),
        pixels.select(spec, roles),
        seed,
        len(classes),
        first=number == 0,
        batch_size=spec.batch_size,
        deadline=clock.deadline(job),
        watcher=run.watcher,
        soft=_soft(run, job),
        keep=folder / ".midway",
    )
    outcome = train_stage(member, task)
    save_weights(outcome.state, folder / "weights.safetensors")
    write_json(folder / "history.json", outcome.history)
    write_arrays(
        folder / "choice.npz", **_choice(run, member, spec, roles, pixels, outcome, previous)
    )
    if number == len(stages) - 1:
        write_arrays(folder / "probs.npz", **_predict(run, member, spec, roles, pixels))
    run.folder.finish_job(job, outcome.earlier + time.monotonic() - began)
    (folder / ".midway").unlink(missing_ok=True)
    if previous is not None:
        # The next stage has taken them over.
        (run.folder.job_folder(previous) / "weights.safetensors").unlink(missing_ok=True)


def _soft(run: Run, job: Job) -> np.ndarray | None:
    """A teacher's probabilities on the fit rows, for a student."""
    teaching = Teaching.of(run)
    if teaching is None or not run.recipe.soft(job.member):
        return None
    return teaching.targets(job.fold).of(run.roles[job.fold].fit)


def _start(run: Run, spec: MemberSpec, fold: int, previous: Job | None) -> nn.Module:
    """The network as a stage finds it: with pretrained weights, with those of the stage before, or of the members it joins."""
    member = run.build(spec, len(run.sources.train.classes), pretrained=previous is None)
    if previous is not None:
        load_weights(member, run.folder.verify_job(previous) / "weights.safetensors")
    elif isinstance(member, JointMember):
        for name, base in zip(spec.joins, member.bases, strict=True):
            folder = run.folder.verify_job(run.last_job(name, fold))
            load_weights(base, folder / "weights.safetensors")
    return member.to(device=pick_device(run.recipe.train.device)).to(
        memory_format=torch.channels_last
    )


def _choice(
    run: Run,
    member: nn.Module,
    spec: MemberSpec,
    roles: Roles,
    pixels: Pixels,
    outcome: StageOutcome,
    previous: Job | None,
) -> dict[str, np.ndarray]:
    """Which select rows the kept weights have right, and which score rows, both without views: how optimistic the choice was."""
    arrays = {"select": outcome.hits}
    if previous is not None and not outcome.history["kept"]:
        before = run.folder.job_folder(previous) / "choice.npz"
        if before.exists():
            return read_arrays(before)
    if len(roles.score):
        images, labels = pixels.rows("train", spec, roles.score)
        precision = pick_precision(run.recipe.train.precision, next(member.parameters()).device)
        arrays["score"] = predict_probs(Predictor(member), images, precision).argmax(1) == labels
    return arrays


def _predict(
    run: Run, member: nn.Module, spec: MemberSpec, roles: Roles, pixels: Pixels
) -> dict[str, np.ndarray]:
    """Probabilities (c, r, k) on the rows that this fold scores, and on the test split, for each choice of views."""
    arrays = {"rows": roles.score}
    if len(roles.score):
        arrays["score"] = _by_views(run, member, spec, pixels, "train", roles.score)
    if run.sources.test is not None:
        arrays["test"] = _by_views(
            run, member, spec, pixels, "test", np.arange(len(run.sources.test))
        )
    return arrays


def _by_views(
    run: Run, member: nn.Module, spec: MemberSpec, pixels: Pixels, split: str, rows: np.ndarray
) -> np.ndarray:
    device = next(member.parameters()).device
    precision = pick_precision(run.recipe.train.precision, device)
    counts = view_counts(run.recipe.views) if run.recipe.views.choose else ()
    predictor: nn.Module = Predictor(member, run.all_views(spec).to(device))
    if counts:
        predictor = FirstViews(predictor, [count for count in counts if count])  # type: ignore[arg-type]
    probs = predict_probs(predictor, pixels.rows(split, spec, rows, views=True)[0], precision)
    if not counts:
        return probs[None]
    probs = probs.swapaxes(0, 1)
    if counts[0]:
        return probs
    whole = Predictor(member, Views(run.recipe.views, spec.img_size, run.recipe.seed, 0).to(device))
    return np.concatenate(
        [predict_probs(whole, pixels.rows(split, spec, rows)[0], precision)[None], probs]
    )


def _preview(run: Run, pixels: Pixels, count: int = 16) -> dict[str, np.ndarray]:
    """A few training images as the network sees them, augmented, for the report."""
    spec = next(m for m in run.recipe.members if not m.joins)
    rows = np.linspace(0, len(run.sources.train) - 1, count).astype(int)
    images = to_pixels(pixels.rows("train", spec, rows)[0], torch.device("cpu"))
    seen = Augment(run.recipe.augment)(images, torch.Generator().manual_seed(run.recipe.seed))
    return {"preview": seen.round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()}


def _data_digest(sources: Sources) -> str:
    """SHA-256 of which images there are and what they show (their names and labels, not their pixels)."""
    parts = [
        (d.ids, d.labels.tolist(), d.groups) for d in (sources.train, sources.test) if d is not None
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
        notes=(*sources.notes, *_group_note(run)),
        skipped=tuple(f"{bad.path}: {bad.reason}" for bad in sources.skipped),
        roles=roles,
    )
    run.folder.write_info(info)
