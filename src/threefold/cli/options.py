"""Options that several verbs share, and how lists of names are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from threefold.errors import RecipeError

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change one recipe value, e.g. train.batch_size=64; may be repeated.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print a line per job and epoch.")]
RunOut = Annotated[Path, typer.Option("--out", help="The run folder.")]
WallTime = Annotated[
    str, typer.Option("--budget", help="Limit on the wall time: 90s, 20m, 2h; 0 = none.")
]
Backbones = Annotated[
    str,
    typer.Option(
        "--members",
        help="timm names of the backbones, separated by commas; auto = choose by measurement.",
    ),
]
QualityOption = Annotated[
    Literal["fast", "good", "best"],
    typer.Option(
        "--quality",
        help="fast = heads only; good; best = larger images, more epochs and folds.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
ModelFile = Annotated[Path, typer.Argument(help="An exported model file.")]
Mode = Annotated[
    str,
    typer.Option(
        "--mode", help="full: run every member; fast: stop once the first members are sure."
    ),
]
ImageTime = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Time per image, e.g. 15ms: run as many members as fit, measured on this machine.",
    ),
]


def split_names(texts: Iterable[str] | None) -> tuple[str, ...]:
    """Split the values of an option at commas; spaces around a name do not count."""
    names = [name.strip() for text in texts or () for name in text.split(",")]
    return tuple(name for name in names if name)


def parse_minutes(text: str) -> float:
    """Parse a duration (90s, 20m, 2h, or a number of minutes) into minutes.

    Raises:
        RecipeError: the text is not a duration.
    """
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    number, factor = text, 1.0
    if text and text[-1] in units:
        number, factor = text[:-1], units[text[-1]]
    try:
        minutes = float(number) * factor
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        raise RecipeError(
            "not a duration", where="--budget", got=text, expected="90s, 20m, 2h or 0"
        )
    return minutes
