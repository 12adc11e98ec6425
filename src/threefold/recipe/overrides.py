"""`--set a.b=c`: changes to a tree of plain values before it becomes a recipe."""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

from threefold.errors import RecipeError


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Apply one `a.b=c` to a tree in place; a value that is not valid TOML is taken as a string.

    Raises:
        RecipeError: the path does not exist, or the text has no `=`.
    """
    path, equals, raw = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(
            "cannot apply --set", where=text, expected="path=value, for example train.batch_size=64"
        )
    value = parse_value(raw)
    *parents, last = path.strip().split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, text)
    if isinstance(node, list):
        node[_index(node, last, text)] = value
    else:
        node[last] = value


def parse_value(text: str) -> Any:
    """Parse a value as TOML has it; anything else is a text."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text


def _child(node: Any, part: str, text: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, text)]
    child = node.setdefault(part, {})
    if not isinstance(child, (dict, list)):
        raise RecipeError("cannot apply --set", where=text, got=f"{part} is a value, not a table")
    return child


def _index(items: list[Any], part: str, text: str) -> int:
    """Return the position in a list of tables, given its index or the table's name."""
    names = [str(item.get("name")) for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    near = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
    raise RecipeError(
        "cannot apply --set",
        where=text,
        expected=f"one of {', '.join(names)} or an index",
        got=part,
        fix=f"did you mean {near[0]}?" if near else "",
    )
