"""Labels beside the predictions are joined by ids, whatever the column is called."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.errors import DataError
from threefold.predictions.formats import read_predictions
from threefold.predictions.join import join_predictions

IDS = ("a/img1.jpg", "a/img2.jpg", "b/img3.jpg", "b/img4.jpg")
TRUTH = ("cat", "dog", "dog", "cat")
PROBS = np.eye(2)[[0, 1, 1, 0]]
"""Right for every row."""


def save_net(folder: Path, **arrays: Any) -> Path:
    arrays = {"probs": PROBS, "ids": IDS, "classes": ["cat", "dog"]} | arrays
    np.savez(folder / "net.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder / "net.npz"


def write_table(folder: Path, header: str, rows: list[str]) -> Path:
    (folder / "truth.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "truth.csv"


@pytest.mark.parametrize("simplify", [str, lambda i: Path(i).name, lambda i: Path(i).stem])
@pytest.mark.parametrize("column", ["image_id", "Id", "image", "file", "filename", "Nummer", "id"])
def test_labels_are_joined_by_the_column_of_ids(tmp_path: Path, column: str, simplify: Any) -> None:
    rows = [f"7.5,{simplify(name)},{label}" for name, label in zip(IDS, TRUTH, strict=True)]
    table = write_table(tmp_path, f"width,{column},label", rows[::-1])

    loaded = read_predictions(save_net(tmp_path), labels=table)

    assert (loaded.probs[0].argmax(-1) == loaded.labels).all()
    assert loaded.ids == IDS


@pytest.mark.parametrize("column", ["image_id", "Id", "file", "Nummer"])
def test_ids_of_other_images_are_not_matched_by_order(tmp_path: Path, column: str) -> None:
    table = write_table(tmp_path, f"{column},label", [f"other{i},cat" for i in range(4)])

    with pytest.raises(DataError, match=f"no column .* such as a/img1.jpg, got {column} other0"):
        read_predictions(save_net(tmp_path), labels=table)


@pytest.mark.parametrize(("one", "zero"), [("1", "0"), ("1.0", "0.0")])
def test_a_column_for_each_class_is_read(tmp_path: Path, one: str, zero: str) -> None:
    """The truth files of ISIC; a class may have no image (UNK), and other columns may be there."""
    rows = [
        f"{Path(name).stem},{one if label == 'cat' else zero},{one if label == 'dog' else zero},"
        f"{zero},{number}.5"
        for number, (name, label) in enumerate(zip(IDS, TRUTH, strict=True))
    ]
    table = write_table(tmp_path, "image,cat,dog,UNK,age", rows[::-1])

    read = read_predictions(save_net(tmp_path), labels=table)

    assert read.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("cells", "got"), [("1.0,1.0", "1 in cat, dog"), ("0.0,0.0", "0 in all of them")]
)
def test_several_labels_per_image_are_refused(tmp_path: Path, cells: str, got: str) -> None:
    table = write_table(tmp_path, "image,cat,dog", ["img1,1.0,0.0", f"img2,{cells}"])

    with pytest.raises(DataError, match=f"exactly one class: .*row 1; .*got {got}; .*multi-label"):
        read_predictions(save_net(tmp_path), labels=table)


def test_a_table_of_labels_alone_is_in_the_order_of_the_rows(tmp_path: Path) -> None:
    table = write_table(tmp_path, "label,Group ID", ["cat,x", "dog,x", "dog,y", "cat,y"])

    loaded = read_predictions(save_net(tmp_path), labels=table)

    assert (loaded.labels.tolist(), loaded.groups) == ([0, 1, 1, 0], ("x", "x", "y", "y"))


def test_shuffled_row_numbers_are_not_an_order(tmp_path: Path) -> None:
    table = write_table(tmp_path, "Id,label", ["4,cat", "3,dog", "2,dog", "1,cat"])

    with pytest.raises(DataError, match="numbered, but not in that order"):
        read_predictions(save_net(tmp_path, ids=None), labels=table)


def test_two_columns_that_contradict_each_other(tmp_path: Path) -> None:
    table = write_table(
        tmp_path, "x,y,label", [f"{IDS[i]},{IDS[3 - i]},{TRUTH[i]}" for i in range(4)]
    )

    with pytest.raises(DataError, match=r"several columns .* got x, y; fix: name the right"):
        read_predictions(save_net(tmp_path), labels=table)


@pytest.mark.parametrize(
    ("header", "order"),
    [
        ("id,cat,dog", [0, 1, 2]),
        ("Image,cat,dog", [0, 1, 2]),
        ("cat,dog,image_id", [1, 2, 0]),
    ],
)
@pytest.mark.parametrize("truth", ["id,label", "image_id,breed", "Id,Category"])
def test_a_submission_and_its_truth(
    tmp_path: Path, header: str, order: list[int], truth: str
) -> None:
    rows = [(name, f"{p[0]}", f"{p[1]}") for name, p in zip(IDS, PROBS, strict=True)]
    (tmp_path / "submission.csv").write_text(
        "\n".join([header, *(",".join(row[i] for i in order) for row in rows)])
    )
    labels = [f"{name},{label}" for name, label in zip(IDS, TRUTH, strict=True)]
    table = write_table(tmp_path, truth, labels[::-1])

    loaded = read_predictions(tmp_path / "submission.csv", labels=table)

    assert (loaded.classes, loaded.ids) == (("cat", "dog"), IDS)
    assert loaded.labels.tolist() == [0, 1, 1, 0]


def test_a_submission_with_labels_from_folders(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,cat,dog\ndog/1.png,0,1\ncat/2.png,0,1\n")

    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "s.csv"), "--labels", "folder"])
    loaded = read_predictions(tmp_path / "s.csv", labels="folder")

    assert done.exit_code == 0, done.exception
    assert loaded.labels.tolist() == [1, 0]


def test_columns_are_known_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("ID,Label,Group,Fold,cat,dog\na,dog,g,0,0,1\nb,cat,h,1,0,1\n")

    loaded = read_predictions(tmp_path / "s.csv")

    assert (loaded.classes, loaded.ids, loaded.groups) == (("cat", "dog"), ("a", "b"), ("g", "h"))
    assert loaded.folds is not None
    assert loaded.folds.tolist() == [0, 1]


def test_arrays_of_file_names_are_ids(tmp_path: Path) -> None:
    labels = np.array([0, 1, 1, 0])
    one = read_predictions(save_net(tmp_path, ids=None, filenames=IDS, labels=labels))
    (tmp_path / "b").mkdir()
    other = save_net(
        tmp_path / "b", ids=None, image_ids=IDS[::-1], probs=PROBS[::-1], labels=labels[::-1]
    )

    joined = join_predictions([one, read_predictions(other.rename(tmp_path / "b/two.npz"))])

    assert joined.ids == IDS
    assert (joined.probs.argmax(-1) == joined.labels).all()


SUMS = {
    "percent": (PROBS * 100, "percentages.*divide by 100"),
    "sigmoid": (np.full((4, 2), 0.9), "sigmoid outputs.*softmax.logits. in place of sigmoid"),
    "transposed": (np.array([[0.9, 0.2], [0.0, 0.1], [0.1, 0.3], [0, 0.4]]), "save the transpose"),
    "bfloat16": (np.full((4, 2), 0.50390625), "precision of bfloat16.*in float32"),
    "logits": (np.full((4, 2), 7.5), "logits.*apply softmax"),
}


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_numbers_that_are_no_probabilities(tmp_path: Path, case: str, suffix: str) -> None:
    probs, message = SUMS[case]
    np.savez(tmp_path / "net.npz", probs=probs, labels=np.zeros(4, int))
    rows = [f"{row[0]},{row[1]},cat" for row in probs]
    (tmp_path / "net.csv").write_text("\n".join(["cat,dog,label", *rows]))

    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / f"net.{suffix}")


def test_names_of_macos_match_those_of_others(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for folder, name in (("a", nfc), ("b", nfd)):
        (tmp_path / folder).mkdir()
        ids = [f"{name}/1.png", "dog/1.png"]
        (tmp_path / folder / "truth.csv").write_text(f"id,label\n{ids[1]},dog\n{ids[0]},{name}\n")
        np.savez(
            tmp_path / folder / f"{folder}.npz",
            probs=np.eye(2),
            ids=ids,
            classes=[name, "dog"],
        )
    parts = [
        read_predictions(tmp_path / f"{one}/{one}.npz", labels=tmp_path / f"{other}/truth.csv")
        for one, other in ("ab", "ba")
    ]

    joined = join_predictions(parts)

    assert joined.classes == (nfc, "dog")
    assert (joined.probs.argmax(-1) == joined.labels).all()
