"""Model files that give any number of labels, scored and compared on a table of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.label_models import write_label_model
from support.server import write_model
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.errors import DataError, RecipeError
from threefold.runtime.score_labels import (
    compare_label_models,
    give_labels,
    score_label_models,
)

runner = CliRunner()
ROWS = {"yellow": "green|red", "black": "", "white": "blue|green|red", "red": "red|green"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Images of four colours, three times each; of red ones the labels are not all right."""
    colours = {"yellow": (250, 250, 10), "black": (10, 10, 10), "white": (250, 250, 250)}
    lines = ["path,labels"]
    for copy in range(3):
        for name, labels in ROWS.items():
            path = tmp_path / f"{name}{copy}.png"
            pixels = np.full((6, 8, 3), colours.get(name, (250, 10, 10)), np.uint8)
            pixels[0, 0] = copy
            Image.fromarray(pixels).save(path)
            lines.append(f"{path.name},{labels}")
    target = tmp_path / "labels.csv"
    target.write_text("\n".join(lines) + "\n")
    return target


def test_files_are_scored_at_their_own_thresholds(tmp_path: Path, table: Path) -> None:
    model = write_label_model(tmp_path / "m.onnx")
    strict = write_label_model(tmp_path / "strict.onnx", thresholds=[0.99, 0.99, 0.99])

    scored = score_label_models([model, strict], table)

    first, second = scored.summary.scores
    assert (first.name, first.n, first.subset_accuracy) == ("m", 12, 0.75)
    assert second.subset_accuracy == 0.25  # only black images have no label
    assert first.mean_average_precision == second.mean_average_precision
    expected = threefold.load(model).predict_proba(tmp_path / "white1.png")[0]
    row = scored.rows.ids.index("white1.png")
    np.testing.assert_allclose(scored.rows.probs[0, row], expected, atol=1e-6)
    assert scored.rows.targets[row].tolist() == [1, 1, 1]


def test_files_are_compared(tmp_path: Path, table: Path) -> None:
    model = write_label_model(tmp_path / "m.onnx")
    strict = write_label_model(tmp_path / "strict.onnx", thresholds=[0.99, 0.99, 0.99])

    (pair,) = compare_label_models([model, strict], table).summary.comparisons

    assert (pair.a, pair.b, pair.difference) == ("m", "strict", 0)
    assert pair.macro_f1_a > pair.macro_f1_b == 0


def test_bad_tables_and_mixed_files_are_refused(tmp_path: Path, table: Path) -> None:
    model, one = write_label_model(tmp_path / "m.onnx"), write_model(tmp_path / "one.onnx")
    (tmp_path / "folder" / "red").mkdir(parents=True)
    table.with_name("other.csv").write_text("path,labels\nred0.png,red|pink\nblack0.png,\n")

    assert give_labels([model])
    assert not give_labels([one])
    with pytest.raises(RecipeError, match="do not go together"):
        give_labels([one, model])
    with pytest.raises(DataError, match="a folder has one class for each image"):
        score_label_models([model], tmp_path / "folder")
    with pytest.raises(DataError, match="got pink"):
        score_label_models([model], table.with_name("other.csv"))


def test_the_verbs_take_such_files(tmp_path: Path, table: Path) -> None:
    model = write_label_model(tmp_path / "m.onnx")
    other = write_label_model(tmp_path / "n.onnx", thresholds=[0.99, 0.99, 0.99])

    scored = runner.invoke(app, ["evaluate", str(model), str(table), "--json"])
    compared = runner.invoke(app, ["compare", str(model), str(other), "--data", str(table)])
    refused = runner.invoke(app, ["evaluate", str(model), str(table), "--members", "m"])

    assert json.loads(scored.stdout)["scores"][0]["subset_accuracy"] == 0.75
    assert compared.exit_code == 0, compared.output
    assert "for predictions, not for model files" in str(refused.exception)
