"""Tables, lists and arrays in memory become files in the folder of a run."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from threefold.data.dataset import Sources
from threefold.data.detect_source import detect_source
from threefold.data.in_memory import find_stored_data, is_stored_data, store_data
from threefold.data.load import load_data
from threefold.errors import DataError, RunError
from threefold.predictions.run_folder import RunFolder

LABELS = ["wolf", "ant"] * 4


def grey(i: int) -> np.ndarray:
    """A grey image with the value of its number."""
    return np.full((3, 4), i, np.uint8)


def png(i: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(grey(i)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Eight images, relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(8):
        (tmp_path / f"photos/{i}.png").write_bytes(png(i))
    return [f"photos/{i}.png" for i in range(8)]


def load(path: Path, **options: Any) -> Sources:
    return load_data(detect_source(path).model_copy(update=options), 0)


def check(sources: Sources) -> None:
    """The eight images with their labels, in order."""
    assert sources.train.classes == ("ant", "wolf")
    assert sources.train.labels.tolist() == [1, 0] * 4
    assert [int(sources.train.pixels(i)[0, 0, 0]) for i in range(8)] == list(range(8))


def pandas_table(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("pandas").DataFrame(columns)


def polars_table(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("polars").DataFrame(columns)


def lazy_table(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("polars").LazyFrame(columns)


def arrow_table(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("pyarrow").table(columns)


TABLES = [dict, pandas_table, polars_table, lazy_table, arrow_table]


@pytest.mark.parametrize("make", TABLES)
def test_tables_of_paths(tmp_path: Path, paths: list[str], make: Any) -> None:
    columns = {"File_Name": paths, "species": LABELS, "fold": [0, 0, 1, 1] * 2, "width": [4] * 8}

    path = store_data(make(columns), None, tmp_path / "run")

    sources = load(path, fold_column="fold")
    check(sources)
    assert path.is_relative_to(tmp_path / "run" / "data")
    assert sources.train.folds == ("0", "0", "1", "1") * 2
    assert sources.train.ids[0] == (tmp_path / "photos/0.png").as_posix()


@pytest.mark.parametrize("make", TABLES)
def test_tables_of_images(tmp_path: Path, make: Any) -> None:
    columns = {"image": [png(i) for i in range(8)], "label": LABELS, "split": ["train"] * 8}

    check(load(store_data(make(columns), None, tmp_path / "run")))


@pytest.mark.parametrize("make", TABLES)
def test_other_columns_of_a_table_can_name_groups(
    tmp_path: Path, paths: list[str], make: Any
) -> None:
    columns = {"image": paths, "label": LABELS, "Patient": [7, 7, 8, 8, 9, 9, 9, 9]}

    path = store_data(make(columns), None, tmp_path / "run")

    assert any("--set data.group_column=Patient" in note for note in load(path).notes)
    groups = load(path, group_column="Patient").train.groups
    assert groups == ("7", "7", "8", "8", "9", "9", "9", "9")


def test_what_is_no_column_of_plain_cells_is_left_out(tmp_path: Path, paths: list[str]) -> None:
    columns = {"image": paths, "label": LABELS, "Class name": LABELS}
    others = {"note": "taken in May", "thumbnail": [png(i) for i in range(8)], "few": [1, 2]}

    path = store_data(columns | others, None, tmp_path / "run")

    assert path.read_text().splitlines()[0] == "path,label"


def test_a_table_with_a_column_for_each_class(tmp_path: Path, paths: list[str]) -> None:
    table = pandas_table({"image": paths, "ant": [0, 1] * 4, "wolf": [1.0, 0.0] * 4})

    check(load(store_data(table, None, tmp_path / "run")))


def test_the_label_of_a_table_can_be_named_or_given(tmp_path: Path, paths: list[str]) -> None:
    table = pandas_table({"path": paths, "what": LABELS, "label": ["x"] * 8})

    check(load(store_data(table, "what", tmp_path / "a")))
    check(load(store_data(table, table["what"], tmp_path / "b")))


@pytest.mark.parametrize(
    "images",
    [
        np.stack([grey(i) for i in range(8)]),
        np.stack([grey(i) for i in range(8)])[..., None].repeat(3, axis=3),
        np.stack([grey(i) for i in range(8)])[..., None].astype(np.int64),
        [grey(i) for i in range(8)],
        [Image.fromarray(grey(i)) for i in range(8)],
        [png(i) for i in range(8)],
        [grey(i)[:, :1] if i else grey(i) for i in range(8)],
    ],
)
def test_images_in_memory(tmp_path: Path, images: Any) -> None:
    check(load(store_data(images, LABELS, tmp_path / "run")))


def test_a_tensor_of_images(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    images = torch.from_numpy(np.stack([grey(i) for i in range(8)]))

    check(load(store_data(images, np.array(LABELS), tmp_path / "run")))


def test_lists_and_pairs_of_paths(tmp_path: Path, paths: list[str]) -> None:
    check(load(store_data(paths, LABELS, tmp_path / "a")))
    check(load(store_data(np.array(paths), np.array(LABELS, object), tmp_path / "b")))
    check(load(store_data([*zip(paths, LABELS, strict=True)], None, tmp_path / "c")))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([[2], [10]] * 4), ("2", "10")),
        (np.eye(2, dtype=int)[[0, 1] * 4], ("0", "1")),
        ([2.0, 10.0] * 4, ("2", "10")),
        ([[0, 1], [1, 0]] * 4, ("0", "1")),
    ],
)
def test_labels_in_usual_forms(tmp_path: Path, labels: Any, classes: tuple[str, ...]) -> None:
    sources = load(store_data(np.zeros((8, 3, 3), np.uint8), labels, tmp_path / "run"))

    assert sources.train.classes == classes


def test_the_same_data_are_stored_once(tmp_path: Path) -> None:
    images = [grey(i) for i in range(8)]
    first = store_data(images, LABELS, tmp_path / "run")
    before = first.stat().st_mtime_ns

    assert store_data(images, LABELS, tmp_path / "run") == first
    assert first.stat().st_mtime_ns == before
    assert is_stored_data(tmp_path / "run" / "data")
    RunFolder(tmp_path / "run").check_new()


@pytest.mark.parametrize("kind", [list, np.stack])
def test_other_data_are_refused_once_a_run_has_begun(tmp_path: Path, kind: Any) -> None:
    run = tmp_path / "run"
    store_data(kind([grey(i + 1) for i in range(8)]), LABELS, run)
    path = store_data(kind([grey(i) for i in range(8)]), LABELS, run)
    assert [entry.name for entry in (run / "data").iterdir()] == [path.parent.name]

    (run / "recipe.toml").write_text("")

    assert store_data(kind([grey(i) for i in range(8)]), LABELS, run) == path
    for images, labels in (
        ([grey(i + 1) for i in range(8)], LABELS),
        ([grey(i) for i in range(8)], LABELS[::-1]),
    ):
        with pytest.raises(RunError, match="a run on other images"):
            store_data(kind(images), labels, run)
    assert {entry.name for entry in run.iterdir()} == {"data", "recipe.toml"}


def test_stored_data_move_with_their_run(tmp_path: Path) -> None:
    path = store_data([grey(i) for i in range(8)], LABELS, tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")

    found = find_stored_data(str(path), tmp_path / "moved")

    check(load(Path(found)))
    assert find_stored_data("photos", tmp_path / "moved") == "photos"


BAD: list[tuple[Any, Any, str]] = [
    ([grey(0)] * 3, ["a", "b"], "differ in number; got 3 images, 2 labels"),
    ([grey(0)] * 2, None, "no labels.*give them, too: labels=LABELS in threefold.fit"),
    ([grey(0)] * 2, "label", "no labels"),
    ([], [], "there are no images"),
    ([grey(0), "a.png"], ["a", "b"], "some images are paths.*row 1"),
    ([b"text", b"text"], ["a", "b"], "the bytes are no image: row 0"),
    ([grey(0), 3], ["a", "b"], "not an image: row 1; .*got int 3"),
    ([grey(0)] * 2, ["a", None], "neither text nor a whole number: labels, row 1; got None"),
    ([grey(0)] * 2, ["a", float("nan")], "neither text.*row 1; got nan"),
    ([grey(0)] * 2, np.array([[1, 2], [0, 1]]), "each image needs one label.*multi-label"),
    ([grey(0)] * 2, [["a|b", "c"], ["c"]], "the name of a label has a vertical bar; got a|b"),
    (np.zeros((2, 3, 8, 8), np.uint8), [0, 1], r"transpose\(0, 2, 3, 1\)"),
    (np.zeros((2, 8, 8, 4), np.uint8), [0, 1], "alpha channel"),
    (np.zeros((2, 8, 8, 3), np.float32), [0, 1], "whole numbers from 0 to 255.*scale them"),
    ({"path": ["no.png"] * 2, "label": [0, 1]}, None, "2 of 2 images do not exist.*no.png"),
    (
        {"file": ["x"], "image": ["y"], "label": [0]},
        None,
        "columns can be the path.*remove one",
    ),
    ({"path": ["x"], "what": ["y"]}, None, "be the label: .*got path, what; fix: rename"),
    ({"path": ["x"], "label": ["y"], "subset": ["z"]}, None, "seems to be the split"),
    (5, [1], "not a sequence; got int 5"),
    ("photos", None, "a path is no data in memory"),
]


@pytest.mark.parametrize(("data", "labels", "message"), BAD)
def test_bad_data_leave_nothing(tmp_path: Path, data: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        store_data(data, labels, tmp_path / "run")

    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_pandas_and_polars_are_never_imported() -> None:
    code = "import sys, threefold.data.in_memory; sys.exit('pandas' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
