"""Model files on disk: one file, or above 2 GB a bundle of the file and one data file beside it.

Protobuf ends at 2 GB, so a larger model keeps its weights in a plain file in the same folder (ONNX's external data). The
data file's name holds the hash of its content, and it is in place before the model file that names it: whatever interrupts an
export, a model file that is there belongs to the data that it names, the old ones or the new ones. Both move together.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx

from threefold.errors import ExportError, RunError
from threefold.files import write_bytes

LIMIT: Final = 2**31 - 2**24
"""Bytes of weights above which a bundle is written; what is left to 2 GB is for the graph and the card."""
SMALLEST: Final = 1024
"""Bytes of the smallest tensor that goes into the data file."""
ALIGN: Final = 4096
"""Tensors begin at multiples of this in the data file, so that runtimes can map them into memory."""


class Staged(NamedTuple):
    """A model on disk that is not yet in its place."""

    model: Path
    data: Path | None
    told: Mapping[str, Any]
    """What the card says of a bundle: {"bundle": {"file", "bytes", "sha256"}}, or nothing."""


def weight_bytes(model: Any) -> int:
    """Bytes of a model's tensors, without serialising it (which fails above 2 GB)."""
    return sum(_bytes(tensor) for tensor in _tensors(model.graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """A graph's weights, those of its branches among them: a cascade keeps later members there."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _bytes(tensor: Any) -> int:
    return int(math.prod(tensor.dims)) * int(
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )


@contextmanager
def staged(model: Any, target: Path, seal: Callable[[Mapping[str, Any]], None]) -> Iterator[Staged]:
    """Write a model where it can be tried; it is gone afterwards unless it was published.

    Args:
        model: ONNX model; above `LIMIT` its weights move out of it into the data file.
        target: where it shall be in the end.
        seal: puts the card into the model, with what a bundle adds to it.

    Raises:
        ExportError: the files cannot be written.
    """
    large = weight_bytes(model) > LIMIT
    try:
        if large:
            target.parent.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(
            dir=target.parent if large else None, prefix=f".{target.name}."
        )
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error.strerror or error) from None
    with holder as folder:
        data: Path | None = None
        told: Mapping[str, Any] = {}
        if large:
            data, told = _move_weights(model, Path(folder), target.name)
        seal(told)
        trial = Path(folder) / "model.onnx"
        write_file(trial, model.SerializeToString())
        yield Staged(trial, data, told)


def publish(model: Any, found: Staged, target: Path) -> int:
    """Put a staged model into its place, with the card it has now; returns its bytes, data file included.

    Raises:
        ExportError: the files cannot be written.
    """
    before = data_file(target)
    size = 0
    if found.data is not None:
        place = target.parent / found.data.name
        size = found.data.stat().st_size
        try:
            os.replace(found.data, place)
        except OSError as error:
            raise ExportError("cannot write", where=place, got=error.strerror or error) from None
    write_file(target, model.SerializeToString())
    if before is not None and (found.data is None or before.name != found.data.name):
        with suppress(OSError):
            before.unlink()
    return size + target.stat().st_size


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        write_bytes(path, content)
    except RunError as error:
        raise ExportError(str(error)) from None


def data_file(target: Path) -> Path | None:
    """The data file of a bundle that stands at `target`; None of a single file, or where none of ours is there."""
    if not any(target.parent.glob(f"{glob.escape(target.name)}.*.bin")):
        return None
    try:
        head = onnx.load(target, load_external_data=False)
    except Exception:  # nothing there, or not a model: then there is nothing of ours beside it
        return None
    named = {
        entry.value
        for t in _tensors(head.graph)
        for entry in t.external_data
        if entry.key == "location"
    }
    names = [
        name
        for name in named
        if re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{16}\.bin", name)
    ]
    return target.parent / names[0] if len(named) == len(names) == 1 else None


def _move_weights(model: Any, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Move the large tensors' bytes into one file in the folder; returns it and what the card says of it."""
    digest, path, end = hashlib.sha256(), folder / "weights", 0
    moved: list[tuple[Any, int, int]] = []
    try:
        with open(path, "wb") as file:
            for tensor in _tensors(model.graph):
                if (
                    _bytes(tensor) < SMALLEST or tensor.data_type == onnx.TensorProto.INT64
                ):  # shapes, read with the graph
                    continue
                raw = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
                gap = bytes(-end % ALIGN)
                for part in (gap, raw):
                    file.write(part)
                    digest.update(part)
                moved.append((tensor, end + len(gap), len(raw)))
                end += len(gap) + len(raw)
                tensor.ClearField("raw_data")
            file.flush()
            os.fsync(file.fileno())
        data = folder / f"{name}.{digest.hexdigest()[:16]}.bin"
        os.replace(path, data)
    except OSError as error:
        raise ExportError(
            "cannot write", where=path.parent, got=error.strerror or error, fix="free disk space"
        ) from None
    for tensor, offset, length in moved:
        for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", data.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return data, {"bundle": {"file": data.name, "bytes": end, "sha256": digest.hexdigest()}}
