"""What people have: archives, tables with other names and separators, arrays, names on the hub."""

from __future__ import annotations

import importlib.util
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threefold.data.check import check_data, find_spec
from threefold.data.dataset import Sources
from threefold.data.detect_source import detect_source, find_fold_column, seems_data
from threefold.data.labelled import load_labelled
from threefold.data.load import load_data
from threefold.errors import DataError, RecipeError
from threefold.files import sha256
from threefold.predictions.run_folder import default_run_folder
from threefold.recipe.schema import DataSpec

LABELS = ["wolf", "ant"] * 4


def paint(path: Path, value: int) -> Path:
    """Write a grey image of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4), value, np.uint8)).save(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path: Path, **options: str) -> Sources:
    return load_data(detect_source(path).model_copy(update=options), 0)


def check(sources: Sources) -> None:
    """The eight images with their labels, in order."""
    assert sources.train.classes == ("ant", "wolf")
    assert sources.train.labels.tolist() == [1, 0] * 4
    assert [int(sources.train.pixels(i)[0, 0, 0]) for i in range(8)] == list(range(8))


# Folders and archives with a table inside, as Kaggle has them


def make_competition(root: Path) -> Path:
    """train.csv, a submission with made-up labels, test.csv, and images in flat folders."""
    for i in range(8):
        paint(root / "train" / f"id{i}.png", i)
        paint(root / "test" / f"new{i}.png", 100 + i)
    rows = [f"id{i},{label}" for i, label in enumerate(LABELS)]
    (root / "train.csv").write_text("image_id,label\n" + "\n".join(rows))
    made_up = [f"new{i},wolf" for i in range(8)]
    (root / "sample_submission.csv").write_text("image_id,label\n" + "\n".join(made_up))
    (root / "test.csv").write_text("image_id\n" + "\n".join(f"new{i}" for i in range(8)))
    return root


@pytest.mark.parametrize("form", ["", "zip", "gztar"])
def test_table_beside_its_images_is_found(tmp_path: Path, cache: Path, form: str) -> None:
    root = make_competition(tmp_path / "competition")
    given = Path(shutil.make_archive(str(tmp_path / "all"), form, root)) if form else root

    spec = detect_source(given)

    assert spec.source == "csv"
    assert spec.root == str(given if form else root / "train.csv")
    check(load_data(spec, 0))


@pytest.mark.parametrize("form", ["", "zip"])
def test_a_check_reads_what_a_run_would_read(tmp_path: Path, cache: Path, form: str) -> None:
    root = make_competition(tmp_path / "competition")
    given = Path(shutil.make_archive(str(tmp_path / "all"), form, root)) if form else root

    spec = find_spec(str(given))

    assert spec == detect_source(given)
    assert check_data(spec).usable


def test_class_folders_win_over_a_table(tmp_path: Path, cache: Path) -> None:
    root = make_folders(tmp_path / "photos", split=True)
    (root / "labels.csv").write_text("path,label\ntrain/wolf/0.png,wolf\n")

    assert detect_source(root).source == "folder"


def test_two_tables_without_class_folders_are_refused(tmp_path: Path, cache: Path) -> None:
    root = make_competition(tmp_path / "competition")
    shutil.copyfile(root / "train.csv", root / "extra.csv")

    with pytest.raises(DataError, match=r"several tables.*extra\.csv, train\.csv"):
        detect_source(root)


def test_table_in_an_archive_survives_an_empty_cache(tmp_path: Path, cache: Path) -> None:
    root = make_competition(tmp_path / "competition")
    rows = (root / "train.csv").read_text().splitlines()
    folds = [f"{row},{i % 2}" for i, row in enumerate(rows[1:])]
    (root / "train.csv").write_text(rows[0] + ",kfold\n" + "\n".join(folds))
    archive = Path(shutil.make_archive(str(tmp_path / "all"), "zip", root))
    spec = detect_source(archive)
    shutil.rmtree(cache)

    assert find_fold_column(spec) == "kfold"
    check(load_data(spec.model_copy(update={"fold_column": "kfold"}), 0))


# Archives


def make_folders(root: Path, split: bool) -> Path:
    """Four images in two classes, in train/ and test/ or not."""
    for i in range(4):
        paint(root / ("train" if split else "") / LABELS[i] / f"{i}.png", i)
        if split:
            paint(root / "test" / LABELS[i] / f"{i}.png", 10 + i)
    return root


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["zip", "gztar"])
def test_archives_of_folders(
    tmp_path: Path, cache: Path, split: bool, wrapped: bool, form: str
) -> None:
    root = make_folders(tmp_path / "made" / "photos", split)
    base = root.parent if wrapped else root
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), form, base))
    before = sorted(tmp_path.iterdir())

    sources = load(archive)

    assert sources.train.classes == ("ant", "wolf")
    assert len(sources.train) == 4
    assert (sources.test is not None) == split
    assert not any(name.startswith("photos/") for name in sources.train.ids)
    assert sources.notes[0] == f"the archive is unpacked in {cache / 'archives' / sha256(archive)}"
    assert sorted(tmp_path.iterdir()) == sorted({*before, cache})
    assert detect_source(archive).root == str(archive)
    assert default_run_folder(archive).name == "photos"
    assert len(load_labelled(archive)) == 4


def test_a_changed_archive_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    root = make_folders(tmp_path / "photos", split=False)
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", root))
    assert len(load(archive).train) == 4

    paint(root / "ant" / "new.png", 9)
    shutil.make_archive(str(tmp_path / "photos"), "zip", root)

    assert len(load(archive).train) == 5
    shutil.rmtree(cache)
    assert len(load(archive).train) == 5


def test_archives_that_cannot_be_used(tmp_path: Path, cache: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../out.png", b"x")
    with pytest.raises(DataError, match="unsafe name"):
        load(archive)

    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ant/0.png", b"x")
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip; got its files need a password"):
        load(archive)

    archive.write_bytes(b"text")
    with pytest.raises(DataError, match="not a supported archive"):
        load(archive)

    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match="there are no class folders"):
        load(tmp_path / "b.tar.gz")
    assert not (tmp_path / "out.png").exists()


# Tables


def write_table(
    folder: Path,
    header: str,
    separator: str = ",",
    name: str = "rows.csv",
    names: str = "images/{}.png",
) -> Path:
    """A table of eight images; the columns after the path and the label hold `x`."""
    for i in range(8):
        paint(folder / f"images/{i}.png", i)
    columns = header.split(",")
    lines = [separator.join(columns)]
    for i, label in enumerate(LABELS):
        cells = [names.format(i), label] + ["x"] * (len(columns) - 2)
        lines.append(separator.join(cells))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.mark.parametrize(
    "header",
    [
        *("image,class", "File,Category", "filename,target", "file_name,species", "FILEPATH,Y"),
        *("Image Path,Class Name", "img,labels", "image_id,breed", "id,label", "img_path,dx"),
        *("filename,class_name,class_id", "path,label,image_id,category", "file_name,label,id"),
    ],
)
def test_usual_names_of_columns(tmp_path: Path, header: str) -> None:
    check(load(write_table(tmp_path, header)))


@pytest.mark.parametrize(
    ("separator", "name"),
    [("\t", "rows.tsv"), ("\t", "rows.csv"), (";", "rows.csv"), ("|", "rows.csv"), (",", "a.tsv")],
)
def test_separators_are_those_of_the_header(tmp_path: Path, separator: str, name: str) -> None:
    check(load(write_table(tmp_path, "path,label,note", separator, name)))


def test_other_signs_in_quoted_cells_do_not_separate(tmp_path: Path) -> None:
    table = write_table(tmp_path, 'path,label,"a; b; c; d; e"')

    check(load(table))


@pytest.mark.parametrize(
    ("header", "got", "key"),
    [
        ("path,label,class,species", None, ""),
        ("image,label,file", "image and file", "path"),
        ("path,species,class", "species and class", "label"),
    ],
)
def test_two_candidates_are_named_with_the_key(
    tmp_path: Path, header: str, got: str | None, key: str
) -> None:
    table = write_table(tmp_path, header)
    if got is None:
        check(load(table))
        return

    with pytest.raises(DataError, match=f"two columns can be the {key}: ") as error:
        load(table)

    assert f"got {got}; fix: choose one: --set data.{key}_column=NAME" in str(error.value)
    check(load(table, **{f"{key}_column": header.split(",")[key == "label"].upper()}))
    with pytest.raises(DataError, match=f"no column what: .*correct data.{key}_column"):
        load(table, **{f"{key}_column": "what"})
    with pytest.raises(DataError, match="rename or remove one of them"):
        load_labelled(table)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("names", ["{}", "{}.png"])
def test_names_without_folder_or_suffix_are_found(tmp_path: Path, names: str, suffix: str) -> None:
    table = write_table(tmp_path, "image_id,label", names=names)
    for i in range(8):
        paint(tmp_path / f"test_images/{i}.png", 100 + i)
    if suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"image_id": [names.format(i) for i in range(8)], "label": LABELS}
        table = tmp_path / "rows.parquet"
        parquet.write_table(pa.table(columns), table)

    sources = load(table)

    check(sources)
    assert "8 names in the table were found below its folder: in images/" in sources.notes
    assert "read from the table: path = image_id" in sources.notes
    paint(tmp_path / "copy/3.png", 3)
    with pytest.raises(DataError, match=r"rows\.\w+: 3.*; got copy/3.png, images/3.png"):
        load(table)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".pq"])
def test_folds_are_found_in_every_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix in (".parquet", ".pq"):
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"path": ["a"], "label": ["b"], "kFold": [1]}), path)
    else:
        path.write_text("path,label,kFold\n".replace(",", "\t" if suffix == ".tsv" else ","))

    assert find_fold_column(detect_source(path)) == "kFold"


def test_a_check_reads_the_folds_that_a_plan_keeps(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,KFold")
    table.write_text(table.read_text().replace("x", "1", 4).replace("x", "2"))

    report = check_data(find_spec(str(table)))

    assert report.usable
    assert "2 folds from the column KFold: 1, 2" in [f.what for f in report.findings]


def test_a_folder_of_images_without_labels_says_what_can_be_done(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for i in range(3):
        paint(tmp_path / f"test/{i}.png", i)
    spec = detect_source(tmp_path / "test")

    with pytest.raises(DataError, match=r"got 3 images without labels; fix: to classify .*/test$"):
        load_data(spec, 0)
    (tmp_path / "train.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"fix: fit a table beside it: train\.csv; to classify"):
        load_data(spec, 0)


def test_two_columns_of_folds_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,fold,kfold")

    with pytest.raises(DataError, match=r"got fold and kfold; fix: choose one: --set data"):
        find_fold_column(detect_source(table))
    assert len(load_labelled(table)) == 8  # nothing is trained


def test_keys_of_columns_need_a_table() -> None:
    with pytest.raises(ValueError, match="label_column needs a table"):
        DataSpec(source="folder", label_column="x")


def test_old_recipes_keep_their_digest() -> None:
    """Keys without a value are no part of it, so that older runs can be resumed."""
    assert "path_column" not in DataSpec().model_dump(exclude_none=True)


# Arrays


@pytest.mark.parametrize(
    "keys",
    [
        ("images", "labels"),
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
    ],
)
def test_arrays_as_they_are_published(tmp_path: Path, keys: tuple[str, ...]) -> None:
    images = np.arange(8, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(3, 2)
    labels = np.array([[1], [0]] * 4)
    arrays = {key: (images, labels)[i % 2] for i, key in enumerate(keys)}
    np.savez(tmp_path / "data.npz", **arrays)

    sources = load(tmp_path / "data.npz")

    assert sources.train.labels[:8].tolist() == [1, 0] * 4
    assert [int(sources.train.pixels(i)[0, 0, 0]) for i in range(8)] == list(range(8))
    assert len(sources.train) == 16 if "val_images" in keys else 8
    assert (sources.test is None) == (len(keys) == 2)
    assert len(load_labelled(tmp_path / "data.npz")) == 8


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"probs": np.zeros((2, 3, 3))}, "not images with labels: .*x_train.*got probs"),
        ({"x": np.zeros((4, 3, 3))}, "not images with labels"),
        ({"x": np.zeros((4, 3, 3), np.uint8), "y": [0, 1, 0]}, "got 4 x, 3 y"),
        ({"x": np.zeros((4, 3, 3)), "y": [0, 1] * 2}, r"data\.npz: x; .*got float64 \(4, 3, 3\)"),
        ({"x": np.zeros((2, 3, 3), np.uint8), "y": [0, 0]}, "too few classes"),
        ({"x": np.zeros((3, 3, 3), np.uint8), "y": [0, 1, 1]}, "fewer than 2 .*got 0 \\(1\\)"),
        (
            {
                "x_train": np.zeros((4, 3, 3), np.uint8),
                "y_train": [0, 1] * 2,
                "x_test": np.zeros((1, 3, 3), np.uint8),
                "y_test": [2],
            },
            "classes differ .*only in test: 2",
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    np.savez(tmp_path / "data.npz", **{key: np.asarray(value) for key, value in arrays.items()})

    with pytest.raises(DataError, match=message):
        load(tmp_path / "data.npz")


# Names


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    assert detect_source("owner/name:small").source == "huggingface"
    assert detect_source("owner/name").root == "owner/name"
    assert default_run_folder(Path("owner/name:small")) == Path("runs/name-small")
    for path in ("photos/typo", "owner/rows.csv", "owner/a/b", "../owner", "owner", "a/b.zip"):
        assert not seems_data(path)
        with pytest.raises(DataError, match=r"no such folder or table: .*owner/name of a data set"):
            detect_source(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"no such folder or table; .*pip install .*\[hf\]'"):
        detect_source("owner/name")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")

    with pytest.raises(DataError, match=r"not a folder or table.*\.csv, \.tsv, .*\.zip"):
        detect_source(tmp_path / "rows.xlsx")
    with pytest.raises((DataError, RecipeError)):
        find_spec(str(tmp_path / "rows.xlsx"), "no kind")
