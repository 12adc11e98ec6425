"""The tables and figures of the paper: the runs of each, and the cells with the paper's values.

The items are data in `items.toml`; this module documents its keys. Imports no torch.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from threefold.errors import RecipeError
from threefold.json_files import read_json
from threefold.paper.scales import Small
from threefold.recipe.schema import Section


def _usual_member(cell: dict[str, Any]) -> str:
    if cell["method"]:
        return ""
    return f"{cell['row']} {cell['column']}".strip().replace(" ", "-").lower()


class Cell(Section):
    """One value of a table or figure, and whose accuracy it is.

    Attributes:
        method: the ensemble method that combines the run's `ensemble`; empty = `member` is scored.
        member: by default row and column in lower case, joined by a hyphen.
        ensemble_folds: folds in which the mean of the run's `ensemble` answers, and `member` in
            the others (paper, table 3); None = `member` answers as in any other cell.
        paper: the value that the paper prints, a share; None where it prints none.
    """

    row: str
    column: str = ""
    method: str = ""
    member: str = Field(default_factory=_usual_member)
    ensemble_folds: tuple[int, ...] | None = None
    paper: float | None = None

    @property
    def label(self) -> str:
        """Row and column."""
        return f"{self.row} {self.column}".strip()


class ItemRun(Section):
    """One run of an item.

    Attributes:
        recipe: name of a packaged recipe.
        source: the published data set.
        ensemble: the members that cells with a method or ensemble folds combine.
    """

    name: str = "run"
    recipe: str
    source: str
    overrides: tuple[str, ...] = ()
    ensemble: tuple[str, ...] = ()
    cells: tuple[Cell, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """The members that the cells need."""
        names: list[str] = []
        for cell in self.cells:
            if cell.method or cell.ensemble_folds is not None:
                names += self.ensemble
            else:
                names.append(cell.member)
        return tuple(dict.fromkeys(names))


class Item(Section):
    """A table or figure of the paper.

    Attributes:
        compare: pairs of cells, by label, that paired tests compare.
        notes: remarks on cells, by label.
        small: what replaces the paper's networks in a small run.
        draw: the kind of figure.
        notebook_stages: best accuracy of each stage in the authors' notebooks, by member.
        honest_only: the item has no meaning under the paper's protocol.
        smoke: members of a smoke run, where all of them would take too long; empty = all.
    """

    name: str
    title: str
    runs: tuple[ItemRun, ...]
    compare: tuple[tuple[str, str], ...]
    notes: dict[str, str] = Field(default_factory=dict)
    small: Small
    draw: Literal["dots", "curves", "macs", "groups"] = "dots"
    notebook_stages: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    honest_only: bool = False
    smoke: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of all runs."""
        return tuple(cell for run in self.runs for cell in run.cells)

    @property
    def sources(self) -> tuple[str, ...]:
        """The published data sets, each once."""
        return tuple(dict.fromkeys(run.source for run in self.runs))


def _read_items() -> dict[str, Item]:
    text = (resources.files("threefold.paper") / "items.toml").read_text(encoding="utf-8")
    return {name: Item(name=name, **table) for name, table in tomllib.loads(text).items()}


ITEMS = _read_items()
"""Every table and figure with values or a claim, by name."""

TABLE_OF_FIGURE: dict[str, str] = {
    "figure6": "table1",
    "figure7": "table2",
    "figure9": "table3",
    "figure13": "table7",
}
"""Figures that show a table's values."""

FIGURES_WITHOUT_VALUES: dict[str, str] = {
    "figure1": "the design of E2E-3M",
    "figure2": "the design of one network",
    "figure3": "samples of iNaturalist 2019",
    "figure5": "samples of Fashion-MNIST",
    "figure8": "samples of iCassava 2019",
}
"""Figures with nothing to reproduce, and what they show."""


def find_item(name: str) -> Item:
    """Return the item of that name, or of the table whose values a figure shows.

    Raises:
        RecipeError: there is no such item, or it has no values.
    """
    if name in FIGURES_WITHOUT_VALUES:
        shown = FIGURES_WITHOUT_VALUES[name]
        raise RecipeError("this figure has no values to reproduce", where=name, got=shown)
    key = TABLE_OF_FIGURE.get(name, name)
    if key not in ITEMS:
        known = ", ".join([*ITEMS, *TABLE_OF_FIGURE])
        raise RecipeError(
            "the paper has no such table or figure", got=name, expected=f"one of {known}"
        )
    return ITEMS[key]


class ItemState(NamedTuple):
    """An item, and its finished runs: scale, protocol and day of each."""

    item: Item
    runs: tuple[str, ...]


def list_items(root: Path) -> list[ItemState]:
    """List every item with its runs below a folder (`ITEM-SCALE-PROTOCOL/reproduce.json`)."""
    states = []
    for name, item in ITEMS.items():
        results = [read_json(path) for path in sorted(root.glob(f"{name}-*/reproduce.json"))]
        runs = [f"{r['scale']}, {r['protocol']}, {r['trained'][:10]}" for r in results]
        states.append(ItemState(item, tuple(runs)))
    return states
