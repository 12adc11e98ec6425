"""Lists of names: natural order, and names that occur twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key for natural order: digits count as numbers, so `class2` comes before `class10`.

    Names that differ only in leading zeros are sorted as text.
    """
    pieces = re.split(r"(\d+)", name)
    key = [(int(piece), "") if i % 2 else (0, piece) for i, piece in enumerate(pieces)]
    return key, name


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, in order of first appearance."""
    return [name for name, count in Counter(names).items() if count > 1]
