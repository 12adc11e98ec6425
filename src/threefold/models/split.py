"""A backbone in two: the blocks that a stage leaves frozen, and the rest.

What the frozen blocks answer is the same in every epoch and fold, so it can be computed once. Only
backbones that are a stem and a sequence of blocks can be divided: EfficientNet and MobileNet
(conv_stem, blocks), ResNet (conv1, layer1 ...), and ConvNeXt, RegNet and their kin (stem, stages).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor, nn

from threefold.models.heads import InputForm
from threefold.models.member import Member, head_input


class _Layout(NamedTuple):
    """Names of a family's modules in the order of the forward pass."""

    stem: tuple[str, ...]
    blocks: tuple[str, ...]
    """One nn.Sequential of blocks, or several modules that are blocks themselves."""


_LAYOUTS = (
    _Layout(("conv_stem", "bn1"), ("blocks",)),
    _Layout(("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4")),
    _Layout(("stem",), ("stages",)),
)


class EarlyBlocks(nn.Module):
    """Normalisation, stem and first blocks of a backbone, in eval mode.

    Args:
        backbone: a timm network that `count_frozen_blocks` can divide.
        count: number of blocks.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, count: int) -> None:
        super().__init__()
        config = timm.data.resolve_model_data_config(backbone)
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, -1, 1, 1))
        layout = _layout(backbone)
        assert layout is not None
        stem = [getattr(backbone, name) for name in layout.stem]
        self.layers = nn.Sequential(*stem, *_blocks(backbone, layout)[:count])
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels, float (b, 3, s, s) in 0..255, to activations (b, c, h, w)."""
        return cast("Tensor", self.layers((pixels - self.mean) / self.std))


class LateBlocks(nn.Module):
    """The blocks of a member that follow `EarlyBlocks`, and its head; shares the member's modules.

    Args:
        member: backbone and head.
        count: number of blocks that `EarlyBlocks` has.
    """

    def __init__(self, member: Member, count: int) -> None:
        super().__init__()
        self.backbone = _without_early(member.backbone, count)
        self.head = member.head

    def forward(self, activations: Tensor) -> Tensor:
        """Map activations (b, c, h, w) to logits (b, k)."""
        form = cast("InputForm", self.head.form)
        return cast("Tensor", self.head(head_input(self.backbone, activations, form)))


def count_frozen_blocks(backbone: nn.Module, trainable: Collection[str]) -> int:
    """Count the first blocks that hold no trainable parameter; 0 if the backbone has no blocks.

    Args:
        backbone: a timm network without classifier.
        trainable: names of its trainable parameters, without the prefix of the member.
    """
    layout = _layout(backbone)
    if layout is None:
        return 0
    modules = [getattr(backbone, name) for name in layout.stem]
    if any(_has_any(backbone, module, trainable) for module in modules):
        return 0
    blocks = _blocks(backbone, layout)
    for count, block in enumerate(blocks):
        if _has_any(backbone, block, trainable):
            return count if _divides(backbone, count) else 0
    return 0


def _layout(backbone: nn.Module) -> _Layout | None:
    for layout in _LAYOUTS:
        if all(hasattr(backbone, name) for name in (*layout.stem, *layout.blocks)):
            return layout
    return None


def _blocks(backbone: nn.Module, layout: _Layout) -> Sequence[nn.Module]:
    modules = [getattr(backbone, name) for name in layout.blocks]
    return list(modules[0]) if len(modules) == 1 else modules


def _has_any(backbone: nn.Module, module: nn.Module, trainable: Collection[str]) -> bool:
    """Whether a module of the backbone holds one of the named parameters."""
    mine = {id(parameter) for parameter in module.parameters()}
    return any(id(backbone.get_parameter(name)) in mine for name in trainable)


def _without_early(backbone: nn.Module, count: int) -> Any:
    """Return a backbone that takes activations: a copy that shares all modules that are left."""
    layout = _layout(backbone)
    assert layout is not None
    late = copy.copy(backbone)
    late._modules = dict(backbone._modules)
    for name in layout.stem:
        late._modules[name] = nn.Identity()
    if len(layout.blocks) == 1:
        late._modules[layout.blocks[0]] = nn.Sequential(*_blocks(backbone, layout)[count:])
    else:
        for name in layout.blocks[:count]:
            late._modules[name] = nn.Identity()
    return late


def _divides(backbone: nn.Module, count: int) -> bool:
    """Whether the two parts answer as the whole does; some families do more between blocks."""
    if not count:
        return False
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    pixels = torch.linspace(0, 255, 3 * 64 * 64, device=device).view(1, 3, 64, 64)
    try:
        with torch.inference_mode():
            early = EarlyBlocks(copy.deepcopy(backbone), count).to(device)
            whole = cast("Any", backbone).forward_features((pixels - early.mean) / early.std)
            parts = _without_early(backbone, count).forward_features(early(pixels))
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
        return False
    finally:
        backbone.train(was_training)
    return whole.shape == parts.shape and bool(torch.allclose(whole, parts, rtol=1e-4, atol=1e-4))
