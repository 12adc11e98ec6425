"""Compute the program of a saved Core ML package in torch, where Core ML itself does not run.

Core ML runs on Apple's systems only. The program in a package, its operations in MIL with their
weights, can be read anywhere, and each operation is defined in Apple's "MIL ops" reference. So an
export is checked for what the converter may have changed: weights, paddings, axes, order. It says
nothing about the arithmetic of Apple's processors. Only the operations of networks that were
exported here are known; any other is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from threefold.errors import ExportError

WEIGHTS: Final = Path("Data") / "com.apple.CoreML" / "weights"
"""Folder of the weights in a package."""


class MilProgram:
    """The program of a package.

    Args:
        package: the package.
        coremltools: the imported module.
    """

    def __init__(self, package: Path, coremltools: Any) -> None:
        from coremltools.converters.mil.frontend.milproto.load import load

        spec = coremltools.utils.load_spec(str(package))
        program = load(spec, spec.specificationVersion, str(package / WEIGHTS))
        self.package, self.function = package, program.functions["main"]

    @torch.inference_mode()
    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Map the input float32 (1, 3, size, size) to the outputs by name.

        Raises:
            ExportError: the program has an operation that is not known here.
        """
        (name,) = self.function.inputs
        values: dict[str, Any] = {name: torch.from_numpy(pixels)}
        for op in self.function.operations:
            if op.op_type == "const":
                continue
            compute = OPERATIONS.get(op.op_type)
            if compute is None:
                raise ExportError(
                    "no check here knows this operation of Core ML, so the file was not written",
                    where=self.package.name,
                    got=op.op_type,
                    fix="export to a name that ends in .onnx",
                )
            inputs = {key: _read(value, values) for key, value in op.inputs.items()}
            results = compute({key: value for key, value in inputs.items() if value is not None})
            results = results if isinstance(results, tuple | list) else [results]
            values |= zip([output.name for output in op.outputs], results, strict=True)
        return {output.name: values[output.name].numpy() for output in self.function.outputs}


def _read(value: Any, values: dict[str, Any]) -> Any:
    """Return the value of an operation's input: a tensor, or a plain value or list."""
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return [_read(one, values) for one in value]
    if value.name in values:
        return values[value.name]
    constant = value.val
    if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(constant))
    return constant.tolist() if isinstance(constant, np.ndarray | np.generic) else constant


def _padding(pairs: list[int]) -> list[int]:
    """Turn before and after of each axis, the first axis first, into the order of torch."""
    axes = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    return [value for axis in reversed(axes) for value in axis]


def _pad(x: Any) -> Tensor:
    if x["mode"] != "constant":
        raise ExportError("no check here knows this padding of Core ML", got=x["mode"])
    return functional.pad(x["x"], _padding(x["pad"]), value=float(x["constant_val"]))


def _pads(x: Any) -> list[int]:
    """The padding of a convolution or a pooling."""
    if x["pad_type"] not in ("valid", "custom"):
        raise ExportError("no check here knows this padding of Core ML", got=x["pad_type"])
    return _padding(x["pad"]) if x["pad_type"] == "custom" else [0, 0]


def _conv(x: Any) -> Tensor:
    padded = functional.pad(x["x"], _pads(x))
    return functional.conv2d(
        padded,
        x["weight"],
        x.get("bias"),
        stride=x.get("strides", 1),
        dilation=x.get("dilations", 1),
        groups=x.get("groups", 1),
    )


def _max_pool(x: Any) -> Tensor:
    padded = functional.pad(x["x"], _pads(x), value=-torch.inf)
    return functional.max_pool2d(
        padded, x["kernel_sizes"], x["strides"], ceil_mode=x.get("ceil_mode", False)
    )


def _avg_pool(x: Any) -> Tensor:
    pads, options = _pads(x), {"ceil_mode": x.get("ceil_mode", False)}
    sums = functional.avg_pool2d(
        functional.pad(x["x"], pads), x["kernel_sizes"], x["strides"], **options
    )
    if not x.get("exclude_padding_from_average", False):
        return sums
    ones = functional.pad(torch.ones_like(x["x"]), pads)
    return sums / functional.avg_pool2d(ones, x["kernel_sizes"], x["strides"], **options)


def _slice(x: Any) -> Tensor:
    """`slice_by_index` with positive strides."""
    value = x["x"]
    rank = value.ndim
    begin_mask = x.get("begin_mask", [False] * rank)
    end_mask = x.get("end_mask", [False] * rank)
    squeeze = x.get("squeeze_mask", [False] * rank)
    steps = x.get("stride", [1] * rank)
    index: list[int | slice] = []
    for axis in range(rank):
        if squeeze[axis]:
            index.append(x["begin"][axis])
            continue
        begin = None if begin_mask[axis] else x["begin"][axis]
        index.append(slice(begin, None if end_mask[axis] else x["end"][axis], steps[axis]))
    result: Tensor = value[tuple(index)]
    return result


def _expand_dims(x: Any) -> Tensor:
    value = x["x"]
    for axis in x["axes"]:
        value = value.unsqueeze(axis)
    result: Tensor = value
    return result


def _squeeze(x: Any) -> Tensor:
    result: Tensor = x["x"].squeeze(tuple(x["axes"])) if "axes" in x else x["x"].squeeze()
    return result


def _split(x: Any) -> Any:
    sizes = x.get("split_sizes") or x["x"].shape[x["axis"]] // x["num_splits"]
    return torch.split(x["x"], sizes, x["axis"])


def _reduce(function: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
    def compute(x: Any) -> Tensor:
        axes = x.get("axes", list(range(x["x"].ndim)))
        return function(x["x"], dim=axes, keepdim=x.get("keep_dims", False))

    return compute


def _matmul(x: Any) -> Tensor:
    left = x["x"].mT if x.get("transpose_x") else x["x"]
    right = x["y"].mT if x.get("transpose_y") else x["y"]
    return torch.matmul(left, right)


def _gelu(x: Any) -> Tensor:
    approximate = "none" if x.get("mode", "EXACT") == "EXACT" else "tanh"
    return functional.gelu(x["x"], approximate=approximate)


def _layer_norm(x: Any) -> Tensor:
    value, axes = x["x"], x["axes"]
    if [axis % value.ndim for axis in axes] != list(range(value.ndim - len(axes), value.ndim)):
        raise ExportError("no check here knows this layer norm of Core ML", got=axes)
    shape = value.shape[-len(axes) :]
    return functional.layer_norm(value, shape, x.get("gamma"), x.get("beta"), float(x["epsilon"]))


OPERATIONS: Final[dict[str, Callable[[Any], Any]]] = {
    "add": lambda x: x["x"] + x["y"],
    "avg_pool": _avg_pool,
    "clip": lambda x: x["x"].clamp(x["alpha"], x["beta"]),
    "concat": lambda x: torch.cat(x["values"], x["axis"]),
    "conv": _conv,
    "exp": lambda x: x["x"].exp(),
    "expand_dims": _expand_dims,
    "gelu": _gelu,
    "identity": lambda x: x["x"],
    "layer_norm": _layer_norm,
    "linear": lambda x: functional.linear(x["x"], x["weight"], x.get("bias")),
    "log": lambda x: (x["x"] + x.get("epsilon", 0)).log(),
    "matmul": _matmul,
    "max_pool": _max_pool,
    "maximum": lambda x: torch.maximum(torch.as_tensor(x["x"]), torch.as_tensor(x["y"])),
    "minimum": lambda x: torch.minimum(torch.as_tensor(x["x"]), torch.as_tensor(x["y"])),
    "mul": lambda x: x["x"] * x["y"],
    "pad": _pad,
    "real_div": lambda x: x["x"] / x["y"],
    "reduce_max": _reduce(torch.amax),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "relu": lambda x: x["x"].relu(),
    "relu6": lambda x: x["x"].clamp(0, 6),
    "reshape": lambda x: x["x"].reshape(x["shape"]),
    "sigmoid": lambda x: x["x"].sigmoid(),
    "sigmoid_hard": lambda x: (x["alpha"] * x["x"] + x["beta"]).clamp(0, 1),
    "silu": lambda x: functional.silu(x["x"]),
    "slice_by_index": _slice,
    "softmax": lambda x: x["x"].softmax(x["axis"]),
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda x: torch.stack(x["values"], x["axis"]),
    "sub": lambda x: x["x"] - x["y"],
    "tanh": lambda x: x["x"].tanh(),
    "transpose": lambda x: x["x"].permute(x["perm"]),
}
"""Function of each known operation, from its inputs by name."""
