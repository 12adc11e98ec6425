"""Fully sharded training (FSDP2): each rank keeps a part of the weights, gradients and moments.

Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`. The
weights of a block are gathered while it computes and dropped afterwards. What leaves the loop of a
stage (checkpoints, the resume file, the result) is whole, so it does not depend on the number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

LEAST_SHARE: Final = 0.01
"""Blocks with a smaller share of the weights than this are gathered together with others."""

ROWS: Final = (nn.Sequential, nn.ModuleList)
"""Modules whose elements are called one after the other, and often not through the row itself."""


def shard(network: nn.Module, device: torch.device, ranks: int) -> nn.Module:
    """Divide the weights of a network among all ranks, each of which calls this.

    Args:
        network: changed in place. It can be copied no more.
        device: of this rank, which receives its part.
        ranks: their number.

    Returns:
        The network.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network.to(memory_format=torch.contiguous_format)  # FSDP takes no other one
    mesh = init_device_mesh(device.type, (ranks,))
    least = LEAST_SHARE * _count_weights(network)
    for block in list(_blocks(network)):
        if _count_weights(block) >= least:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def _count_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of rows of modules, such as a transformer's blocks; inner ones first."""
    for child in network.children():
        yield from _blocks(child)
        if isinstance(network, ROWS) and not isinstance(child, ROWS):
            yield child


def _is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose module only sharded training needs to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks, each of which calls this; others as they are."""
    return cast("Any", tensor).full_tensor() if _is_divided(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a divided tensor that this rank has, which shares its memory; or all."""
    return cast("Any", tensor).to_local() if _is_divided(tensor) else tensor


def own_share(network: nn.Module) -> float:
    """Return the share of a network's weights that this rank has; 1 if they are not divided."""
    return sum(own_part(p).numel() for p in network.parameters()) / _count_weights(network)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor if another one is divided, else all of it.

    Args:
        tensor: the same on all ranks.
        like: of the same shape.
    """
    if not _is_divided(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    layout, on_device = cast("Any", like), tensor.to(like.device)
    return distribute_tensor(on_device, layout.device_mesh, layout.placements, src_data_rank=None)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network; divided tensors are gathered into main memory."""
    return {
        name: whole(tensor).cpu() if _is_divided(tensor) else tensor
        for name, tensor in network.state_dict().items()
    }


def load_whole_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state dict into a network of which this rank may have a part."""
    own = network.state_dict()
    network.load_state_dict({name: part_of(value, own[name]) for name, value in state.items()})
