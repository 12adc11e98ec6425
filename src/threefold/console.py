"""Where the command line prints: one console for answers, one for errors, JSON for machines."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def plain(text: object) -> str:
    """Text without Rich markup."""
    return escape(str(text))


def print_json(tree: Any) -> None:
    """A tree of plain values, readable."""
    print(json.dumps(tree, indent=1, ensure_ascii=False, default=float))
