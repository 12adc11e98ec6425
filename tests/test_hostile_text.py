"""Text from elsewhere: recipes in odd encodings, endless numbers, formulas, control characters."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from support.command_line import SURFACE
from support.tiny_runs import tiny_tree

from threefold.cli import main
from threefold.cli.console import plain
from threefold.cli.signals import Signals
from threefold.data.class_names import check_class_names, exported_names
from threefold.errors import DataError, RecipeError
from threefold.evaluation.label_errors import Suspect, write_suspects
from threefold.names import escape_formula, natural_key, printable
from threefold.predictions.formats import read_predictions
from threefold.predictions.run_folder import default_run_folder
from threefold.recipe.recipe import Recipe


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_as_powershell_writes_it(tmp_path: Path, encoding: str) -> None:
    recipe = Recipe.parse(tiny_tree(tmp_path / "caf\u00e9"))
    (tmp_path / "photos.toml").write_bytes(recipe.dump("h\u00e9").encode(encoding))

    assert Recipe.load(tmp_path / "photos.toml") == recipe


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "9" * 5000,
        "a = " + "[" * 5000 + "]" * 5000,
        "\0",
        "data.group_regex = 'a{99999999999}'",
        "data.group_regex = '" + "(" * 5000 + ")" * 5000 + "'",
    ],
)
def test_recipes_beyond_all_limits_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)

    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "x.toml")

    assert "\n" not in str(error.value)


def test_overrides_beyond_all_limits_are_one_line(tmp_path: Path) -> None:
    for value in ("9" * 5000, "[" * 5000 + "]" * 5000):
        with pytest.raises(RecipeError):
            Recipe.parse(tiny_tree(tmp_path), [f"seed={value}"])


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")

    with pytest.raises(RecipeError, match=r"cannot read the recipe.*no regular file"):
        Recipe.load(tmp_path / "x.toml")


@pytest.mark.parametrize("verb", ["evaluate", "data check", "predict", "report", "train"])
def test_a_path_that_is_too_long_is_one_line(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb.split()[0] in SURFACE
    path = "a" * 5000
    extra = {"predict": ["x.jpg"], "train": ["--out", path]}.get(verb, [])
    source = "demo" if verb == "train" else path
    monkeypatch.setattr(sys, "argv", ["threefold", *verb.split(), source, *extra])

    with pytest.raises(SystemExit) as status:
        main.run(Signals())

    assert status.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_in_names_may_have_any_length() -> None:
    names = ["class" + "9" * 5000, "class10", "class9", "class09"]

    assert sorted(names, key=natural_key) == ["class09", "class9", "class10", names[0]]


def test_formulas_are_text(tmp_path: Path) -> None:
    suspect = Suspect(id="=1+2.png", label="+x", suggested="cat", score=0.5, reason="@y")

    write_suspects(tmp_path / "suspects.csv", [suspect])

    rows = list(csv.reader(io.StringIO((tmp_path / "suspects.csv").read_text())))
    assert rows[1] == ["'=1+2.png", "'+x", "cat", "0.5", "'@y"]
    assert [escape_formula(cell) for cell in ("-1.png", "a=1", "")] == ["'-1.png", "a=1", ""]


def test_control_characters_do_not_reach_the_terminal() -> None:
    name = "\x1b[2J\x9bm.png"

    assert printable(name) == "\\x1b[2J\\x9bm.png"
    assert "\x1b" not in plain(name)
    assert "\x1b" not in str(DataError("no such file", where=name))


@pytest.mark.parametrize("name", ["a\tb", "a\x85b", "x" * 1001, ""])
def test_class_names_that_no_model_file_can_hold(name: str) -> None:
    check_class_names(["x" * 1000, "Éclair", "a b"])

    with pytest.raises(DataError, match=r"fix: rename|a class has no name"):
        check_class_names(["a", name])


def test_a_table_of_very_many_classes_is_read(tmp_path: Path) -> None:
    k = 21_843
    probs = np.eye(3, k)
    lines = [",".join(["label", *map(str, range(k))])]
    lines += [
        ",".join([str(i), *map(str, row.astype(int).tolist())]) for i, row in enumerate(probs)
    ]
    (tmp_path / "x.csv").write_text("\n".join(lines))

    assert read_predictions(tmp_path / "x.csv").probs.argmax(-1).tolist() == [[0, 1, 2]]


def test_the_default_run_folder_is_never_inside_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    for place in (photos, photos / "cat"):
        monkeypatch.chdir(place)
        for images in (Path(os.path.relpath(photos)), photos):
            target = default_run_folder(images).resolve()
            assert target == tmp_path / "runs/photos"
    monkeypatch.chdir(tmp_path)

    assert default_run_folder(Path("photos")) == Path("runs/photos")
    (tmp_path / "photos.csv").touch()
    assert default_run_folder(tmp_path / "photos.csv") == Path("runs/photos")


def test_a_finished_run_with_such_names_can_be_exported() -> None:
    classes = ("Ã\x89clair", "a\nb", "\x1b", "\\x1b", "x" * 1200, "café")

    names = exported_names(classes)

    check_class_names(names)
    assert names[:4] == ("Ã\\x89clair", "a\\x0ab", "\\x1b (2)", "\\x1b")
    assert names[5] == "café"
    assert len(set(names)) == len(classes)
