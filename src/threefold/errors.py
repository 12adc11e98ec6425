"""The errors that threefold raises for what a user can mend: one line that says what, where, expected, got, fix."""

from __future__ import annotations


class ThreefoldError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback and exits 1."""

    def __init__(
        self,
        what: str,
        *,
        where: object = "",
        expected: object = "",
        got: object = "",
        fix: str = "",
    ) -> None:
        told = [
            f"{word} {value}"
            for word, value in (("expected", str(expected)), ("got", str(got)))
            if value
        ]
        parts = [f"{what}: {where}" if str(where) else what, ", ".join(told)]
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(" ".join(part.split()) for part in parts if part))


class RecipeError(ThreefoldError):
    """A recipe cannot be read, has an unknown key, or asks for what cannot be."""


class DataError(ThreefoldError):
    """Images, labels or predictions are missing, unreadable or contradict each other."""


class RunError(ThreefoldError):
    """A run folder cannot be written, belongs to another recipe, or is not complete."""


class ExportError(ThreefoldError):
    """A model file cannot be written, read, or does not answer as the pipeline it came from."""


class MissingExtraError(ThreefoldError, ImportError):
    """Packages of an extra are not installed; the line names the pip command that installs them."""
