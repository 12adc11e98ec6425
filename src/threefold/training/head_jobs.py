"""Jobs of kind `head`: heads fitted on the cached features of frozen backbones."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file

from threefold.files import read_json, write_arrays, write_json
from threefold.models.member import save_weights
from threefold.recipe import Job
from threefold.recipe_schema import MemberSpec
from threefold.training.features import FeatureCache
from threefold.training.frozen import frozen_backbone
from threefold.training.probe import LinearHead, Targets, choose_l2, fit_linear
from threefold.training.run import Run


def feature_cache(run: Run) -> FeatureCache:
    """Return the cache of a run's features, which come from the backbones that the run keeps."""
    return FeatureCache(
        run.sources,
        run.recipe,
        run.watcher,
        record=run.dir / "engines.json",
        load=partial(frozen_backbone, run.folder),
    )


def _state(head: LinearHead) -> dict[str, torch.Tensor]:
    return {
        "head.classifier.weight": torch.from_numpy(head.weight),
        "head.classifier.bias": torch.from_numpy(head.bias),
    }


def start_of_tuning(
    run: Run, spec: MemberSpec, fold: int, cache: FeatureCache
) -> dict[str, torch.Tensor]:
    """Return the state from which a member is tuned: a frozen backbone and a head.

    The head is the probe's, fitted without the select rows, so that these stay unseen. At another
    image size a linear head is fitted anew, with the probe's penalty.

    Args:
        run: the run.
        spec: the member to be tuned; it starts from a probe, or its first stage is of kind `head`.
        fold: the fold.
        cache: of features.
    """
    base = run.recipe.member(spec.starts_from or spec.name)
    stage = run.recipe.stages_of(base.name)[0]
    folder = run.folder.verify_job(Job(base.name, fold, stage.name))
    head = load_file(folder / "start.safetensors")
    if spec.img_size != base.img_size and base.head.kind == "linear":
        fit = cache.rows("train", spec, run.roles[fold].fit)
        targets = Targets(fit.labels, len(run.sources.train.classes))
        l2 = read_json(folder / "history.json")["l2"]
        head = _state(fit_linear(fit.features, targets, l2))
    backbone = frozen_backbone(run.folder, base).state_dict()
    return {**{f"backbone.{name}": tensor for name, tensor in backbone.items()}, **head}


def run_head_job(run: Run, job: Job, cache: FeatureCache) -> None:
    """Fit a head and write the files of its job; done.json last.

    The penalty is chosen on the select rows. The head that answers is then fitted on the fit and
    the select rows; the one that tuning starts from has seen the fit rows only.
    """
    began = time.monotonic()
    spec, roles = run.recipe.member(job.member), run.roles[job.fold]
    folder = run.folder.job_folder(job)
    k = len(run.sources.train.classes)
    frozen = [run.recipe.member(name) for name in run.recipe.probes]
    cache.prepare("train", frozen, np.arange(len(run.sources.train)))
    fit, select = cache.rows("train", spec, roles.fit), cache.rows("train", spec, roles.select)
    choice = choose_l2(fit.features, Targets(fit.labels, k), select.features, select.labels)
    both = fit_linear(
        np.concatenate([fit.features, select.features]),
        Targets(np.concatenate([fit.labels, select.labels]), k),
        choice.head.l2,
    )

    save_weights(_state(both), folder / "weights.safetensors")
    save_weights(_state(choice.head), folder / "start.safetensors")
    correct = choice.head.probs(select.features).argmax(1) == select.labels
    write_json(
        folder / "history.json",
        {
            "epochs": [],
            "accepted": True,
            "best_epoch": 0,
            "start_accuracy": 0.0,
            "reason": f"L2 {choice.head.l2:g}",
            "stopped": "",
            "l2": choice.head.l2,
        },
    )
    arrays = {"select": correct}
    probs: dict[str, np.ndarray] = {"rows": roles.score}
    if len(roles.score):
        score = cache.rows("train", spec, roles.score)
        arrays["score"] = choice.head.probs(score.features).argmax(1) == score.labels
        probs["score"] = both.probs(score.features)[None]
    if run.sources.test is not None:
        rows = np.arange(len(run.sources.test))
        cache.prepare("test", frozen, rows)
        probs["test"] = both.probs(cache.rows("test", spec, rows).features)[None]
    write_arrays(folder / "choice.npz", **arrays)
    write_arrays(folder / "probs.npz", **probs)
    run.folder.finish_job(job, time.monotonic() - began)
