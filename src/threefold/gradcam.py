"""Where a member sees its evidence for a class: Grad-CAM (Selvaraju et al. 2017, "Grad-CAM", equations 1 and 2).

The last feature map A (channels, places) of the backbone, weighted by the gradient of the class's logit averaged over
the places, summed over the channels, negative parts dropped. Under a linear head on pooled features that is CAM (Zhou
et al. 2016) up to a factor; recurrent heads differ only in the gradient. A map says which places speak for a class, not
that the decision is right, and it is as coarse as the last feature map.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from threefold.errors import DataError
from threefold.models__member import JointMember, Member
from threefold.models__resize import resize_square

Resize = Literal["squash", "crop"]


class NoMap(UserWarning):
    """A backbone has no map of places; its Grad-CAM is zero everywhere."""


def grad_cam(
    member: nn.Module,
    images: np.ndarray,
    classes: npt.ArrayLike,
    *,
    size: int | None = None,
    resize: Resize = "squash",
) -> np.ndarray:
    """Heat of each pixel for one class per image: float32 (b, h, w) in 0..1; the hottest place of an image is 1.

    Zero everywhere where no place speaks for the class, and, with the warning `NoMap`, where the backbone has no map
    of places. A joined member is the mean of its bases' maps, each by its own logit. Transformers whose head reads a
    class token use the patch tokens before the last block, where these still act. Nothing of the member is changed:
    mode, gradients and `requires_grad` are as before.

    Args:
        member: a `Member` or `JointMember`, on any device.
        images: uint8 (b, h, w, 3).
        classes: (b,) the class number to explain for each image.
        size: side in pixels to which the images are resized for the member, its `img_size`; None = as they are.
        resize: how, see `augment.resize_square`; pixels that crop leaves out have no heat.

    Raises:
        DataError: images or classes are not usable.
    """
    array, wanted = np.asarray(images), np.asarray(classes)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise DataError(
            "not a batch of images",
            expected="uint8 (b, h, w, 3)",
            got=f"{array.dtype} {array.shape}",
        )
    if wanted.shape != array.shape[:1] or wanted.dtype.kind not in "iu":
        raise DataError(
            "one class number per image",
            expected=array.shape[:1],
            got=f"{wanted.dtype} {wanted.shape}",
        )
    if isinstance(member, JointMember):
        bases = [grad_cam(base, array, wanted, size=size, resize=resize) for base in member.bases]
        return np.asarray(np.mean(bases, axis=0, dtype=np.float32))
    if not isinstance(member, Member):
        raise DataError(
            "cannot look into this network",
            expected="a Member or a JointMember",
            got=type(member).__name__,
        )
    device = next(member.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    pixels = (
        pixels.permute(0, 3, 1, 2).float() if size is None else resize_square(pixels, size, resize)
    )
    features, slopes = _evidence(
        member, pixels, torch.from_numpy(wanted.astype(np.int64)).to(device)
    )
    grid = _as_map(member.backbone, features)
    if grid is None:
        kind, shape = type(member.backbone).__name__, tuple(features.shape[1:])
        warnings.warn(
            f"{kind} has no map of places (its features are {shape}): no heat", NoMap, stacklevel=2
        )
        return np.zeros(array.shape[:3], np.float32)
    weights = _as_map(member.backbone, slopes)
    assert weights is not None
    heat = (weights.mean((2, 3), keepdim=True) * grid).sum(1, keepdim=True).relu()
    found = _on_image(
        heat, array.shape[1], array.shape[2], resize if size is not None else "squash"
    )
    return np.asarray(found.cpu().numpy())


def ensemble_cam(
    members: Sequence[nn.Module],
    images: np.ndarray,
    classes: npt.ArrayLike,
    *,
    sizes: Sequence[int] | None = None,
    resizes: Sequence[Resize] | None = None,
) -> np.ndarray:
    """Mean of the members' `grad_cam`, float32 (b, h, w) in 0..1: how much of the ensemble looks at a place.

    Args:
        members: one at least; a member without heat counts as one that looks nowhere.
        images: uint8 (b, h, w, 3).
        classes: (b,).
        sizes: each member's `img_size`; None = the images as they are.
        resizes: how each member's images are resized; None = squash.

    Raises:
        DataError: no members, or images or classes are not usable.
    """
    if not members:
        raise DataError("no members to look into", expected="one at least")
    sides: Sequence[int | None] = sizes or [None] * len(members)
    ways: Sequence[Resize] = resizes or ["squash"] * len(members)
    maps = [
        grad_cam(member, images, classes, size=side, resize=way)
        for member, side, way in zip(members, sides, ways, strict=True)
    ]
    return np.asarray(np.mean(maps, axis=0, dtype=np.float32))


def _evidence(member: Member, pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The features that are looked at, and the gradient of each image's class logit by them, both of one shape."""
    # cuDNN's recurrent layers have no backward pass in eval mode.
    plain = torch.backends.cudnn.flags(enabled=False) if pixels.is_cuda else nullcontext()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        plain,
        _at_rest(member),
        _leaf(member) as caught,
    ):
        logits = member(pixels.clone())
        if classes.min() < 0 or classes.max() >= logits.shape[1]:
            got = int(classes.max() if classes.max() >= logits.shape[1] else classes.min())
            raise DataError("no such class", expected=f"0 to {logits.shape[1] - 1}", got=got)
        score = logits.gather(
            1, classes.clone()[:, None]
        ).sum()  # images do not act on each other in eval mode
        (slopes,) = torch.autograd.grad(score, caught)
    return caught[0].detach().float(), slopes.float()


@contextmanager
def _at_rest(member: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter with a gradient, so that only what follows the features is differentiated."""
    modes = [(module, module.training) for module in member.modules()]
    trained = [parameter for parameter in member.parameters() if parameter.requires_grad]
    try:
        member.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _leaf(member: Member) -> Iterator[list[Tensor]]:
    """Within it, the features that pass through the backbone become a leaf of the gradient, and stand in the list."""
    caught: list[Tensor] = []

    def catch(features: Tensor) -> Tensor:
        caught[:] = [features.detach().requires_grad_()]
        return caught[0]

    backbone = member.backbone
    if (
        getattr(backbone, "global_pool", None) == "token"
        and not member.head.takes_map
        and hasattr(backbone, "blocks")
    ):
        hook = backbone.blocks[-1].register_forward_pre_hook(
            lambda _, inputs: (catch(inputs[0]), *inputs[1:])
        )
        try:
            yield caught
        finally:
            hook.remove()
        return
    inner = backbone.forward_features  # a method, which hooks do not see
    backbone.forward_features = lambda pixels: catch(inner(pixels))
    try:
        yield caught
    finally:
        del backbone.forward_features  # the method of the class is seen again


def _as_map(backbone: Any, features: Tensor) -> Tensor | None:
    """Features as (b, c, h, w): maps with channels first or last, or patch tokens on timm's grid; None if they have none."""
    if features.ndim == 4:
        return (
            features if features.shape[1] == backbone.num_features else features.permute(0, 3, 1, 2)
        )
    if features.ndim != 3:
        return None
    count = features.shape[1]
    for prefix in (getattr(backbone, "num_prefix_tokens", None) or 0, 0):
        height, width = getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or (0, 0)
        if height * width != count - prefix:
            height = width = round((count - prefix) ** 0.5)
        if height * width == count - prefix:
            return features[:, prefix:].mT.reshape(len(features), -1, height, width)
    return None


def _on_image(heat: Tensor, height: int, width: int, resize: Resize) -> Tensor:
    """Heat (b, 1, places) as (b, height, width), each image's largest value 1, none outside a centred crop."""
    whole = heat.new_zeros(len(heat), height, width)
    down, across = (min(height, width),) * 2 if resize == "crop" else (height, width)
    top, left = (height - down) // 2, (width - across) // 2
    whole[:, top : top + down, left : left + across] = interpolate(
        heat, (down, across), mode="bilinear"
    )[:, 0]
    most = whole.amax((1, 2), keepdim=True)
    return torch.where(most > 0, whole / most, 0.0)
