"""A model file whose bytes or answers are wrong is refused, not served."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.server import UNCERTAIN, card, colour_graph, write_model

import threefold
from threefold.errors import ExportError
from threefold.exporting import onnx_files
from threefold.runtime.model_file import CHECKSUM

GREY = np.full((4, 4, 3), 90, np.uint8)


def graph_times(number: float) -> onnx.ModelProto:
    """A graph whose probabilities are multiplied by a number."""
    model = colour_graph()
    mean = model.graph.node[-1]
    assert list(mean.output) == ["probs"]
    mean.output[0] = "right"
    model.graph.initializer.append(helper.make_tensor("number", TensorProto.FLOAT, [], [number]))
    model.graph.node.append(helper.make_node("Mul", ["right", "number"], ["probs"]))
    return model


def graph_of_rows(number: int) -> onnx.ModelProto:
    """A graph that answers for that number of images, whatever it is given."""
    model = colour_graph()
    for name, width in (("probs", [3]), ("member_probs", [2, 3])):
        producer = next(node for node in model.graph.node if name in node.output)
        producer.output[0] = f"right_{name}"
        for node in model.graph.node:
            node.input[:] = [f"right_{name}" if i == name else i for i in node.input]
        shape = helper.make_tensor(
            f"shape_{name}", TensorProto.INT64, [len(width) + 1], [number, *width]
        )
        model.graph.initializer.append(shape)
        third = helper.make_tensor("third", TensorProto.FLOAT, [1], [1 / 3])
        model.graph.node.append(
            helper.make_node("ConstantOfShape", [f"shape_{name}"], [name], value=third)
        )
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph_times(float("nan")), "a probability of nan"),
        (graph_times(-5), "a probability of -"),
        (graph_times(2), "a probability of 1|a sum of 2"),
        (graph_times(0.5), "a sum of 0.5"),
        (graph_of_rows(0), r"answers of shape \(0, 3\)"),
        (graph_of_rows(5), r"answers of shape \(5, 3\)"),
    ],
    ids=["nan", "negative", "twice", "half", "no rows", "more rows"],
)
def test_answers_that_are_not_probabilities(
    tmp_path: Path, model: onnx.ModelProto, reason: str
) -> None:
    loaded = threefold.load(write_model(tmp_path / "m.onnx", model))

    with pytest.raises(ExportError, match=reason) as error:
        loaded.predict([GREY])
    assert "m.onnx" in str(error.value)


def sealed_model(path: Path) -> bytes:
    """Write a model as an export does, with a checksum."""
    model = colour_graph()
    onnx_files.set_card(model, card())
    path.write_bytes(onnx_files.serialize(model))
    return path.read_bytes()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    content = sealed_model(path)
    right = threefold.load(path).predict_proba([GREY])

    unnoticed = []
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ExportError):
            assert np.array_equal(threefold.load(path).predict_proba([GREY]), right)
            unnoticed.append(position)

    # Only the checksum's own name may differ: then there is no checksum, and nothing else is wrong.
    name = content.index(CHECKSUM.encode())
    assert all(name - 20 < position < name + 20 for position in unnoticed)


def test_the_checksum_is_made_anew_with_every_card(tmp_path: Path) -> None:
    model = colour_graph()
    onnx_files.set_card(model, card())
    onnx_files.serialize(model)

    onnx_files.set_card(model, card(name="another"))
    (tmp_path / "m.onnx").write_bytes(onnx_files.serialize(model))

    assert threefold.load(tmp_path / "m.onnx").card == card(name="another")


CARDS: dict[str, tuple[Any, str]] = {
    "name": (card(name=["a"]), "name is not text"),
    "digest": (card(digest=7), "digest is not text"),
    "score": (card(score=[0.5]), "score is not an object"),
    "accuracy": (card(score={"accuracy": "high"}), "score.accuracy is not a share"),
    "large accuracy": (card(score={"accuracy": 10**400}), "score.accuracy is not a share"),
    "accuracy above 1": (card(score={"accuracy": 88.4}), "score.accuracy is not a share"),
    "interval": (card(score={"interval": [0.5]}), "score.interval is not two shares"),
    "images": (card(score={"n": -1}), "score.n is not a number of images"),
    "n_train": (card(n_train="many"), "n_train is not a number"),
    "temperature": (card(temperature="hot"), "temperature is not a number"),
    "backbones": (card(backbones=[1, 2]), "backbones is not a list of texts"),
    "versions": (card(versions={"a": {}}), "versions is not texts"),
    "nesting": (card(more=json.loads("[" * 200 + "]" * 200)), "nested more than 32 deep"),
    "conformal": (card(conformal=5), "the model card is damaged"),
    "entries": (card(conformal=[5]), "the model card is damaged"),
    "unknown": (card(unknown={"state": {"score": "1 - max"}}), "the model card is damaged"),
    "alpha": (
        card(conformal=[{"state": {**UNCERTAIN["conformal"][0]["state"], "alpha": 1e999}}]),
        "alpha",
    ),
    "threshold": (
        card(unknown={"state": {**UNCERTAIN["unknown"]["state"], "threshold": float("nan")}}),
        "threshold",
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_with_values_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    content, reason = CARDS[name]
    path = write_model(tmp_path / "m.onnx", model_card=json.dumps(content))

    with pytest.raises(ExportError, match=reason) as error:
        threefold.load(path)
    assert "\n" not in str(error.value)


def test_half_a_character_in_a_card_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", model_card=json.dumps(card(name="\ud800")))

    with pytest.raises(ExportError, match="half of a character"):
        threefold.load(path)
