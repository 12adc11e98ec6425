"""The ranks other than 0: they do what rank 0 sends them, until it ends."""

from __future__ import annotations

from typing import Any

from torch import nn

from threefold.models.pipeline import ImageRows
from threefold.training.distributed.ranks import RankGroup, Ranks
from threefold.training.features.compute import FeaturePass, follow_pass
from threefold.training.predict import answer_share
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask


def follow(ranks: Ranks) -> None:
    """Do what rank 0 sends; it has the results, too.

    Args:
        ranks: the group, of which this is not rank 0.

    Raises:
        ThreefoldError: as the same work does in one process.
    """
    while isinstance(ranks, RankGroup):
        command, values = ranks.receive()
        if command == "end":
            return
        _COMMANDS[command](ranks, *values)


def _train(ranks: RankGroup, member: nn.Module, task: StageTask) -> None:
    train_stage(member.to(ranks.device), task)


def _predict(ranks: RankGroup, predictor: nn.Module, pixels: ImageRows) -> None:
    answer_share(ranks, predictor.to(ranks.device), pixels)


def _compute_features(ranks: RankGroup, work: FeaturePass) -> None:
    follow_pass(ranks.device, work)


_COMMANDS: dict[str, Any] = {
    "stage": _train,
    "predict": _predict,
    "features": _compute_features,
}
