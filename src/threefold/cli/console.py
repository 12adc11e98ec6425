"""The terminal: one console for answers, one for errors, and JSON for programs."""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from threefold.errors import ThreefoldError
from threefold.names import printable, wrap_words

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def plain(text: object) -> str:
    """Escape Rich markup and control characters, so that the text prints literally."""
    return escape(printable(str(text)))


def print_error(message: ThreefoldError | str) -> None:
    """Print one line on standard error; an exception is marked as an error, a string is not."""
    mark = "[bold red]error[/] " if isinstance(message, ThreefoldError) else ""
    err.print(f"{mark}{plain(message)}", highlight=False)


def print_wrapped(text: object, mark: str = "", indent: int = 0) -> None:
    """Print a paragraph on standard output, wrapped between words.

    Args:
        text: printed literally.
        mark: Rich markup of a word before it, such as "note".
        indent: of all lines; those after the first have two spaces more.
    """
    start = " " * indent + Text.from_markup(mark).plain
    space = " " if mark else ""
    lines = wrap_words(f"{start}{space}{printable(str(text))}", out.width, " " * (indent + 2))
    out.print(f"{' ' * indent}{mark}{escape(lines.removeprefix(start))}", highlight=False)


def print_json(tree: Any) -> None:
    """Print a tree of plain values as indented JSON on standard output.

    Numbers that are not finite, which JSON lacks, become null.
    """
    from threefold.runtime.json_text import as_json, json_line

    print(json_line(as_json(tree), sys.stdout, indent=1))


def make_robust_streams() -> None:
    """Print what the terminal cannot encode as escapes, so that no later answer is lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
