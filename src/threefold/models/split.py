"""A backbone in two: the blocks that a stage leaves frozen, and the rest.

What the frozen blocks answer is the same in every epoch and fold, so it can be computed once. Only
backbones that are a stem and a sequence of blocks can be divided: EfficientNet and MobileNet
(conv_stem, blocks), ResNet (conv1, layer1 ...), and ConvNeXt, RegNet and their kin (stem, stages).

A head on several levels reads what some of the frozen blocks answer, too. Their pooled features
then precede the activations, both in one flat row for each image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor, nn

from threefold.models.heads import InputForm
from threefold.models.member import Member, head_input, level_maps


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
        form: what the head reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, count: int, form: InputForm = "pooled") -> None:
        super().__init__()
        config = timm.data.resolve_model_data_config(backbone)
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, -1, 1, 1))
        layout = _layout(backbone)
        assert layout is not None
        stem = [getattr(backbone, name) for name in layout.stem]
        self.layers = nn.Sequential(*stem, *_blocks(backbone, layout)[:count])
        self.form = form
        self.levels = find_levels(backbone).places if form == "levels" else []
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels, float (b, 3, s, s) in 0..255, to activations (b, c, h, w).

        For a head on levels the answer is flat, (b, l + c * h * w): the pooled features of those
        levels that lie in these blocks, then the activations.
        """
        x, pooled = (pixels - self.mean) / self.std, []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.levels:
                pooled.append(x.mean((2, 3)))
        if self.form != "levels":
            return x
        return torch.cat([*pooled, x.flatten(1)], 1)


class LateBlocks(nn.Module):
    """The blocks of a member that follow `EarlyBlocks`, and its head; shares the member's modules.

    Args:
        member: backbone and head.
        count: number of blocks that `EarlyBlocks` has.
    """

    def __init__(self, member: Member, count: int) -> None:
        super().__init__()
        self.head = member.head
        self.form = cast("InputForm", self.head.form)
        self.levels: list[_Level] = []
        places: list[int] = []
        if self.form == "levels":
            layout = _layout(member.backbone)
            assert layout is not None
            last = len(layout.stem) + count - 1
            places, channels = find_levels(member.backbone)
            self.early_width = sum(channels[place] for place in places if place <= last)
            self.channels = channels[last]
        self.backbone = _without_early(member.backbone, count, places, self.levels)

    def forward(self, activations: Tensor) -> Tensor:
        """Map what `EarlyBlocks` answers to logits (b, k)."""
        if self.form != "levels":
            return cast("Tensor", self.head(head_input(self.backbone, activations, self.form)))
        early, rest = activations.tensor_split((self.early_width,), 1)
        side = math.isqrt(rest.shape[1] // self.channels)
        maps = rest.reshape(-1, self.channels, side, side)
        maps = maps.contiguous(memory_format=torch.channels_last)
        last = head_input(self.backbone, maps, "pooled")
        late = [level.take() for level in self.levels]
        return cast("Tensor", self.head(torch.cat([early, *late, last], 1)))


class _Level(nn.Module):
    """A block whose answer a head on levels reads; remembers its pooled features (b, c)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.pooled = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        answer = cast("Tensor", self.block(x))
        self.pooled = answer.mean((2, 3))
        return answer

    def take(self) -> Tensor:
        """Return the pooled features and forget them: a graph cannot be copied with the module."""
        pooled, self.pooled = self.pooled, torch.empty(0)
        return pooled


class Levels(NamedTuple):
    """Where the levels of a backbone lie. Modules of the stem and blocks are counted from 0."""

    places: list[int]
    """The module whose answer each level is."""
    channels: list[int]
    """Channels of each module's answer."""


def count_frozen_blocks(
    backbone: nn.Module, trainable: Collection[str], form: InputForm = "pooled"
) -> int:
    """Count the first blocks that hold no trainable parameter; 0 if the backbone has no blocks.

    Args:
        backbone: a timm network without classifier.
        trainable: names of its trainable parameters, without the prefix of the member.
        form: what the head reads. Levels must be answers of blocks, or the count is 0.
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
            return count if _divides(backbone, count, form) else 0
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


def find_levels(backbone: nn.Module) -> Levels:
    """Find the modules whose answers are the levels of a backbone.

    timm has its own numbers of levels in every family, so an image is passed through the network.

    Raises:
        ValueError: a level is the answer of none of them.
    """
    layout = _layout(backbone)
    assert layout is not None
    answers: list[Tensor] = []
    modules = [*(getattr(backbone, name) for name in layout.stem), *_blocks(backbone, layout)]
    hooks = [module.register_forward_hook(partial(_remember, answers)) for module in modules]
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            maps, _ = level_maps(backbone, _sample(backbone))
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    places = []
    for level in maps:
        # The last of equal ones: an activation that works in place changes the answer before it.
        same = [i for i, a in enumerate(answers) if a.shape == level.shape and a.equal(level)]
        if not same:
            raise ValueError("a level is the answer of no block")
        places.append(same[-1])
    return Levels(places, [answer.shape[1] for answer in answers])


def _remember(answers: list[Tensor], _module: nn.Module, _inputs: object, answer: Tensor) -> None:
    answers.append(answer)


def _sample(backbone: nn.Module) -> Tensor:
    """Return an image of 64 px, normalized or not, on the device of a backbone."""
    device = next(backbone.parameters()).device
    return torch.linspace(0, 255, 3 * 64 * 64, device=device).view(1, 3, 64, 64)


def _without_early(
    backbone: nn.Module, count: int, places: Sequence[int] = (), levels: list[_Level] | None = None
) -> Any:
    """Return a backbone that takes activations: a copy that shares all modules that are left.

    Args:
        backbone: the whole network.
        count: how many blocks to leave out.
        places: of the levels, see `Levels`.
        levels: receives the modules that remember those levels which are left.
    """
    layout = _layout(backbone)
    assert layout is not None
    late = copy.copy(backbone)
    late._modules = dict(backbone._modules)
    for name in layout.stem:
        late._modules[name] = nn.Identity()
    blocks = list(_blocks(backbone, layout))
    for number in range(count, len(blocks)):
        if levels is not None and len(layout.stem) + number in places:
            levels.append(_Level(blocks[number]))
            blocks[number] = levels[-1]
    if len(layout.blocks) == 1:
        late._modules[layout.blocks[0]] = nn.Sequential(*blocks[count:])
    else:
        for number, name in enumerate(layout.blocks):
            late._modules[name] = nn.Identity() if number < count else blocks[number]
    return late


def _divides(backbone: nn.Module, count: int, form: InputForm) -> bool:
    """Whether the two parts answer as the whole does; some families do more between blocks."""
    if not count:
        return False
    was_training = backbone.training
    backbone.eval()
    pixels = _sample(backbone)
    try:
        with torch.inference_mode():
            early = EarlyBlocks(copy.deepcopy(backbone), count).to(pixels.device)
            whole = cast("Any", backbone).forward_features((pixels - early.mean) / early.std)
            parts = _without_early(backbone, count).forward_features(early(pixels))
            if form == "levels":
                find_levels(backbone)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
        return False
    finally:
        backbone.train(was_training)
    return whole.shape == parts.shape and bool(torch.allclose(whole, parts, rtol=1e-4, atol=1e-4))
