"""Train and wrap small networks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.scaling import temperature_module
from threefold.models.member import Member
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.recipe.schema import StageSpec
from threefold.training.steps.optimizers import set_trainable, train_mode


def coarse_pictures(size: int) -> np.ndarray:
    """Draw eight images of 4 x 4 colours, uint8 (8, size, size, 3)."""
    small = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    place = np.arange(size) * 4 // size
    return small[:, place][:, :, place]


def learn(member: Member, pixels: torch.Tensor) -> None:
    """Take a training step; every gradient must be finite, and those above 0 have an effect."""
    before = {name: p.detach().clone() for name, p in member.named_parameters()}
    set_trainable(member, StageSpec(name="s", epochs=1, lr=1e-5))
    train_mode(member)
    loss = nn.functional.cross_entropy(member(pixels), torch.arange(len(pixels)) % 3)
    loss.backward()
    torch.optim.Adam(member.parameters(), lr=1e-5).step()
    assert torch.isfinite(loss)
    for name, p in member.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert not p.grad.abs().max() > 1e-6 or not torch.equal(before[name], p), name
    # ResNet50's blocks begin as the identity: only their last norms learn in the first step.
    learning = [p for p in member.parameters() if p.grad is not None and p.grad.any()]
    assert len(learning) > 0.25 * len(before)


def settle(member: Member, pixels: torch.Tensor) -> None:
    """Fit batch norms to these images; otherwise a random deep network overflows its softmax."""
    for module in member.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        member.train()(pixels)
    member.eval()


def pipeline_of(member: Member, size: int) -> Pipeline:
    """Wrap a member of three classes as a pipeline without calibration."""
    return Pipeline(
        {"m": MemberPipeline([Predictor(member)], size, "squash")},
        Combiner(MeanEnsemble().to_module(), temperature_module(1.0)),
        ("a", "b", "c"),
    )
