"""A model file that gives an image any number of labels: what it answers, and how it is written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.label_models import THRESHOLDS, write_label_model

import threefold
from threefold.errors import DataError, ExportError
from threefold.runtime.model import FAST, Model
from threefold.runtime.predict import write_predictions
from threefold.runtime.predict_file import predict_to_file

YELLOW, BLACK, WHITE = (250, 250, 10), (10, 10, 10), (250, 250, 250)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return threefold.load(write_label_model(tmp_path / "labels.onnx"))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """A yellow, a black and a white image."""
    paths = []
    for name, colour in (("yellow", YELLOW), ("black", BLACK), ("white", WHITE)):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (8, 6), colour).save(path)
        paths.append(str(path))
    return paths


def written(model: Model, images: list[str], form: str, **options: Any) -> str:
    """What `predict` writes."""
    stream = io.StringIO()
    assert write_predictions(stream, str, model.path, images, 3, form, **options) == 0
    return stream.getvalue()


def test_labels_are_those_that_reach_their_thresholds(model: Model, images: list[str]) -> None:
    probs = model.predict_proba(images)

    answers = model.predict(images)

    assert model.thresholds is not None
    assert (model.task, model.thresholds.tolist()) == ("multilabel", list(THRESHOLDS))
    assert probs.sum(1)[1] < 0.6 < 2 < probs.sum(1)[2]
    assert [frozenset(row) for row in answers] == [
        {name for name, p, t in zip(model.classes, row, THRESHOLDS, strict=True) if p >= t}
        for row in probs
    ]
    assert answers[1] == ()
    assert set(answers[2]) == {"blue", "green", "red"}


def test_labels_come_in_the_order_of_their_probabilities(model: Model) -> None:
    assert model.labels_of(np.array([0.4, 0.6, 0.9])) == ("red", "green", "blue")
    assert model.labels_of(np.array([0.3, 0.5, 0.7])) == ("red", "green", "blue")
    assert model.labels_of(np.array([0.29, 0.49, 0.69])) == ()


def test_the_score_is_the_share_of_exact_answers(model: Model, images: list[str]) -> None:
    right = [["red", "green"], [], {"blue", "green", "red"}]

    assert model.score(images, right) == 1
    assert model.score(images, [["red"], [], ["blue", "green", "red"]]) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="a list of labels for each image"):
        model.score(images, ["red", "", "blue"])
    with pytest.raises(DataError, match="got pink"):
        model.score(images, [["pink"], [], []])


def test_text_names_labels_and_those_below_threshold(model: Model, images: list[str]) -> None:
    yellow, black, white = written(model, images, "text").splitlines()

    assert "yellow.png: green " in yellow
    assert "; below threshold: blue " in yellow
    assert "black.png: no label; below threshold: " in black
    assert black.count("<") == 3
    assert "below" not in white


def test_json_has_labels_and_no_label(model: Model, images: list[str]) -> None:
    lines = written(model, images, "json").splitlines()

    answers = [json.loads(line) for line in lines]
    assert all({"label", "probability", "set", "unknown"}.isdisjoint(row) for row in answers)
    assert [entry["label"] for entry in answers[0]["labels"]] == ["green", "red"]
    assert answers[1]["labels"] == []
    assert answers[0]["labels"][1]["threshold"] == 0.7
    probs = model.infer(images[:1])
    sharp = answers[0]["members"]["sharp"]
    assert sharp["blue"] == pytest.approx(float(probs.member_probs[0, 0, 0]))


def test_csv_joins_the_labels(model: Model, images: list[str]) -> None:
    rows = list(csv.reader(io.StringIO(written(model, images, "csv"))))

    assert rows[0] == ["path", "labels", "blue", "green", "red"]
    assert [row[1] for row in rows[1:]] == ["green|red", "", "blue|green|red"]
    expected = model.predict_proba(images)
    np.testing.assert_allclose(np.array([row[2:] for row in rows[1:]], float), expected, atol=1e-6)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_files_of_answers_go_on(
    model: Model, images: list[str], suffix: str, tmp_path: Path
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    target = tmp_path / f"answers.{suffix}"
    predict_to_file(target, str, model.path, images)
    once = target.read_bytes()

    again = predict_to_file(target, str, model.path, images)

    assert (again.resumed, target.read_bytes()) == (3, once)
    if suffix == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(target)
        assert table.column_names == ["path", "labels", "blue", "green", "red"]
        assert table.column("labels").to_pylist()[0] == "green|red"


def test_heat_is_drawn_for_each_label(model: Model, images: list[str], tmp_path: Path) -> None:
    lines = written(model, images[:2], "json", heat=tmp_path / "heat").splitlines()

    heats = [json.loads(line)["heat"] for line in lines]
    assert [*heats[0]] == ["green", "red"]
    assert heats[1] == {}
    assert sorted(path.name for path in (tmp_path / "heat").iterdir()) == [
        "yellow-green.png",
        "yellow-red.png",
    ]


def test_what_needs_one_class_is_refused(model: Model, images: list[str]) -> None:
    for call in (
        lambda: model.predict_sets(images),
        lambda: model.is_unknown(images),
        lambda: model.predict(images, FAST),
    ):
        with pytest.raises(ExportError, match="gives any number of labels cannot have one"):
            call()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "regression"}, "the task 'regression', of another version"),
        ({"task": ["multilabel"]}, "of another version"),
        ({"thresholds": None}, "thresholds are not a number for each label"),
        ({"thresholds": [0.5, 0.5]}, "thresholds are not a number for each label"),
        ({"thresholds": [0.5, 0.5, float("nan")]}, "thresholds are not a number"),
        ({"unknown": {"state": {}}}, "has unknown, which a multilabel model cannot have"),
        ({"score": {"value": "high"}}, "score.value is not a share"),
    ],
)
def test_damaged_cards_are_refused(tmp_path: Path, changes: Any, reason: str) -> None:
    path = write_label_model(tmp_path / "m.onnx", **changes)

    with pytest.raises(ExportError, match=reason):
        threefold.load(path)
