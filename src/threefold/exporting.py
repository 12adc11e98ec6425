"""The pipeline as one ONNX file, written only if it answers the same.

Every architecture is traced once, fold copies are grafted with their own weights.
Tracing dominates the cost of an export, so what can be shared is: the resize by canvas, the network by architecture.
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

from threefold.bundle import publish, set_card, staged
from threefold.errors import ExportError
from threefold.models__pipeline import (
    MemberPipeline,
    Pipeline,
    Predictor,
    describe_preprocessing,
    mix,
)
from threefold.models__resize import resize_square
from threefold.precision import convert
from threefold.runtime import FORMAT, load

OPSET = 20
IR_VERSION = 10


def card_of(pipeline: Pipeline, precision: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The model card: what every file says, and the metadata of its run."""
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
    measure: Callable[[np.ndarray], dict[str, Any]],
) -> dict[str, Any]:
    """Write a graph with its card, if its answers pass; above 2 GB with the weights in a data file beside it, see `bundle`.

    Args:
        model: images -> probs, member_probs.
        target: file to write.
        card: the model card; the parity report joins it.
        images: uint8 (h, w, 3), any sizes, that the file answers before it takes its place.
        measure: the parity report of those answers (n, k); raises where they do not pass.

    Returns:
        The parity report, with the bytes written.

    Raises:
        ExportError: the file cannot be written, or `measure` refuses.
    """

    with staged(model, target, card) as trial:
        report = measure(load(trial.model).predict_proba(images))
        set_card(model, {**card, **trial.bundle, "parity": report})
        return {**report, "bytes": publish(model, trial, target)}


def build_graph(
    pipeline: Pipeline, precision: str = "float32", calibration: Sequence[np.ndarray] = ()
) -> onnx.ModelProto:
    """The pipeline as an ONNX model: images uint8 (b, h, w, 3) to probs (b, k) and member_probs (b, m, k).

    Args:
        pipeline: what to build.
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
    _add_combiner(graph, pipeline, stacked)
    return graph.finish(len(pipeline.classes), len(pipeline.names))


def network_names(pipeline: Pipeline) -> list[list[str]]:
    """For each member the graph's values (b, k) that its networks give.

    Raises:
        ExportError: members are mixed over folds, so that no network is one member's alone.
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
    """ONNX model of a module with one input and one output; the axes in `dynamic` may have any length."""
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
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
    """Graft one member: its resize once, then every fold model; returns the names of their probabilities."""
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
        model = (
            first
            if fold == 0
            else _with_weights(first, fused[0], predictor)
            or trace(predictor, example, ("pixels", "probs"), (0,))
        )
        names.append(f"{prefix}fold{fold}_probs")
        model = convert(model, precision, pixels)
        graph.graft(model, f"{prefix}fold{fold}_", {"pixels": canvas}, {"probs": names[-1]})
    return names


def _add_combiner(graph: _Joiner, pipeline: Pipeline, stacked: str) -> None:
    example = torch.full((2, len(pipeline.names), len(pipeline.classes)), 1 / len(pipeline.classes))
    combiner = trace(pipeline.combiner, example, ("member_probs", "probs"), (0,))
    graph.graft(combiner, "ensemble_", {"member_probs": stacked}, {"probs": "probs"})


class _Resize(nn.Module):
    """The resize of a canvas, as a module that can be traced."""

    def __init__(self, canvas: int, mode: Literal["squash", "crop"]) -> None:
        super().__init__()
        self.canvas, self.mode = canvas, mode

    def forward(self, images: Tensor) -> Tensor:
        return resize_square(images, self.canvas, self.mode)


class _Mix(nn.Module):
    """The members' answers from those of all networks, where members are not in every fold."""

    def __init__(self, mixing: Tensor) -> None:
        super().__init__()
        self.register_buffer("mixing", mixing)

    def forward(self, nets: Tensor) -> Tensor:
        return mix(nets, self.get_buffer("mixing"))


def _with_weights(model: Any, old: nn.Module, new: nn.Module) -> Any | None:
    """A copy of a traced model with the weights of another network of the same shape; None if one cannot be placed."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    initializers = {tensor.name: tensor for tensor in twin.graph.initializer}
    before, after = old.state_dict(), new.state_dict()
    for name, tensor in after.items():
        found = initializers.get(name)
        if found is None or not np.array_equal(
            onnx.numpy_helper.to_array(found), before[name].numpy()
        ):
            return None
        found.CopyFrom(onnx.numpy_helper.from_array(tensor.numpy(), name))
    return twin


def fold_batch_norm(predictor: Predictor, canvas: int) -> nn.Module:
    """A copy of the network with every batch norm that directly follows a convolution folded into its weights.

    The pairs are found by running an image through and seeing which norm receives which convolution's output. Exact up
    to rounding; the parity gate stands behind it.
    """
    network = copy.deepcopy(predictor).float().eval()
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[Any, Any]] = []

    def after_conv(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

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
        rest = [
            part
            for part in (getattr(norm, "drop", None), getattr(norm, "act", None))
            if part is not None
        ]
        _replace(network, norm, nn.Sequential(*rest))
    for module in list(network.modules()):
        if isinstance(module, nn.Hardtanh):
            _replace(network, module, _Clamp(module.min_val, module.max_val))
    return network.requires_grad_(False)


class _Clamp(nn.Module):
    """ReLU6 as one clamp: tracing torch's own takes a quarter of a second each (measured, torch 2.15)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new.eval())


class _Joiner:
    """Builds one ONNX graph out of several by prefixing their names and wiring inputs to outputs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: set[str] = {"images"}

    def graft(
        self, model: Any, prefix: str, inputs: dict[str, str], outputs: dict[str, str]
    ) -> None:
        """Add a model's nodes; its input and output names become the outer names given, all others get the prefix."""
        if model.functions:
            raise ExportError(
                "the exporter made functions that cannot be joined",
                where=prefix,
                got=[f.name for f in model.functions],
            )
        outer = {**inputs, **outputs, "": ""}
        for node in model.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = prefix + node.name
            copy.ClearField("metadata_props")
            copy.ClearField("doc_string")
            copy.input[:] = [outer.get(name, prefix + name) for name in node.input]
            copy.output[:] = [outer.get(name, prefix + name) for name in node.output]
            self.nodes.append(copy)
        for tensor in model.graph.initializer:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            copy.name = outer.get(tensor.name, prefix + tensor.name)
            self.initializers.append(copy)
        self.values.update(outputs.values())

    def mean(self, names: Sequence[str], output: str) -> str:
        """Average of values of equal shape."""
        self.nodes.append(
            onnx.helper.make_node("Mean", list(names), [output], name=f"{output}_mean")
        )
        return output

    def stack(self, names: Sequence[str], output: str) -> str:
        """Values (b, k) as one (b, m, k)."""
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
        """The whole model: images -> probs, member_probs."""
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
        model.graph.initializer.extend(
            self.initializers
        )  # last: above 2 GB a graph can no longer be copied whole
        return model
