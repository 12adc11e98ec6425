"""What is wrong with a recipe, in one line: pydantic's errors in the words of its tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel


def explain_errors(errors: Iterable[Any], table: type[BaseModel]) -> str:
    """Describe pydantic's errors, each as `path: problem`, with the nearest known key.

    Args:
        errors: `ValidationError.errors()`.
        table: the model of the whole recipe.
    """
    return "; ".join(_explain(error, table) for error in errors)


def _explain(error: Any, table: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    known = _fields_at(error["loc"][:-1], table)
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{path}: unknown key, {advice}"


def _fields_at(loc: tuple[Any, ...], recipe: type[BaseModel]) -> list[str]:
    """Return the keys of the table at a pydantic error location."""
    table: Any = recipe
    for part in loc:
        if isinstance(part, int):  # an item of a list of tables
            continue
        annotation = table.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        tables = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        table = tables[0] if tables else annotation
    return list(table.model_fields)
