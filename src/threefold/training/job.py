"""One job of a run: train a stage, save it, and predict after the last one.

A job reads what the jobs before it have written, and writes only into its own folder; so it can run
in any process that reaches the run folder. Running it again gives the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from threefold.data.splits import Roles
from threefold.errors import RunError
from threefold.json_files import write_json
from threefold.models.member import Member, save_weights
from threefold.models.pipeline import FirstViews, Predictor, pick_device
from threefold.models.split import LateBlocks
from threefold.models.views import Views, view_counts
from threefold.npz_files import write_arrays
from threefold.recipe.recipe import Job
from threefold.recipe.schema import MemberSpec
from threefold.training.features.activations import predict_late
from threefold.training.features.cache import FeatureCache
from threefold.training.features.heads import START_FILE
from threefold.training.head_jobs import answer_features, train_head
from threefold.training.pixel_cache import PixelCache
from threefold.training.predict import predict_images
from threefold.training.pseudo_labels import Caches, find_pseudo_labels
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.start import job_seed, previous_job, start_stage
from threefold.training.stages.task import StageOutcome
from threefold.training.truth import right_share

RESUME_FILE: Final = ".resume"
"""State of a stage that is being trained, in its job's folder."""


def run_job(
    run: Run,
    job: Job,
    caches: Caches,
    deadline: float = math.inf,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Train one stage, or one head, and write its files; done.json last.

    Args:
        run: the run; the jobs that this one goes on from are done.
        job: member, fold and stage.
        caches: of the run's images.
        deadline: a time.monotonic() value to stop at, or infinity.
        check: called before files are written; raises if the job is no longer this process's.

    Raises:
        ThreefoldError: weights cannot be loaded, numbers diverge, or the disk is full.
    """
    run_one = _run_head_job if run.recipe.stage(job.stage).kind == "head" else _run_job
    run_one(run, job, caches, deadline, check)


def _run_job(
    run: Run, job: Job, caches: Caches, deadline: float, check: Callable[[], None]
) -> None:
    """Train one stage and write its files: weights, history, predictions; done.json last."""
    cache, features = caches
    began, spec, roles = time.monotonic(), run.recipe.member(job.member), run.roles[job.fold]
    folder, previous = run.folder.job_folder(job), previous_job(run.recipe, job)
    member, task, count = start_stage(
        run, job, caches, deadline=deadline, resume_path=folder / RESUME_FILE
    )
    outcome = train_stage(member, task)
    check()
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
    check()
    run.folder.finish_job(job, outcome.elapsed_before + time.monotonic() - began)
    tidy_job(run, job)


def tidy_job(run: Run, job: Job) -> None:
    """Delete what a finished job has made useless, again where a process was killed before that.

    These are the state to resume it from, and the weights of the stage before, which its own
    replace.
    """
    (run.folder.job_folder(job) / RESUME_FILE).unlink(missing_ok=True)
    previous = previous_job(run.recipe, job)
    if previous is not None and run.recipe.stage(job.stage).kind == "tune":
        (run.folder.job_folder(previous) / "weights.safetensors").unlink(missing_ok=True)


def _run_head_job(
    run: Run, job: Job, caches: Caches, deadline: float, check: Callable[[], None]
) -> None:
    """Train a head on cached features and write its files; done.json last."""
    cache, features = caches
    began, spec, roles = time.monotonic(), run.recipe.member(job.member), run.roles[job.fold]
    seed, folder = job_seed(run, job), run.folder.job_folder(job)
    torch.manual_seed(seed)
    pseudo = find_pseudo_labels(run, job.member, job.fold, caches)
    outcome = train_head(run, job, features, seed, deadline, folder / RESUME_FILE, pseudo)
    check()
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
    check()
    run.folder.finish_job(job, outcome.elapsed_before + time.monotonic() - began)
    tidy_job(run, job)


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
    source = None if outcome.history["accepted"] else previous
    if source is not None and run.folder.job_wrote(source, "choice.npz"):
        return run.folder.read_job_arrays(source, "choice.npz")
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
