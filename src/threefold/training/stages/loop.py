"""The stage loop: train one member for one stage, then keep the best of its weights.

A stage is a pure function of its start weights, its rows and its seed, so repeating it gives the
same bits (on the same machine, with the same versions). That includes a stage that was killed and
resumed between two epochs, or stopped and resumed within one. The caller owns all files but the
resume file.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, count, islice, pairwise
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from threefold.errors import shorten
from threefold.training.checkpoints import (
    Checkpoint,
    ResumeState,
    State,
    accept_stage,
    fingerprint,
    load_resume_state,
    save_resume_state,
)
from threefold.training.checks import DivergedError, diverged
from threefold.training.distributed.fsdp import own_share, shard, whole, whole_state
from threefold.training.distributed.ranks import Stopped, current_ranks
from threefold.training.distributed.stage import share_stage
from threefold.training.randomness import seed_generators
from threefold.training.stages.inputs import stage_inputs
from threefold.training.stages.recovery import Recovery
from threefold.training.stages.resume import RESUME_FORMAT, Progress, collect_state, restore_loop
from threefold.training.stages.task import StageOutcome, StageTask, why_stopped
from threefold.training.steps.allocator import reuse_freed_memory
from threefold.training.steps.batches import Batch, draw_batches
from threefold.training.steps.memory import MemoryGuard
from threefold.training.steps.optimizers import create_optimizer, lr_at, set_trainable, train_mode
from threefold.training.steps.precision import autocast, check_precision, pick_precision
from threefold.training.steps.sharpness import sharpen_gradients


def train_stage(member: nn.Module, task: StageTask) -> StageOutcome:
    """Train one stage and load the accepted weights into the member.

    After a first stage, they are never worse on the select rows than those it started from.

    Raises:
        RunError: the loss, answers or weights stay not finite, or the memory is exhausted.
        RecipeError: the stage's regexes leave nothing to train.
    """
    task = share_stage(member, task)
    seed_generators(task.seed)
    loop = StageLoop(member, task)
    start = loop.checkpoint(-1)
    best, records = loop.resume(start)
    patience = task.stage.patience or math.inf
    with task.watcher.deferring_stop(), reuse_freed_memory():
        for epoch in range(len(records), task.stage.epochs):
            if epoch - 1 - best.epoch >= patience:
                break
            record, checkpoint = loop.epoch(best, records)
            records.append(record)
            if checkpoint is not best and (
                (best is start and task.first) or loop.is_better(checkpoint, best)
            ):
                best = checkpoint
            loop.stop_if_asked(best, records)
            task.watcher.epoch(record)  # prints, which fails if a closed terminal is the reason
            loop.save(best, records)
            if loop.is_late():
                break
    tested = task.recipe.train.gate and task.recipe.protocol != "paper"
    judge = partial(accept_stage, start, best, first=task.first, enabled=tested)
    accepted, reason = loop.ranks.decide(judge)
    if task.first and best is start and loop.recovery.returns:
        raise diverged(task.stage, len(records) - 1, "weights are not numbers", "NaN")
    chosen = best if accepted else start
    member.load_state_dict(chosen.state)
    member.to(loop.device)
    stopped = why_stopped(loop.cut_short, len(records), best, task.stage)
    troubles = (loop.recovery.describe(), loop.memory.describe())
    reason = "; ".join(filter(None, [reason, stopped, *troubles]))
    history = {
        "epochs": records,
        "accepted": accepted,
        "best_epoch": chosen.epoch,
        "metric": task.recipe.train.metric,
        "start_accuracy": start.accuracy,
        "start_metric": start.plain_score,
        "reason": reason,
        "stopped": stopped,
        "skipped_steps": loop.recovery.skipped,
        "returns": loop.recovery.returns,
        "splits": loop.memory.splits,
    }
    if loop.ranks.world_size > 1:
        history |= {"processes": loop.ranks.world_size, "weights_share": own_share(loop.member)}
    return StageOutcome(chosen.state, history, chosen.correct, loop.elapsed_before)


class StageLoop:
    """Optimizer, generators and counters of one stage, of a network or of a head."""

    def __init__(self, member: nn.Module, task: StageTask) -> None:
        spec = task.recipe.train
        self.task, self.spec = task, spec
        self.ranks = current_ranks()
        self.device = next(member.parameters()).device
        set_trainable(member, task.stage)
        self.inputs = stage_inputs(task, self.device)
        self.member, self.network = member, self.inputs.network(member)
        self.precision = self.ranks.decide(self._pick_precision)
        # Averages the weights and the statistics of norms. The warm-up lets short stages forget
        # where they began: after n steps the decay is at most 1 - (n + 1)^(-2/3).
        self.average = ModelEmaV3(member, spec.ema, use_warmup=True) if spec.ema else None
        if self._can_shard:
            self._shard()
        else:
            self.network = self.ranks.wrap(self.network)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self.optimizer = create_optimizer(self.member, spec, task.stage.lr)
        self.generator = torch.Generator().manual_seed(task.seed)
        self.generators = {"batches": self.generator, "augment": self.inputs.augment.generator}
        self.memory = MemoryGuard(self.member, self.generators, spec, task.stage, task.watcher.note)
        self.order_state = self.generator.get_state()  # before the epoch's batches were drawn
        self.progress = Progress()
        batch_size = task.batch_size or spec.batch_size
        self.steps_per_epoch = max(1, round(len(task.fit.labels) / batch_size))
        self.step = 0
        self.cut_short = False
        self.started = self.saved = time.monotonic()
        self.elapsed_before = 0.0
        self.fingerprint = ""
        self.recovery = Recovery(
            self.member, self.optimizer, self.average, task.stage, task.watcher.note
        )

    @property
    def _can_shard(self) -> bool:
        """Whether weights are divided among ranks: those of networks that are trained whole."""
        is_whole = self.network is self.member and not self.inputs.reads_features
        return self.spec.fsdp and self.ranks.world_size > 1 and is_whole

    def _shard(self) -> None:
        """Train a copy of which each rank has a part; the network waits in main memory."""
        self.member.cpu()
        count = self.ranks.world_size
        self.network = shard(copy.deepcopy(self.member), self.device, count)
        self.member = self.network
        if self.average is not None:
            self.average.foreach = False  # it would mix divided tensors with others
            shard(self.average.module, self.device, count)

    def _train_mode(self) -> None:
        train_mode(self.member, fixed_norms=self.task.stage.batch_norm == "fixed")

    def _pick_precision(self) -> str:
        """The recipe's precision; `auto` is measured on the first batch. Heads are in float32."""
        task, name = self.task, self.spec.precision
        if self.inputs.reads_features:
            return "float32"
        check_precision(name, self.device)
        if name != "auto":
            return name
        self._train_mode()
        size = -(-(task.batch_size or self.spec.batch_size) // self.spec.accumulate)
        inputs, what = self.inputs.sample(size)
        return pick_precision(self.network, inputs, what, task.precision_file, task.watcher.note)

    def resume(self, start: Checkpoint) -> tuple[Checkpoint, list[dict[str, Any]]]:
        """Restore a stage that was killed; returns the best checkpoint and the epochs so far.

        Without a usable resume file these are `start` and none.
        """
        state = self.ranks.decide(partial(self._saved_state, start))
        if state is None:
            return start, []
        records, self.progress = restore_loop(self, state)
        self.task.watcher.batch(len(self.task.fit.labels) * len(records) + self.progress.images)
        best_epoch = state.values["best_epoch"]
        if best_epoch < 0:
            return start, records
        probs = state.tensors["probs"].numpy()
        return self._measured(state.section("best"), probs, best_epoch), records

    def _saved_state(self, start: Checkpoint) -> ResumeState | None:
        """The content of the resume file; None without a usable one."""
        task = self.task
        if task.resume_path is None:
            return None
        inputs = (
            RESUME_FORMAT,
            task.seed,
            task.stage,
            task.recipe.digest(),
            len(task.fit.labels),
            self.precision,
            None if task.targets is None else hashlib.sha256(task.targets.tobytes()).hexdigest(),
        )
        self.fingerprint = fingerprint(inputs, start.state)
        return load_resume_state(task.resume_path, self.fingerprint)

    def save(self, best: Checkpoint, records: list[dict[str, Any]]) -> None:
        """Write the resume file, unless the last one is recent or the stage is done."""
        if len(records) < self.task.stage.epochs and self.ranks.is_true(self._wants_saving):
            self._write(best, records, Progress())

    def _wants_saving(self) -> bool:
        """Whether there is a resume file, and the last one is old."""
        is_old = time.monotonic() - self.saved >= self.task.save_interval
        return self.task.resume_path is not None and is_old

    def stop_if_asked(
        self, best: Checkpoint, records: list[dict[str, Any]], progress: Progress | None = None
    ) -> None:
        """Write the resume file and raise what the watcher wants raised, if it wants anything.

        Args:
            best: the best checkpoint so far.
            records: of the epochs that are over.
            progress: of the epoch that is not; None = between two epochs.
        """
        if not self.ranks.is_true(lambda: self.task.watcher.stop is not None):
            return
        self.task.watcher.defers_stop = False
        self._write(best, records, progress or Progress())
        raise self.task.watcher.stop or Stopped

    def _write(self, best: Checkpoint, records: list[dict[str, Any]], progress: Progress) -> None:
        """Write the resume file, if there is one; all ranks have a part in its content."""
        state = collect_state(self, best, records, progress)
        if self.task.resume_path is not None:
            save_resume_state(self.task.resume_path, self.fingerprint, state)
        self.saved = time.monotonic()

    def epoch(
        self, best: Checkpoint, records: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], Checkpoint]:
        """Train one epoch, or the rest of it, and measure it on the select rows.

        Args:
            best: the best checkpoint so far, which is saved if training is stopped.
            records: of the epochs before.
        """
        number = len(records)
        steps, total, images, seconds, without_loss, skipped = self.progress
        self.progress = Progress()
        began = time.monotonic() - seconds
        self.order_state = self.generator.get_state()
        self.inputs.begin_epoch(number)
        self._train_mode()
        batches = islice(self._batches(), steps, None)
        for rows, following in pairwise(chain(batches, [np.zeros(0, np.int64)])):
            self.inputs.announce([*self._parts(rows), *self._parts(following)])
            skipped_before = self.recovery.skipped
            loss = self._step(rows)
            steps, images = steps + 1, images + len(rows)
            if math.isfinite(loss):
                total += loss * len(rows)
            else:
                without_loss += len(rows)
            skipped += self.recovery.skipped - skipped_before
            if self.recovery.is_stuck:
                what = "loss or gradient is not finite"
                self.recovery.go_back(best, number, self.step, what)
            self.task.watcher.batch(len(rows))
            seconds = time.monotonic() - began
            progress = Progress(steps, total, images, seconds, without_loss, skipped)
            self.stop_if_asked(best, records, progress)
            if self.is_late():
                self.cut_short = True
                break
        seconds = time.monotonic() - began
        try:
            checkpoint = self.checkpoint(number)
        except DivergedError as error:  # a single step can spoil the weights after its loss
            self.recovery.go_back(best, number, self.step, error.what)
            checkpoint = best
        record = {
            "epoch": number,
            "loss": total / (images - without_loss) if images > without_loss else math.nan,
            "select_accuracy": checkpoint.accuracy,
            "select_loss": float(checkpoint.losses.mean()),
            "select_metric": checkpoint.plain_score,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1),
            "skipped_steps": skipped,
        }
        return record, checkpoint

    def checkpoint(self, epoch: int) -> Checkpoint:
        """Measure the weights, or their moving average after training, on the select rows."""
        source = self.average.module if self.average is not None and epoch >= 0 else self.member
        probs = self.ranks.gather(len(self.task.select.labels), partial(self.inputs.answer, source))
        state = {name: tensor.clone() for name, tensor in whole_state(source).items()}
        # A single step can spoil the weights after its loss was computed.
        if not np.isfinite(probs).all():
            raise diverged(self.task.stage, epoch, "the answers are not numbers", "NaN")
        spoilt = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
        if spoilt:
            raise diverged(self.task.stage, epoch, "weights are not numbers", shorten(spoilt, 3))
        return self._measured(state, probs, epoch)

    def is_better(self, checkpoint: Checkpoint, best: Checkpoint) -> bool:
        """Whether a checkpoint is better than the best so far."""
        return self.ranks.is_true(lambda: checkpoint.better_than(best))

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        deadline = self.task.deadline
        return deadline < math.inf and self.ranks.is_true(lambda: time.monotonic() > deadline)

    def _measured(self, state: State, probs: np.ndarray, epoch: int) -> Checkpoint:
        return Checkpoint(state, probs, self.task.select.labels, epoch, self.spec.metric)

    def _batches(self) -> Iterator[np.ndarray]:
        """Rows of each optimizer step of an epoch."""
        labels, k = self.task.fit.labels, self.task.num_classes
        return draw_batches(labels, self.spec, k, self.steps_per_epoch, self.generator)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Divide the rows of a step into micro-batches; of no rows there are none."""
        return np.array_split(rows, min(self.memory.parts, len(rows) // 2)) if len(rows) else []

    def take_steps(self, lrs: Iterable[float]) -> Iterator[float]:
        """Take a step at each rate; yields the loss of its images, before the step."""
        rates = iter(lrs)
        for epoch in count():
            self.inputs.begin_epoch(epoch % self.task.stage.epochs)
            self._train_mode()
            for rows in self._batches():
                lr = next(rates, None)
                if lr is None:
                    return
                yield self._step(rows, lr)

    def _step(self, rows: np.ndarray, lr: float | None = None) -> float:
        """Take one optimizer step; `lr` in place of the schedule's. Returns the mean loss."""
        if lr is None:
            stage, total = self.task.stage, self.steps_per_epoch * self.task.stage.epochs
            lr = lr_at(stage.schedule, stage.lr, self._schedule_step(total), total, stage.epochs)
        update = partial(self._update, rows, lr)
        return self.memory.take(update, self.recovery.undo_step, self.step, len(rows))

    def _update(self, rows: np.ndarray, lr: float) -> float:
        """Take one optimizer step over a few micro-batches; returns the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.recovery.rate * group.get("lr_scale", 1.0)
        self.ranks.begin_step(self.task.seed, self.step)
        self.recovery.begin_step()
        parts = self._parts(rows)
        batches: Iterable[Batch] = map(self.inputs.batch, parts)
        if self.spec.sam:
            batches = list(batches)  # both passes take the same augmented images
        loss = self._backward(batches, len(rows))
        self.ranks.average_statistics(self.member, list(map(len, parts)))
        if self.spec.sam:
            sharpen_gradients(
                self.member, self.spec.sam, lambda: self._backward(batches, len(rows))
            )
        self.memory.is_complete = True
        if self.recovery.allows(loss, self._clip_gradients()):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update(self.member, self.step + 1)
        else:
            self.scaler.update(0.5 * self.scaler.get_scale())
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _clip_gradients(self) -> float:
        """Return the norm of the gradients, which are clipped if the recipe says so.

        Loss scaling leaves out steps by itself until it has found its scale: they count as finite.
        """
        parameters = list(self.member.parameters())
        if self.spec.clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.spec.clip_grad)
        else:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        is_scaling = self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        return 0.0 if is_scaling else float(whole(norm))

    def _backward(self, batches: Iterable[Batch], count: int) -> float:
        """Add the gradients of micro-batches of `count` images together; returns the mean loss."""
        loss, done = 0.0, 0
        for batch in batches:
            share = batch.num_images / count
            done += batch.num_images
            with self.ranks.keep_gradients(self.network, done < count):
                with autocast(self.precision, self.device):
                    logits = self.network(batch.images)
                part_loss = self.inputs.loss(logits.float(), batch.labels, batch.soft, batch.whole)
                scaled = self.scaler.scale(part_loss * (share * self.ranks.world_size))
                scaled.backward()  # type: ignore[no-untyped-call]
            loss += float(part_loss.detach()) * share
        return self.ranks.total(loss)

    def _schedule_step(self, total: int) -> int:
        """The position in the schedule: the step, or a later one if the time runs out sooner."""
        if math.isinf(self.task.deadline):
            return self.step
        used = (time.monotonic() - self.started) / max(self.task.deadline - self.started, 1e-9)
        return self.ranks.decide(lambda: max(self.step, min(total - 1, int(used * total))))
