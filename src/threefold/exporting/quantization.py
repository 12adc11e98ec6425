"""Store members' weights in fewer bytes: float16 and bfloat16, or int8 static quantization.

Half-precision weights take half the bytes and are cast to float32 in the graph. onnxruntime does
that once, at load, and computes in float32: the file is smaller, the speed is the same. int8
computes convolutions and matrix products in int8, calibrated on training images; resize,
normalization, softmax, views, ensemble and calibration stay float32. Inputs and outputs have the
same types in every precision.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, get_args

import ml_dtypes
import numpy as np
import onnx

from threefold.errors import ExportError
from threefold.files import TemporaryFolder

Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
CALIBRATION_IMAGES: Final = 128
"""Training images from which int8 takes its ranges."""
SMALLEST: Final = 1024
"""Values of the smallest tensor stored in half precision; biases and constants stay float32."""
FLOAT_SHARE: Final = 4
"""The first 1 / FLOAT_SHARE of the convolutions stay float32.

They have few weights and cause most of the error: on the demo's first network int8 throughout
agreed with float32 on 92 % of 500 images, without the first quarter on 98 %, equally fast.
"""
QUANTIZED: Final = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Clip",
    "Relu",
    "GlobalAveragePool",
    "ReduceMean",
)
"""Operators computed in int8; the others stay float32."""


def check_precision(name: str) -> None:
    """Refuse a precision that does not exist.

    Raises:
        ExportError: unknown name.
    """
    if name not in PRECISIONS:
        raise ExportError(
            "no such precision", where="--precision", expected=" | ".join(PRECISIONS), got=name
        )


def convert(model: Any, precision: str, inputs: np.ndarray | None = None) -> Any:
    """Convert the weights of a network's ONNX model to another precision.

    Args:
        model: a network or a part of one, with one float32 input; not changed.
        precision: one of `PRECISIONS`.
        inputs: float32 (n, ...), of training images; int8 needs them.

    Raises:
        ExportError: unknown precision, or int8 without training images.
    """
    check_precision(precision)
    if precision == "int8":
        if inputs is None or not len(inputs):
            raise ExportError("int8 needs training images to calibrate on", got="none")
        return quantize(model, inputs)
    return model if precision == "float32" else halve(model, precision)


def halve(model: Any, precision: str) -> Any:
    """Store large float32 tensors in float16 or bfloat16, each with a cast back to float32."""
    dtype = np.float16 if precision == "float16" else ml_dtypes.bfloat16
    casts: list[Any] = []
    initializers: list[Any] = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type != onnx.TensorProto.FLOAT or values.size < SMALLEST:
            initializers.append(tensor)
            continue
        with np.errstate(over="ignore"):  # overflow becomes infinite, and the parity gate refuses
            halves = values.astype(dtype)
        stored = onnx.numpy_helper.from_array(halves, f"{tensor.name}_{precision}")
        initializers.append(stored)
        casts.append(
            onnx.helper.make_node(
                "Cast",
                [stored.name],
                [tensor.name],
                name=f"{tensor.name}_cast",
                to=onnx.TensorProto.FLOAT,
            )
        )
    graph = onnx.helper.make_graph(
        [*casts, *model.graph.node],
        model.graph.name,
        model.graph.input,
        model.graph.output,
        initializers,
    )
    return onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )


def quantize(model: Any, inputs: np.ndarray) -> Any:
    """Quantize a model to int8 in QDQ form, with one scale per output channel of a weight.

    The ranges of activations come from the images. Weights use 7 bits (onnxruntime's
    `reduce_range`): with 8, products overflow on processors without VNNI, and the answers would
    depend on the machine.

    Raises:
        OSError: temporary files cannot be written.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with TemporaryFolder() as folder, _quiet(), _own_folder_refused():
        target = Path(folder) / "int8.onnx"
        quantize_static(
            onnx.shape_inference.infer_shapes(model),
            target,
            _reader(model.graph.input[0].name, inputs),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=_float_nodes(model),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(target)


def _float_nodes(model: Any) -> list[str]:
    """Name the nodes before the first int8 convolution and after the last product."""
    nodes = model.graph.node
    convolutions = [i for i, node in enumerate(nodes) if node.op_type == "Conv"]
    products = [i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul")]
    if not products:
        return [node.name for node in nodes[:-1]]
    first = convolutions[len(convolutions) // FLOAT_SHARE] if convolutions else products[0]
    return [node.name for i, node in enumerate(nodes) if i < first or i > products[-1]]


def _reader(name: str, inputs: np.ndarray) -> Any:
    """Make a reader that gives the inputs to onnxruntime's calibration in batches of 16."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter(
                [{name: inputs[i : i + 16]} for i in range(0, len(inputs), 16)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    return Reader()


@contextmanager
def _own_folder_refused() -> Iterator[None]:
    """Say that the quantizer's own temporary folder may not be written.

    `tempfile.TemporaryDirectory`, which it uses, calls itself until Python's stack is full where it
    may not delete.

    Raises:
        PermissionError: it is so.
    """
    try:
        yield
    except RecursionError:
        reason = os.strerror(errno.EACCES)
        raise PermissionError(errno.EACCES, reason, tempfile.gettempdir()) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's quantizer, which logs about steps that do not apply."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
