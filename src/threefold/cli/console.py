"""The terminal: one console for answers, one for errors, and JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape

from threefold.errors import ThreefoldError
from threefold.names import printable

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def plain(text: object) -> str:
    """Escape Rich markup and control characters, so that the text prints literally."""
    return escape(printable(str(text)))


def print_error(message: ThreefoldError | str) -> None:
    """Print one line on standard error; an exception is marked as an error, a string is not."""
    mark = "[bold red]error[/] " if isinstance(message, ThreefoldError) else ""
    err.print(f"{mark}{plain(message)}", highlight=False)


def print_json(tree: Any) -> None:
    """Print a tree of plain values as indented JSON on standard output."""
    print(json.dumps(tree, indent=1, ensure_ascii=False, default=float))
