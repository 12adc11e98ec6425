"""Arguments as people write them: durations, and names separated by commas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from threefold.errors import RecipeError

QUALITIES: Final = {
    "fast": "fits heads on frozen pretrained networks; the quickest answer",
    "good": "heads first, then tunes the networks in the time that is left; the default",
    "best": "as good, with larger images, more epochs, five folds, and mirrored views at the end",
}
"""The values of `--quality`, and what each does."""


def split_names(texts: str | Iterable[str] | None) -> tuple[str, ...]:
    """Split texts at commas; spaces around a name do not count.

    Args:
        texts: one text or several; None = no names.
    """
    given = (texts,) if isinstance(texts, str) else texts or ()
    names = [name.strip() for text in given for name in text.split(",")]
    return tuple(name for name in names if name)


def parse_devices(devices: str | int | None) -> int | Literal["all"] | None:
    """Parse a number of devices.

    Args:
        devices: a number, or all; empty or None = what the recipe says.

    Raises:
        RecipeError: it is neither.
    """
    text = "" if devices is None else str(devices).strip()
    if text == "all":
        return "all"
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(
            "not a number of devices", where="devices", got=devices, expected="2, all"
        )
    return int(text)


def parse_minutes(duration: str | float, where: str = "budget") -> float:
    """Parse a duration (90s, 20m, 2h, or a number of minutes) into minutes.

    Args:
        duration: the text, or a number of minutes.
        where: name of the argument, for the error.

    Raises:
        RecipeError: it is not a duration.
    """
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    number, factor = str(duration).strip(), 1.0
    if number and number[-1] in units:
        number, factor = number[:-1], units[number[-1]]
    try:
        minutes = float(number) * factor
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        raise RecipeError("not a duration", where=where, got=duration, expected="90s, 20m, 2h or 0")
    return minutes
