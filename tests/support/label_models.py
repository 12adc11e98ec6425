"""A tiny model that gives an image any number of labels: those of its strong channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from support.server import card, colour_graph, write_model

THRESHOLDS = (0.3, 0.5, 0.7)
"""Of blue, green and red."""
SCORE: dict[str, Any] = {
    "metric": "mean_average_precision",
    "value": 0.871,
    "interval": [0.842, 0.899],
    "macro_f1": 0.804,
    "micro_f1": 0.822,
    "level": 0.95,
    "rows": "test",
    "n": 1000,
    "protocol": "honest",
    "fitted_on": "oof",
}


def label_card(**changes: Any) -> dict[str, Any]:
    """Make the card of a multilabel model as `export` writes it."""
    content = card(task="multilabel", thresholds=list(THRESHOLDS), score=SCORE)
    del content["temperature"]
    return {**content, **changes}


def label_graph() -> onnx.ModelProto:
    """Make a graph whose label blue is the more probable, the bluer the mean colour; and so on.

    A channel of 128 gives a probability of one half, by both members.
    """
    model = colour_graph()
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.op_type = "Sigmoid"
            del node.attribute[:]
            node.input[0] = "centred"
        if node.op_type == "Mul":
            node.output[0] = "wide"
    middle = onnx.helper.make_tensor("middle", onnx.TensorProto.FLOAT, [2, 1], [3.2, 0.8])
    model.graph.initializer.append(middle)
    place = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Sigmoid")
    shift = onnx.helper.make_node("Sub", ["wide", "middle"], ["centred"])
    model.graph.node.insert(place, shift)
    return model


def write_label_model(path: Path, **changes: Any) -> Path:
    """Write a multilabel model file; `changes` are of its card."""
    return write_model(path, label_graph(), label_card(**changes))
