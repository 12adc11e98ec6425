"""Model files scored and compared on labelled images, exported ones and those of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from support.command_line import threefold_command
from support.server import UNCERTAIN, card, write_model

import threefold
from threefold.cli.saved import find_models
from threefold.errors import DataError, ExportError, RecipeError
from threefold.evaluation.saved import score_saved
from threefold.runtime.foreign_model import ForeignCard, ForeignModel
from threefold.runtime.labelled_images import predict_labelled
from threefold.runtime.model import Model
from threefold.runtime.predict import write_predictions
from threefold.runtime.score_models import compare_models, score_models

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


def write_colours(folder: Path, wrong: int = 1, count: int = 4, side: int = 8) -> Path:
    """Write `count` images of each colour, of which `wrong` lie in the folder of another class."""
    names = list(COLOURS)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = COLOURS[names[(number + 1) % 3] if i < wrong else name]
            image = np.full((side, side + i % 2, 3), colour, np.uint8)
            image[0, 0] = i
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def write_foreign(
    path: Path, batch: int | str = "b", layout: str = "nchw", logits: bool = True
) -> Path:
    """Write a classifier of the mean colour in the form of other programs: red, green, blue."""
    node, tensor, value = helper.make_node, helper.make_tensor, helper.make_tensor_value_info
    axes = [2, 3] if layout == "nchw" else [1, 2]
    nodes = [node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0)]
    nodes.append(node("Mul", ["mean", "nine"], ["y" if logits else "logits"]))
    if not logits:
        nodes.append(node("Softmax", ["logits"], ["y"], axis=-1))
    shape = [batch, 3, 6, 6] if layout == "nchw" else [batch, 6, 6, 3]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, [batch, 3])],
        [
            tensor("axes", TensorProto.INT64, [2], axes),
            tensor("nine", TensorProto.FLOAT, [1], [9.0]),
        ],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def write_card(path: Path, **changes: object) -> Path:
    """Write a card for `write_foreign`."""
    values = {"size": 6, "classes": list(COLOURS), **changes}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


@pytest.mark.parametrize("form", ["a folder", "a table"])
def test_images_without_labels_name_predict(tmp_path: Path, form: str) -> None:
    model = write_model(tmp_path / "colours.onnx")
    data = write_colours(tmp_path / "images") / "red"
    if form == "a table":
        data = tmp_path / "test.csv"
        data.write_text("image_id\nimages/red/0.png\n")

    with pytest.raises(
        DataError, match=r"`threefold predict MODEL IMAGE\.\.\.` answers images with"
    ):
        score_models([model], data)


def test_a_model_file_is_scored_on_a_folder(tmp_path: Path) -> None:
    model = write_model(tmp_path / "colours.onnx")
    data = write_colours(tmp_path / "images")

    summary, rows = score_models([model], data)

    assert rows.members == ("colours",)
    assert rows.ids[0] == "blue/0.png"
    assert summary.scores[0].accuracy == pytest.approx(9 / 12)
    assert {row.name: row.recall for row in summary.per_class} == dict.fromkeys(COLOURS, 0.75)
    expected = Model(model).predict_proba([data / "blue/0.png", data / "green/3.png"])
    np.testing.assert_array_equal(rows.probs[0][[0, 7]], expected)


def test_only_the_test_split_is_scored(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    write_colours(tmp_path / "images" / "train", wrong=4)
    write_colours(tmp_path / "images" / "test", wrong=0, side=9)

    summary, _ = score_models([model], tmp_path / "images")

    assert (summary.n, summary.scores[0].accuracy) == (12, 1.0)
    assert summary.warnings[0].startswith("only the 12 images of the test split are answered")
    assert "the 12 others" in summary.warnings[0]
    alone, _ = score_models([model], tmp_path / "images" / "test")
    assert not any("split" in note for note in alone.warnings)
    assert repr(summary.scores[0]).startswith("<Score m: accuracy 1.0000 [")
    assert len(repr(summary.scores[0])) < 100


def test_a_table_and_a_folder_of_one_class_are_scored(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    write_colours(tmp_path / "images")
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nimages/red/3.png,red\nimages/blue/2.png,green\n")
    one_class = tmp_path / "images" / "red"
    (tmp_path / "one").mkdir()

    summary, _ = score_models([model], table)
    one_class.rename(tmp_path / "one" / "red")
    alone, _ = score_models([model], tmp_path / "one")

    assert (summary.n, summary.scores[0].accuracy) == (2, 0.5)
    assert (alone.n, alone.scores[0].accuracy) == (4, 0.75)


def test_coverage_of_the_sets_is_measured(tmp_path: Path) -> None:
    content = card(**UNCERTAIN)
    model = write_model(tmp_path / "m.onnx", model_card=content)
    data = write_colours(tmp_path / "images")

    summary, rows = score_models([model], data)

    assert summary.conformal is not None
    sets = Model(model).sets[False].predict_sets(rows.probs[0])
    assert summary.conformal.sets[0].coverage == sets[np.arange(12), rows.labels].mean()
    assert summary.conformal.unknown is not None
    assert summary.conformal.unknown.n == 12


def test_classes_may_have_another_order_in_another_file(tmp_path: Path) -> None:
    exported = write_model(tmp_path / "ours.onnx")
    data = write_colours(tmp_path / "images")
    foreign = ForeignModel(
        write_foreign(tmp_path / "theirs.onnx"), ForeignCard(size=6, classes=tuple(COLOURS))
    )

    rows = predict_labelled([Model(exported), foreign], data)

    assert rows.members == ("ours", "theirs")
    np.testing.assert_array_equal(rows.probs[0].argmax(1), rows.probs[1].argmax(1))
    again = write_model(tmp_path / "again.onnx")
    summary, _ = compare_models([exported, again], data)
    assert (summary.comparisons[0].only_a, summary.comparisons[0].only_b) == (0, 0)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("batch", ["b", 1, 5])
@pytest.mark.parametrize("logits", [True, False])
def test_foreign_files_of_every_form(
    layout: str, batch: int | str, logits: bool, tmp_path: Path
) -> None:
    path = write_foreign(tmp_path / "m.onnx", batch, layout, logits)
    data = write_colours(tmp_path / "images")
    card_file = write_card(tmp_path / "card.toml", mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])

    summary, rows = score_models([path], data, card_file)

    assert summary.scores[0].accuracy == pytest.approx(9 / 12)
    colour = (np.array(COLOURS["green"], np.float32) / 255 - 0.5) / 0.5 * 9
    expected = np.exp(colour - colour.max()) / np.exp(colour - colour.max()).sum()
    row = rows.ids.index("green/3.png")
    np.testing.assert_allclose(rows.probs[0, row], expected, atol=0.02)  # one pixel is another


def test_a_foreign_file_may_want_blue_first(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "m.onnx")
    card_file = write_card(tmp_path / "c.toml", channels="bgr", classes=["blue", "green", "red"])

    summary, _ = score_models([path], write_colours(tmp_path / "images"), card_file)

    assert summary.scores[0].accuracy == pytest.approx(9 / 12)


def test_crop_keeps_the_centre() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 25:55] = 200
    foreign = object.__new__(ForeignModel)
    foreign.card = ForeignCard(classes=("a", "b"), size=10, resize="crop", crop_pct=0.5)

    square = foreign.fit_canvas(image)

    assert square.shape == (10, 10, 3)
    assert square.min() == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size"),
        ({"classes": ["one"]}, "classes"),
        ({"std": [1, 1, 0]}, r"std\.2"),
        ({"sise": 6}, "sise: unknown key, known are classes, size"),
        ({"outputs": "probs"}, "probabilities"),
        ({"classes": ["red", "green", "blue", "grey"]}, "4 outputs.*got 3"),
        ({"size": 7}, "cannot answer"),
    ],
)
def test_a_card_that_does_not_fit(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "m.onnx")
    data = write_colours(tmp_path / "images")

    with pytest.raises(ExportError, match=message):
        score_models([path], data, write_card(tmp_path / "card.toml", **changes))


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    data = write_colours(tmp_path / "images")
    (data / "red").rename(data / "pink")

    with pytest.raises(DataError, match="expected blue, green, red, got pink; fix: rename"):
        score_models([model], data)


def test_models_of_other_classes_are_refused(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a.onnx")
    second = write_model(tmp_path / "b.onnx", model_card=card(classes=["blue", "green", "pink"]))

    with pytest.raises(RecipeError, match=r"different classes.*only in one of them: pink, red"):
        compare_models([first, second], write_colours(tmp_path / "images"))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(write_model(tmp_path / name / "model.onnx"))
    data = write_colours(tmp_path / "images")

    assert compare_models(paths, data)[1].members == ("one/model/one/model", "two/model/two/model")
    with pytest.raises(RecipeError, match="the same model twice"):
        compare_models([paths[0], paths[0]], data)


def test_score_is_the_accuracy(tmp_path: Path) -> None:
    model = threefold.load(write_model(tmp_path / "m.onnx"))
    images = [np.full((4, 4, 3), colour, np.uint8) for colour in COLOURS.values()]

    assert model.score(images, ["red", "green", "red"]) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="does not know; expected blue, green, red, got pink"):
        model.score(images, ["red", "green", "pink"])
    with pytest.raises(DataError, match="one label for each image; expected 3 labels, got 2"):
        model.score(images, ["red", "green"])


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, 0]),
        np.array([[0], [1], [0]], np.uint8),
        np.array([0.0, 1.0, 0.0]),
        np.eye(3)[[0, 1, 0]],
        [0, 1, 0],
        [[1, 0, 0], [0, 1, 0], [1, 0, 0]],
        np.array(["0", "1", "0"]),
    ],
    ids=["numbers", "a column", "floats", "one-hot", "a list", "one-hot lists", "texts"],
)
def test_labels_are_read_as_fit_reads_them(tmp_path: Path, labels: Any) -> None:
    numbered = card(**{**UNCERTAIN, "classes": ["0", "1", "2"]})
    model = threefold.load(write_model(tmp_path / "m.onnx", model_card=numbered))
    colours = [COLOURS[name] for name in ("blue", "green", "red")]
    images = [np.full((4, 4, 3), colour, np.uint8) for colour in colours]

    assert model.score(images, labels) == pytest.approx(2 / 3)


def test_labels_in_another_form_are_refused_in_a_line(tmp_path: Path) -> None:
    model = threefold.load(write_model(tmp_path / "m.onnx"))
    images = [np.full((4, 4, 3), colour, np.uint8) for colour in COLOURS.values()]

    with pytest.raises(DataError, match="got 0, 1; fix: give the names of the model's classes"):
        model.score(images, np.array([0, 1, 0]))
    with pytest.raises(DataError, match="each image needs one label; got lists of several"):
        model.score(images, [["red"], ["red", "blue"], []])
    with pytest.raises(DataError, match=r"neither text nor a whole number: labels, row 1"):
        model.score(images, ["red", None, "blue"])


@pytest.mark.slow
def test_the_command_line_takes_a_file_and_a_folder(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN))
    data = write_colours(tmp_path / "images")
    page = tmp_path / "page.html"

    scored = threefold_command("evaluate", str(model), str(data), "--html", str(page))
    compared = threefold_command(
        "compare", str(model), str(write_model(tmp_path / "n.onnx")), "--data", str(data), "--json"
    )

    assert scored.returncode == 0, scored.stderr
    assert "75.00" in scored.stdout
    assert "90% sets: contain the right class of" in scored.stdout
    assert "Prediction sets" in page.read_text()
    assert json.loads(compared.stdout)["comparisons"][0]["verdict"]


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"

    with pytest.raises(DataError, match="got none; fix: type `threefold evaluate"):
        find_models([model], None, None)
    with pytest.raises(DataError, match="got a, b"):
        find_models([model, Path("a"), Path("b")], None, None)
    with pytest.raises(DataError, match="a card is for model files"):
        find_models([Path("a.csv")], None, Path("card.toml"))
    assert find_models([Path("a.csv")], None, None) is None
    assert find_models([tmp_path], Path("data"), None) == ([tmp_path / "model.onnx"], Path("data"))


def test_evaluate_reads_what_predict_writes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    data = write_colours(tmp_path / "images")
    answers = tmp_path / "answers.csv"
    with answers.open("w", newline="") as stream:
        assert write_predictions(stream, pytest.fail, model, [str(data)], 3, "csv") == 0

    summary, rows = score_saved([answers])

    direct, direct_rows = score_models([model], data)
    assert summary.scores[0].accuracy == direct.scores[0].accuracy == 0.75
    assert rows.ids == direct_rows.ids
    np.testing.assert_allclose(rows.probs, direct_rows.probs, atol=2e-6)
