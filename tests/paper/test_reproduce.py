"""Every item of the paper plans at every scale, and runs from the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.paper import fake_item_results
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.cli.reproduce import show_results
from threefold.data.load import load_data
from threefold.data.published import data_table
from threefold.data.synthetic import write_sample
from threefold.errors import DataError, RecipeError
from threefold.json_files import read_json
from threefold.paper.items import (
    FIGURES_WITHOUT_VALUES,
    ITEMS,
    TABLE_OF_FIGURE,
    Item,
    find_item,
    list_items,
)
from threefold.paper.reproduce import (
    Reproduction,
    available_runs,
    left_out_notes,
    plan_recipe,
    reproduce_item,
)
from threefold.paper.results import CellResult, ItemResults
from threefold.recipe.lookup import packaged
from threefold.recipe.recipe import Recipe

runner = CliRunner()


def plan_recipes(name: str, **options: Any) -> list[Recipe]:
    """Return the recipes of the runs of an item that have members at this scale."""
    plan = Reproduction(item=find_item(name), **options)
    recipes = [plan_recipe(plan, run) for run in plan.item.runs]
    return [recipe for recipe in recipes if recipe is not None]


# Plans


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that each data set is made up once."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("item", ITEMS.values(), ids=list(ITEMS))
@pytest.mark.parametrize("protocol", ["honest", "paper"])
@pytest.mark.parametrize("scale", ["full", "small", "smoke"])
def test_every_item_plans(item: Item, protocol: str, scale: str, smoke_folder: Path) -> None:
    data = None if scale == "smoke" else smoke_folder / "somewhere"

    recipes = plan_recipes(item.name, scale=scale, protocol=protocol, out=smoke_folder, data=data)

    assert recipes
    for recipe in recipes:
        assert recipe.protocol == protocol
        assert recipe.jobs(3 if recipe.folds.scheme == "leave-one-group-out" else None)
        backbones = {m.backbone for m in recipe.members if not m.joins}
        if scale == "small":
            assert all("efficientnet_lite" in name for name in backbones)
            assert {s.lr for s in recipe.stages} <= {2e-3, 2e-4, 2e-5, 1e-3, 1e-4, 1e-5}
        if scale == "smoke":
            assert all(name.startswith("test_") for name in backbones)
            assert {m.weights for m in recipe.members if not m.joins} == {"none"}
            assert protocol == "paper" or len(load_data(recipe.data, 0).train) < 500


@pytest.mark.parametrize(
    ("name", "scale", "protocol", "folds"),
    [
        ("table1", "full", "paper", (1, "stratified", "average")),
        ("table1", "full", "honest", (2, "stratified", "refit")),
        ("table1", "small", "honest", (2, "stratified", "average")),
        ("table3", "full", "honest", (5, "stratified", "average")),
        ("table3", "full", "paper", (5, "stratified", "average")),
        ("figure10", "small", "honest", (2, "stratified", "average")),
    ],
)
def test_protocols_change_folds_where_the_authors_had_none(
    tmp_path: Path, name: str, scale: str, protocol: str, folds: tuple[int, str, str]
) -> None:
    spec = plan_recipes(name, scale=scale, protocol=protocol, data=tmp_path)[0].folds

    assert (spec.k, spec.scheme, spec.final) == folds


def test_groups_are_left_out_one_at_a_time(tmp_path: Path) -> None:
    recipe = plan_recipes("table7", scale="full", protocol="honest", data=tmp_path)[0]

    assert recipe.folds.scheme == "leave-one-group-out"


def test_full_under_the_papers_protocol_is_the_recipe(tmp_path: Path) -> None:
    packaged_recipe = packaged("paper/figure11", [f'data.root="{tmp_path}"'])

    recipe = plan_recipes("figure11", scale="full", protocol="paper", data=tmp_path)[0]
    with_joint = plan_recipes("table4", scale="full", protocol="paper", data=tmp_path)[0]

    members = tuple(m for m in packaged_recipe.members if m.name != "e2e-3m")
    assert recipe.members == members
    assert recipe.augment == packaged_recipe.augment
    assert recipe.train == packaged_recipe.train
    assert recipe.folds == packaged_recipe.folds
    assert recipe.stages == packaged_recipe.stages[:3]  # without the joint network's stage
    assert "e2e-3m" in [m.name for m in with_joint.members]


def test_sizes_that_differ_still_differ_in_a_smoke_run(tmp_path: Path) -> None:
    recipe = plan_recipes("figure4", scale="smoke", out=tmp_path)[0]

    assert [m.img_size for m in recipe.members] == [32, 43, 45, 45, 32, 45, 45]


def test_missing_data_say_how_to_get_them() -> None:
    match = r"table7 needs surrey-asl data; fix: .*threefold data fetch surrey-asl --to"
    with pytest.raises(DataError, match=match):
        plan_recipes("table7", scale="full")


def test_where_the_data_are(tmp_path: Path) -> None:
    small = plan_recipes("table1", scale="small", overrides=("seed=3",))[0]
    full = plan_recipes("table1", scale="full")[0]
    several = plan_recipes("table6", scale="full", data=tmp_path)

    assert small.data.source == "demo"
    assert small.seed == 3
    assert full.data.source == "fashion-mnist"
    assert {recipe.data.source for recipe in several} == {"cifar10", "cifar100", "svhn"}
    assert several[2].data.root == str(tmp_path / "svhn")


def test_published_files_and_class_folders_are_told_apart(tmp_path: Path) -> None:
    photos = write_sample("folder", tmp_path / "photos", per_class=2)
    svhn = write_sample("svhn", tmp_path / "s", per_class=2)

    assert data_table("cifar10", photos)["source"] == "folder"
    assert data_table("svhn", svhn)["source"] == "svhn"


def test_other_images_of_hands_have_folds(tmp_path: Path) -> None:
    """Without known signers any folds; with a table that names groups, grouped folds."""
    photos = write_sample("folder", tmp_path / "photos", per_class=2)

    from_folders = plan_recipes("table7", scale="small", data=photos)[0]
    from_table = plan_recipes("table7", scale="small", data=tmp_path / "t.csv")[0]

    assert from_folders.folds.scheme == "stratified"
    assert from_table.folds.scheme == "grouped"


def test_of_several_data_sets_those_run_that_are_there(tmp_path: Path) -> None:
    plan = Reproduction(item=find_item("table6"), scale="small", data=tmp_path)
    smoke = Reproduction(item=find_item("table6"), scale="smoke", data=tmp_path)
    match = "no data set of this item lies there: .*; expected a folder for any of cifar10, cifar1"
    with pytest.raises(DataError, match=match):
        available_runs(plan)
    (tmp_path / "cifar100").mkdir()

    available = available_runs(plan)

    assert [run.name for run in available] == ["cifar100"]
    assert len(available_runs(smoke)) == 3
    assert left_out_notes(plan, ()) == [
        "no data at hand: cifar10, svhn",
        "left out at this scale: cifar100",
    ]


def test_the_gate_has_no_paper_protocol(tmp_path: Path) -> None:
    plan = Reproduction(item=find_item("figure10"), scale="smoke", protocol="paper", out=tmp_path)
    with pytest.raises(RecipeError, match="no gate under protocol = paper"):
        reproduce_item(plan)


# Runs


def run_smoke(name: str, folder: Path, protocol: str = "honest", *options: str) -> ItemResults:
    """Run an item on made-up data by the command, and return reproduce.json."""
    command = ["reproduce", name, "--scale", "smoke", "--protocol", protocol]
    result = runner.invoke(app, [*command, "--out", str(folder), *options])
    assert result.exit_code == 0, result.output
    assert find_item(name).title in result.output
    assert "made-up pictures" in result.output
    with Image.open(folder / "reproduce.png") as figure:
        assert figure.width > 400
    path = folder / "reproduce.json"
    return ItemResults.parse(read_json(path), path)


@pytest.mark.slow
def test_an_item_runs_measures_and_draws(tmp_path: Path) -> None:
    folder = tmp_path / "runs/reproduce/figure10-smoke-honest"

    results = run_smoke("figure10", folder, "honest", "--seeds", "2")

    cells = results.cells
    assert [cell.row for cell in cells] == ["one stage", "three stages", "three stages, gate"]
    for cell in cells:
        assert cell.ours is not None
        assert cell.interval is not None
        assert 0 <= cell.interval[0] <= cell.ours <= cell.interval[1] <= 1
        assert len(cell.per_seed) == 2
    assert [(s.run, s.member, s.stage, s.lr) for s in results.stages][:2] == [
        ("run", "one", "once", 1e-3),
        ("run", "three", "stage1", 1e-3),
    ]
    test = "crossed random effects over seeds and images"
    assert [comparison.test for comparison in results.comparisons] == [test] * 2
    assert results.commit
    ledger = read_json(next(folder.glob("*/seed*")) / "ledger.json")
    assert [entry["by"] for entry in ledger["test_opened"]] == ["train", "reproduce"]
    runs = {state.item.name: state.runs for state in list_items(tmp_path / "runs/reproduce")}
    assert runs["figure10"] == (f"smoke, honest, {results.trained[:10]}",)
    assert runs["table1"] == ()


def test_the_list_of_items_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; import threefold.cli.app; "
        "from threefold.paper.items import list_items; list_items(Path('.')); "
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.long
def test_one_item_in_rotation(tmp_path: Path) -> None:
    """Another one every day, or the one that THREEFOLD_ITEM names."""
    day = datetime.now(UTC).timetuple().tm_yday
    name = os.environ.get("THREEFOLD_ITEM") or list(ITEMS)[day % len(ITEMS)]
    check_smoke(name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("protocol", ["honest", "paper"])
def test_every_item_runs(name: str, protocol: str, tmp_path: Path) -> None:
    if ITEMS[name].honest_only and protocol == "paper":
        pytest.skip("about the gate, which the paper's protocol does not have")
    check_smoke(name, tmp_path, protocol)


def check_smoke(name: str, folder: Path, protocol: str = "honest") -> None:
    item = ITEMS[name]

    results = run_smoke(name, folder, protocol)
    again = run_smoke(name, folder, protocol)

    measured = [cell for cell in results.cells if cell.ours is not None]
    assert len(measured) == len(results.cells) or item.smoke
    labels = {cell.label for cell in item.cells}
    assert {label for c in results.comparisons for label in (c.a, c.b)} <= labels
    assert results.comparisons
    assert all(cell.rows in ("test", "oof") and cell.n > 0 for cell in measured)
    assert again.trained == results.trained  # nothing is trained again


def test_the_command_lists_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    listed = runner.invoke(app, ["reproduce"]).output

    for name in [*ITEMS, *TABLE_OF_FIGURE, *FIGURES_WITHOUT_VALUES]:
        assert re.search(rf"^{name} ", listed, re.MULTILINE), name
    assert "the values of table7" in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table8"], "no such table or figure"),
        (["table1", "--scale", "huge"], "no such scale; expected full or small or smoke"),
        (["table1", "--protocol", "fair"], "expected honest or paper"),
        (["table5"], "table5 needs cifar10 data"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)

    result = runner.invoke(app, ["reproduce", *words])

    assert message in str(result.exception)


def test_names_in_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    cell = CellResult(
        row="MobileNetV1",
        column="[red]",
        ours=0.5,
        interval=(0.4, 0.6),
        n=9,
        rows="oof",
        backbone="net.x",
    )

    show_results(fake_item_results((cell,)))

    shown = capsys.readouterr().out
    assert "MobileNetV1 [red]" in shown
    assert "1 seed, 9 oof images" in shown
