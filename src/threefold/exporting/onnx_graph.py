"""Build a pipeline as one ONNX graph and write it to a file.

The resize is in the graph once per canvas, and a frozen backbone once for all heads on it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from threefold.data.class_names import exported_names
from threefold.errors import ExportError
from threefold.exporting.onnx_files import publish, set_card, staged
from threefold.exporting.onnx_networks import Tracer, run_model, trace
from threefold.exporting.quantization import convert
from threefold.models.member import Member
from threefold.models.pipeline import (
    MemberPipeline,
    Pipeline,
    Predictor,
    describe_preprocessing,
    mix,
)
from threefold.models.resize import resize_square
from threefold.models.shared import HeadPredictor, HeadsPipeline, SharedBackbone
from threefold.models.tracing import OPSET, simplify
from threefold.predictions.export_schema import ExportReport
from threefold.runtime.model import FORMAT, Model, load

GRAPH_PIXELS: Final = 1_000_000
"""Pixels of the largest images that a graph is tried on without a resize before it, which takes 26
bytes of memory for each."""

IR_VERSION = 10


def card_of(pipeline: Pipeline, precision: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the model card: the entries that every file has, and the metadata."""
    return {
        "format": FORMAT,
        "classes": list(exported_names(pipeline.classes)),
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
        report = measure(_answer(load(trial.model), images))
        set_card(model, {**card, **trial.bundle, "parity": report.as_json()})
        return report.replace(bytes=publish(model, trial, target))


def _answer(model: Model, images: Sequence[np.ndarray]) -> np.ndarray:
    """Probabilities (n, k) by the graph itself, which resizes all but large images."""
    rows = []
    for pixels in images:
        is_large = pixels.shape[0] * pixels.shape[1] > GRAPH_PIXELS
        fitted = model.fit_canvas(pixels) if is_large or model.is_fixed_size else pixels
        rows.append(model.run(fitted[None]).probs)
    return np.concatenate(rows)


def build_graph(
    pipeline: Pipeline,
    precision: str = "float32",
    calibration: Sequence[np.ndarray] = (),
    stages: Sequence[Sequence[int]] = (),
    fixed_size: int = 0,
) -> onnx.ModelProto:
    """Build the ONNX model: images uint8 (b, h, w, 3) to probs (b, k) and member_probs (b, m, k).

    Args:
        pipeline: in eval mode.
        precision: of the members' weights.
        calibration: training images uint8 (h, w, 3), for int8.
        stages: numbers of the members in each stage of a cascade; members of different stages have
            no nodes in common, because one may run without the other.
        fixed_size: side in pixels of the images, which come resized to the members' only canvas;
            0 = images of any size, which the graph resizes.
    """
    graph, num_classes = _Joiner(), len(pipeline.classes)
    networks = _Networks(graph, precision, calibration, fixed_size)
    stage_of = {member: stage for stage, members in enumerate(stages) for member in members}
    # In the order of the stages, so that what the first one needs is not among the nodes of others.
    order = sorted(range(len(pipeline.parts)), key=lambda i: stage_of.get(i, 0))
    added = {i: networks.add(f"m{i}_", pipeline.parts[i], stage_of.get(i, 0)) for i in order}
    outputs = [added[i] for i in range(len(pipeline.parts))]
    if pipeline.mixing is None:
        stacked = graph.stack(
            [graph.mean(copies, f"m{i}_probs") for i, copies in enumerate(outputs)], "member_probs"
        )
    else:
        nets = graph.stack([name for copies in outputs for name in copies], "network_probs")
        examples = _examples(pipeline.mixing.shape[1], num_classes)
        mixing = trace(_Mix(pipeline.mixing), *examples, ("nets", "mixed"))
        graph.graft(mixing, "mix_", {"nets": nets}, {"mixed": "member_probs"})
        stacked = "member_probs"
    examples = _examples(len(pipeline.names), num_classes)
    combiner = trace(pipeline.combiner, *examples, ("member_probs", "probs"))
    graph.graft(combiner, "ensemble_", {"member_probs": stacked}, {"probs": "probs"})
    return graph.finish(num_classes, len(pipeline.names), fixed_size)


def _examples(answers: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Make answers (2, answers, k) and (3, answers, k) that are probabilities, for tracing."""
    probs = _uniform(5, answers, num_classes).softmax(-1)
    return probs[:2], probs[2:]


def _uniform(*shape: int) -> Tensor:
    """Draw numbers between 0 and 1, the same ones each time."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def network_names(pipeline: Pipeline) -> list[list[str]]:
    """Name the values (b, k) that the networks of each member produce.

    Raises:
        ExportError: members are mixed over folds, so no network belongs to one member alone.
    """
    if pipeline.mixing is not None:
        raise ExportError(
            "members that are not in every fold have no cascade", fix="ensemble.disagreement = 0"
        )
    return [
        [f"m{i}_fold{fold}_probs" for fold in range(part.networks)]
        for i, part in enumerate(pipeline.parts)
    ]


class _Networks:
    """Adds the networks of members to a graph.

    Args:
        graph: the graph.
        precision: of the weights.
        calibration: training images uint8 (h, w, 3), for int8.
        fixed_size: see `build_graph`.
    """

    def __init__(
        self,
        graph: _Joiner,
        precision: str,
        calibration: Sequence[np.ndarray],
        fixed_size: int,
    ) -> None:
        self.graph, self.precision, self.calibration = graph, precision, calibration
        self.fixed_size = fixed_size
        self.tracer, self.scope = Tracer(), 0
        self.shared: dict[tuple[SharedBackbone, int | None], _Features] = {}

    def add(self, prefix: str, part: MemberPipeline | HeadsPipeline, scope: int = 0) -> list[str]:
        """Add the networks of a member; returns the names of their probabilities (b, k).

        Args:
            prefix: of the names in the graph.
            part: the member.
            scope: see `_Joiner.graft`.
        """
        self.scope = scope
        pixels = self.calibration_pixels(part)
        if isinstance(part, HeadsPipeline):
            # A later stage can take rows of the features of an earlier one, unless there are views.
            key = (part.shared, scope if part.views.count > 1 else None)
            if key not in self.shared:
                name = f"backbone{len(self.shared)}_"
                self.shared[key] = self.add_backbone(name, part.shared, pixels)
            features = self.shared[key]
            return [
                self.add_head(f"{prefix}fold{fold}_", cast("HeadPredictor", head), features)
                for fold, head in enumerate(part.heads)
            ]
        return [
            self.add_network(f"{prefix}fold{fold}_", part, cast("Predictor", predictor), pixels)
            for fold, predictor in enumerate(part.predictors)
        ]

    def calibration_pixels(self, part: MemberPipeline | HeadsPipeline) -> np.ndarray | None:
        """Return the input of a member's networks for the training images, if int8 needs it."""
        return part.pixels(self.calibration) if self.precision == "int8" else None

    def add_network(
        self, prefix: str, part: MemberPipeline, predictor: Predictor, pixels: np.ndarray | None
    ) -> str:
        """Add a network, as a backbone and a head if it has those; returns its output's name."""
        network = predictor.member
        if isinstance(network, Member) and predictor.views is not None:
            backbone = SharedBackbone(network, predictor.views, part.resize)
            head = HeadPredictor(network.head, predictor.views.count, predictor.task)
            backbone.require(head.form)
            return self.add_head(prefix, head, self.add_backbone(prefix, backbone, pixels))
        simple = simplify(predictor, part.canvas)
        model = self.tracer.trace_network(simple, part.canvas, ("pixels", "probs"), id(part))
        probs = f"{prefix}probs"
        model = convert(model, self.precision, pixels)
        canvas = self.add_canvas(part.canvas, part.resize)
        self.graph.graft(model, prefix, {"pixels": canvas}, {"probs": probs}, self.scope)
        return probs

    def add_backbone(
        self, prefix: str, backbone: SharedBackbone, pixels: np.ndarray | None
    ) -> _Features:
        """Add a backbone; returns the names of its features and their values on `pixels`."""
        simple = cast("SharedBackbone", simplify(backbone, backbone.canvas))
        names = ("pixels", *backbone.forms)
        key = _architecture(simple)
        model = self.tracer.trace_network(simple, backbone.canvas, names, key)
        values = {}
        if pixels is not None:
            values = dict(zip(backbone.forms, run_model(model, pixels), strict=True))
        outputs = {str(form): f"{prefix}{form}" for form in backbone.forms}
        model = convert(model, self.precision, pixels)
        canvas = self.add_canvas(backbone.canvas, backbone.resize)
        self.graph.graft(model, prefix, {"pixels": canvas}, outputs, self.scope)
        with torch.no_grad():
            example = torch.zeros(1, 3, backbone.canvas, backbone.canvas)
            shapes = {form: value.shape[1:] for form, value in simple(example).items()}
        return {form: _Feature(outputs[form], shapes[form], values.get(form)) for form in outputs}

    def add_head(self, prefix: str, head: HeadPredictor, features: _Features) -> str:
        """Add a head on these features; returns the name of its probabilities."""
        feature, probs = features[head.form], f"{prefix}probs"
        values = _uniform(5 * head.views, *feature.shape)
        example, other = values[: 2 * head.views], values[2 * head.views :]
        head = copy.deepcopy(head).float().eval().requires_grad_(False)
        key = (repr(head), head.views, head.task)
        model = self.tracer.trace(head, example, other, ("features", "probs"), key)
        model = convert(model, self.precision, feature.values)
        inputs = {"features": feature.name}
        self.graph.graft(model, f"{prefix}head_", inputs, {"probs": probs}, self.scope)
        return probs

    def add_canvas(self, size: int, mode: Literal["squash", "crop"]) -> str:
        """Add the resize to a canvas, unless it is there; returns the name of the pixels."""
        canvas = f"pixels_{size}_{mode}"
        if canvas not in self.graph.values and self.fixed_size:
            self.graph.convert_pixels(canvas)
        elif canvas not in self.graph.values:
            example = torch.zeros(2, 30, 40, 3, dtype=torch.uint8)
            other = (255 * _uniform(3, 50, 20, 3)).to(torch.uint8)
            resize = trace(_Resize(size, mode), example, other, ("images", "pixels"))
            self.graph.graft(resize, f"{canvas}_", {"images": "images"}, {"pixels": canvas})
        return canvas


class _Feature(NamedTuple):
    """One form of a backbone's features."""

    name: str
    """Of the value in the graph."""
    shape: Sequence[int]
    """Of one image and view."""
    values: np.ndarray | None
    """On the training images, for int8."""


_Features = dict[str, _Feature]


def _architecture(backbone: SharedBackbone) -> object:
    """Return all that decides about a backbone's graph except its state dict."""
    views = backbone.views
    config = getattr(backbone.backbone, "pretrained_cfg", None) or {}
    return (
        repr(backbone),
        config.get("architecture"),
        tuple(backbone.mean.flatten().tolist()),
        tuple(backbone.std.flatten().tolist()),
        (views.kind, views.count, views.img_size, tuple(views.corners)),
    )


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


class _Joiner:
    """Joins several ONNX graphs into one by prefixing names and connecting inputs to outputs.

    What two graphs have in common is in the result once: equal tensors, and nodes that compute the
    same from the same inputs, such as blocks that no stage has trained.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: set[str] = {"images"}
        self._tensors: dict[object, str] = {}
        self._results: dict[object, list[str]] = {}

    def graft(
        self,
        model: Any,
        prefix: str,
        inputs: dict[str, str],
        outputs: dict[str, str],
        scope: object = None,
    ) -> None:
        """Add a model's nodes under a prefix; `inputs` and `outputs` map its names to ours.

        Args:
            model: the model.
            prefix: of the names of its nodes, tensors and inner values.
            inputs: its inputs.
            outputs: its outputs.
            scope: models of equal scope share nodes; None = no other model's. All share tensors.
        """
        if model.functions:
            raise ExportError(
                "the exporter produced functions that cannot be joined",
                where=prefix,
                got=[f.name for f in model.functions],
            )
        names = {**inputs, **outputs, "": ""}
        for tensor in model.graph.initializer:
            names.setdefault(tensor.name, self._add_tensor(tensor, prefix))
        for node in model.graph.node:
            read = [names.get(name, prefix + name) for name in node.input]
            key = (
                prefix if scope is None else scope,
                node.op_type,
                node.domain,
                tuple(read),
                tuple(bool(name) for name in node.output),
                _attributes(node),
            )
            is_output = any(name in outputs for name in node.output)
            if key in self._results and not is_output:
                names.update(zip(node.output, self._results[key], strict=True))
                continue
            grafted = onnx.NodeProto()
            grafted.CopyFrom(node)
            grafted.name = prefix + node.name
            grafted.ClearField("metadata_props")
            grafted.ClearField("doc_string")
            grafted.input[:] = read
            grafted.output[:] = [names.get(name, prefix + name) for name in node.output]
            self.nodes.append(grafted)
            self._results.setdefault(key, list(grafted.output))
        self.values.update(outputs.values())

    def _add_tensor(self, tensor: Any, prefix: str) -> str:
        """Add a tensor, unless an equal one is there; returns the name."""
        content = onnx.numpy_helper.to_array(tensor).tobytes()
        digest = hashlib.sha256(content).digest()
        name = f"{prefix}{tensor.name}"
        known = self._tensors.setdefault((tensor.data_type, tuple(tensor.dims), digest), name)
        if known == name:
            added = onnx.TensorProto()
            added.CopyFrom(tensor)
            added.name = name
            self.initializers.append(added)
        return known

    def convert_pixels(self, output: str) -> None:
        """Add the images as floats (b, 3, h, w); the cast is first, since TensorRT asks for it."""
        floats = f"{output}_float"
        cast_node = onnx.helper.make_node(
            "Cast", ["images"], [floats], name=floats, to=onnx.TensorProto.FLOAT
        )
        transpose = onnx.helper.make_node(
            "Transpose", [floats], [output], name=output, perm=(0, 3, 1, 2)
        )
        self.nodes += [cast_node, transpose]
        self.values.add(output)

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

    def finish(self, num_classes: int, num_members: int, fixed_size: int) -> Any:
        """Make the ONNX model: images -> probs, member_probs."""
        value = onnx.helper.make_tensor_value_info
        sides = (fixed_size, fixed_size) if fixed_size else ("height", "width")
        graph = onnx.helper.make_graph(
            self.nodes,
            "threefold",
            [value("images", onnx.TensorProto.UINT8, ["batch", *sides, 3])],
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


def _attributes(node: Any) -> tuple[bytes, ...]:
    """Return a node's attributes in a form that can be compared."""
    return tuple(sorted(attribute.SerializeToString() for attribute in node.attribute))
