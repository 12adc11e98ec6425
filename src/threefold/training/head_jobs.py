"""Jobs of kind `head`: train a head on cached features of a frozen backbone.

A linear head is fitted twice. `start` has seen the fit rows only, so a member that goes on from it
still has select rows that nothing has seen. `answer` is fitted on the fit and select rows, with the
penalty that the select rows chose for `start`. Other heads are trained by the stage loop and keep
the epoch that is best on the select rows; there both are the same.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from threefold.data.splits import Roles
from threefold.errors import OutOfMemoryError, RunError, is_out_of_memory
from threefold.models.member import Member, assemble_member
from threefold.models.pipeline import pick_device
from threefold.recipe.recipe import Job
from threefold.recipe.schema import MemberSpec, StageSpec
from threefold.training.checkpoints import Checkpoint, State
from threefold.training.distributed.ranks import current_ranks
from threefold.training.features.cache import FeatureCache, FeatureRows
from threefold.training.features.frozen import frozen_backbone
from threefold.training.features.heads import START_FILE, HeadNetwork, head_probs
from threefold.training.features.probe import (
    L2Choice,
    LinearHead,
    Targets,
    choose_l2,
    class_weights,
    fit_linear,
)
from threefold.training.pseudo_labels import PseudoLabels
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask
from threefold.training.truth import right_share, task_of

EPOCHS: Final = 30
"""Epochs of a head that is not linear, where the stage has none."""

LR: Final = 1e-3
"""Its learning rate then, with the schedule one-cycle."""


@dataclass
class HeadOutcome:
    """What a head stage results in.

    Attributes:
        start: the tensors `head.*` fitted on the fit rows.
        answer: those of the member's answer.
        history: the content of history.json.
        correct: which select rows and score rows `start` answers correctly; see `right_share`.
        member: frozen backbone and answering head.
        elapsed_before: seconds spent before the stage was resumed.
    """

    start: State
    answer: State
    history: dict[str, Any]
    correct: dict[str, np.ndarray]
    member: Member
    elapsed_before: float = 0.0


def open_features(run: Run) -> FeatureCache:
    """Return the features of a run's images, by the run's own frozen backbones."""
    return FeatureCache(
        run.all_sources,
        run.recipe,
        run.watcher,
        record=run.dir / "features.json",
        load=lambda spec: frozen_backbone(run.folder, spec),
        squares=run.squares,
    )


def prepare_features(run: Run, features: FeatureCache, jobs: Sequence[Job]) -> None:
    """Compute what those of some head jobs will read that are not done, in one pass over images.

    If the memory is too small for that, each job computes what it reads, or finds that it cannot.
    """
    pending = [
        job
        for job in jobs
        if run.recipe.stage(job.stage).kind == "head" and not run.folder.is_done(job)
    ]
    specs = [run.recipe.member(name) for name in dict.fromkeys(job.member for job in pending)]
    if not specs:
        return
    try:
        _prepare(run, features, specs)
    except Exception as error:
        is_short = isinstance(error, OutOfMemoryError) or is_out_of_memory(error)
        if not is_short or current_ranks().world_size > 1:
            raise
        traceback.clear_frames(error.__traceback__)
        features.free_engines()
        run.watcher.note(
            "the memory is too small to compute all features in one pass over the images: each "
            "member computes its own"
        )


def _prepare(run: Run, features: FeatureCache, specs: Sequence[MemberSpec]) -> None:
    """Compute what heads of some members will read."""
    rows = np.arange(len(run.sources.train))
    features.prepare("train", specs, rows, run.recipe.features.copies)
    if run.sources.test is not None:
        features.prepare("test", specs, np.arange(len(run.sources.test)))
    if any(run.recipe.uses_pseudo_labels(spec.name) for spec in specs):
        names = [name for name in run.recipe.teachers if run.recipe.is_frozen(name)]
        readers = [spec for spec in specs if run.recipe.uses_pseudo_labels(spec.name)]
        readers += map(run.recipe.member, names)
        features.prepare("unlabelled", readers, np.arange(len(run.unlabelled)))


def train_head(
    run: Run,
    job: Job,
    features: FeatureCache,
    seed: int,
    deadline: float,
    resume_path: Path,
    pseudo: PseudoLabels | None = None,
) -> HeadOutcome:
    """Train the head of a member in one fold.

    Args:
        run: the run.
        job: its member, fold and stage of kind head.
        features: of the run's images.
        seed: of all random draws.
        deadline: a time.monotonic() value to stop at, or infinity; a linear head ignores it.
        resume_path: where to save the state between epochs.
        pseudo: what the fold learns from unlabelled images; None = nothing.

    Raises:
        RunError: the features do not fit into memory, or the loss is not a number.
    """
    spec, roles = run.recipe.member(job.member), run.roles[job.fold]
    member = _fresh_member(run, spec, features)
    network = HeadNetwork(member.head)
    elapsed = 0.0
    if spec.head.is_linear:
        start, answer, history = _fit_exactly(run, job, features, pseudo)
    else:
        task = _head_task(run, job, features, seed, pseudo, deadline, resume_path)
        outcome = train_stage(network, task)
        start = answer = outcome.state
        history, elapsed = outcome.history, outcome.elapsed_before
    network.load_state_dict(start)
    correct = _correct(features, spec, roles, network)
    network.load_state_dict(answer)
    return HeadOutcome(start, answer, history, correct, member, elapsed)


def start_head(
    run: Run, job: Job, features: FeatureCache, seed: int, pseudo: PseudoLabels | None = None
) -> tuple[HeadNetwork, StageTask]:
    """Build a fresh head that is trained in steps, and collect what it is trained on.

    Args:
        run: the run.
        job: its member, fold and stage of kind head; the head is not linear.
        features: of the run's images.
        seed: of all random draws.
        pseudo: what the fold learns from unlabelled images; None = nothing.

    Raises:
        RunError: the features do not fit into memory.
    """
    member = _fresh_member(run, run.recipe.member(job.member), features)
    return HeadNetwork(member.head), _head_task(run, job, features, seed, pseudo)


def _fresh_member(run: Run, spec: MemberSpec, features: FeatureCache) -> Member:
    """A frozen backbone with a fresh head, which is on the device of training."""
    member = assemble_member(spec, features.backbone(spec), len(run.sources.train.classes))
    member.head.to(pick_device(run.recipe.train.device))
    return member


def _head_task(
    run: Run,
    job: Job,
    features: FeatureCache,
    seed: int,
    pseudo: PseudoLabels | None,
    deadline: float = math.inf,
    resume_path: Path | None = None,
) -> StageTask:
    """What the stage loop is given of a head that is not linear."""
    spec, roles = run.recipe.member(job.member), run.roles[job.fold]
    copies = run.recipe.features.copies
    fit, targets = features.rows("train", spec, roles.fit, copies), None
    if pseudo is not None:
        targets = pseudo.targets_after(fit.labels, copies)
        fit = _add_pseudo_labelled_features(features, spec, fit, pseudo, copies)
    return StageTask(
        stage=_with_epochs(run.recipe.stage(job.stage)),
        recipe=run.recipe,
        fit=fit,
        select=features.select(spec, roles),
        seed=seed,
        num_classes=len(run.sources.train.classes),
        batch_size=spec.batch_size,
        deadline=deadline,
        watcher=run.watcher,
        resume_path=resume_path,
        network=f"the head of {spec.name}",
        targets=targets,
    )


def _with_epochs(stage: StageSpec) -> StageSpec:
    """The stage, with epochs and learning rate if it has none."""
    if stage.epochs:
        return stage
    return stage.model_copy(update={"epochs": EPOCHS, "lr": LR, "schedule": "one-cycle"})


def _add_pseudo_labelled_features(
    features: FeatureCache, spec: MemberSpec, rows: FeatureRows, pseudo: PseudoLabels, copies: int
) -> FeatureRows:
    """Add the unlabelled images of a fold, with their most likely classes, to labelled rows."""
    more = features.rows("unlabelled", spec, pseudo.rows, copies)
    return FeatureRows(
        np.concatenate([rows.features, more.features]),
        np.concatenate([rows.labels, np.tile(pseudo.labels, copies + 1)]),
    )


def _fit_exactly(
    run: Run, job: Job, features: FeatureCache, pseudo: PseudoLabels | None
) -> tuple[State, State, dict[str, Any]]:
    """Choose the penalty on the select rows; fit on the fit rows, then on both.

    Unlabelled images are fitted both times, and never chosen on.
    """
    began = time.monotonic()
    spec, roles = run.recipe.member(job.member), run.roles[job.fold]
    copies = run.recipe.features.copies
    fit = features.rows("train", spec, roles.fit, copies)
    select = features.select(spec, roles)
    if not (np.isfinite(fit.features).all() and np.isfinite(select.features).all()):
        raise RunError(
            "features are not numbers",
            where=f"member {spec.name}, backbone {spec.backbone} at {spec.img_size} px",
            got="NaN or infinity, perhaps beyond what float16 holds (65,504)",
            fix="give the member another backbone or img_size",
        )
    choice = _choose_head(run, *_to_learn(run, spec, features, fit, pseudo), select)
    start, answer = choice.head, choice.head
    if run.recipe.protocol == "honest":  # `paper` scores the rows that it selects on
        rows = np.concatenate([roles.fit, roles.select])
        both = features.rows("train", spec, rows, copies)
        answer = fit_linear(*_to_learn(run, spec, features, both, pseudo), start.l2, start)
    history = _history(run, choice, fit, select, time.monotonic() - began)
    run.watcher.batch(len(roles.fit))
    run.watcher.epoch(history["epochs"][0])
    return _state(start), _state(answer), history


def _choose_head(run: Run, features: np.ndarray, targets: Targets, select: FeatureRows) -> L2Choice:
    """Fit heads on some rows and choose the penalty on the select rows."""
    weights = None
    if select.labels.ndim == 1:
        weights = class_weights(select.labels, len(run.sources.train.classes), _balance(run))
    return choose_l2(features, targets, select.features, select.labels, weights)


def _balance(run: Run) -> int:
    """How often the recipe asks for balanced classes: by weights, by drawing, or both."""
    train = run.recipe.train
    return (train.class_weights == "balanced") + (train.sampler == "balanced")


def _to_learn(
    run: Run,
    spec: MemberSpec,
    features: FeatureCache,
    rows: FeatureRows,
    pseudo: PseudoLabels | None = None,
) -> tuple[np.ndarray, Targets]:
    """Return what a linear head learns from: rows, their copies and any unlabelled images."""
    num_classes, copies = len(run.sources.train.classes), run.recipe.features.copies
    probs, relative = None, 1.0
    if pseudo is not None:
        targets = pseudo.targets_after(rows.labels, copies)
        relative = targets.sum(1, dtype=np.float64)
        probs = targets / relative[:, None]
        rows = _add_pseudo_labelled_features(features, spec, rows, pseudo, copies)
    balanced = np.ones(len(rows.labels))
    if rows.labels.ndim == 1:
        balanced = class_weights(rows.labels, num_classes, _balance(run))
    # All copies of an image together weigh as much as one image.
    weights = balanced / (copies + 1) * relative
    return rows.features, Targets(rows.labels, num_classes, weights, probs)


def start_of_tuning(
    run: Run, spec: MemberSpec, fold: int, features: FeatureCache
) -> dict[str, Tensor]:
    """Return the state from which a member is tuned: a frozen backbone and a head.

    The head has not seen the select rows, so that tuning is judged on new ones. At another image
    size, or on other levels of the backbone, a linear head is fitted anew, with the penalty that
    suits the select rows best.

    Args:
        run: the run.
        spec: the member to be tuned; it starts from a probe, or its first stage is of kind `head`.
        fold: the fold.
        features: of the run's images.
    """
    base = run.recipe.member(spec.starts_from or spec.name)
    job = Job(base.name, fold, run.recipe.stages_of(base.name)[0].name)
    num_classes = len(run.sources.train.classes)
    start = run.load_job(job, num_classes, START_FILE, features.backbone(base)).state_dict()
    differs = (spec.img_size, spec.head.sequence) != (base.img_size, base.head.sequence)
    if differs and base.head.is_linear:
        copies = run.recipe.features.copies
        fit = features.rows("train", spec, run.roles[fold].fit, copies)
        select = features.select(spec, run.roles[fold])
        to_learn = _to_learn(run, spec, features, fit)
        start |= _state(_choose_head(run, *to_learn, select).head)
    return start


def _state(head: LinearHead) -> State:
    """The tensors of a linear head under their names in a member."""
    return {
        "head.classifier.weight": torch.from_numpy(head.weight),
        "head.classifier.bias": torch.from_numpy(head.bias),
    }


def _history(
    run: Run, choice: L2Choice, fit: FeatureRows, select: FeatureRows, seconds: float
) -> dict[str, Any]:
    """history.json of an exact fit: as of one epoch, with the penalty and what chose it."""
    metric = run.recipe.train.metric

    def measure(probs: np.ndarray, labels: np.ndarray) -> Checkpoint:
        return Checkpoint({}, probs, labels, 0, metric)

    on_fit = measure(choice.head.probs(fit.features), fit.labels)
    on_select = measure(choice.head.probs(select.features), select.labels)
    shares = fit.labels.mean(0)
    if fit.labels.ndim == 1:
        shares = np.bincount(fit.labels, minlength=len(choice.head.bias)) / len(fit.labels)
    constant = measure(np.tile(shares, (len(select.labels), 1)), select.labels)
    record = {
        "epoch": 0,
        "loss": float(on_fit.losses.mean()),
        "select_accuracy": on_select.accuracy,
        "select_loss": float(on_select.losses.mean()),
        "select_metric": on_select.plain_score,
        "lr": 0.0,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(fit.labels) / max(seconds, 1e-3), 1),
    }
    return {
        "epochs": [record],
        "accepted": True,
        "best_epoch": 0,
        "metric": metric,
        "start_accuracy": constant.accuracy,
        "start_metric": constant.plain_score,
        "reason": f"logistic regression, fitted exactly; l2 = {choice.head.l2:.3g} has the lowest "
        f"log loss of {len(choice.losses)} on the select rows",
        "stopped": "",
        "l2": choice.head.l2,
        "l2_losses": [[l2, loss] for l2, loss in choice.losses.items()],
    }


def _correct(
    features: FeatureCache, spec: MemberSpec, roles: Roles, network: nn.Module
) -> dict[str, np.ndarray]:
    """Which select rows and score rows a head answers correctly."""
    rows = {"select": features.select(spec, roles)}
    if len(roles.score):
        rows["score"] = features.rows("train", spec, roles.score)
    return {
        name: right_share(head_probs(network, part.features, task_of(part.labels)), part.labels)
        for name, part in rows.items()
    }


def answer_features(
    member: Member, spec: MemberSpec, features: FeatureCache, split: str, rows: np.ndarray
) -> np.ndarray:
    """Probabilities (r, k) of some rows from cached features.

    They are the member's answers to whole images, up to the rounding of the features to float16.
    """
    answered = features.rows(split, spec, rows).features
    return head_probs(HeadNetwork(member.head), answered, features.recipe.data.task)
