"""Networks as ONNX models, each architecture traced once.

Tracing dominates the cost of an export. A member is traced as two models, its backbone and its
head, so that a network on the same backbone is a copy with other weights, whatever its head: the
other folds of a member, and a tuned member beside its probe. A frozen backbone is one model for
all of its heads. Only weights that tracing left as they were can be replaced; a network where it
did not is traced itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from threefold.models import tracing
from threefold.models.tracing import (
    OPSET,
    PREFIX,
    FlatOutputs,
    TracingError,
    differing_axes,
    example_pixels,
)

BATCH = 16
"""Images that `run_model` takes at once."""


def trace(module: nn.Module, example: Tensor, other: Tensor, names: Sequence[str]) -> Any:
    """Trace a module to an ONNX model, or export it without tracing where that fails.

    Args:
        module: maps a tensor to a tensor, or to a dict of tensors.
        example: an input.
        other: another input; the axes in which the lengths of both differ may have any length.
        names: of the input and the outputs, in their order.
    """
    try:
        return onnx.load_from_string(tracing.trace(module, example, other, names))
    except TracingError:
        return _export(module, example, differing_axes(example, other), names)


def _export(
    module: nn.Module, example: Tensor, dynamic: Sequence[int], names: Sequence[str]
) -> Any:
    """Export a module by torch's other exporter, which is slower and knows more modules.

    Args:
        module: as in `trace`.
        example: an input.
        dynamic: axes of the input that may have any length.
        names: of the input and the outputs, in their order.
    """
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its internals
        program = torch.onnx.export(
            FlatOutputs(module).eval(),
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
        return self.trace(network, *example_pixels(size), names, key)

    def trace(
        self,
        module: nn.Module,
        example: Tensor,
        other: Tensor,
        names: Sequence[str],
        key: object = None,
    ) -> Any:
        """Trace a module, see `trace`, or copy the model of another one of the same key."""
        place = (type(module), key, tuple(example.shape[1:]), tuple(names))
        if place in self._traced:
            copied = _with_weights(*self._traced[place], module)
            if copied is not None:
                return copied
        model = trace(module, example, other, names)
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
        tensor = initializers.get(PREFIX + name)
        if tensor is None:
            return None
        if not np.array_equal(onnx.numpy_helper.to_array(tensor), old_weights[name].numpy()):
            return None
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight.numpy(), PREFIX + name))
    return result
