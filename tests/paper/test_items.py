"""The paper's items agree with the recipes, and the recipes with the authors' settings."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from threefold.ensembles.registry import make_ensemble
from threefold.errors import RecipeError
from threefold.paper.items import (
    FIGURES_WITHOUT_VALUES,
    ITEMS,
    TABLE_OF_FIGURE,
    Item,
    find_item,
)
from threefold.recipe.lookup import packaged, packaged_names

PAPER_RECIPES = [name for name in packaged_names() if name.startswith("paper/")]

THREE = [(1e-4, 40), (1e-5, 15), (1e-6, 15)]
STAGES = {
    "paper/table1": [(1e-4, 30)],
    "paper/table2": [(1e-4, 30)],
    "paper/table3": [(2e-4, 10), (1e-5, 10), (1e-5, 10)],
    "paper/figure4": [(1e-5, 30)],
    "paper/figure10": THREE,
    "paper/figure11": THREE,
    "paper/figure12": THREE,
    "paper/table6-cifar100": THREE,
    "paper/table6-svhn": [(1e-3, 20), (1e-4, 15)],
    "paper/table7": [(1e-3, 40), (1e-4, 15), (1e-5, 15)],
}
ODD_STAGES = {
    ("paper/figure4", "seresnext101-421"),
    ("paper/figure10", "one"),
    ("paper/table6-cifar100", "efficientnetb0"),
}
BATCHES = {
    "paper/figure11": {
        "seresnext101-std": 40,
        "seresnext101-bilstm": 30,
        "xception-bilstm": 100,
        "inception-resnetv2-std": 120,
    },
    "paper/figure12": {
        "efficientnetb4-299": 48,
        "efficientnetb5-345": 36,
        "xception-gru": 100,
        "e2e-3m": 200,
    },
    "paper/table6-cifar100": {
        "efficientnetb0": 160,
        "efficientnetb1": 128,
        "efficientnetb3": 96,
        "efficientnetb7": 72,
    },
    "paper/table6-svhn": {
        "efficientnetb0": 192,
        "efficientnetb5": 48,
        "efficientnetb6": 36,
        "efficientnetb7": 24,
        "xception": 64,
    },
    "paper/table7": {"mobilenetv1": 64, "inceptionv3": 32},
    "paper/table3": {"seresnext101": 20},
}


@pytest.mark.parametrize("item", ITEMS.values(), ids=list(ITEMS))
def test_an_item_names_what_its_recipes_have(item: Item) -> None:
    members: set[str] = set()
    for run in item.runs:
        recipe = packaged(run.recipe, run.overrides)
        names = {m.name for m in recipe.members}
        members |= names
        assert set(run.members) <= names
        assert recipe.data.source == run.source
        for cell in run.cells:
            assert {cell.member, *run.ensemble} - {""} <= names, cell.label
            # A method that needs fitting would be scored on the rows that it was fitted on.
            assert not cell.method or not make_ensemble(cell.method).needs_fit
            assert cell.paper is None or 0.7 < cell.paper < 1

    assert set(item.small.members) | set(item.smoke) | set(item.notebook_stages) <= members


@pytest.mark.parametrize("item", ITEMS.values(), ids=list(ITEMS))
def test_cells_are_compared_on_one_network(item: Item) -> None:
    cells = {cell.label: cell for cell in item.cells}
    backbones = item.small.backbone_of

    assert len(cells) == len(item.cells)
    assert set(item.notes) <= set(cells)
    assert {label for pair in item.compare for label in pair} <= set(cells)
    for a, b in item.compare:
        networks = {backbones.get(cells[label].member) for label in (a, b)} - {None}
        assert cells[a].row != cells[b].row or len(networks) < 2, f"{a} and {b}"


def test_every_recipe_of_the_paper_is_used() -> None:
    used = {run.recipe for item in ITEMS.values() for run in item.runs}

    assert used == {*PAPER_RECIPES, "beyond"}


@pytest.mark.parametrize("name", [*PAPER_RECIPES, "beyond"])
def test_a_recipe_says_what_it_is(name: str) -> None:
    file = resources.files("threefold") / "recipes" / f"{name}.toml"

    head = re.match(r"(?:#.*\n)+", file.read_text(encoding="utf-8"))

    assert head is not None
    assert "# command: threefold " in head[0]
    assert "not run here: needs" in head[0]
    assert name == "beyond" or "# sources: paper section" in head[0]
    assert packaged(name).name == name.removeprefix("paper/")
    assert set(re.findall(r"threefold reproduce (\w+)", head[0])) <= set(ITEMS)


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_what_holds_for_every_recipe_of_the_paper(name: str) -> None:
    """Sources: paper, sections 4.1 to 4.7, and the authors' notebooks."""
    recipe = packaged(name)
    train, augment = recipe.train, recipe.augment
    flips = name not in ("paper/table6-svhn", "paper/table7")
    warps = augment.model_dump(include={"rotation", "shift", "shear", "zoom", "channel_shift"})

    assert (train.optimizer, train.precision, train.weight_decay) == ("adam-keras", "float32", 0)
    assert warps == {"rotation": 30, "shift": 0.3, "shear": 0.3, "zoom": 0.3, "channel_shift": 10}
    assert (augment.hflip, augment.vflip) == (flips, flips)
    assert (augment.crop, augment.policy, augment.color) == (1.0, "none", 0.0)
    assert recipe.protocol == ("honest" if name == "paper/figure10" else "paper")


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_the_authors_heads_stages_and_batch_sizes(name: str) -> None:
    recipe = packaged(name)
    joint = [m for m in recipe.members if m.joins]
    single = [m for m in recipe.members if not m.joins]
    batches = {m.name: m.batch_size or recipe.train.batch_size for m in recipe.members}

    for member in joint:
        assert len(member.joins) == 3
        assert member.head.kind == "mlp"
    for member in single:
        head = member.head
        assert (head.noise, head.activation, head.units) == (0.1, "keras", 2048)
        assert head.kind != "gru" or not head.reset_after
        rates = [(stage.lr, stage.epochs) for stage in recipe.stages_of(member.name)]
        assert rates == STAGES[name] or (name, member.name) in ODD_STAGES
    assert {n: batches[n] for n in BATCHES.get(name, {})} == BATCHES.get(name, {})


def test_figures_of_tables_and_unknown_names() -> None:
    assert {name: find_item(name).name for name in TABLE_OF_FIGURE} == TABLE_OF_FIGURE
    for name in FIGURES_WITHOUT_VALUES:
        with pytest.raises(RecipeError, match="has no values to reproduce"):
            find_item(name)
    with pytest.raises(RecipeError, match="no such table or figure; expected one of table1, "):
        find_item("table8")
