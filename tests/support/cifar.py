"""CIFAR's python version: pickles exactly as Python 2 wrote them, from the binary sample."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from threefold.data.published import CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_SUPERCLASSES
from threefold.data.synthetic import write_sample

META: dict[str, dict[str, Any]] = {
    "cifar10": {
        "num_cases_per_batch": 10_000,
        "label_names": list(CIFAR10_CLASSES),
        "num_vis": 3072,
    },
    "cifar100": {
        "fine_label_names": list(CIFAR100_CLASSES),
        "coarse_label_names": list(CIFAR100_SUPERCLASSES),
    },
}
"""Content of `batches.meta` and `meta`."""


def write_python_cifar(root: Path, name: str) -> Path:
    """Write the python version of the sample of `cifar10` or `cifar100`.

    Returns:
        The folder of the batches below `root`; that of the binary version is beside it.
    """
    write_sample(name, root, per_class=2)
    binary = root / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir()
    for path in sorted(binary.glob("*.bin")):
        records = np.frombuffer(path.read_bytes(), np.uint8)
        if name == "cifar10":
            records = records.reshape(-1, 1 + 3072)
            batch: dict[str, Any] = {"labels": records[:, 0].tolist()}
        else:
            records = records.reshape(-1, 2 + 3072)
            batch = {
                "coarse_labels": records[:, 0].tolist(),
                "fine_labels": records[:, 1].tolist(),
            }
        batch["data"] = records[:, -3072:]
        batch["filenames"] = [f"image_s_{row:06d}.png" for row in range(len(records))]
        (folder / path.stem).write_bytes(pickle_as_python2(batch))
    meta = folder / ("batches.meta" if name == "cifar10" else "meta")
    meta.write_bytes(pickle_as_python2(META[name]))
    return folder


def pickle_as_python2(tree: dict[str, Any]) -> bytes:
    """Pickle a dictionary as Python 2's cPickle does with protocol 2.

    Args:
        tree: values are whole numbers, strings, lists of these, or uint8 arrays of two axes.
    """
    writer = _Pickler()
    writer.write_dict(tree)
    return bytes(writer.out) + b"."


class _Pickler:
    def __init__(self) -> None:
        self.out, self.memo = bytearray(b"\x80\x02"), 0

    def remember(self) -> None:
        self.memo += 1
        if self.memo < 256:
            self.out += b"q" + bytes([self.memo])
        else:
            self.out += b"r" + struct.pack("<L", self.memo)

    def emit(self, opcodes: bytes) -> None:
        """Write opcodes that leave a value, and remember the value."""
        self.out += opcodes
        self.remember()

    def write_str(self, value: str) -> None:
        raw = value.encode("latin-1")
        short = len(raw) < 256
        size = bytes([len(raw)]) if short else struct.pack("<L", len(raw))
        self.emit((b"U" if short else b"T") + size + raw)

    def write_int(self, value: int) -> None:
        if value < 256:
            self.out += b"K" + bytes([value])
        elif value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        else:
            self.out += b"J" + struct.pack("<l", value)

    def write(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            self.write_array(value)
        elif isinstance(value, list):
            self.write_list(value)
        elif isinstance(value, str):
            self.write_str(value)
        else:
            self.write_int(int(value))

    def write_list(self, values: list[Any]) -> None:
        self.emit(b"]")
        for start in range(0, len(values), 1000):  # cPickle's batches
            self.out += b"("
            for value in values[start : start + 1000]:
                self.write(value)
            self.out += b"e"

    def write_dict(self, tree: dict[str, Any]) -> None:
        self.emit(b"}")
        self.out += b"("
        for key, value in tree.items():
            self.write_str(key)
            self.write(value)
        self.out += b"u"

    def write_array(self, array: np.ndarray) -> None:
        self.emit(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.emit(b"cnumpy\nndarray\n")
        self.emit(b"K\0\x85")
        self.write_str("b")
        self.emit(b"\x87")
        self.emit(b"R")
        self.out += b"(K\1"
        for side in array.shape:
            self.write_int(side)
        self.emit(b"\x86")
        self.emit(b"cnumpy\ndtype\n")
        self.write_str("u1")
        self.emit(b"K\0K\1\x87")
        self.emit(b"R")
        self.out += b"(K\3"
        self.write_str("|")
        self.emit(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t")
        self.out += b"b\x89"
        self.write_str(array.tobytes().decode("latin-1"))
        self.emit(b"t")
        self.out += b"b"
