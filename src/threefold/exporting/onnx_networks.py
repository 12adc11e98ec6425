"""Networks as ONNX models, each architecture traced once.

Tracing dominates the cost of an export. A member is traced as two models, its backbone and its
head, so that a network on the same backbone is a copy with other weights, whatever its head: the
other folds of a member, and a tuned member beside its probe. A frozen backbone is one model for
all of its heads. Only weights that tracing left as they were can be replaced; a network where it
did not is traced itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

OPSET = 20
BATCH = 16
"""Images that `run_model` takes at once."""


def trace(
    module: nn.Module, example: Tensor, names: Sequence[str], dynamic: tuple[int, ...]
) -> Any:
    """Trace a module with one input to an ONNX model.

    Args:
        module: the module.
        example: an input.
        names: of the input, and of the outputs in their order.
        dynamic: axes of the input that may have any length.
    """
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),)
    with warnings.catch_warnings(), _kept_registry():
        warnings.simplefilter("ignore")  # the exporter warns about its internals
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[names[0]],
            output_names=list(names[1:]),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


_registries: dict[Any, Any] = {}


@contextmanager
def _kept_registry() -> Iterator[None]:
    """Keep torch's table of ONNX operators between traces.

    torch parses the source of its 500 operators for every export, which takes a second (measured,
    torch 2.15): longer than the trace of a head. Where a version of torch has no such table at this
    place, nothing is kept, and nothing else changes.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return

    def from_torchlib(*args: Any, **options: Any) -> Any:
        key = (args, tuple(sorted(options.items())))
        if key not in _registries:
            _registries[key] = original(*args, **options)
        return _registries[key]

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)):
        yield


class Tracer:
    """Traces modules, and copies the models of those that it has seen with other weights."""

    def __init__(self) -> None:
        self._traced: dict[object, tuple[Any, nn.Module]] = {}

    def trace(
        self, module: nn.Module, example: Tensor, names: Sequence[str], key: object = None
    ) -> Any:
        """Trace a module to an ONNX model, or copy the model of another one of the same key.

        Args:
            module: of `fold_batch_norm`.
            example: an input; its first axis may have any length.
            names: see `trace`.
            key: equal for modules that differ in nothing but their state dict.
        """
        place = (type(module), key, tuple(example.shape[1:]), tuple(names))
        if place in self._traced:
            model = _with_weights(*self._traced[place], module)
            if model is not None:
                return model
        model = trace(module, example, names, (0,))
        self._traced.setdefault(place, (model, module))
        return model


def run_model(model: Any, pixels: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of a network's model for pixels float32 (n, 3, s, s), in batches."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    batches = [
        session.run(None, {name: pixels[begin : begin + BATCH]})
        for begin in range(0, len(pixels), BATCH)
    ]
    return [np.concatenate(values) for values in zip(*batches, strict=True)]


def _with_weights(model: Any, old: nn.Module, new: nn.Module) -> Any | None:
    """Copy a traced model with other weights; None if tracing changed or dropped a weight."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    initializers = {tensor.name: tensor for tensor in result.graph.initializer}
    old_weights = old.state_dict()
    for name, weight in new.state_dict().items():
        tensor = initializers.get(name)
        if tensor is None:
            return None
        if not np.array_equal(onnx.numpy_helper.to_array(tensor), old_weights[name].numpy()):
            return None
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight.numpy(), name))
    return result


def fold_batch_norm(predictor: nn.Module, canvas: int) -> nn.Module:
    """Copy a network and fold each batch norm after a convolution into the convolution's weights.

    Hooks record which norm receives the output of which convolution while an image runs through
    the network. The result is exact up to rounding, which the parity gate checks.
    """
    network = copy.deepcopy(predictor).float().eval()
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[Any, Any]] = []

    def after_conv(module: nn.Module, _: Any, output: Tensor) -> None:
        # Holding the output keeps its id from being used again.
        outputs[id(output)] = (module, output)

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], module))

    hooks = [
        m.register_forward_hook(after_conv) for m in network.modules() if isinstance(m, nn.Conv2d)
    ]
    hooks += [
        m.register_forward_pre_hook(before_norm)
        for m in network.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, canvas, canvas))
    for hook in hooks:
        hook.remove()
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
    return network.requires_grad_(False)


class _Clamp(nn.Module):
    """ReLU6 as one clamp: tracing torch's own takes 0.25 s each (measured, torch 2.15)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module of the network by another."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new.eval())
