"""What a probe of `hostile.py` is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Probe(NamedTuple):
    """One input.

    Attributes:
        name: its kind and what is odd about it.
        run: makes the input in an empty folder and returns what threefold says of it.
        right: the right value; a `Refusal` if none is right.
    """

    name: str
    run: Callable[[Path], Any]
    right: Any


class Refusal(NamedTuple):
    """The words that the message must have, as a regular expression."""

    words: str
