"""The names that users can choose from; each kind imports only what it needs."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from importlib.resources import files as resources
from typing import get_args

from threefold.arguments import QUALITIES
from threefold.data.published import PUBLISHED, PublishedDataset
from threefold.errors import RecipeError
from threefold.models.backbones import PAPER_BACKBONES
from threefold.recipe.lookup import packaged_names
from threefold.recipe.schema import DataSpec, HeadKind, HeadSpec


def catalogue(kind: str, pattern: str = "*") -> list[str]:
    """List the names that a recipe or the command line can use, one per line.

    Args:
        kind: backbones, heads, ensembles, data, recipes or presets.
        pattern: a glob pattern for backbones. The paper's names for them come last.

    Raises:
        RecipeError: there is no such kind, or the pattern matches no backbone.
    """
    lists: dict[str, Callable[[], list[str]]] = {
        "backbones": lambda: _backbones(pattern),
        "heads": _heads,
        "ensembles": _ensembles,
        "data": _data_sources,
        "recipes": _recipes,
        "presets": _presets,
    }
    if kind not in lists:
        raise RecipeError("nothing to list", got=kind, expected=" or ".join(lists))
    return lists[kind]()


def _backbones(pattern: str) -> list[str]:
    import timm

    names = list(timm.list_models(pattern, pretrained=True))
    aliases = [
        f"{row.name}: {row.timm}, the paper's, {row.authors_scaling} there; weights: {row.weights}"
        for row in PAPER_BACKBONES
        if fnmatch(row.name.lower(), pattern.lower()) or row.timm in names
    ]
    if not names and not aliases:
        raise RecipeError(
            "no pretrained backbone has such a name",
            got=pattern,
            fix="* stands for any letters: threefold list backbones '*convnext*'",
        )
    return names + aliases


def _data_sources() -> list[str]:
    """Name every source; add title, size and terms for published data sets."""
    lines = []
    for name in get_args(DataSpec.model_fields["source"].annotation):
        published = PUBLISHED.get(name)
        lines.append(name if published is None else f"{name}: {_describe(published)}")
    return lines


def _describe(published: PublishedDataset) -> str:
    parts = {
        "training": published.num_train,
        "test": published.num_test,
        "extra": published.num_extra,
    }
    counts = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count)
    terms = f"; terms: {published.licence}" if published.must_accept else ""
    return f"{published.title}, {counts}{terms}"


def _heads() -> list[str]:
    from threefold.models.heads import describe

    return [f"{kind}: {describe(HeadSpec(kind=kind))}" for kind in get_args(HeadKind)]


def _recipes() -> list[str]:
    """Name every packaged recipe, and what it is for: the first line of its file, a comment."""
    folder = resources("threefold") / "recipes"
    lines = []
    for name in packaged_names():
        first, *_ = (folder / f"{name}.toml").read_text("utf-8").splitlines()
        lines.append(f"{name}: {first.lstrip('# ')}")
    return lines


def _presets() -> list[str]:
    """Name the qualities of `fit` and what each does, then the recipes, which need no choice."""
    qualities = [f"--quality {name}: {text}" for name, text in QUALITIES.items()]
    return [*qualities, *(f"threefold train {line}" for line in _recipes())]


def _ensembles() -> list[str]:
    from threefold.ensembles.registry import ENSEMBLES

    return list(ENSEMBLES)
