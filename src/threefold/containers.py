"""Files of arrays, read without trust: sizes are checked before memory is taken, and nothing is unpickled.

What the arrays mean is not known here: `adapters` says that.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from threefold.errors import DataError

MAX_BYTES: Final = 4 << 30
"""What one file may claim in memory: 4 GiB, as float32 50,000 rows of 1,000 classes from 21 members."""

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
WHOLE: Final = "write the file again, and copy it whole"
"""What helps against files that were cut off."""


def content_of(path: Path) -> str:
    """What a file is by its first bytes: npz, npy, parquet, pt, json or csv.

    Raises:
        DataError: no such file, empty, of another kind, or its name ends in what it is not.
    """
    if not path.is_file():
        raise DataError(
            "cannot read the predictions",
            where=path,
            got="a folder" if path.is_dir() else "no such file",
        )
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(
            "cannot read the predictions", where=path, got=error.strerror or error
        ) from None
    if not start:
        raise DataError("the predictions file is empty", where=path, got="0 bytes", fix=WHOLE)
    found = next(
        (kind for magic, kind in _MAGIC if start.startswith(magic)),
        "binary" if b"\0" in start else "text",
    )
    if found == "zip":
        found = _zip_content(path)
    elif found == "text":
        found = (
            "json" if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") else "csv"
        )
    named = _SUFFIXES.get(path.suffix.lower(), found)
    if named == found and found in _SUFFIXES.values():
        return found
    if found == "pickle" and named == "pt":
        return "pt"  # torch.save of before 2020; it is read with weights_only, too
    fix = (
        f"rename the file to end in .{found}"
        if found in _SUFFIXES.values()
        else "save .npz, .csv or .parquet"
    )
    if found == "UTF-16 text":
        fix = "save it as UTF-8"
    raise DataError(
        "the content of the file is not what its name says"
        if path.suffix.lower() in _SUFFIXES
        else "unknown format",
        where=path,
        expected=named if named != found else ", ".join(_SUFFIXES),
        got=f"{found} content",
        fix=fix,
    )


def _zip_content(path: Path) -> str:
    """npz or pt, by the names inside."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        raise DataError(
            "the file is cut off or damaged", where=path, got="a zip without its end", fix=WHOLE
        ) from None
    if any(name.endswith("/data.pkl") for name in names):
        return "pt"
    return "npz" if any(name.endswith(".npy") for name in names) else "zip"


def npz_headers(path: Path) -> dict[str, np.dtype[Any]]:
    """Names and types of the arrays in an .npz, after their claimed sizes were compared with what is there.

    Raises:
        DataError: damaged, larger than MAX_BYTES, or an array of Python objects (which is never unpickled).
    """
    found: dict[str, np.dtype[Any]] = {}
    total = 0
    with _refusing(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:  # numpy would read it whole, whatever its size
                raise DataError(
                    "the .npz holds something else than arrays", where=path, got=name[:80]
                )
            with archive.open(info) as file:
                found[name], size = _npy_header(file, f"{path}: {name}", info.file_size)  # type: ignore[arg-type]
            total += size
    limit(total, path)
    return found


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, sizes checked first.

    Raises:
        DataError: as `npz_headers`.
    """
    names = npz_headers(path)
    with _refusing(path), np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in names}


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy, its size checked first.

    Raises:
        DataError: damaged, larger than MAX_BYTES, or Python objects.
    """
    with _refusing(path):
        with open(path, "rb") as file:
            _, size = _npy_header(file, str(path), path.stat().st_size)
        limit(size, path)
        return np.asarray(np.load(path, allow_pickle=False))


def _npy_header(file: BinaryIO, where: str, length: int) -> tuple[np.dtype[Any], int]:
    """Type and bytes of the array in an .npy of this length."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            "the file holds Python objects, which are never unpickled",
            where=where,
            fix="save names as plain string arrays, numpy.array(names, dtype=str), and a dict as list(it)",
        )
    size = math.prod(shape) * dtype.itemsize  # Python's integers: no overflow
    if size != length - file.tell():
        raise DataError(
            "the array is cut off or damaged",
            where=where,
            expected=f"{size} bytes for {shape}",
            got=length - file.tell(),
            fix=WHOLE,
        )
    return dtype, size


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """Tensors and lists of text saved with torch.save: a dict, or the pair (probs, labels) of `get_preds`.

    Read with weights_only, which builds tensors and plain values and calls nothing.

    Raises:
        DataError: damaged, too large, or it holds other objects.
    """
    import torch

    fix = "save plain arrays: numpy.savez(path, probs=probs.numpy(), labels=labels.numpy())"
    limit(path.stat().st_size, path)
    if zipfile.is_zipfile(path):
        with _refusing(path), zipfile.ZipFile(path) as archive:
            limit(sum(info.file_size for info in archive.infolist()), path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types on damaged and on refused files
        named = re.search(r"GLOBAL (\S+)", str(error))
        got = named.group(1) if named else type(error).__name__
        raise DataError(
            "the file holds more than tensors, or is damaged", where=path, got=got[:100], fix=fix
        ) from None
    if isinstance(tree, tuple | list) and len(tree) == 2:
        tree = dict(zip(("probs", "labels"), tree, strict=True))
    if not isinstance(tree, dict):
        raise DataError(
            "the file is not a dict and not (probs, labels)",
            where=path,
            got=type(tree).__name__,
            fix=fix,
        )
    found = {}
    for name, value in tree.items():
        plain = (
            isinstance(value, torch.Tensor)
            and value.layout == torch.strided
            and not value.is_quantized
        )
        if plain and value.device.type == "cpu":
            limit(value.numel() * value.element_size(), path)
            found[str(name)] = (
                (value.float() if value.dtype == torch.bfloat16 else value)
                .detach()
                .resolve_conj()
                .numpy()
            )
        elif isinstance(value, list | tuple) and all(isinstance(cell, str) for cell in value):
            limit(len(value) * max(map(len, value), default=0) * 4, path)
            found[str(name)] = np.array(value, dtype=np.str_)
        else:
            expected = "tensors and lists of text"
            raise DataError(
                "a value cannot be used",
                where=f"{path}: {name}",
                expected=expected,
                got=type(value).__name__,
                fix=fix,
            )
    return found


def limit(size: int, path: Path) -> None:
    """Refuse a file that claims more than MAX_BYTES.

    Raises:
        DataError: it does.
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
def _refusing(path: Path) -> Iterator[None]:
    """Turns what numpy and zipfile raise on bad files into one line."""
    try:
        yield
    except DataError:
        raise
    except (
        Exception
    ) as error:  # numpy and zipfile raise errors of many types, even those of Python's tokenizer
        got = f"{type(error).__name__}: {str(error)[:120]}"
        raise DataError("the file is cut off or damaged", where=path, got=got, fix=WHOLE) from None
