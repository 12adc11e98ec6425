"""Describe the answer to an image: as plain values for JSON, as a line of text, as cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from threefold.names import escape_formula
from threefold.runtime.model import Model
from threefold.runtime.model_output import ModelOutput
from threefold.tasks import Task

SEPARATOR: Final = "|"
"""Between the labels of an image in a cell."""

Answer = Mapping[str, Any]
"""Of `describe_answer`."""


def describe_answer(model: Model, image: str, output: ModelOutput, top: int) -> dict[str, Any]:
    """Describe the answer to one image as plain values for JSON.

    Args:
        model: the exported file.
        image: path of the image.
        output: its answer, n = 1.
        top: how many classes to name.

    Returns:
        The keys image, label, probability, top (the most probable classes), members (the label of
        each member that ran) and probs; set and unknown if the file has them; members_used with a
        cascade. Of a multilabel file the keys image, labels (those that reach their thresholds),
        top, members (the probabilities of the labels in both, by member, without calibration) and
        probs.
    """
    probs, member_probs = output.probs[0], output.member_probs[0]
    order = np.argsort(-probs, kind="stable")[:top]
    if model.thresholds is not None:
        numbers = model.label_numbers(probs)
        named = dict.fromkeys([*numbers, *map(int, order)])
        return {
            "image": image,
            "labels": describe_labels(model, probs, numbers),
            "top": describe_labels(model, probs, order),
            "members": {
                name: {model.classes[i]: float(row[i]) for i in named}
                for name, row in zip(model.members, member_probs, strict=True)
            },
            "probs": [float(p) for p in probs],
        }
    stages = None if output.stages_used is None else int(output.stages_used[0])
    members = model.members_in_stages(stages)
    answer = {
        "image": image,
        "label": model.classes[order[0]],
        "probability": float(probs[order[0]]),
        "top": [{"label": model.classes[i], "probability": float(probs[i])} for i in order],
        "members": {model.members[i]: model.classes[member_probs[i].argmax()] for i in members},
        "probs": [float(p) for p in probs],
    }
    if False in model.sets:
        answer["set"] = model.sets_from_probs(output.probs)[0]
    if model.unknown is not None:
        answer["unknown"] = bool(model.unknown_from_probs(output.probs)[0])
    if model.cascade is not None:
        answer["members_used"] = len(members)
    return answer


def describe_labels(
    model: Model, probs: np.ndarray, numbers: Iterable[int]
) -> list[dict[str, Any]]:
    """Describe labels of a multilabel file: each with its probability and threshold.

    Args:
        model: the file.
        probs: (k,) of an image.
        numbers: of the labels.
    """
    assert model.thresholds is not None
    return [
        {
            "label": model.classes[i],
            "probability": float(probs[i]),
            "threshold": float(model.thresholds[i]),
        }
        for i in numbers
    ]


def as_text(answer: Answer, model: Model) -> str:
    """Format an answer of `describe_answer` as one line."""
    if "labels" in answer:
        return _labels_as_text(answer)
    parts = [f"{answer['image']}: {_shares(answer['top'])}"]
    if "set" in answer:
        coverage = 100 * (1 - model.sets[False].alpha)
        parts.append(f"{coverage:.4g}% set {{{', '.join(answer['set'])}}}")
    if answer.get("unknown"):
        parts.append("unknown?")
    return "; ".join(parts)


def _labels_as_text(answer: Answer) -> str:
    """Format the labels of an image, and which of the most probable ones miss their thresholds."""
    labels = answer["labels"]
    text = f"{answer['image']}: {_shares(labels) if labels else 'no label'}"
    missed = [
        f"{entry['label']} {entry['probability']:.1%} < {entry['threshold']:.1%}"
        for entry in answer["top"]
        if entry not in labels
    ]
    return f"{text}; below threshold: {', '.join(missed)}" if missed else text


def _shares(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in entries)


class AnswerTable:
    """The columns of a table of answers: two of text, then numbers, the last for each class.

    path, prediction and confidence come before the classes; for a multilabel file path and labels.

    Args:
        classes: class names, in the order of the probabilities.
        task: of the model file.
    """

    def __init__(self, classes: Sequence[str], task: Task = "multiclass") -> None:
        self.is_multilabel = task == "multilabel"
        own = ("path", "labels") if self.is_multilabel else ("path", "prediction", "confidence")
        self.columns = (*own, *classes)

    def texts(self, answer: Answer) -> tuple[str, str]:
        """The path of an image, and its class, or its labels with a vertical bar between them."""
        if not self.is_multilabel:
            return answer["image"], answer["label"]
        return answer["image"], SEPARATOR.join(entry["label"] for entry in answer["labels"])

    def numbers(self, answer: Answer) -> tuple[float, ...]:
        """The confidence, where there is one, and the probability of each class."""
        if self.is_multilabel:
            return tuple(answer["probs"])
        return answer["probability"], *answer["probs"]

    def csv_head(self) -> list[str]:
        """The names of the columns as cells of a CSV file."""
        return [escape_formula(name) for name in self.columns]

    def csv_cells(self, answer: Answer) -> list[str]:
        """The cells of an answer in a CSV file: the numbers with six decimals."""
        texts = [escape_formula(text) for text in self.texts(answer)]
        return [*texts, *(f"{number:.6f}" for number in self.numbers(answer))]
