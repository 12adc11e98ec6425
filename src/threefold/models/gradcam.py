"""Grad-CAM: heat maps of the evidence for a class (Selvaraju et al. 2017, equations 1 and 2).

The last feature map A (channels, height, width) of the backbone is weighted by the gradient of the
class's logit, averaged over the positions, and summed over the channels; negative parts are
dropped. Under a linear head on pooled features this is CAM (Zhou et al. 2016) up to a factor.
Recurrent heads differ only in the gradient. A heat map shows which positions speak for a class, not
that the decision is right, and its resolution is that of the last feature map.
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
from threefold.models.member import JointMember, Member, feature_map
from threefold.models.resize import resize_square

Resize = Literal["squash", "crop"]


class NoMap(UserWarning):
    """A backbone has no feature map; its Grad-CAM is zero everywhere."""


def grad_cam(
    member: nn.Module,
    images: np.ndarray,
    classes: npt.ArrayLike,
    *,
    size: int | None = None,
    resize: Resize = "squash",
) -> np.ndarray:
    """Compute one heat map per image, for one class each.

    The map of a joint member is the mean of its members' maps, each from the member's own logit.
    Transformers whose head reads a class token use the patch tokens before the last block, where
    the patches still influence it. The member's mode, gradients and `requires_grad` do not change.

    Args:
        member: a `Member` or `JointMember`, on any device.
        images: uint8 (b, h, w, 3).
        classes: (b,) number of the class to explain in each image.
        size: side in pixels to which the images are resized, the member's `img_size`; None keeps
            them.
        resize: see `resize_square`; pixels that a crop leaves out have no heat.

    Returns:
        float32 (b, h, w) in 0..1. The maximum of each image is 1, or 0 if no position speaks for
        the class. A backbone without a feature map gives zeros and the warning `NoMap`.

    Raises:
        DataError: the images, the classes or the network are not usable.
    """
    images, classes = _check(images, classes)
    if isinstance(member, JointMember):
        maps = [grad_cam(base, images, classes, size=size, resize=resize) for base in member.bases]
        return np.asarray(np.mean(maps, axis=0, dtype=np.float32))
    if not isinstance(member, Member):
        raise DataError(
            "cannot compute Grad-CAM of this network",
            expected="a Member or a JointMember",
            got=type(member).__name__,
        )
    device = next(member.parameters()).device
    batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    if size is None:
        pixels = batch.permute(0, 3, 1, 2).float()
    else:
        pixels = resize_square(batch, size, resize)
    targets = torch.from_numpy(classes.astype(np.int64)).to(device)
    features, gradients = _features_and_gradients(member, pixels, targets)
    activations = feature_map(member.backbone, features)
    gradient_map = feature_map(member.backbone, gradients)
    if activations is None or gradient_map is None:
        kind, shape = type(member.backbone).__name__, tuple(features.shape[1:])
        message = f"{kind} has no feature map (its features are {shape}): no heat"
        warnings.warn(message, NoMap, stacklevel=2)
        return np.zeros(images.shape[:3], np.float32)
    weights = gradient_map.mean((2, 3), keepdim=True)
    heat = (weights * activations).sum(1, keepdim=True).relu()
    height, width = images.shape[1:3]
    cropped = size is not None and resize == "crop"
    return np.asarray(_scale_to_image(heat, height, width, cropped).cpu().numpy())


def ensemble_cam(
    members: Sequence[nn.Module],
    images: np.ndarray,
    classes: npt.ArrayLike,
    *,
    sizes: Sequence[int] | None = None,
    resizes: Sequence[Resize] | None = None,
) -> np.ndarray:
    """Average the heat maps of several members.

    Args:
        members: at least one; a member without heat counts as zeros.
        images: uint8 (b, h, w, 3).
        classes: (b,) number of the class to explain in each image.
        sizes: `img_size` of each member; None keeps the images as they are.
        resizes: how each member's images are resized; None = squash.

    Returns:
        float32 (b, h, w) in 0..1.

    Raises:
        DataError: there are no members, or the images, classes or networks are not usable.
    """
    if not members:
        raise DataError("no members for Grad-CAM", expected="at least one")
    maps = [
        grad_cam(
            member,
            images,
            classes,
            size=sizes[i] if sizes else None,
            resize=resizes[i] if resizes else "squash",
        )
        for i, member in enumerate(members)
    ]
    return np.asarray(np.mean(maps, axis=0, dtype=np.float32))


def _check(images: np.ndarray, classes: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    images, classes = np.asarray(images), np.asarray(classes)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise DataError(
            "not a batch of images",
            expected="uint8 (b, h, w, 3)",
            got=f"{images.dtype} {images.shape}",
        )
    if classes.shape != images.shape[:1] or classes.dtype.kind not in "iu":
        raise DataError(
            "one class number per image",
            expected=images.shape[:1],
            got=f"{classes.dtype} {classes.shape}",
        )
    return images, classes


def _features_and_gradients(
    member: Member, pixels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the features and the gradient of each image's class logit with respect to them."""
    # cuDNN's recurrent layers have no backward pass in eval mode.
    cudnn = torch.backends.cudnn.flags(enabled=False) if pixels.is_cuda else nullcontext()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        cudnn,
        _frozen(member),
        _capture_features(member) as captured,
    ):
        logits = member(pixels.clone())
        largest = logits.shape[1] - 1
        for number in (int(classes.min()), int(classes.max())):
            if not 0 <= number <= largest:
                raise DataError("no such class", expected=f"0 to {largest}", got=number)
        # In eval mode images do not influence each other, so one backward pass serves all.
        score = logits.gather(1, classes.clone()[:, None]).sum()
        (gradients,) = torch.autograd.grad(score, captured)
    return captured[0].detach().float(), gradients.float()


@contextmanager
def _frozen(member: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of parameters, so that backward stops at the features."""
    modes = [(module, module.training) for module in member.modules()]
    trainable = [parameter for parameter in member.parameters() if parameter.requires_grad]
    try:
        member.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _capture_features(member: Member) -> Iterator[list[Tensor]]:
    """Make the backbone's features a leaf of the gradient and put them into the list."""
    captured: list[Tensor] = []

    def capture(features: Tensor) -> Tensor:
        captured[:] = [features.detach().requires_grad_()]
        return captured[0]

    backbone = member.backbone
    class_token = getattr(backbone, "global_pool", None) == "token" and not member.head.takes_map
    if class_token and hasattr(backbone, "blocks"):
        hook = backbone.blocks[-1].register_forward_pre_hook(
            lambda _, inputs: (capture(inputs[0]), *inputs[1:])
        )
        try:
            yield captured
        finally:
            hook.remove()
        return
    if member.head.form == "levels":  # what the head reads of the last level is explained
        forward_intermediates = backbone.forward_intermediates

        def captured_levels(*args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
            features, levels = forward_intermediates(*args, **options)
            return capture(features), levels

        backbone.forward_intermediates = captured_levels
        try:
            yield captured
        finally:
            del backbone.forward_intermediates
        return
    # Hooks see only __call__, and timm calls forward_features as a method.
    forward_features = backbone.forward_features
    backbone.forward_features = lambda pixels: capture(forward_features(pixels))
    try:
        yield captured
    finally:
        del backbone.forward_features  # uncovers the method of the class


def _scale_to_image(heat: Tensor, height: int, width: int, cropped: bool) -> Tensor:
    """Resize heat (b, 1, h, w) to (b, height, width), with maximum 1 and none outside a crop."""
    scaled = heat.new_zeros(len(heat), height, width)
    down, across = (min(height, width),) * 2 if cropped else (height, width)
    top, left = (height - down) // 2, (width - across) // 2
    resized = interpolate(heat, (down, across), mode="bilinear")
    scaled[:, top : top + down, left : left + across] = resized[:, 0]
    largest = scaled.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, scaled / largest, 0.0)
