"""Stages that are trained by one process and by several, to compare the two."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from support.stages import Stopper, build_tiny, make_rows, make_task
from support.tiny_runs import make_folder, tiny_tree
from threefold.data.load import load_data
from threefold.json_files import write_json
from threefold.models.pipeline import Predictor
from threefold.npz_files import write_arrays
from threefold.recipe.recipe import Recipe
from threefold.training.features.cache import FeatureCache, FeatureRows
from threefold.training.features.heads import HeadNetwork
from threefold.training.predict import predict_images
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask

QUIET = ("members.plain.head.noise=0.0", "stages.one.batch_norm=fixed")
"""No random number depends on the process, and no norm on the images beside one."""

SCENARIOS: dict[str, dict[str, Any]] = {
    # 27 rows are batches of 9 images.
    "plain": {"fit": make_rows(27, 0)},
    "mixed": {"sets": ("augment.mixup=0.4", "augment.cutmix=1.0", "augment.erasing=0.5")},
    "weighted": {
        "sets": ("train.class_weights=balanced", "train.label_smoothing=0.1"),
        "fit": make_rows(22, 0),
    },
    "sharp": {"sets": ("train.sam=0.05", "train.accumulate=2", "train.clip_grad=0.5")},
    "averaged": {"sets": ("train.ema=0.9", "augment.policy=randaugment")},
    "sharded": {"sets": ("train.fsdp=true", "train.ema=0.9", "train.accumulate=2")},
    "sharded-sharp": {"sets": ("train.fsdp=true", "train.sam=0.05", "train.clip_grad=0.5")},
    "sharded-keras": {
        "sets": ("train.fsdp=true", "train.optimizer=adam-keras", "train.weight_decay=0")
    },
    # Four batches of two images or one: the second rank has none of its own.
    "sparse": {"sets": ("train.batch_size=2",), "fit": make_rows(7, 0)},
}


def make_scenario(name: str) -> StageTask:
    """The task of a scenario, whose epochs are fewer than usual."""
    values = dict(SCENARIOS[name])
    return make_task(*QUIET, *values.pop("sets", ()), **values)


def train_scenarios(folder: Path) -> None:
    """Train every scenario and a recurrent head, and predict with the last network."""
    folder.mkdir(exist_ok=True)
    for name in SCENARIOS:
        member = build_tiny("plain", *QUIET)
        outcome = train_stage(member, make_scenario(name))
        save_file(outcome.state, folder / f"{name}.safetensors")
        write_json(folder / f"{name}.json", outcome.history)
    probs = predict_images(Predictor(member), make_rows(13, 2).pixels)
    write_arrays(folder / "probs.npz", probs=probs, features=_compute_features(folder))
    _train_head(folder)
    train_saved(folder)


def _compute_features(folder: Path) -> np.ndarray:
    """The features of image files and of their augmented copies, by two backbones."""
    recipe = Recipe.parse(tiny_tree(make_folder(folder / "images", 7)), ["features.engine=torch"])
    cache = FeatureCache(load_data(recipe.data, 0), recipe, folder=folder / "cache")
    rows = np.arange(len(cache.sources.train))
    cache.prepare("train", recipe.members, rows, copies=1)
    answers = [cache.rows("train", spec, rows, copies=1).features for spec in recipe.members]
    return np.concatenate(answers, axis=1)


def _train_head(folder: Path) -> None:
    """Train a GRU on features."""
    rng = np.random.default_rng(0)
    no_noise = "members.gated.head.noise=0.0"
    member = build_tiny("gated", no_noise)
    network, width = HeadNetwork(member.head), member.backbone.num_features
    labels = np.arange(30) % 3
    features = (rng.normal(size=(30, width)) + labels[:, None]).astype(np.float16)
    rows = FeatureRows(features, labels)
    outcome = train_stage(network, replace(make_task(no_noise), fit=rows, select=rows))
    save_file(outcome.state, folder / "head.safetensors")
    write_json(folder / "head.json", outcome.history)


def noisy(folder: Path) -> StageTask:
    """A task with noise, batch norm and an average of its own; a stop saves its state."""
    task = make_task("train.ema=0.9", "augment.mixup=0.5", "stages.one.epochs=3")
    return replace(task, resume_path=folder / ".resume", save_interval=math.inf)


def quiet(folder: Path) -> StageTask:
    """A task that one process trains as several do; a stop saves its state."""
    task = make_task(*QUIET, "train.ema=0.9", "augment.mixup=0.5", "stages.one.epochs=3")
    return replace(task, resume_path=folder / ".resume-quiet", save_interval=math.inf)


def divided(folder: Path) -> StageTask:
    """The quiet task with its weights divided among the processes."""
    task = make_task(*QUIET, "train.fsdp=true", "train.ema=0.9", "stages.one.epochs=3")
    return replace(task, resume_path=folder / ".resume-divided", save_interval=math.inf)


def train_saved(folder: Path) -> None:
    """Train all three tasks, from the state that is saved in the folder if there is one."""
    folder.mkdir(exist_ok=True)
    for make in (noisy, quiet, divided):
        member = build_tiny("plain", *(() if make is noisy else QUIET))
        save_file(train_stage(member, make(folder)).state, folder / f"{make.__name__}.safetensors")


def stop_in_the_middle(folder: Path) -> None:
    """Stop the noisy task in the middle of its second epoch, as a signal does."""
    train_stage(build_tiny(), replace(noisy(folder), watcher=Stopper(5)))


def stop_divided(folder: Path) -> None:
    """Stop the divided task in the middle of its second epoch."""
    train_stage(build_tiny("plain", *QUIET), replace(divided(folder), watcher=Stopper(5)))
