"""The stage loop: one member, one learning-rate phase, from its best weights so far to better ones or the same.

Every stage is a pure function of its start weights, its rows and its seed, so a stage that is run again gives the same
bits (same machine, same versions), also where it was killed and goes on from what it keeps between epochs (`midway`). The
caller owns all other files; this module owns tensors.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from threefold import midway
from threefold.checkpoints import Checkpoint, State, gate
from threefold.errors import RunError
from threefold.midway import (
    Midway,
    load_midway,
    mark_of,
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random,
    save_midway,
)
from threefold.models__pipeline import Predictor, autocast, pick_precision, predict_probs, to_pixels
from threefold.recipe import Recipe
from threefold.recipe_schema import DistillSpec, StageSpec
from threefold.softloss import soft_loss, soften
from threefold.training__augment import Augment
from threefold.training__optimizers import create_optimizer, lr_at, set_trainable, train_mode
from threefold.training__watcher import Watcher


@dataclass(frozen=True)
class StageTask:
    """What one stage is trained and chosen on.

    `fit` and `select` are pairs of pixels uint8 (n, s, s, 3) and labels int64 (n,). `first` marks the stage that starts
    from a random head: the gate cannot apply to it. `deadline` is a time.monotonic() value, or infinity. `batch_size` 0 is
    the recipe's. `soft` (n, k) are a teacher's probabilities on the fit rows, for a student. `keep` is where the stage
    keeps itself between epochs, at most once in `midway.EVERY` seconds, to go on from when it is begun again; None = nowhere.
    """

    stage: StageSpec
    recipe: Recipe
    fit: tuple[np.ndarray, np.ndarray]
    select: tuple[np.ndarray, np.ndarray]
    seed: int
    num_classes: int
    first: bool = True
    batch_size: int = 0
    deadline: float = math.inf
    watcher: Watcher = field(default_factory=Watcher)
    soft: np.ndarray | None = None
    keep: Path | None = None


@dataclass
class StageOutcome:
    """The best weights after a stage, its history.json, which select rows they have right, booleans (n,), and the seconds before it was begun again."""

    state: State
    history: dict[str, Any]
    hits: np.ndarray
    earlier: float = 0.0


def train_stage(member: nn.Module, task: StageTask) -> StageOutcome:
    """Train one stage; the member ends with the best weights, which are after the first stage never worse on select than its start.

    Raises:
        RunError: the loss is not a number, or the accelerator has not enough memory.
        RecipeError: the stage's regexes leave nothing to train.
    """
    _seed_all(task.seed)
    loop = _Loop(member, task)
    start = loop.checkpoint(-1)
    best, records = loop.go_on(start)
    for epoch in range(len(records), task.stage.epochs):
        record, checkpoint = loop.epoch(epoch)
        records.append(record)
        task.watcher.epoch(record)
        best = (
            checkpoint if (best is start and task.first) or checkpoint.better_than(best) else best
        )
        loop.keep(best, records)
        if time.monotonic() > task.deadline:
            break
    kept, reason = gate(
        start, best, task.first, task.recipe.train.gate and task.recipe.protocol != "paper"
    )
    chosen = best if kept else start
    member.load_state_dict(chosen.state)
    cut = len(records) < task.stage.epochs or loop.cut
    history = {
        "epochs": records,
        "kept": kept,
        "best_epoch": chosen.epoch,
        "started_from": start.accuracy,
        "reason": reason + ("; cut short by the time budget" if cut else ""),
    }
    return StageOutcome(chosen.state, history, chosen.hits, loop.earlier)


class _Loop:
    """Optimizer, augmentation and counters of one stage."""

    def __init__(self, member: nn.Module, task: StageTask) -> None:
        spec = task.recipe.train
        self.member, self.task, self.spec = member, task, spec
        self.device = next(member.parameters()).device
        self.precision = pick_precision(spec.precision, self.device)
        set_trainable(member, task.stage)
        self.optimizer = create_optimizer(member, spec, task.stage.lr)
        self.augment = _Augmentation(task)
        self.generator = torch.Generator().manual_seed(task.seed)
        self.steps_per_epoch = max(
            1, round(len(task.fit[1]) / (task.batch_size or spec.batch_size))
        )
        self.step, self.cut, self.began = 0, False, time.monotonic()
        self.mark, self.kept, self.earlier = "", self.began, 0.0
        self.average = _average(member, spec.ema) if spec.ema else None
        self.soft = _softened(task, self.device)
        self.weight = (
            _class_weights(task.fit[1], task.num_classes, self.device)
            if spec.class_weights == "balanced"
            else None
        )

    def go_on(self, start: Checkpoint) -> tuple[Checkpoint, list[dict[str, Any]]]:
        """The best checkpoint and the epochs so far: none, or those of a stage that was killed, whose state is put back."""
        task = self.task
        if task.keep is None:
            return start, []
        self.mark = mark_of(
            (task.seed, task.stage, task.recipe.digest(), len(task.fit[1])), start.state
        )
        found = load_midway(task.keep, self.mark)
        if found is None:
            return start, []
        values = found.values
        self.member.load_state_dict(found.part("member"))
        if self.average is not None:
            self.average.load_state_dict(found.part("average"))
        restore_optimizer(self.optimizer, found.part("optimizer"), values["optimizer"])
        restore_random(self.device, self._generators(), found.part("random"), values["random"])
        self.step, self.earlier = values["step"], values["seconds"]
        task.watcher.batch(len(task.fit[1]) * len(values["records"]))
        if values["best"] < 0:
            return start, values["records"]
        losses, hits = (found.tensors[name].numpy() for name in ("losses", "hits"))
        return Checkpoint(
            found.part("best"), float(hits.mean()), losses, hits, values["best"]
        ), values["records"]

    def keep(self, best: Checkpoint, records: list[dict[str, Any]]) -> None:
        """Write down where the stage stands, unless it has just been done, or the stage is over."""
        now, task = time.monotonic(), self.task
        if task.keep is None or now - self.kept < midway.EVERY or len(records) == task.stage.epochs:
            return
        optimizer, drawn = (
            optimizer_state(self.optimizer),
            random_state(self.device, self._generators()),
        )
        parts = {
            "member": self.member.state_dict(),
            "optimizer": optimizer.tensors,
            "random": drawn.tensors,
        }
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        alone = {}
        if best.epoch >= 0:
            parts["best"] = best.state
            alone = {"losses": torch.from_numpy(best.losses), "hits": torch.from_numpy(best.hits)}
        values = {
            "records": records,
            "best": best.epoch,
            "step": self.step,
            "seconds": self.earlier + now - self.began,
            "optimizer": optimizer.values,
            "random": drawn.values,
        }
        tensors = {
            f"{part}/{name}": tensor
            for part, state in parts.items()
            for name, tensor in state.items()
        }
        save_midway(task.keep, self.mark, Midway({**tensors, **alone}, values))
        self.kept = time.monotonic()

    def _generators(self) -> dict[str, torch.Generator]:
        return {"batches": self.generator, "augment": self.augment.generator}

    def epoch(self, number: int) -> tuple[dict[str, Any], Checkpoint]:
        """Train one epoch and measure it on the select rows."""
        began, total, images = time.monotonic(), 0.0, 0
        train_mode(self.member)
        for rows in self._batches():
            try:
                loss = self._step(rows)
            except torch.OutOfMemoryError:
                raise RunError(
                    "the accelerator has not enough memory",
                    where=f"stage {self.task.stage.name}",
                    got=f"{len(rows)} images at once",
                    fix=f"set train.accumulate = {2 * self.spec.accumulate} (the same batch, in smaller parts)",
                ) from None
            if not math.isfinite(loss):
                raise RunError(
                    "the loss is not a number",
                    where=f"stage {self.task.stage.name}, epoch {number}",
                    got=loss,
                    fix=f"lower the stage's lr ({self.task.stage.lr}) or set train.clip_grad = 1.0",
                )
            total, images = total + loss * len(rows), images + len(rows)
            self.task.watcher.batch(len(rows))
            if time.monotonic() > self.task.deadline:
                self.cut = True
                break
        seconds = time.monotonic() - began
        checkpoint = self.checkpoint(number)
        record = {
            "epoch": number,
            "loss": total / max(images, 1),
            "select_accuracy": checkpoint.accuracy,
            "select_loss": float(checkpoint.losses.mean()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1),
        }
        return record, checkpoint

    def checkpoint(self, epoch: int) -> Checkpoint:
        """The weights as they are (their moving average, if asked for) and what they reach on the select rows."""
        source = self.average.module if self.average is not None and epoch >= 0 else self.member
        probs = predict_probs(Predictor(source), self.task.select[0], self.precision)
        labels = self.task.select[1]
        losses = -np.log(np.clip(probs[np.arange(len(labels)), labels], 1e-7, 1.0)).astype(
            np.float64
        )
        hits = probs.argmax(1) == labels
        state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        return Checkpoint(state, float(hits.mean()), losses, hits, epoch)

    def _batches(self) -> Iterator[np.ndarray]:
        """Rows of each optimizer step; a last batch of one row would break batch norm and is left out."""
        labels = self.task.fit[1]
        if self.spec.sampler == "balanced":
            weights = torch.from_numpy(
                1.0 / np.bincount(labels, minlength=self.task.num_classes)[labels]
            )
            order = torch.multinomial(
                weights, len(labels), replacement=True, generator=self.generator
            )
        else:
            order = torch.randperm(len(labels), generator=self.generator)
        for rows in np.array_split(order.numpy(), self.steps_per_epoch):
            if len(rows) > 1:
                yield np.sort(rows)

    def _step(self, rows: np.ndarray) -> float:
        """One optimizer step over `accumulate` micro-batches; returns the mean loss."""
        stage = self.task.stage
        total = self.steps_per_epoch * stage.epochs
        lr = lr_at(stage.schedule, stage.lr, self._position(total), total, stage.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        loss = 0.0
        parts = np.array_split(rows, min(self.spec.accumulate, len(rows) // 2))
        for part in parts:
            share = len(part) / len(rows)
            with autocast(self.precision, self.device):
                part_loss = self._loss(part)
            (part_loss * share).backward()  # type: ignore[no-untyped-call]
            loss += float(part_loss.detach()) * share
        if self.spec.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.member.parameters(), self.spec.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.member)
        self.step += 1
        return loss

    def _position(self, total: int) -> int:
        """Where the schedule stands: the step, or further where a time budget is being used up faster."""
        if math.isinf(self.task.deadline):
            return self.step
        used = (time.monotonic() - self.began) / max(self.task.deadline - self.began, 1e-9)
        return max(self.step, min(total - 1, int(used * total)))

    def _loss(self, rows: np.ndarray) -> Tensor:
        pixels, labels = self.task.fit
        images = to_pixels(pixels[rows], self.device)
        own = torch.from_numpy(labels[rows]).to(self.device)
        soft = self.soft[1][torch.from_numpy(rows)] if self.soft is not None else None
        images, targets, soft = self.augment(images, own, soft)
        logits = self.member(images.contiguous(memory_format=torch.channels_last)).float()
        hard = functional.cross_entropy(
            logits, targets, weight=self.weight, label_smoothing=self.spec.label_smoothing
        )
        if self.soft is None or soft is None:
            return hard
        spec = self.soft[0]
        return (1 - spec.alpha) * hard + spec.alpha * soft_loss(logits, soft, spec.temperature)


class _Augmentation:
    """The recipe's augmentation of a batch: the paper's warp, then timm's erasing and mixing where asked for."""

    def __init__(self, task: StageTask) -> None:
        spec = task.recipe.augment
        self.warp = Augment(spec)
        self.generator = torch.Generator().manual_seed(task.seed + 1)
        self.erase = (
            RandomErasing(spec.erasing, mode="const", device="cpu") if spec.erasing else None
        )
        self.mix = (
            Mixup(spec.mixup, spec.cutmix, label_smoothing=0.0, num_classes=task.num_classes)
            if spec.mixup or spec.cutmix
            else None
        )
        self.num_classes = task.num_classes

    def __call__(
        self, images: Tensor, labels: Tensor, soft: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, labels (or shares of classes) and a teacher's probabilities, mixed alike."""
        images = self.warp(images, self.generator)
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:  # timm mixes pairs; the last of an odd batch stays as it is
            even = len(images) - len(images) % 2
            self.mix.num_classes = even  # each image a class of its own: the answer then says how much of whom is in it
            mixed, shares = self.mix(images[:even], torch.arange(even, device=labels.device))
            images, labels = (
                torch.cat([mixed, images[even:]]),
                functional.one_hot(labels, self.num_classes).to(shares.dtype),
            )
            labels = torch.cat([shares @ labels[:even], labels[even:]])
            soft = torch.cat([shares @ soft[:even], soft[even:]]) if soft is not None else None
        return images, labels, soft


def _softened(task: StageTask, device: torch.device) -> tuple[DistillSpec, Tensor] | None:
    """How a student learns, and its teacher's softened probabilities on the fit rows (n, k)."""
    spec = task.recipe.distill
    if task.soft is None or spec is None:
        return None
    return spec, soften(task.soft, spec.temperature, device)


def _average(member: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and batch norm statistics."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(member, multi_avg_fn=average, use_buffers=True)


def _class_weights(labels: np.ndarray, num_classes: int, device: torch.device) -> Tensor:
    """n / (k * count) for each class, as scikit-learn's `balanced`."""
    counts = np.bincount(labels, minlength=num_classes).clip(min=1)
    return torch.tensor(len(labels) / (num_classes * counts), dtype=torch.float32, device=device)


def _seed_all(seed: int) -> None:
    """Seed every generator that timm and torch draw from (noise, dropout, mixing, erasing)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
