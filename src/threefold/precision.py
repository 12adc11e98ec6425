"""Members' weights in fewer bytes: float16 and bfloat16 storage, and int8 static quantisation.

What runs is what the CPU has kernels for. Half-precision weights are stored in half the bytes and cast to float32 in the
graph; onnxruntime does that once, at load, and computes in float32: the file is smaller, the speed is the same. int8 is
computed in int8: convolutions and matrix products, calibrated on training images; resize, normalisation, softmax, views,
ensemble and calibration stay float32. Inputs and outputs have the same types in every precision.
"""

from __future__ import annotations

import logging
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

Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
CALIBRATION_IMAGES: Final = 128
"""Training images that int8's ranges are taken from."""
SMALLEST: Final = 1024
"""Values of the smallest tensor that is stored in half precision; biases and constants below that stay as they are."""
FLOAT_SHARE: Final = 4
"""One in so many convolutions, the first ones, stay float32. They hold few weights and do most of the harm: on the demo's
first network int8 throughout agreed with float32 on 92 % of 500 images, with the first quarter left out on 98 %, as fast."""
QUANTISED: Final = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Clip",
    "Relu",
    "GlobalAveragePool",
    "ReduceMean",
)
"""Operators computed in int8; the rest stays float32."""


def check_precision(name: str) -> None:
    """Refuse a precision that does not exist.

    Raises:
        ExportError: unknown name.
    """
    if name not in PRECISIONS:
        raise ExportError(
            "no such precision", where="--precision", expected=" | ".join(PRECISIONS), got=name
        )


def convert(model: Any, precision: str, pixels: np.ndarray | None = None) -> Any:
    """A network's ONNX model with its weights in another precision.

    Args:
        model: pixels float32 (b, 3, s, s) in 0..255 to probs (b, k); left as it is.
        precision: one of `PRECISIONS`.
        pixels: float32 (n, 3, s, s), training images; int8 needs them.

    Raises:
        ExportError: unknown precision, or int8 without training images.
    """
    check_precision(precision)
    if precision == "int8":
        if pixels is None or not len(pixels):
            raise ExportError("int8 needs training images to calibrate on", got="none")
        return quantise(model, pixels)
    return model if precision == "float32" else halve(model, precision)


def halve(model: Any, precision: str) -> Any:
    """Store a model's large float32 tensors in float16 or bfloat16, each followed by a cast back to float32."""
    dtype = np.float16 if precision == "float16" else ml_dtypes.bfloat16
    casts: list[Any] = []
    kept: list[Any] = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type != onnx.TensorProto.FLOAT or values.size < SMALLEST:
            kept.append(tensor)
            continue
        with np.errstate(over="ignore"):  # overflow becomes infinite, and the parity gate refuses
            halves = values.astype(dtype)
        stored = onnx.numpy_helper.from_array(halves, f"{tensor.name}_{precision}")
        kept.append(stored)
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
        [*casts, *model.graph.node], model.graph.name, model.graph.input, model.graph.output, kept
    )
    return onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version
    )


def quantise(model: Any, pixels: np.ndarray) -> Any:
    """A model in int8: QDQ form, ranges of activations from the images, a scale for every output channel of a weight.

    Weights use 7 bits: with 8, products of the kernels of processors without VNNI overflow, and the answers would depend
    on the machine (onnxruntime's `reduce_range`).
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = Path(folder) / "int8.onnx"
        quantize_static(
            onnx.shape_inference.infer_shapes(model),
            target,
            _reader(pixels),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_exclude=_kept_in_float(model),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(target)


def _kept_in_float(model: Any) -> list[str]:
    """Names of the nodes up to the first convolutions and after the last matrix product (softmax, views)."""
    nodes = model.graph.node
    convolutions = [i for i, node in enumerate(nodes) if node.op_type == "Conv"]
    heavy = [i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul")] or [
        len(nodes) - 1
    ]
    first = convolutions[len(convolutions) // FLOAT_SHARE] if convolutions else heavy[0]
    return [node.name for i, node in enumerate(nodes) if i < first or i > heavy[-1]]


def _reader(pixels: np.ndarray) -> Any:
    """The images in small batches, as onnxruntime's calibration asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter(
                [{"pixels": pixels[i : i + 16]} for i in range(0, len(pixels), 16)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser speaks to the root logger of steps that do not apply."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
