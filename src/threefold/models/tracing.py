"""Modules as ONNX graphs, by torch's tracing exporter.

It takes a fifth of the time of the exporter that torch prefers (0.3 s against 1.7 s for an
EfficientNet-Lite, torch 2.15), and onnxruntime optimizes both graphs to the same one.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

OPSET = 20

PREFIX = "network."
"""What stands before the names of a module's weights in its graph."""


class TracingError(Exception):
    """The tracing exporter cannot export this module."""


def trace(module: nn.Module, example: Tensor, other: Tensor, names: Sequence[str]) -> bytes:
    """Export a module with one input.

    Args:
        module: maps a tensor to a tensor, or to a dict of tensors.
        example: an input.
        other: another input, on which the graph is compared with the module. The axes in which the
            lengths of both differ may have any length.
        names: of the input and the outputs, in their order.

    Raises:
        TracingError: torch cannot trace it, or the graph would answer the other input wrongly.
    """
    buffer = io.BytesIO()
    module = FlatOutputs(module).eval()
    axes = {name: {0: "batch"} for name in names}
    axes[names[0]] = {axis: f"length{axis}" for axis in differing_axes(example, other)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # They say that the exporter is deprecated, and what tracing made constant.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (example,),
                buffer,  # type: ignore[arg-type]  # the tracing exporter also writes to streams
                dynamo=False,
                input_names=[names[0]],
                output_names=list(names[1:]),
                dynamic_axes=axes,
                opset_version=OPSET,
            )
    except Exception as error:  # the exporter raises errors of many types
        raise TracingError(f"{type(error).__name__}: {str(error)[:120]}") from error
    graph = buffer.getvalue()
    _check_answers(graph, module, other)
    return graph


def trace_network(network: nn.Module, size: int, names: Sequence[str]) -> bytes:
    """Export a network for batches of any length of images of one size.

    Args:
        network: of `simplify`; maps (b, 3, size, size) to a tensor, or to a dict of tensors.
        size: side of the images in pixels.
        names: of the input and the outputs, in their order.

    Raises:
        TracingError: see `trace`.
    """
    return trace(network, *example_pixels(size), names)


def example_pixels(size: int) -> tuple[Tensor, Tensor]:
    """Make two batches of pixels of different lengths, (2, 3, size, size) and (3, ...)."""
    generator = torch.Generator().manual_seed(0)
    return torch.zeros(2, 3, size, size), 255 * torch.rand(3, 3, size, size, generator=generator)


def differing_axes(example: Tensor, other: Tensor) -> list[int]:
    """Return the axes in which the lengths of two tensors differ."""
    return [
        axis
        for axis, lengths in enumerate(zip(example.shape, other.shape, strict=True))
        if lengths[0] != lengths[1]
    ]


def _check_answers(graph: bytes, module: nn.Module, example: Tensor) -> None:
    """Compare the graph's answers with the module's.

    Raises:
        TracingError: they differ, as when tracing took the number of images for a constant.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        answers = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    except Exception as error:  # onnxruntime has an error type for each kind of problem
        raise TracingError(f"{type(error).__name__}: {str(error)[:120]}") from error
    with torch.no_grad():
        expected = [output.numpy() for output in module(example)]
    for answer, right in zip(answers, expected, strict=True):
        scale = float(np.abs(right).max()) or 1.0
        if answer.shape != right.shape or not np.abs(answer - right).max() <= 1e-3 * scale:
            raise TracingError("the graph's answers differ from the module's")


class FlatOutputs(nn.Module):
    """A module whose outputs are a tuple, since the tracing exporter takes no dict."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, example: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(example)
        return tuple(outputs.values()) if isinstance(outputs, dict) else (outputs,)


def simplify(network: nn.Module, size: int) -> nn.Module:
    """Copy a network for images of one size, without what an exported graph does not need.

    Each batch norm after a convolution is folded into the convolution's weights, and the padding of
    TensorFlow's convolutions becomes a constant. The result is exact up to rounding.

    Args:
        network: maps (b, 3, size, size) to anything.
        size: side of the images in pixels.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    pairs, sizes = _observe(network, size)
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        # timm's norms may have a dropout and an activation of their own.
        parts = [getattr(norm, "drop", None), getattr(norm, "act", None)]
        _replace(network, norm, nn.Sequential(*(part for part in parts if part is not None)))
    for module in list(network.modules()):
        if isinstance(module, nn.Hardtanh):
            _replace(network, module, _Clamp(module.min_val, module.max_val))
        elif isinstance(module, Conv2dSame) and len(sizes.get(module, ())) == 1:
            _replace(network, module, _padded(module, next(iter(sizes[module]))))
    return network.requires_grad_(False)


def _observe(
    network: nn.Module, size: int
) -> tuple[list[tuple[Any, Any]], dict[nn.Module, set[tuple[int, int]]]]:
    """Run an image through a network.

    Returns:
        Which norm receives the output of which convolution, and the sizes (height, width) of each
        convolution's inputs.
    """
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[Any, Any]] = []
    sizes: dict[nn.Module, set[tuple[int, int]]] = {}

    def after_conv(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Holding the output keeps its id from being used again.
        outputs[id(output)] = (module, output)
        sizes.setdefault(module, set()).add((inputs[0].shape[-2], inputs[0].shape[-1]))

    def before_norm(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], module))

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return pairs, sizes


class _Clamp(nn.Module):
    """ReLU6 as one clamp: exporting torch's own can take 0.25 s each (measured, torch 2.15)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


def _padded(conv: Conv2dSame, size: tuple[int, int]) -> nn.Module:
    """TensorFlow's convolution with the padding that it computes for inputs of one size.

    Args:
        conv: the convolution, whose weights are taken.
        size: height and width of its input.
    """
    padding: list[int] = []
    for axis in (1, 0):  # ZeroPad2d takes left, right, top, bottom
        total = get_same_padding(
            size[axis], conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        )
        padding += [total // 2, total - total // 2]
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return nn.Sequential(nn.ZeroPad2d(padding), plain)  # type: ignore[arg-type]


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module of the network by another."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new.eval())
