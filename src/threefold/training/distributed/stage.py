"""A stage of training on all ranks: rank 0 sends the network and what it is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from threefold.errors import RecipeError
from threefold.training.distributed.portable import portable, portable_rows
from threefold.training.distributed.ranks import RankGroup, current_ranks
from threefold.training.features.activations import Activations
from threefold.training.features.cache import FeatureRows
from threefold.training.pixel_cache import PixelRows
from threefold.training.progress.watcher import Watcher
from threefold.training.stages.task import StageTask


def share_stage(member: nn.Module, task: StageTask) -> StageTask:
    """Let all ranks train a stage, each in a call of its own.

    Args:
        member: the network; its batch norms become synchronized ones where the recipe has it so.
        task: what rank 0 trains.

    Returns:
        What this rank trains.

    Raises:
        RecipeError: synchronized batch norm was asked for on a processor.
    """
    ranks = current_ranks()
    if not isinstance(ranks, RankGroup):
        return task
    if ranks.rank == 0:
        ranks.send("stage", portable(member), _portable_task(task))
        if task.activations is not None:
            task = replace(task, activations=_sent(task.activations))
    if task.recipe.train.sync_batchnorm and task.stage.batch_norm == "train":
        _synchronize_norms(member, ranks.device)
    return task


def _portable_task(task: StageTask) -> StageTask:
    """What the other ranks are given: they write nothing, and tell nobody."""
    activations = task.activations
    if activations is not None:
        activations = replace(activations, fit=_receive_copies)
    return replace(
        task,
        fit=_portable_part(task.fit),
        select=_portable_part(task.select),
        watcher=Watcher(),
        resume_path=None,
        precision_file=None,
        activations=activations,
    )


def _portable_part(rows: PixelRows | FeatureRows) -> PixelRows | FeatureRows:
    if isinstance(rows, PixelRows):
        return rows._replace(pixels=portable_rows(rows.pixels))
    return rows


def _sent(activations: Activations) -> Activations:
    """Activations whose augmented copies rank 0 computes and sends, epoch by epoch."""

    def send_copies(epoch: int) -> np.ndarray:
        return current_ranks().decide(lambda: activations.fit(epoch))

    return replace(activations, fit=send_copies)


def _receive_copies(epoch: int) -> np.ndarray:
    """The activations of an epoch's augmented copies, from rank 0."""
    return current_ranks().decide(lambda: np.empty(0))


def _synchronize_norms(member: nn.Module, device: torch.device) -> None:
    """Let batch norms normalize by the statistics of all ranks' images."""
    if not any(getattr(m, "running_mean", None) is not None for m in member.modules()):
        return
    if device.type != "cuda":
        raise RecipeError(
            "torch synchronizes batch norm only between GPUs",
            where="train.sync_batchnorm",
            got=f"device {device.type}",
            fix="set train.sync_batchnorm = false, or batch_norm = fixed in the stages",
        )
    convert_sync_batchnorm(member)
