"""Where a fit from Python runs, for paths and for data in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.tiny_runs import make_folder

import threefold
from threefold.data.detect_source import detect_source
from threefold.data.load import load_data
from threefold.errors import RunError, ThreefoldError
from threefold.training.run_data import place_data

IMAGES = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
LABELS = ["ant", "bee"] * 2


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_path_has_the_run_folder_of_the_command_line() -> None:
    Path("photos").mkdir()

    assert place_data("photos", None, None) == (Path("runs/photos"), "photos")
    assert place_data(Path("photos"), None, "x") == (Path("x"), Path("photos"))


def test_data_in_memory_have_a_folder_of_their_own() -> None:
    folder, data = place_data(IMAGES, LABELS, None)
    again, same = place_data(IMAGES, LABELS, None)
    other, _ = place_data(IMAGES, LABELS[::-1], None)

    assert (folder, data) == (again, same)
    assert sorted(Path("runs").iterdir()) == sorted([folder, other])
    assert load_data(detect_source(data), 0).train.classes == ("ant", "bee")
    assert data.is_relative_to(folder.resolve())


def test_a_table_is_stored_where_the_caller_says() -> None:
    for row, image in enumerate(IMAGES):
        Path(f"{row}.bin").write_bytes(image.tobytes())
    table = pd.DataFrame({"path": [f"{row}.bin" for row in range(4)], "kind": LABELS})

    folder, data = place_data(table, "kind", "run")

    assert folder == Path("run")
    assert Path(data).read_text().splitlines()[1].endswith("0.bin,ant")


@pytest.mark.parametrize(
    ("data", "labels", "out", "reason"),
    [
        (IMAGES, None, LABELS, "the second argument is the run folder; got list; fix: .*labels="),
        ("photos", LABELS, None, "labels are given for images in memory only"),
        (IMAGES, LABELS[:2], None, "images and labels differ in number"),
    ],
)
def test_what_does_not_fit_is_refused(data: Any, labels: Any, out: Any, reason: str) -> None:
    with pytest.raises(ThreefoldError, match=reason):
        threefold.fit(data, out, labels=labels, progress=False)
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_a_table_in_memory_is_fitted_and_resumed(capfd: pytest.CaptureFixture[str]) -> None:
    paths = sorted(make_folder(Path("images"), 12).rglob("*.png"))
    table = pd.DataFrame({"file": paths, "class": [path.parent.name for path in paths]})

    def call() -> threefold.Run:
        sets = ("members.0.weights=none", "members.0.img_size=32", "train.device=cpu")
        return threefold.fit(
            table, budget=0, members="test_resnet", overrides=sets, quality="fast", progress=False
        )

    run, again = call(), call()

    assert capfd.readouterr() == ("", "")  # progress=False
    assert run.dir == again.dir
    assert run.dir.parent == Path("runs")
    assert run.accuracy == again.accuracy > 0.9
    assert run.score(table).n == len(table)


def test_a_folder_of_other_files_is_left_as_it_is() -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")

    with pytest.raises(RunError, match="not empty and not a run"):
        place_data(IMAGES, LABELS, "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]
