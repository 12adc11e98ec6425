"""What TensorRT's ONNX parser reads, by its published table; TensorRT itself is not needed.

The table is `docs/operators.md` of onnx-tensorrt. Later versions have added operators to it. Where
the table restricts an operator, the restriction is here too if a network can come into its way.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from threefold.errors import ExportError, shorten
from threefold.runtime.model import KEY
from threefold.runtime.model_file import read_card

VERSION: Final = "10.6"
"""The version of TensorRT whose table this is."""
OPSETS: Final = range(9, 23)
"""Versions of ONNX's operators that it reads."""
CHECKED: Final = f"operators checked against the table of TensorRT {VERSION}; TensorRT was not run"
"""What the check is about, for the model card."""

_NAMES: Final = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose
    Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp
    Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU
    HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf
    IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool
    LRN LSTM MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
    NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    Resize ReverseSequence RNN RoiAlign Round STFT Scan Scatter ScatterElements ScatterND Selu Shape
    Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
    Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
OPERATORS: Final = frozenset(_NAMES.split())

_CONSTANT_INPUT: Final = {"Squeeze": 1, "Unsqueeze": 1, "CumSum": 1}
"""Operators with an input that must be a constant, and its place; so have those of `Reduce`."""
_POOLS: Final = ("AveragePool", "LpPool", "MaxPool")
_ONE_OUTPUT: Final = ("MaxPool", "LayerNormalization")
_TYPES: Final = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.BOOL,
)
"""Types of tensors in a graph that is not quantized."""


def check_graph(model: Any, where: object) -> None:
    """Refuse a graph that TensorRT's parser would not read.

    Args:
        model: ONNX model.
        where: the file that would be written.

    Raises:
        ExportError: names what TensorRT lacks.
    """
    problems = find_problems(model)
    if problems:
        raise ExportError(
            "TensorRT does not read this graph, so it was not written",
            where=where,
            expected=f"operators of TensorRT {VERSION}",
            got=shorten(problems),
            fix="leave out --fixed-size, or export other members with --members",
        )


def find_problems(model: Any) -> list[str]:
    """Describe what TensorRT's parser does not read in an ONNX model, each in a few words."""
    problems: dict[str, None] = {}  # in order, each once
    for imported in model.opset_import:
        if not imported.domain and imported.version not in OPSETS:
            problems[f"opset {imported.version}"] = None
    images = {
        value.name
        for value in model.graph.input
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    }
    for graph in _graphs(model.graph):
        constants = {tensor.name for tensor in graph.initializer} | {
            node.output[0] for node in graph.node if node.op_type == "Constant"
        }
        for tensor in graph.initializer:
            if tensor.data_type not in _TYPES:
                kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
                problems[f"weights of type {kind}"] = None
        for node in graph.node:
            problems.update(dict.fromkeys(_node_problems(node, constants, images)))
    return list(problems)


def trtexec_line(path: str | Path, images: Sequence[int] = (1, 8, 32)) -> str:
    """Return the command that builds an engine from a file of a fixed size.

    Args:
        path: the file.
        images: fewest, usual and most images of a batch.
    """
    path = Path(path)
    size = read_card(path, KEY)["fixed_size"]
    shapes = " ".join(
        f"--{name}Shapes=images:{count}x{size}x{size}x3"
        for name, count in zip(("min", "opt", "max"), images, strict=True)
    )
    onnx_file, engine = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".plan")))
    return f"trtexec --onnx={onnx_file} {shapes} --noTF32 --saveEngine={engine}"


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _node_problems(node: Any, constants: Iterable[str], images: set[str]) -> Iterator[str]:
    """Yield what TensorRT does not read in a node."""
    name = node.op_type
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.domain not in ("", "ai.onnx"):
        yield f"{node.domain}.{name}"
    elif name not in OPERATORS:
        yield name
    if images.intersection(node.input) and name != "Cast":
        yield f"{name} of 8-bit pixels"
    place = 1 if name.startswith("Reduce") else _CONSTANT_INPUT.get(name, len(node.input))
    if any(value and value not in constants for value in node.input[place:]):
        yield f"{name} over axes that are computed"
    if name in _POOLS and np.any(np.array(attributes.get("dilations", 1)) != 1):
        yield f"{name} with dilations"
    if name in _ONE_OUTPUT and any(node.output[1:]):
        yield f"{name} with a second output"
    if name == "LSTM" and (attributes.get("layout") or attributes.get("input_forget")):
        yield "LSTM with another layout"
    if name == "Resize":
        yield from _resize_problems(attributes)


def _resize_problems(attributes: dict[str, Any]) -> Iterator[str]:
    mode = attributes.get("mode", b"nearest").decode()
    if mode not in ("nearest", "linear"):
        yield f"Resize of mode {mode}"
    if attributes.get("antialias"):
        yield "Resize with antialiasing"
    coordinates = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    if coordinates == "tf_crop_and_resize":
        yield f"Resize of coordinates {coordinates}"
