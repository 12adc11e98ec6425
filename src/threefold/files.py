"""Atomic file writing and safe reading; everything a run writes goes through this module."""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import json
import os
import stat
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import RunError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a crash leaves the old content or the new, never a part.

    Raises:
        RunError: the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(
            "cannot write",
            where=path,
            got=error,
            fix="free disk space or choose a writable folder, then run the same command again",
        ) from None


def read_text(path: Path, max_bytes: int = 1 << 24) -> str:
    """Read a text file: UTF-8, or UTF-16 with its mark, as PowerShell and Excel write it.

    Args:
        path: the file; a pipe or a device, which could be read for ever, is refused.
        max_bytes: the largest size.

    Raises:
        OSError: the file cannot be read, is no regular file, or is too large.
        UnicodeDecodeError: it is in another encoding.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def write_json(path: Path, tree: Any) -> None:
    """Write a tree of plain values as indented JSON; see `finite_json`."""
    text = json.dumps(
        finite_json(tree), indent=1, ensure_ascii=False, default=float, allow_nan=False
    )
    write_bytes(path, (text + "\n").encode())


def finite_json(tree: Any) -> Any:
    """Replace numbers that JSON lacks by the texts NaN, Infinity and -Infinity.

    Records read them back as numbers; without this, the file would not be JSON.
    """
    if isinstance(tree, Mapping):
        return {key: finite_json(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_json(value) for value in tree]
    if isinstance(tree, float | np.floating) and not np.isfinite(tree):
        return "NaN" if np.isnan(tree) else "Infinity" if tree > 0 else "-Infinity"
    return tree


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError("cannot read", where=path, got=error) from None
    except (ValueError, RecursionError) as error:
        raise RunError("the file is damaged", where=path, got=error) from None


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed .npz file, without pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz file written by `write_arrays`; object arrays are refused.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise RunError(
            "cannot read arrays", where=path, got=f"{type(error).__name__}: {str(error)[:120]}"
        ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
