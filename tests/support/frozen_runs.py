"""Runs of members with a frozen backbone, whose head stages are done without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.tiny_runs import make_folder, tiny_tree
from threefold.models.member import assemble_member, head_weights, save_weights
from threefold.predictions.records import VERSION, RunInfo
from threefold.recipe.recipe import Job, Recipe
from threefold.training.features.frozen import frozen_backbone
from threefold.training.run import Run

PROBE: dict[str, Any] = {
    "name": "probe",
    "backbone": "test_resnet",
    "weights": "none",
    "img_size": 32,
}
GATED: dict[str, Any] = {**PROBE, "name": "gated", "head": {"kind": "gru", "units": 16, "fc": 8}}


def frozen_tree(root: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe as plain values: two probes on one backbone, two folds."""
    stages = [{"name": "head", "kind": "head", "epochs": 1, "lr": 1e-3}]
    own = {"stages": stages, "members": [PROBE, GATED], "augment": {}}
    return tiny_tree(root, **{**own, **changes})


def frozen_run(folder: Path, **changes: Any) -> Run:
    """Start a run folder of `frozen_tree` and finish its head jobs with random heads."""
    recipe = Recipe.parse(frozen_tree(make_folder(folder / "images"), **changes))
    run = Run.create(recipe, folder / "run")
    for number, job in enumerate(run.jobs):
        if recipe.stage(job.stage).kind == "head":
            finish_head_job(run, job, number)
    run.folder.write_info(_info(run))
    return run


def _info(run: Run) -> RunInfo:
    train = run.sources.train
    return RunInfo(
        version=VERSION,
        digest=run.recipe.digest(),
        data="",
        created="",
        versions={},
        hardware="",
        threads=1,
        commit="",
        classes=train.classes,
        n_train=len(train),
        n_test=0,
        folds=sum(fold >= 0 for fold in run.roles),
        notes=(),
        skipped=(),
        roles={},
    )


def finish_head_job(run: Run, job: Job, seed: int) -> None:
    """Write the files of a head job with a random head."""
    spec = run.recipe.member(job.member)
    backbone = frozen_backbone(run.folder, spec)
    torch.manual_seed(seed)
    member = assemble_member(spec, backbone, 3)
    save_weights(head_weights(member), run.folder.job_folder(job) / "weights.safetensors")
    run.folder.finish_job(job, 0.0)
