"""Groups from a CSV file: every training image has one, and a run keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sources import load_source
from support.tiny_runs import make_folder, tiny_tree

from threefold.data.group_file import GROUP_FILE, read_groups, write_groups
from threefold.errors import DataError, RecipeError, RunError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ids = ["a/1.jpg", 'b/"odd", é.jpg', "b/3.jpg"]

    write_groups(tmp_path / "groups.csv", ids, ["g 1", "g,2", "g 1"])

    table = read_groups(tmp_path / "groups.csv")
    assert [table[name] for name in ids] == ["g 1", "g,2", "g 1"]


def test_a_folder_takes_its_groups_from_a_file(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", per_class=3, test=1)
    ids = load_source("folder", tmp_path / "images").train.ids
    groups = [f"g{row % 4}" for row in range(len(ids))]
    file = tmp_path / "groups.csv"
    write_groups(file, [*reversed(ids), "gone.png"], [*reversed(groups), "g9"])

    sources = load_source("folder", tmp_path / "images", group_file=str(file))

    assert sources.train.groups == tuple(groups)
    assert sources.test is not None
    assert sources.test.groups is None


def test_groups_of_test_images_are_compared_if_all_are_known(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", per_class=3, test=1)
    plain = load_source("folder", tmp_path / "images")
    assert plain.test is not None
    ids = [*plain.train.ids, *plain.test.ids]
    write_groups(tmp_path / "groups.csv", ids, [f"g{row % 4}" for row in range(len(ids))])

    sources = load_source("folder", tmp_path / "images", group_file=str(tmp_path / "groups.csv"))

    assert "3 groups are in both train and test" in sources.warnings[-1]


def test_pixels_in_memory_take_groups_too(tmp_path: Path) -> None:
    ids = load_source("demo", "", limit_per_class=2).train.ids
    write_groups(tmp_path / "groups.csv", ids, [f"g{row % 4}" for row in range(len(ids))])

    train = load_source(
        "demo", "", limit_per_class=2, group_file=str(tmp_path / "groups.csv")
    ).train

    assert train.groups is not None
    assert set(train.groups) == {"g0", "g1", "g2", "g3"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name,group\nx,1\n", ["lacks a column", "expected id,group, got name,group"]),
        ("", ["lacks a column", "got an empty file"]),
        ("id,group\nx,\n", ["an empty cell in the group file", "groups.csv line 2"]),
        ("id,group\nx\n", ["an empty cell in the group file", "groups.csv line 2"]),
        ("id,group\nx,1\nx,2\n", ["the group file repeats ids", "groups.csv", "got x"]),
        ("id,group\nx,1\n", ["9 of 9 training images are not in the group file"]),
        (None, ["cannot read the group file", "groups.csv", "data.group_file"]),
    ],
)
def test_bad_group_files(tmp_path: Path, text: str | None, expected: list[str]) -> None:
    make_folder(tmp_path / "images", per_class=3)
    if text is not None:
        (tmp_path / "groups.csv").write_text(text)

    with pytest.raises(DataError) as error:
        load_source("folder", tmp_path / "images", group_file=str(tmp_path / "groups.csv"))

    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('data={root="x",group_file="g.csv"}', "ignores data.group_file; set folds.scheme"),
        ('data={root="x",group_file="g.csv",group_regex="a"}', "both define groups"),
    ],
)
def test_recipes_that_contradict_themselves(override: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        Recipe.parse(tiny_tree(Path("x")), [override])


def test_a_run_folder_may_begin_with_its_group_file(tmp_path: Path) -> None:
    recipe = Recipe.parse(tiny_tree(tmp_path))
    write_groups(tmp_path / "run" / GROUP_FILE, ["a"], ["1"])
    write_groups(tmp_path / "other" / "rows.csv", ["a"], ["1"])

    assert RunFolder.create(tmp_path / "run", recipe).recipe == recipe
    with pytest.raises(RunError, match="not empty and not a run"):
        RunFolder.create(tmp_path / "other", recipe)
