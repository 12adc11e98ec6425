"""What a stage of kind `tune` starts from: its network, its rows and its seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import nn

from threefold.models.member import JointMember, load_weights
from threefold.models.pipeline import pick_device
from threefold.recipe.recipe import Job, Recipe
from threefold.recipe.schema import MemberSpec, StageSpec
from threefold.training.distillation import Distillation
from threefold.training.features.activations import cached_activations, cached_blocks
from threefold.training.features.cache import FeatureCache
from threefold.training.head_jobs import start_of_tuning
from threefold.training.pixel_cache import PixelCache, PixelRows, join_rows
from threefold.training.provenance import stable_seed
from threefold.training.pseudo_labels import Caches, PseudoLabels, find_pseudo_labels
from threefold.training.run import Run
from threefold.training.stages.task import StageTask

PRECISION_FILE: Final = "precision.json"
"""The precision that each network is trained in, where the recipe leaves the choice."""


class StageStart(NamedTuple):
    """A network, what it is to be trained on, and how many of its first blocks are cached."""

    member: nn.Module
    task: StageTask
    cached_blocks: int


def start_stage(
    run: Run,
    job: Job,
    caches: Caches,
    *,
    deadline: float = math.inf,
    resume_path: Path | None = None,
) -> StageStart:
    """Build the network of a stage of kind `tune`, and collect what it is trained on.

    Seeds torch's generator, from which a fresh head is drawn.

    Args:
        run: the run; the jobs that this one goes on from are done.
        job: member, fold and stage.
        caches: of the run's images.
        deadline: a time.monotonic() value to stop at, or infinity.
        resume_path: where to save the state between epochs; None = nowhere.

    Raises:
        RunError: weights that the stage starts from are missing or damaged.
        RecipeError: pretrained weights are not available, or the stage trains nothing.
    """
    recipe, spec, roles = run.recipe, run.recipe.member(job.member), run.roles[job.fold]
    stage, previous = recipe.stage(job.stage), previous_job(recipe, job)
    cache, features = caches
    seed = job_seed(run, job)
    torch.manual_seed(seed)
    pseudo = find_pseudo_labels(run, job.member, job.fold, caches)
    member = _build_start(run, spec, job.fold, previous, features)
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
        fit=_add_pseudo_labelled_pixels(cache, spec, stage, fit, pseudo),
        select=select,
        seed=seed,
        num_classes=len(run.sources.train.classes),
        # The probe that a member starts from has an answer of its own. A first stage need not beat
        # it: networks that are as good but different make the better ensemble.
        first=previous is None,
        batch_size=spec.batch_size,
        deadline=deadline,
        watcher=run.watcher,
        teacher_probs=_teacher_probs(run, job),
        resume_path=resume_path,
        network=" + ".join(spec.joins) or spec.backbone,
        precision_file=run.dir / PRECISION_FILE,
        activations=activations,
        targets=None if pseudo is None else pseudo.targets_after(fit.labels),
    )
    return StageStart(member, task, count)


def previous_job(recipe: Recipe, job: Job) -> Job | None:
    """Return the job of the member's stage before, in the same fold; None for its first stage."""
    names = [stage.name for stage in recipe.stages_of(job.member)]
    number = names.index(job.stage)
    return job._replace(stage=names[number - 1]) if number else None


def job_seed(run: Run, job: Job) -> int:
    """Return the seed of all random draws of a job; a twin has those of its student."""
    recipe = run.recipe
    return stable_seed(recipe.seed, recipe.seed_name(job.member), str(job.fold), job.stage)


def _add_pseudo_labelled_pixels(
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


def _teacher_probs(run: Run, job: Job) -> np.ndarray | None:
    """A teacher's probabilities on the fit rows (n, k), for a student."""
    distillation = Distillation.from_run(run)
    if distillation is None or not run.recipe.soft(job.member):
        return None
    return distillation.targets(job.fold).probs_of(run.roles[job.fold].fit)


def _build_start(
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
