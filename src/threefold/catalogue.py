"""Names of what a recipe can use; each kind imports only what it needs."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import get_args

from threefold.backbones import PAPER_BACKBONES
from threefold.data__published import PUBLISHED, PublishedDataset
from threefold.errors import RecipeError
from threefold.recipe import DataSpec, HeadKind, HeadSpec, packaged_names


def catalogue(what: str, pattern: str = "*") -> list[str]:
    """Names of what a recipe can use, a line each.

    Args:
        what: backbones, heads, ensembles, data or recipes.
        pattern: for backbones, with `*` for anything; the paper's names for them come last.

    Raises:
        RecipeError: nothing of that kind.
    """
    lists: dict[str, Callable[[], list[str]]] = {
        "backbones": lambda: _backbones(pattern),
        "heads": _heads,
        "ensembles": _ensembles,
        "data": _data,
        "recipes": packaged_names,
    }
    if what not in lists:
        raise RecipeError("nothing to list", got=what, expected=" or ".join(lists))
    return lists[what]()


def _backbones(pattern: str) -> list[str]:
    import timm

    known = list(timm.list_models(pattern, pretrained=True))
    return known + [
        f"{row.name}: {row.timm}, the paper's, {row.authors_scaling} there; weights: {row.weights}"
        for row in PAPER_BACKBONES
        if fnmatch(row.name.lower(), pattern.lower()) or row.timm in known
    ]


def _data() -> list[str]:
    """Sources; of published data sets with their size, and whether their terms have to be accepted."""
    lines = []
    for name in get_args(DataSpec.model_fields["source"].annotation):
        known = PUBLISHED.get(name)
        lines.append(
            name if known is None else f"{name}: {known.title}, {_counts(known)}{_terms(known)}"
        )
    return lines


def _counts(known: PublishedDataset) -> str:
    parts = (("training", known.num_train), ("test", known.num_test), ("extra", known.num_extra))
    return ", ".join(f"{count:,} {part}" for part, count in parts if count)


def _terms(known: PublishedDataset) -> str:
    return f"; terms: {known.licence}" if known.must_accept else ""


def _heads() -> list[str]:
    from threefold.heads import describe

    return [f"{kind}: {describe(HeadSpec(kind=kind))}" for kind in get_args(HeadKind)]


def _ensembles() -> list[str]:
    from threefold.ensembles__registry import ENSEMBLES

    return list(ENSEMBLES)
