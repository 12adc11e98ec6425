"""The paper's items: what they say agrees with the recipes, every one plans at every scale, one runs, and figures are right by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.data.dataset import load_data
from threefold.data.published import data_table
from threefold.data.synthetic import write_sample
from threefold.ensembles.registry import make_ensemble
from threefold.errors import DataError, RecipeError
from threefold.files import write_arrays
from threefold.paper import reproduce
from threefold.paper.items import ITEMS, PICTURES, SAME, Answer, Cell, Item, item, states
from threefold.paper.reproduce import Asked, Rows
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import MemberRow
from threefold.predictions.run_folder import RunFolder
from threefold.recipe import Recipe, packaged, packaged_names

runner = CliRunner()
RECIPES = Path(reproduce.__file__).parent / "recipes"
PAPERS = [name for name in packaged_names() if name.startswith("paper/")]


def plans(asked: Asked) -> list[Recipe]:
    made = [reproduce.plan_recipe(asked, plan) for plan in asked.item.plans]
    return [recipe for recipe in made if recipe is not None]


# Items and recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", ITEMS.values(), ids=list(ITEMS))
def test_an_item_names_what_its_recipes_have(known: Item) -> None:
    there = {
        plan.name: {m.name for m in packaged(plan.recipe, plan.overrides).members}
        for plan in known.plans
    }
    labels = [cell.label for cell in known.cells]
    assert len(set(labels)) == len(labels)
    for plan in known.plans:
        assert set(plan.members) <= there[plan.name]
        assert packaged(plan.recipe).data.source == plan.source
    for cell in known.cells:
        names = {
            *cell.answer.members,
            *([] if cell.answer.kind == "ensemble" else [cell.answer.name]),
        }
        assert names <= there[cell.answer.run], cell.label
        assert (
            cell.answer.kind != "ensemble" or not make_ensemble(cell.answer.name).needs_fit
        )  # scored where it is asked
        assert cell.paper is None or 0.7 < cell.paper < 1
    assert {label for pair in known.pairs for label in pair} <= set(labels)
    everyone = set.union(*there.values())
    assert set(known.small.members) | set(known.smoke) | set(known.stages) <= everyone
    cells = {cell.label: cell for cell in known.cells}
    for a, b in ((cells[a], cells[b]) for a, b in known.pairs):
        nets = {known.small.members.get(cell.answer.name) for cell in (a, b)} - {None}
        assert a.row != b.row or len(nets) < 2, (
            f"{a.label} and {b.label} are compared on two networks"
        )


def test_every_recipe_of_the_paper_is_used_and_says_what_it_is() -> None:
    assert {plan.recipe for known in ITEMS.values() for plan in known.plans} == {*PAPERS, "beyond"}
    for name in [*PAPERS, "beyond"]:
        head = re.match(r"(?:#.*\n)+", (RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
        assert head is not None
        assert "# command: threefold " in head[0]
        assert "not run here: needs" in head[0]
        assert name == "beyond" or "# sources: paper section" in head[0]
        assert packaged(name).name == name.removeprefix("paper/")
        for command in re.findall(r"threefold reproduce (\w+)", head[0]):
            assert command in ITEMS


@pytest.mark.parametrize("name", PAPERS)
def test_the_authors_settings(name: str) -> None:
    """What holds for every recipe of the paper, and the values that differ (paper sections 4.1 to 4.7, notebooks)."""
    recipe = packaged(name)
    assert (recipe.train.optimizer, recipe.train.precision, recipe.train.weight_decay) == (
        "adam-keras",
        "float32",
        0,
    )
    assert recipe.augment.model_dump(exclude={"hflip", "vflip", "erasing", "mixup", "cutmix"}) == {
        "rotation": 30,
        "shift": 0.3,
        "shear": 0.3,
        "zoom": 0.3,
        "channel_shift": 10,
    }
    flips = name not in ("paper/table6-svhn", "paper/table7")
    assert (recipe.augment.hflip, recipe.augment.vflip) == (flips, flips)
    assert recipe.protocol == ("honest" if name == "paper/figure10" else "paper")
    for member in recipe.members:
        if member.joins:
            assert len(member.joins) == 3
            assert member.head.kind == "mlp"
            continue
        assert (member.head.noise, member.head.activation, member.head.units) == (
            0.1,
            "keras",
            2048,
        )
        assert member.head.kind != "gru" or not member.head.reset_after
        rates = [(stage.lr, stage.epochs) for stage in recipe.stages_of(member.name)]
        assert rates == STAGES[name] or (name, member.name) in ODD_STAGES
    batches = {m.name: m.batch_size or recipe.train.batch_size for m in recipe.members}
    assert {n: batches[n] for n in BATCHES.get(name, {})} == BATCHES.get(name, {})


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


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that each data set is made up once."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("known", ITEMS.values(), ids=list(ITEMS))
@pytest.mark.parametrize("protocol", ["honest", "paper"])
def test_every_item_plans_at_every_scale(known: Item, protocol: Any, made_up: Path) -> None:
    for scale in ("full", "small", "smoke"):
        data = None if scale == "smoke" else made_up / "somewhere"
        made = plans(Asked(known, scale, protocol, made_up, data))  # type: ignore[arg-type]
        assert made
        for recipe in made:
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


def test_protocols_change_folds_only_where_the_authors_had_none(tmp_path: Path) -> None:
    def folds(name: str, scale: Any, protocol: Any) -> tuple[int, str, str]:
        spec = plans(Asked(item(name), scale, protocol, data=tmp_path))[0].folds
        return spec.k, spec.scheme, spec.final

    assert folds("table1", "full", "paper") == (1, "stratified", "average")
    assert folds("table1", "full", "honest") == (2, "stratified", "refit")
    assert folds("table1", "small", "honest") == (2, "stratified", "average")
    assert (
        folds("table3", "full", "honest")
        == folds("table3", "full", "paper")
        == (5, "stratified", "average")
    )
    assert folds("table7", "full", "honest")[1] == "leave-one-group-out"
    assert folds("figure10", "small", "honest") == (2, "stratified", "average")


def test_a_full_run_under_the_papers_protocol_is_the_recipe_itself(tmp_path: Path) -> None:
    whole = packaged("paper/figure11", [f'data.root="{tmp_path}"'])
    made = plans(Asked(item("figure11"), "full", "paper", data=tmp_path))[0]
    kept = [m for m in whole.members if m.name != "e2e-3m"]
    assert (made.members, made.augment, made.train, made.folds) == (
        tuple(kept),
        whole.augment,
        whole.train,
        whole.folds,
    )
    assert made.stages == whole.stages[:3]  # the joint network's stage goes with it
    assert "e2e-3m" in [
        m.name for m in plans(Asked(item("table4"), "full", "paper", data=tmp_path))[0].members
    ]


def test_sizes_that_differ_still_differ_in_a_smoke_run(tmp_path: Path) -> None:
    recipe = plans(Asked(item("figure4"), "smoke", out=tmp_path))[0]
    assert [m.img_size for m in recipe.members] == [32, 43, 45, 45, 32, 45, 45]


def test_where_the_data_are(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"table7 needs surrey-asl data; fix: .*threefold data fetch surrey-asl --to",
    ):
        plans(Asked(item("table7"), "full"))
    assert plans(Asked(item("table1"), "small"))[0].data.source == "demo"
    assert plans(Asked(item("table1"), "full"))[0].data.source == "fashion-mnist"
    assert {r.data.source for r in plans(Asked(item("table6"), "full", data=tmp_path))} == {
        "cifar10",
        "cifar100",
        "svhn",
    }
    assert plans(Asked(item("table6"), "full", data=tmp_path))[2].data.root == str(
        tmp_path / "svhn"
    )
    photos = write_sample("folder", tmp_path / "photos", per_class=2)
    assert data_table("cifar10", photos)["source"] == "folder"
    assert data_table("svhn", write_sample("svhn", tmp_path / "s", per_class=2))["source"] == "svhn"
    # Hands without known signers: any folds; with a table that names groups: grouped.
    assert plans(Asked(item("table7"), "small", data=photos))[0].folds.scheme == "stratified"
    assert (
        plans(Asked(item("table7"), "small", data=tmp_path / "t.csv"))[0].folds.scheme == "grouped"
    )
    assert plans(Asked(item("table1"), "small", overrides=("seed=3",)))[0].seed == 3


def test_of_several_data_sets_those_run_that_are_there(tmp_path: Path) -> None:
    asked = Asked(item("table6"), "small", data=tmp_path)
    with pytest.raises(
        DataError,
        match=r"no data set of this item lies there: .*; expected a folder for any of cifar10, cifar100, svhn",
    ):
        reproduce.at_hand(asked)
    (tmp_path / "cifar100").mkdir()
    assert [plan.name for plan in reproduce.at_hand(asked)] == ["cifar100"]
    assert len(reproduce.at_hand(asked._replace(scale="smoke"))) == 3
    runs = [
        SimpleNamespace(
            results=SimpleNamespace(notes=[f"{n} pairs of images look nearly the same: {n}"]),
            recipe=SimpleNamespace(data=SimpleNamespace(source="svhn"), members=()),
        )
        for n in (3, 44)
    ]
    assert [note for note in reproduce._notes(asked, {"svhn": runs}) if "pairs" in note] == [
        "3 pairs of images look nearly the same: 3"
    ]
    assert reproduce._notes(asked, {})[-2:] == [
        "no data at hand: cifar10, svhn",
        "left out at this scale: cifar100",
    ]


def test_names(tmp_path: Path) -> None:
    assert {name: item(name).name for name in SAME} == SAME
    for name in PICTURES:
        with pytest.raises(RecipeError, match="has no values to reproduce"):
            item(name)
    with pytest.raises(RecipeError, match="no such item here; expected one of table1, "):
        item("table8")
    with pytest.raises(RecipeError, match="no gate under protocol = paper"):
        reproduce.reproduce(Asked(item("figure10"), "smoke", "paper", tmp_path))


# Measuring ------------------------------------------------------------------------------------------------------------


def fake_run(
    folder: Path, hits: dict[str, list[bool]], groups: tuple[str, ...] | None = None
) -> Any:
    """A run folder with predictions of two classes that are right on these rows."""
    right = np.array(list(hits.values()))
    probs = np.where(right[..., None], [0.9, 0.1], [0.1, 0.9])
    ids = tuple(f"i{n}" for n in range(right.shape[1]))
    Predictions(
        probs=probs,
        labels=np.zeros(right.shape[1], int),
        ids=ids,
        classes=("a", "b"),
        members=tuple(hits),
        groups=groups,
        kind="test",
    ).save(folder / "test.npz")
    members = [
        MemberRow(
            name=name,
            backbone="net",
            img_size=8,
            weights="none",
            head="linear",
            parameters=5,
            macs=7,
        )
        for name in hits
    ]
    return SimpleNamespace(folder=RunFolder(folder), results=SimpleNamespace(members=members))


def test_cells_over_groups_and_seeds_by_hand(tmp_path: Path) -> None:
    """Two signers of 4 and 2 images: the paper's mean counts signers alike, 1/2 of (3/4 + 1/2)."""
    groups = ("A", "A", "A", "A", "B", "B")
    runs = {
        "run": [
            fake_run(tmp_path / str(s), {"x": [True, True, True, s == 1, True, False]}, groups)
            for s in (0, 1)
        ]
    }
    cell = Cell("X", "", Answer("member", "x"), 0.949)
    rows = reproduce._rows(runs, cell.answer)  # type: ignore[arg-type]
    assert rows is not None
    assert rows.hits.shape == (2, 6)
    entries = reproduce._entries(cell, rows, runs)  # type: ignore[arg-type]
    assert [e["column"] for e in entries] == ["A", "B", "mean"]
    assert [e["paper"] for e in entries] == [None, None, 0.949]
    assert entries[0]["per_seed"] == [0.75, 1.0]
    assert entries[2]["ours"] == pytest.approx((0.875 + 0.5) / 2)
    absent = reproduce._rows(runs, Answer("member", "y"))  # type: ignore[arg-type]
    assert absent is None
    assert reproduce._entries(cell, None, runs)[0]["ours"] is None  # type: ignore[arg-type]
    assert reproduce._rows(runs, Answer("ensemble", "mean", ("x", "y"))) is None  # type: ignore[arg-type]


def test_comparisons_by_hand() -> None:
    ids = tuple(map(str, range(40)))
    base = np.ones((1, 40), bool)
    worse = base.copy()
    worse[0, :12] = False
    found = {
        "a": Rows(base, ids, None, "test"),
        "b": Rows(worse, ids, None, "test"),
        "c": Rows(base, ids[::-1], None, "test"),
    }
    (first,) = reproduce._comparisons(
        (("a", "b"), ("a", "c"), ("a", "d")), found
    )  # other images, and a cell left out
    assert (first["only_a"], first["only_b"], first["difference"]) == (12, 0, 0.3)
    assert first["p"] == pytest.approx(2 * 0.5**12) == first["p_holm"]
    assert first["verdict"].startswith("a is better than b: 12 against 0 images")
    both = reproduce._comparisons((("a", "b"), ("b", "a")), found)
    assert [e["p_holm"] for e in both] == pytest.approx([2 * first["p"]] * 2)
    several = {k: r._replace(hits=np.repeat(r.hits, 3, 0)) for k, r in found.items()}
    (over,) = reproduce._comparisons((("a", "b"),), several)
    assert over["seeds"] == 3
    assert over["difference"] == pytest.approx(0.3)
    assert over["verdict"].startswith("a is better than b over 3 seeds")


def test_several_networks_in_some_folds_only(tmp_path: Path) -> None:
    """Three folds, two networks in fold 1: the mean of the folds' answers, each a network's or the two's mean."""
    probs = {("x", f): np.full((1, 2, 2), 0.1 * (f + 1)) for f in range(3)} | {
        ("y", f): np.full((1, 2, 2), 0.7) for f in range(3)
    }
    for (name, fold), array in probs.items():
        write_arrays(tmp_path / f"{name}{fold}/probs.npz", test=array, score=array)
    run = SimpleNamespace(
        recipe=SimpleNamespace(views=packaged("demo").views),
        roles={f: SimpleNamespace(score=np.arange(2 * f, 2 * f + 2)) for f in range(3)},
        folder=SimpleNamespace(job_folder=lambda job: tmp_path / job),
        last_job=lambda name, fold: f"{name}{fold}",
    )
    answer = Answer("folds", "x", ("x", "y"), (1,))
    np.testing.assert_allclose(
        reproduce._mixed(run, answer, (2, 2), "test"), (0.1 + (0.2 + 0.7) / 2 + 0.3) / 3
    )  # type: ignore[arg-type]
    out_of_fold = reproduce._mixed(run, answer, (6, 2), "oof")  # type: ignore[arg-type]
    np.testing.assert_allclose(out_of_fold[:, 0], [0.1, 0.1, 0.45, 0.45, 0.3, 0.3])


# Runs -----------------------------------------------------------------------------------------------------------------


def smoke(name: str, folder: Path, protocol: str = "honest", *more: str) -> dict[str, Any]:
    done = runner.invoke(
        app,
        [
            "reproduce",
            name,
            "--scale",
            "smoke",
            "--protocol",
            protocol,
            "--out",
            str(folder),
            *more,
        ],
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((folder / "reproduce.json").read_text())
    assert item(name).title in done.output
    assert "made-up pictures" in done.output
    with Image.open(folder / "reproduce.png") as figure:
        assert figure.width > 400
    return found


def test_an_item_runs_measures_and_draws(tmp_path: Path) -> None:
    found = smoke(
        "figure10", tmp_path / "runs/reproduce/figure10-smoke-honest", "honest", "--seeds", "2"
    )
    assert [c["row"] for c in found["cells"]] == ["one stage", "three stages", "three stages, gate"]
    assert all(0 <= c["interval"][0] <= c["ours"] <= c["interval"][1] <= 1 for c in found["cells"])
    assert [len(c["per_seed"]) for c in found["cells"]] == [2, 2, 2]
    assert [(s["run"], s["member"], s["stage"], s["lr"]) for s in found["stages"]][:2] == [
        ("run", "one", "once", 1e-3),
        ("run", "three", "stage1", 1e-3),
    ]
    assert [e["test"] for e in found["comparisons"]] == [
        "crossed random effects over seeds and images"
    ] * 2
    assert found["commit"]
    folder = next((tmp_path / "runs/reproduce/figure10-smoke-honest").glob("*/seed*"))
    assert [
        entry["by"] for entry in json.loads((folder / "ledger.json").read_text())["test_opened"]
    ] == ["train", "reproduce"]
    listing = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, threefold.cli, threefold.paper_items as p; p.states(p.Path('.')); assert 'torch' not in sys.modules",
        ],
        check=False,
    )
    assert listing.returncode == 0  # the list is instant
    state = {line["name"]: line["state"] for line in states(tmp_path / "runs/reproduce")}
    assert state["figure10"] == f"smoke, honest, {found['trained'][:10]}"
    assert state["table1"] == "not run"


@pytest.mark.slow
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
        pytest.skip("about the gate, which the paper's protocol has not")
    check_smoke(name, tmp_path, protocol)


def check_smoke(name: str, folder: Path, protocol: str = "honest") -> None:
    found = smoke(name, folder, protocol)
    measured = [c for c in found["cells"] if c["ours"] is not None]
    assert len(measured) == len(found["cells"]) or ITEMS[name].smoke
    labels = {cell.label for cell in ITEMS[name].cells}
    assert {e[side] for e in found["comparisons"] for side in "ab"} <= labels
    assert found["comparisons"]
    assert all(c["rows"] in ("test", "oof") and c["n"] > 0 for c in measured)
    assert smoke(name, folder, protocol)["trained"] == found["trained"]  # nothing is trained again


def test_what_the_command_lists_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = runner.invoke(app, ["reproduce"]).output
    for name in [*ITEMS, *SAME, *PICTURES]:
        assert re.search(rf"^{name} ", listed, re.MULTILINE), name
    assert "the values of table7" in listed
    for words, told in (
        (["table8"], "no such item here"),
        (["table1", "--scale", "huge"], "no such word; expected full or small or smoke"),
        (["table1", "--protocol", "fair"], "expected honest or paper"),
        (["table5"], "table5 needs cifar10 data"),
    ):
        done = runner.invoke(app, ["reproduce", *words])
        assert told in str(done.exception), words
