"""Grouped folds are planned where scenes or copies would make random folds promise too much."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sources import load_source
from support.tiny_runs import make_folder, tiny_tree

from threefold import api
from threefold.data.dataset import Sources
from threefold.data.group_file import GROUP_FILE, read_groups, write_groups
from threefold.errors import RunError
from threefold.training.planning import plan as planning
from threefold.training.planning.basis import Decision
from threefold.training.planning.groups import FoundGroups, plan_with_groups
from threefold.training.planning.plan import RecipePlan, plan_folder
from threefold.training.run import Run

TINY = ("test_efficientnet",)
SETS = ("members.0.weights=none", "members.0.img_size=32", "train.device=cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


def paint_scenes(root: Path, scenes: int, shots: int, tint: float = 0.0) -> Path:
    """Write photographs of scenes in random order; only the tint tells the class."""
    rng = np.random.default_rng(0)
    for name, shift in (("cat", -tint), ("dog", tint)):
        numbers = rng.permutation(scenes * shots)
        for scene in range(scenes):
            pattern = np.kron(rng.uniform(40, 215, (4, 4, 3)), np.ones((8, 8, 1)))
            for shot in range(shots):
                pixels = pattern + shift + rng.normal(0, 3, pattern.shape)
                path = root / name / f"{numbers[scene * shots + shot]:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


def make_plan(root: Path, file: Path, *sets: str) -> RecipePlan:
    return plan_folder(root, 0, TINY, (*SETS, *sets), "fast", group_file=file)


def folds_decision(plan: RecipePlan) -> Decision | None:
    return next((d for d in plan.decisions if d.key == "folds.scheme"), None)


def test_bursts_are_planned_in_grouped_folds(tmp_path: Path) -> None:
    root = paint_scenes(tmp_path / "images", scenes=15, shots=4)

    plan = make_plan(root, tmp_path / "groups.csv")

    assert plan.recipe.folds.scheme == "grouped"
    assert plan.recipe.data.group_file == str(tmp_path / "groups.csv")
    decision = folds_decision(plan)
    assert decision is not None
    assert "with random folds and" in decision.reason
    assert plan.sources is not None
    table = read_groups(tmp_path / "groups.csv")
    assert plan.sources.train.groups == tuple(table[name] for name in plan.sources.train.ids)
    assert len(set(table.values())) <= 45


def test_images_of_their_own_keep_random_folds(tmp_path: Path) -> None:
    root = paint_scenes(tmp_path / "images", scenes=40, shots=1)

    plan = make_plan(root, tmp_path / "groups.csv")

    assert plan.recipe.folds.scheme == "stratified"
    assert not plan.recipe.data.group_file
    assert folds_decision(plan) is not None
    assert not (tmp_path / "groups.csv").exists()


def test_scenes_that_do_not_matter_keep_random_folds(tmp_path: Path) -> None:
    root = paint_scenes(tmp_path / "images", scenes=15, shots=4, tint=120)

    decision = folds_decision(make_plan(root, tmp_path / "groups.csv"))

    assert decision is not None
    assert decision.value == "stratified"
    assert "no more than chance" in decision.reason


def test_exact_copies_share_a_fold(tmp_path: Path) -> None:
    root = paint_scenes(tmp_path / "images", scenes=30, shots=1)
    shutil.copy(root / "cat" / "000.png", root / "cat" / "900.png")
    shutil.copy(root / "cat" / "001.png", root / "dog" / "901.png")

    plan = make_plan(root, tmp_path / "groups.csv")

    table = read_groups(tmp_path / "groups.csv")
    assert plan.recipe.folds.scheme == "grouped"
    assert table["cat/000.png"] == table["cat/900.png"]
    assert table["cat/001.png"] == table["dog/901.png"]


@pytest.mark.parametrize("given", ["folds.scheme=stratified", "group_regex", "no file"])
def test_what_the_user_decides_is_not_searched(tmp_path: Path, given: str) -> None:
    root = paint_scenes(tmp_path / "images", scenes=15, shots=4)
    sets = (given,) if "=" in given else ()
    if given == "group_regex":
        sets = (r"data.group_regex=\d+", 'folds={scheme="grouped",k=3}')
    file = None if given == "no file" else tmp_path / "groups.csv"

    plan = plan_folder(root, 0, TINY, (*SETS, *sets), "fast", group_file=file)

    assert folds_decision(plan) is None
    assert not (tmp_path / "groups.csv").exists()
    assert not plan.recipe.data.group_file


def test_a_table_is_planned_in_folds_of_its_groups(tmp_path: Path) -> None:
    paint_scenes(tmp_path / "images", scenes=4, shots=3)
    lines = ["path,label,group"]
    for name in ("cat", "dog"):
        lines += [f"images/{name}/{i:03d}.png,{name},{name}{i % 6}" for i in range(12)]
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(lines))

    plan = make_plan(table, tmp_path / "groups.csv")

    assert plan.recipe.name == "photos"
    assert (plan.recipe.data.source, plan.recipe.data.root) == ("csv", str(table))
    assert plan.recipe.folds.scheme == "grouped"
    decision = folds_decision(plan)
    assert decision is not None
    assert decision.reason == "the images have 12 groups, which folds keep whole"
    assert not (tmp_path / "groups.csv").exists()


def test_too_many_images_for_the_time_are_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = paint_scenes(tmp_path / "images", scenes=15, shots=4)
    monkeypatch.setattr("threefold.training.planning.groups.SEARCH_SECONDS", 0.0)

    decision = folds_decision(make_plan(root, tmp_path / "groups.csv"))

    assert decision is not None
    assert decision.value == "stratified"
    assert "no scenes were looked for: to compare 120 images" in decision.reason


def planned(sources: Sources, groups: list[str], file: Path, *sets: str):
    tree = tiny_tree(Path("images"))
    found = FoundGroups(tuple(groups), Decision("folds.scheme", "grouped", "scenes were found"))
    return plan_with_groups(tree, sets, found, sources, file)


def test_a_class_in_one_group_falls_back_to_random_folds(tmp_path: Path) -> None:
    sources = load_source("folder", make_folder(tmp_path / "images", per_class=4))
    groups = [name.split("/")[0] if "red" in name else name for name in sources.train.ids]

    recipe, kept, [decision] = planned(sources, groups, tmp_path / "groups.csv")

    assert recipe.folds.scheme == "stratified"
    assert kept is sources
    assert decision.value == "stratified"
    assert "has no images of class red to train on" in decision.reason
    assert "\n" not in decision.reason
    assert not (tmp_path / "groups.csv").exists()


@pytest.mark.parametrize("table", ["folds={k=3}", 'data={root="images"}'])
def test_an_override_of_a_whole_table_wins(tmp_path: Path, table: str) -> None:
    sources = load_source("folder", make_folder(tmp_path / "images", per_class=4))

    recipe, _, [decision] = planned(sources, list(sources.train.ids), tmp_path / "g.csv", table)

    assert (recipe.folds.scheme, recipe.data.group_file) == ("stratified", "")
    assert decision.value == "stratified"


def test_a_file_with_other_groups_is_left_alone(tmp_path: Path) -> None:
    sources = load_source("folder", make_folder(tmp_path / "images", per_class=4))
    file, ids = tmp_path / "groups.csv", sources.train.ids
    write_groups(file, ids, ["mine"] * len(ids))
    before = file.read_bytes()

    with pytest.raises(RunError, match=r"a file with other groups is in the way: .*groups\.csv"):
        planned(sources, list(ids), file)

    assert file.read_bytes() == before


@pytest.mark.slow
def test_a_run_with_groups_resumes_moves_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = paint_scenes(tmp_path / "images", scenes=10, shots=3)
    out = tmp_path / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("threefold.training.jobs.assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            api.fit(root, out, members=TINY, overrides=SETS, quality="fast", budget=0)
    began = (out / GROUP_FILE).read_bytes()
    monkeypatch.setattr(planning, "plan_folder", None)

    run = api.fit(root, out)

    assert (out / GROUP_FILE).read_bytes() == began
    groups = run.predictions().groups
    assert groups is not None
    folds = run.predictions().folds
    assert all(len(set(folds[np.array(groups) == group])) == 1 for group in set(groups))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "images of one group were never split between training" in page
    assert "and scoring, because" in page
    shutil.move(out, tmp_path / "elsewhere")
    assert Run.open(tmp_path / "elsewhere").sources.train.groups == groups


def test_a_folder_of_something_else_is_refused_before_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    monkeypatch.setattr(planning, "plan_folder", None)

    with pytest.raises(RunError, match="not empty and not a run"):
        api.fit(tmp_path, tmp_path / "run")

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
