"""The page about saved predictions: what `threefold ensemble`, `evaluate` and `compare` found, as one self-contained HTML file.

The same sections, charts and look as the report of a run, without what only a run has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import RunError
from threefold.files import write_bytes
from threefold.pictures import Thumbs
from threefold.render import render
from threefold.reportview import EVIDENCE, main_rows, shared_view

KINDS = ("ensemble", "evaluate", "compare")
_Array = np.ndarray[Any, Any]
_Tree = Mapping[str, Any]


def write_page(
    path: Path, title: str, found: _Tree, probs: _Array | None = None, labels: _Array | None = None
) -> Path:
    """Write one HTML page about saved predictions.

    Args:
        path: the file.
        title: its heading, such as the file's or the run's name.
        found: the tree that the verbs print with `--json`: kind (of KINDS), source, scores, chosen, chosen_reason, comparisons,
            warnings, per_class, optimism, diversity, size_curve, and whatever else results.json may have. All but kind and
            scores may be missing; their sections are then left out.
        probs: (n, k) of the score that is the headline (the chosen ensemble; without one the most accurate), for the
            reliability curve and the confusion matrix; or None.
        labels: (n,), with probs.

    Returns:
        The file written.

    Raises:
        RunError: the tree lacks a key, has no score, or does not belong to the probabilities.
        DataError: probabilities or labels are not usable.
    """
    if found.get("kind") not in KINDS:
        raise RunError(
            "not a tree of saved predictions",
            where=title,
            expected=" or ".join(KINDS),
            got=found.get("kind"),
        )
    if not found.get("scores"):
        raise RunError("there is no score to show", where=title)
    try:
        view = _view(title, found, probs, labels)
    except KeyError as error:
        raise RunError(
            "the tree of saved predictions lacks a key", where=title, expected=error
        ) from None
    write_bytes(Path(path), render("page.html.j2", title, v=view).encode())
    return Path(path)


def _view(title: str, found: _Tree, probs: _Array | None, labels: _Array | None) -> dict[str, Any]:
    score, picked = _headline(found)
    if probs is not None and labels is not None and score is not None:
        shape, expected = (len(probs), len(labels)), (score["n"], score["n"])
        if shape != expected:
            raise RunError(
                "probabilities and scores do not belong together",
                where=title,
                expected=expected,
                got=shape,
            )
    drawn = score is not None
    return {
        **shared_view(found, score, probs if drawn else None, labels if drawn else None, Thumbs()),
        "title": title,
        "kind": found["kind"],
        "source": list(found.get("source") or ()),
        "chosen": found.get("chosen"),
        "reason": found.get("chosen_reason") or "",
        "picked": picked,
        "warnings": list(found.get("warnings") or ()),
        "best": _best(found) if found["kind"] == "compare" else None,
    }


def _headline(found: _Tree) -> tuple[dict[str, Any] | None, int]:
    """The score that the page begins with, and from how many it was picked for being the best (0 = it was not)."""
    if found["kind"] == "compare":
        return None, 0
    rows = main_rows(found["scores"])
    mine = [s for s in found["scores"] if s["rows"] == rows]
    chosen = [s for s in mine if s["kind"] == "ensemble" and s["name"] == found.get("chosen")]
    if chosen:
        return chosen[0], 0
    return max(mine, key=lambda s: s["accuracy"]), len(mine) if len(mine) > 1 else 0


def _best(found: _Tree) -> dict[str, Any]:
    """The most accurate of those compared, and what may be as good: no evidence of a difference from it."""
    rows = main_rows(found["scores"])
    best = max((s for s in found["scores"] if s["rows"] == rows), key=lambda s: s["accuracy"])
    rivals = [
        c["b"] if c["a"] == best["name"] else c["a"]
        for c in found.get("comparisons") or ()
        if best["name"] in (c["a"], c["b"]) and c["rows"] == rows and c["p"] > EVIDENCE
    ]
    return {"score": best, "rivals": rivals}
