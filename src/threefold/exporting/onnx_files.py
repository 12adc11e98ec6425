"""Model files on disk: one file, or above 2 GB a bundle of the model and one data file beside it.

Protobuf ends at 2 GB, so a larger model keeps its weights in a plain file in the same folder
(ONNX's external data). The name of the data file contains the hash of its content, and it is
written before the model file that names it. So a model file always matches the data that it names,
old or new, even if an export is interrupted. Both files must be moved together.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx
import onnx_ir as ir

from threefold.errors import ExportError, RunError
from threefold.files import TemporaryFolder, delete_leftovers, flush_folder, sha256, write_bytes
from threefold.runtime.model import KEY
from threefold.runtime.model_file import CHECKSUM

LIMIT: Final = 2**31 - 2**24
"""Bytes of weights above which a bundle is written; leaves room for the graph and the card."""
SMALLEST: Final = 1024
"""Bytes of the smallest tensor that goes into the data file."""
ALIGN: Final = 4096
"""Tensors start at multiples of this in the data file, so that runtimes can memory-map them."""


class Staged(NamedTuple):
    """A model on disk that is not published yet."""

    model: Path
    data: Path | None
    bundle: Mapping[str, Any]
    """The entry of a bundle in the card: {"bundle": {"file", "bytes", "sha256"}}, or empty."""


def set_card(model: Any, card: Mapping[str, Any]) -> None:
    """Store a model card in the metadata of an ONNX model, in place of any other metadata."""
    text = json.dumps(card, ensure_ascii=False, default=float)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: text})


def weights(graph: Any) -> Iterator[Any]:
    """Yield the tensors of a graph and of its branches, where a cascade keeps later members."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from weights(attribute.g)


def serialize(model: Any) -> bytes:
    """Return the content of a model file with a checksum in its metadata (`model_file.CHECKSUM`).

    The checksum is that of the content without the digits of the checksum itself.
    """
    others = [entry for entry in model.metadata_props if entry.key != CHECKSUM]
    blank = "0" * 64
    onnx.helper.set_model_props(
        model, {**{entry.key: entry.value for entry in others}, CHECKSUM: blank}
    )
    content: bytes = model.SerializeToString()
    begin = content.rindex(CHECKSUM.encode())
    begin = content.index(blank.encode(), begin)
    digest = hashlib.sha256(content[:begin])
    digest.update(content[begin + len(blank) :])
    return b"".join([content[:begin], digest.hexdigest().encode(), content[begin + len(blank) :]])


@contextmanager
def staged(model: Any, target: Path, card: Mapping[str, Any] | None = None) -> Iterator[Staged]:
    """Write a model to a temporary folder, where it can be tried and from which it is published.

    Args:
        model: ONNX model; above `LIMIT` its weights move out of it into the data file.
        target: where it will be published.
        card: stored in the model, together with the entry of a bundle.

    Raises:
        ExportError: the files cannot be written.
    """
    # Serialising the model to learn its size would fail above 2 GB.
    large = sum(ir.from_proto(tensor).nbytes for tensor in weights(model.graph)) > LIMIT
    try:
        directory = TemporaryFolder(target) if large else TemporaryFolder()
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error) from None
    with directory as folder:
        data: Path | None = None
        bundle: dict[str, Any] = {}
        if large:
            data = _move_weights(model, Path(folder), target.name)
            bundle["bundle"] = {
                "file": data.name,
                "bytes": data.stat().st_size,
                "sha256": sha256(data),
            }
        if card is not None:
            set_card(model, {**card, **bundle})
        trial = Path(folder) / "model.onnx"
        write_file(trial, serialize(model))
        yield Staged(trial, data, bundle)


def publish(model: Any, trial: Staged, target: Path) -> int:
    """Publish a staged model, with the card it has now.

    Returns:
        The bytes written, data file included.

    Raises:
        ExportError: the files cannot be written.
    """
    old_data = data_file(target)
    size = 0
    if trial.data is not None:
        size = trial.data.stat().st_size
        place_file(trial.data, target.parent / trial.data.name)
    write_file(target, serialize(model))
    if old_data is not None and (trial.data is None or old_data.name != trial.data.name):
        with suppress(OSError):
            old_data.unlink()
    return size + target.stat().st_size


def place_file(trial: Path, target: Path) -> None:
    """Flush a finished file to disk and move it to its place in one step.

    Raises:
        ExportError: the file cannot be moved.
    """
    try:
        with open(trial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(trial, target)
        flush_folder(target.parent)
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error) from None


def write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, and delete what killed processes left of it.

    Raises:
        ExportError: the file cannot be written.
    """
    try:
        delete_leftovers(path.parent, path.name)
        write_bytes(path, content)
    except RunError as error:
        raise ExportError(str(error)) from None


def data_file(target: Path) -> Path | None:
    """Find the data file of a bundle at `target`; None for a single file, or foreign data."""
    if not any(target.parent.glob(f"{glob.escape(target.name)}.*.bin")):
        return None
    try:
        model = onnx.load(target, load_external_data=False)
    except Exception:  # missing, or not a model
        return None
    locations = {
        entry.value
        for tensor in weights(model.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if len(locations) != 1:
        return None
    name = locations.pop()
    ours = re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{16}\.bin", name)
    return target.parent / name if ours else None


def _move_weights(model: Any, folder: Path, name: str) -> Path:
    """Move the bytes of the large tensors into one file in the folder; returns the file."""
    tensors = []
    for proto in weights(model.graph):
        if proto.data_type == onnx.TensorProto.INT64:  # shapes, which are read with the graph
            continue
        tensor = ir.from_proto(proto)
        if tensor.nbytes >= SMALLEST:
            tensors.append((proto, tensor))
    try:
        moved = ir.external_data.convert_tensors_to_external(
            [tensor for _, tensor in tensors], folder, "weights", alignment=ALIGN, align_threshold=0
        )
        digest = sha256(folder / "weights")
        data = folder / f"{name}.{digest[:16]}.bin"
        os.replace(folder / "weights", data)
    except OSError as error:
        raise ExportError("cannot write", where=folder, got=error) from None
    for (proto, _), tensor in zip(tensors, moved, strict=True):
        stored = ir.ExternalTensor(
            data.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
        )
        proto.Clear()
        ir.serde.serialize_tensor_into(proto, stored)
    return data
