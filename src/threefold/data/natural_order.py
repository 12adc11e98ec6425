"""Natural order of names: digits count as numbers, so `class2` comes before `class10`."""

from __future__ import annotations

import re


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key for natural order; names that differ only in leading zeros are sorted as text."""
    pieces = re.split(r"(\d+)", name)
    key = [(int(piece), "") if i % 2 else (0, piece) for i, piece in enumerate(pieces)]
    return key, name
