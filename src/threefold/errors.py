"""Errors that a user can mend, each in one line: what, where, expected, got, fix."""

from __future__ import annotations

from collections.abc import Iterable

from threefold.names import printable


class ThreefoldError(Exception):
    """Base of every error caused by bad input.

    The command line prints it without a traceback and exits with status 1.

    Args:
        what: what is wrong.
        where: the file, key or row concerned.
        expected: what would have been right.
        got: what was there instead; of an error of the operating system, its reason.
        fix: what the user can do about it.

    Attributes:
        got: `got` as one line of text; empty if it was not given.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = "",
        expected: object = "",
        got: object = "",
        fix: str = "",
    ) -> None:
        if isinstance(got, OSError):
            got = got.strerror or got
        self.got = " ".join(str(got).split())
        contrast = []
        if str(expected):
            contrast.append(f"expected {expected}")
        if self.got:
            contrast.append(f"got {self.got}")
        parts = [f"{what}: {where}" if str(where) else what, ", ".join(contrast)]
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__(printable("; ".join(" ".join(part.split()) for part in parts if part)))


class RecipeError(ThreefoldError):
    """A recipe cannot be read, has an unknown key, or asks for something impossible."""


class DataError(ThreefoldError):
    """Images, labels or predictions are missing, unreadable or inconsistent."""


class RunError(ThreefoldError):
    """A run folder cannot be written, belongs to another recipe, or is incomplete."""


class ExportError(ThreefoldError):
    """A model file cannot be read or written, or its answers differ from its pipeline's."""


class MissingExtraError(ThreefoldError, ImportError):
    """Optional packages are missing; the message names the pip command that installs them."""


def shorten(names: Iterable[str], limit: int = 10) -> str:
    """Join the first few names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
