"""JSON files of plain values, also with numbers that JSON lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import DamagedFileError
from threefold.files import check_regular, unreadable, write_bytes


def write_json(path: Path, tree: Any) -> None:
    """Write a tree of plain values as indented JSON; see `finite_json`."""
    write_bytes(path, json_bytes(tree))


def json_bytes(tree: Any) -> bytes:
    """Return the content of a file of `write_json`."""
    text = json.dumps(
        finite_json(tree), indent=1, ensure_ascii=False, default=float, allow_nan=False
    )
    return (text + "\n").encode()


def finite_json(tree: Any) -> Any:
    """Replace numbers that JSON lacks by the texts NaN, Infinity and -Infinity.

    Records read them back as numbers; without this, the file would not be JSON.
    """
    return replace_not_finite(tree, _spell)


def replace_not_finite(tree: Any, replacement: Callable[[float], Any]) -> Any:
    """Return plain values for JSON, with something else for numbers that are not finite.

    Args:
        tree: plain values; the keys of mappings become texts.
        replacement: maps NaN or an infinity to what takes its place.
    """
    if isinstance(tree, Mapping):
        return {str(key): replace_not_finite(value, replacement) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_not_finite(value, replacement) for value in tree]
    if isinstance(tree, float | np.floating) and not np.isfinite(tree):
        return replacement(float(tree))
    return tree


def _spell(number: float) -> str:
    """Spell a number that is not finite as JavaScript does."""
    if np.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DamagedFileError: the file is missing or damaged.
        RunError: the file cannot be read.
    """
    try:
        check_regular(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable("cannot read", path, error) from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("the file is damaged", where=path, got=error) from None
