"""Read untrusted files of arrays, without pickle.

Sizes are checked before memory is allocated.
`adapters` knows what the arrays mean.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from threefold.errors import DataError, RunError, refuse_address
from threefold.npz_files import read_into
from threefold.scratch import scratch

MAX_BYTES: Final = 4 << 30
"""Most memory that one file may take.

4 GiB hold 50,000 rows of 1,000 classes from 21 members in float32."""

_MAGIC = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x93NUMPY", "npy"),
    (b"PAR1", "parquet"),
    (b"\x89HDF", "HDF5"),
    (b"\x1f\x8b", "gzip"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
)
_SUFFIXES = {
    ".npz": "npz",
    ".npy": "npy",
    ".parquet": "parquet",
    ".pt": "pt",
    ".pth": "pt",
    ".json": "json",
    ".csv": "csv",
}
COPY_FIX: Final = "write the file again, and copy all of it"
"""Advice for files that were cut off."""


def detect_format(path: Path) -> str:
    """Find the format of a file from its first bytes: npz, npy, parquet, pt, json or csv.

    Raises:
        DataError: the file is missing, empty or of another format, or its suffix names another one.
    """
    if not path.is_file():
        refuse_address(path)
        got = "no regular file" if path.exists() else "no such file"
        raise DataError(
            "cannot read the predictions", where=path, got="a folder" if path.is_dir() else got
        )
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError("cannot read the predictions", where=path, got=error) from None
    if not start:
        raise DataError("the predictions file is empty", where=path, got="0 bytes", fix=COPY_FIX)
    format_name = _sniff(path, start)
    is_supported = format_name in _SUFFIXES.values()
    expected = _SUFFIXES.get(path.suffix.lower())
    if is_supported and expected in (format_name, None):
        return format_name
    if format_name == "pickle" and expected == "pt":
        return "pt"  # the format of torch.save before 2020, which weights_only reads as well
    fix = "save .npz, .csv or .parquet"
    if format_name == "UTF-16 text":
        fix = "save it as UTF-8"
    elif is_supported:
        fix = f"rename the file to end in .{format_name}"
    raise DataError(
        "unknown format" if expected is None else "the content of the file contradicts its suffix",
        where=path,
        expected=expected or ", ".join(_SUFFIXES),
        got=f"{format_name} content",
        fix=fix,
    )


def _sniff(path: Path, start: bytes) -> str:
    """The format of a file that starts with these bytes."""
    for magic, format_name in _MAGIC:
        if start.startswith(magic):
            return _zip_format(path) if format_name == "zip" else format_name
    if b"\0" in start:
        return "binary"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return "json" if text[:1] in (b"{", b"[") else "csv"


def _zip_format(path: Path) -> str:
    """npz, pt or zip, from the names of the entries."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        raise DataError(
            "the file is cut off or damaged", where=path, got="a zip without its end", fix=COPY_FIX
        ) from None
    if any(name.endswith("/data.pkl") for name in names):
        return "pt"
    return "npz" if any(name.endswith(".npy") for name in names) else "zip"


def npz_dtypes(path: Path) -> dict[str, np.dtype[Any]]:
    """Names and types of the arrays in an .npz. Their claimed sizes are checked against the file.

    Raises:
        DataError: the file is damaged, larger than MAX_BYTES, or has an array of Python objects.
    """
    dtypes: dict[str, np.dtype[Any]] = {}
    total = 0
    with _one_line_errors(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:  # numpy would read the whole entry, whatever its size
                raise DataError(
                    "the .npz has an entry that is not an array", where=path, got=name[:80]
                )
            with archive.open(info) as file:
                dtypes[name], size = _npy_header(file, f"{path}: {name}", info.file_size)  # type: ignore[arg-type]
            total += size
    check_size(total, path)
    return dtypes


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, after a check of their sizes; large ones as `scratch` has them.

    Raises:
        DataError: as `npz_dtypes`.
        RunError: there is no room for the temporary file of a large array.
    """
    names = npz_dtypes(path)
    with _one_line_errors(path), zipfile.ZipFile(path) as archive:
        entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        arrays = {}
        for name in names:
            with archive.open(entries[name]) as file:
                arrays[name] = _read_array(file)  # type: ignore[arg-type]
                file.read(1)  # at its end the archive compares the checksum
        return arrays


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy, after a check of its size.

    Raises:
        DataError: the file is damaged, larger than MAX_BYTES, or holds Python objects.
    """
    with _one_line_errors(path), open(path, "rb") as file:
        _, size = _npy_header(file, str(path), path.stat().st_size)
        check_size(size, path)
        file.seek(0)
        return _read_array(file)


class _Header(NamedTuple):
    """What an .npy file says about its array."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]


def _read_header(file: BinaryIO) -> _Header:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return _Header(*np.lib.format.read_array_header_1_0(file))
    if version == (2, 0):
        return _Header(*np.lib.format.read_array_header_2_0(file))
    raise ValueError(f"npy version {version}")


def _read_array(file: BinaryIO) -> np.ndarray:
    """Read the array of an .npy file whose header has been checked, piece by piece.

    A large array goes to a file of ours, packed or not: its memory is the system's to give and
    take, the archive's checksum is compared, and whoever writes the source again does no harm.
    """
    shape, is_fortran, dtype = _read_header(file)
    array = scratch(shape[::-1] if is_fortran else shape, dtype)
    read_into(array, file)
    return array.T if is_fortran else array


def _npy_header(file: BinaryIO, where: str, length: int) -> tuple[np.dtype[Any], int]:
    """Type and size in bytes of the array in an .npy file of this length."""
    shape, _, dtype = _read_header(file)
    if dtype.hasobject:
        raise DataError(
            "the file holds Python objects, which are never unpickled",
            where=where,
            fix="save names as plain string arrays, numpy.array(names, dtype=str), "
            "and a dict as list(it)",
        )
    size = math.prod(shape) * dtype.itemsize  # Python integers do not overflow
    if size != length - file.tell():
        raise DataError(
            "the array is cut off or damaged",
            where=where,
            expected=f"{size} bytes for {shape}",
            got=length - file.tell(),
            fix=COPY_FIX,
        )
    return dtype, size


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """Tensors and lists of text saved with torch.save: a dict, or a pair (probs, labels).

    fastai's `get_preds` returns the pair. The file is read with weights_only, which builds tensors
    and plain values and calls nothing.

    Raises:
        DataError: the file is damaged or too large, or holds other objects.
    """
    import torch

    fix = "save plain arrays: numpy.savez(path, probs=probs.numpy(), labels=labels.numpy())"
    check_size(path.stat().st_size, path)
    if zipfile.is_zipfile(path):
        with _one_line_errors(path), zipfile.ZipFile(path) as archive:
            check_size(sum(info.file_size for info in archive.infolist()), path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on damaged and on refused files
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise DataError(
            "the file holds more than tensors, or is damaged",
            where=path,
            got=(refused.group(1) if refused else type(error).__name__)[:100],
            fix=fix,
        ) from None
    if isinstance(tree, tuple | list) and len(tree) == 2:
        tree = dict(zip(("probs", "labels"), tree, strict=True))
    if not isinstance(tree, dict):
        raise DataError(
            "the file holds neither a dict nor a pair (probs, labels)",
            where=path,
            got=type(tree).__name__,
            fix=fix,
        )
    arrays = {}
    for name, value in tree.items():
        array = _to_array(value, path)
        if array is None:
            raise DataError(
                "a value cannot be used",
                where=f"{path}: {name}",
                expected="tensors and lists of text",
                got=type(value).__name__,
                fix=fix,
            )
        arrays[str(name)] = array
    return arrays


def _to_array(value: Any, path: Path) -> np.ndarray | None:
    """A dense CPU tensor or a list of text as an array; None for anything else."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            return None
        check_size(value.numel() * value.element_size(), path)
        if value.dtype == torch.bfloat16:  # numpy has no such type
            value = value.float()
        array: np.ndarray = value.detach().resolve_conj().numpy()
        return array
    if isinstance(value, list | tuple) and all(isinstance(cell, str) for cell in value):
        check_size(len(value) * max(map(len, value), default=0) * 4, path)
        return np.array(value, dtype=np.str_)
    return None


def check_size(size: int, path: Path) -> None:
    """Refuse a file that takes more than MAX_BYTES in memory.

    Raises:
        DataError: the file is too large.
    """
    if size > MAX_BYTES:
        raise DataError(
            "the file is too large",
            where=path,
            expected=f"at most {MAX_BYTES >> 20} MiB",
            got=f"{size >> 20} MiB",
            fix="save float32, and one file per model",
        )


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn what numpy and zipfile raise on bad files into one DataError."""
    try:
        yield
    except (DataError, RunError):
        raise
    except Exception as error:  # many types, even those of Python's tokenizer
        got = f"{type(error).__name__}: {str(error)[:120]}"
        raise DataError(
            "the file is cut off or damaged", where=path, got=got, fix=COPY_FIX
        ) from None
