"""Networks as ONNX models, each architecture traced once.

Tracing dominates the cost of an export. A member is traced as two models, its backbone and its
head, so that a network on the same backbone is a copy with other weights, whatever its head: the
other folds of a member, and a tuned member beside its probe. A frozen backbone is one model for
all of its heads. Only weights that tracing left as they were can be replaced; a network where it
did not is traced itself.
"""

from __future__ import annotations

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

from threefold.models.tracing import OPSET, PREFIX, FlatOutputs, TracingError, trace_network

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

    def trace_network(
        self, network: nn.Module, size: int, names: Sequence[str], key: object = None
    ) -> Any:
        """Trace a network for images of one size, or copy the model of one of the same key.

        Args:
            network: of `simplify`; maps (b, 3, size, size) to a tensor or a dict of tensors.
            size: side of the images in pixels.
            names: of the input, and of the outputs in their order.
            key: equal for networks that differ in nothing but their state dict.
        """
        place = (type(network), key, size, tuple(names))
        return self._copied(place, network, PREFIX) or self._keep(
            place, _trace_network(network, size, names), network
        )

    def trace_head(
        self, head: nn.Module, example: Tensor, names: Sequence[str], key: object = None
    ) -> Any:
        """Trace a head, or copy the model of another one of the same key.

        Args:
            head: the head.
            example: features, whose first axis may have any length.
            names: of the input and the output.
            key: equal for heads that differ in nothing but their state dict.
        """
        place = (type(head), key, tuple(example.shape[1:]), tuple(names))
        return self._copied(place, head, "") or self._keep(
            place, trace(head, example, names, (0,)), head
        )

    def _copied(self, place: object, module: nn.Module, prefix: str) -> Any | None:
        """Copy the model of a module that has been traced, with the weights of another one."""
        if place not in self._traced:
            return None
        return _with_weights(*self._traced[place], module, prefix)

    def _keep(self, place: object, model: Any, module: nn.Module) -> Any:
        self._traced.setdefault(place, (model, module))
        return model


def _trace_network(network: nn.Module, size: int, names: Sequence[str]) -> Any:
    """Trace a network by the tracing exporter, or by the other one where that fails."""
    try:
        return onnx.load_from_string(trace_network(network, size, names))
    except TracingError:
        return trace(FlatOutputs(network), torch.zeros(2, 3, size, size), names, (0,))


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


def _with_weights(model: Any, old: nn.Module, new: nn.Module, prefix: str) -> Any | None:
    """Copy a traced model with other weights; None if tracing changed or dropped a weight."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    initializers = {tensor.name: tensor for tensor in result.graph.initializer}
    old_weights = old.state_dict()
    for name, weight in new.state_dict().items():
        tensor = initializers.get(prefix + name)
        if tensor is None:
            return None
        if not np.array_equal(onnx.numpy_helper.to_array(tensor), old_weights[name].numpy()):
            return None
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight.numpy(), prefix + name))
    return result
