"""The cost of a network: parameters, multiply-adds of one image, bytes of its weights."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from threefold.errors import RecipeError
from threefold.models.member import Member, create_backbone
from threefold.models.shared import HeadPredictor, SharedBackbone
from threefold.models.views import Views
from threefold.recipe.schema import MemberSpec, ViewSpec


class Cost(NamedTuple):
    """Cost of one network on one image."""

    parameters: int
    macs: int
    """Multiply-adds: a product and its sum count as one, as in the papers on ConvNets."""
    bytes: int
    """Size of the weights and of batch norm's statistics in a file, without its header."""

    def times(self, networks: int, views: int) -> Cost:
        """Return the cost of several such networks on several views of an image."""
        return Cost(self.parameters * networks, self.macs * networks * views, self.bytes * networks)


def measure_cost(network: nn.Module, img_size: int) -> Cost:
    """Count the parameters, multiply-adds and bytes of a network.

    Args:
        network: see `count_macs`.
        img_size: side of the image in pixels.

    Raises:
        RecipeError: the network does not take images of that size.
    """
    state = network.state_dict().values()
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        macs=count_macs(network, img_size),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in state),
    )


def split_cost(member: Member, img_size: int) -> tuple[Cost, Cost]:
    """Count a member's cost as that of its backbone and that of its head.

    Args:
        member: the network.
        img_size: side of the image in pixels.

    Raises:
        RecipeError: the network does not take images of that size.
    """
    total = measure_cost(member, img_size)
    views = Views(ViewSpec(), img_size, 0)
    backbone = SharedBackbone(member, views, "squash")
    backbone.require(HeadPredictor(member.head).form)
    shared = measure_cost(backbone, img_size)
    return shared, Cost(*(whole - part for whole, part in zip(total, shared, strict=True)))


def count_macs(network: nn.Module | str, img_size: int) -> int:
    """Count the multiply-adds of one forward pass of one image (3, img_size, img_size).

    Convolutions, matrix products and attention count, as in torch.utils.flop_counter. Norms,
    activations, pooling and the resize do not. The pass runs on torch's meta device, so nothing is
    computed.

    Args:
        network: a module that takes (1, 3, img_size, img_size); it is left in eval mode. Or the
            name of a backbone, in timm or in the paper, counted without its classifier.
        img_size: side of the image in pixels.

    Raises:
        RecipeError: the name is unknown, or the network does not take images of that size.
    """
    if isinstance(network, str):
        spec = MemberSpec.model_construct(
            name=network, backbone=network, weights="none", img_size=img_size
        )
        with torch.device("meta"):
            network = cast("nn.Module", create_backbone(spec, pretrained=False))
    tensors: dict[str, torch.Tensor] = dict(network.named_parameters(remove_duplicate=False))
    tensors |= network.named_buffers(remove_duplicate=False)
    shadows = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    network.eval()
    try:
        image = torch.empty(1, 3, img_size, img_size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(network, shadows, (image,))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(
            "the network does not take images of this size",
            expected="another img_size",
            got=f"{img_size}: {str(error)[:160]}",
        ) from None
    # torch counts a multiply-add as two operations.
    return cast("int", counter.get_total_flops()) // 2
