"""What a network costs: parameters, multiply-adds of one image, bytes of its weights (the axes of the paper's figure 4)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from threefold.errors import RecipeError
from threefold.models__member import create_backbone
from threefold.recipe import MemberSpec


class Cost(NamedTuple):
    """Cost of one network on one image."""

    parameters: int
    flops: int
    """Multiply-adds, in the sense of the papers on ConvNets (figure 4 of ours): one product and one sum count once."""
    bytes: int
    """Of the weights and the statistics of batch norm as they are stored, without the file's header."""


def cost(network: nn.Module, img_size: int) -> Cost:
    """Parameters, multiply-adds and bytes of a network; see `count_flops` for the arguments and the errors."""
    stored = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return Cost(
        sum(p.numel() for p in network.parameters()), count_flops(network, img_size), stored
    )


def count_flops(network: nn.Module | str, img_size: int) -> int:
    """Multiply-adds of one forward pass of one image (3, img_size, img_size).

    Counted are convolutions, matrix products and attention, as torch.utils.flop_counter does; norms, activations,
    pooling and the resize are not. Nothing is computed: the pass is on torch's meta device.

    Args:
        network: a module that takes (1, 3, img_size, img_size), left in eval mode; or a backbone's name, timm's or the
            paper's, counted without a classifier.
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
    tensors = dict(network.named_parameters(remove_duplicate=False)) | dict(
        network.named_buffers(remove_duplicate=False)
    )
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
    # One multiply-add is two operations in torch's count.
    return cast("int", counter.get_total_flops()) // 2
