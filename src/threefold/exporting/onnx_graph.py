"""Build a pipeline as one ONNX graph and write it to a file.

Tracing dominates the cost of an export. So the resize is traced once per canvas and each member's
network once; the networks of its other folds are copies with their own weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from threefold.errors import ExportError
from threefold.exporting.onnx_files import publish, set_card, staged
from threefold.exporting.quantization import convert
from threefold.models.pipeline import (
    MemberPipeline,
    Pipeline,
    Predictor,
    describe_preprocessing,
    mix,
)
from threefold.models.resize import resize_square
from threefold.predictions.results_schema import ExportReport
from threefold.runtime.model import FORMAT, load

OPSET = 20
IR_VERSION = 10


def card_of(pipeline: Pipeline, precision: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the model card: the entries that every file has, and the metadata."""
    return {
        "format": FORMAT,
        "classes": list(pipeline.classes),
        "members": list(pipeline.names),
        "precision": precision,
        "opset": OPSET,
        "preprocessing": describe_preprocessing(pipeline),
        **metadata,
    }


def write_onnx(
    model: Any,
    target: Path,
    card: dict[str, Any],
    images: Sequence[np.ndarray],
    measure: Callable[[np.ndarray], ExportReport],
) -> ExportReport:
    """Write a graph with its card if its answers pass; above 2 GB as a bundle (`onnx_files`).

    Args:
        model: images -> probs, member_probs.
        target: file to write.
        card: the model card; the parity report is added to it.
        images: uint8 (h, w, 3), any sizes, on which the file is tried before it is published.
        measure: returns the parity report of its answers (n, k), or raises if they do not pass.

    Returns:
        The parity report, with the bytes written.

    Raises:
        ExportError: the file cannot be written, or `measure` refuses.
    """
    with staged(model, target, card) as trial:
        report = measure(load(trial.model).predict_proba(images))
        set_card(model, {**card, **trial.bundle, "parity": report.as_json()})
        return report.replace(bytes=publish(model, trial, target))


def build_graph(
    pipeline: Pipeline, precision: str = "float32", calibration: Sequence[np.ndarray] = ()
) -> onnx.ModelProto:
    """Build the ONNX model: images uint8 (b, h, w, 3) to probs (b, k) and member_probs (b, m, k).

    Args:
        pipeline: in eval mode.
        precision: of the members' weights.
        calibration: training images uint8 (h, w, 3), for int8.
    """
    graph = _Joiner()
    members = cast(Iterable[MemberPipeline], pipeline.members)
    outputs = [
        _add_member(graph, f"m{i}_", member, precision, calibration)
        for i, member in enumerate(members)
    ]
    if pipeline.mixing is None:
        stacked = graph.stack(
            [graph.mean(copies, f"m{i}_probs") for i, copies in enumerate(outputs)], "member_probs"
        )
    else:
        nets = graph.stack([name for copies in outputs for name in copies], "network_probs")
        mixing = trace(
            _Mix(pipeline.mixing),
            torch.rand(2, pipeline.mixing.shape[1], 3),
            ("nets", "mixed"),
            (0, 2),
        )
        graph.graft(mixing, "mix_", {"nets": nets}, {"mixed": "member_probs"})
        stacked = "member_probs"
    example = torch.full((2, len(pipeline.names), len(pipeline.classes)), 1 / len(pipeline.classes))
    combiner = trace(pipeline.combiner, example, ("member_probs", "probs"), (0,))
    graph.graft(combiner, "ensemble_", {"member_probs": stacked}, {"probs": "probs"})
    return graph.finish(len(pipeline.classes), len(pipeline.names))


def network_names(pipeline: Pipeline) -> list[list[str]]:
    """Name the values (b, k) that the networks of each member produce.

    Raises:
        ExportError: members are mixed over folds, so no network belongs to one member alone.
    """
    if pipeline.mixing is not None:
        raise ExportError(
            "members that are not in every fold have no cascade", fix="ensemble.disagreement = 0"
        )
    members = cast(Iterable[MemberPipeline], pipeline.members)
    return [
        [f"m{i}_fold{fold}_probs" for fold in range(len(member.predictors))]
        for i, member in enumerate(members)
    ]


def trace(
    module: nn.Module, example: Tensor, names: tuple[str, str], dynamic: tuple[int, ...]
) -> Any:
    """Trace a module with one input and one output to an ONNX model.

    Args:
        module: the module.
        example: an input.
        names: of the input and the output.
        dynamic: axes of the input that may have any length.
    """
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its internals
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[names[0]],
            output_names=[names[1]],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _add_member(
    graph: _Joiner,
    prefix: str,
    member: MemberPipeline,
    precision: str,
    calibration: Sequence[np.ndarray],
) -> list[str]:
    """Add a member's resize, unless it is there, and its networks; returns their outputs' names."""
    canvas = f"pixels_{member.canvas}_{member.resize}"
    if canvas not in graph.values:
        resize = trace(
            _Resize(member.canvas, member.resize),
            torch.zeros(2, 30, 40, 3, dtype=torch.uint8),
            ("images", "pixels"),
            (0, 1, 2),
        )
        graph.graft(resize, f"{canvas}_", {"images": "images"}, {"pixels": canvas})
    predictors = cast(Iterable[Predictor], member.predictors)
    fused = [fold_batch_norm(predictor, member.canvas) for predictor in predictors]
    example = torch.zeros(2, 3, member.canvas, member.canvas)
    first = trace(fused[0], example, ("pixels", "probs"), (0,))
    names = []
    pixels = member.pixels(calibration) if precision == "int8" else None
    for fold, predictor in enumerate(fused):
        model = first if fold == 0 else _with_weights(first, fused[0], predictor)
        if model is None:
            model = trace(predictor, example, ("pixels", "probs"), (0,))
        names.append(f"{prefix}fold{fold}_probs")
        model = convert(model, precision, pixels)
        graph.graft(model, f"{prefix}fold{fold}_", {"pixels": canvas}, {"probs": names[-1]})
    return names


class _Resize(nn.Module):
    """The resize to a canvas as a module, for tracing."""

    def __init__(self, canvas: int, mode: Literal["squash", "crop"]) -> None:
        super().__init__()
        self.canvas, self.mode = canvas, mode

    def forward(self, images: Tensor) -> Tensor:
        return resize_square(images, self.canvas, self.mode)


class _Mix(nn.Module):
    """The mix of all networks' answers to those of members, as a module, for tracing."""

    def __init__(self, mixing: Tensor) -> None:
        super().__init__()
        self.register_buffer("mixing", mixing)

    def forward(self, nets: Tensor) -> Tensor:
        return mix(nets, self.get_buffer("mixing"))


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


def fold_batch_norm(predictor: Predictor, canvas: int) -> nn.Module:
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


class _Joiner:
    """Joins several ONNX graphs into one by prefixing names and connecting inputs to outputs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: set[str] = {"images"}

    def graft(
        self, model: Any, prefix: str, inputs: dict[str, str], outputs: dict[str, str]
    ) -> None:
        """Add a model's nodes under a prefix; `inputs` and `outputs` map its names to ours."""
        if model.functions:
            raise ExportError(
                "the exporter produced functions that cannot be joined",
                where=prefix,
                got=[f.name for f in model.functions],
            )
        outer = {**inputs, **outputs, "": ""}
        for node in model.graph.node:
            grafted = onnx.NodeProto()
            grafted.CopyFrom(node)
            grafted.name = prefix + node.name
            grafted.ClearField("metadata_props")
            grafted.ClearField("doc_string")
            grafted.input[:] = [outer.get(name, prefix + name) for name in node.input]
            grafted.output[:] = [outer.get(name, prefix + name) for name in node.output]
            self.nodes.append(grafted)
        for tensor in model.graph.initializer:
            grafted = onnx.TensorProto()
            grafted.CopyFrom(tensor)
            grafted.name = outer.get(tensor.name, prefix + tensor.name)
            self.initializers.append(grafted)
        self.values.update(outputs.values())

    def mean(self, names: Sequence[str], output: str) -> str:
        """Add the mean of values of equal shape; returns its name."""
        self.nodes.append(
            onnx.helper.make_node("Mean", list(names), [output], name=f"{output}_mean")
        )
        return output

    def stack(self, names: Sequence[str], output: str) -> str:
        """Stack m values (b, k) to (b, m, k); returns the name of the result."""
        self.initializers.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "axis_1"))
        for name in names:
            self.nodes.append(
                onnx.helper.make_node(
                    "Unsqueeze", [name, "axis_1"], [f"{name}_row"], name=f"{name}_unsqueeze"
                )
            )
        self.nodes.append(
            onnx.helper.make_node(
                "Concat",
                [f"{name}_row" for name in names],
                [output],
                name=f"{output}_concat",
                axis=1,
            )
        )
        return output

    def finish(self, num_classes: int, num_members: int) -> Any:
        """Make the ONNX model: images -> probs, member_probs."""
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "threefold",
            [value("images", onnx.TensorProto.UINT8, ["batch", "height", "width", 3])],
            [
                value("probs", onnx.TensorProto.FLOAT, ["batch", num_classes]),
                value("member_probs", onnx.TensorProto.FLOAT, ["batch", num_members, num_classes]),
            ],
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            producer_name="threefold",
            ir_version=IR_VERSION,
        )
        # Added last, because a graph above 2 GB cannot be copied as a whole.
        model.graph.initializer.extend(self.initializers)
        return model
