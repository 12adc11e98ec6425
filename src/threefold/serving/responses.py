"""The responses of a server, as types that check them and document them in /openapi.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from pydantic import BaseModel

from threefold.runtime.describe import describe_answer
from threefold.runtime.model import Model
from threefold.runtime.model_output import ModelOutput


class ClassProbability(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class MemberPrediction(BaseModel):
    """The prediction of one member for an image."""

    label: str
    probability: float
    top: list[ClassProbability]


class Prediction(BaseModel):
    """The prediction for one image."""

    file: str
    label: str
    probability: float
    top: list[ClassProbability]
    members: dict[str, MemberPrediction]
    """The members that ran; in mode "fast" not always all."""
    set: list[str] | None = None
    """The prediction set, if the model has one."""
    unknown: bool | None = None
    """Whether the image looks like none of the classes, if the model has a threshold for it."""
    members_used: int | None = None
    """How many members ran, if the model has a cascade."""


class PredictResponse(BaseModel):
    """The predictions of a request, in the order of its images."""

    answers: list[Prediction]


class LabelProbability(BaseModel):
    """A label, its probability, and the threshold from which on an image has the label."""

    label: str
    probability: float
    threshold: float


class MultilabelPrediction(BaseModel):
    """The prediction of a model that gives an image any number of labels."""

    file: str
    labels: list[LabelProbability]
    """Those that reach their thresholds, the most probable first; may be empty."""
    top: list[LabelProbability]
    """The most probable ones, whether they reach their thresholds or not."""
    members: dict[str, dict[str, float]]
    """The probabilities of the labels in `labels` and `top`, by member, without calibration."""


class MultilabelResponse(BaseModel):
    """The predictions of a request, in the order of its images."""

    answers: list[MultilabelPrediction]


class Explanation(BaseModel):
    """What hiding parts of an image costs a class."""

    file: str
    label: str
    """The class that is explained."""
    probability: float
    """Of the class, by all members."""
    lowest: float
    """The same with the square hidden that matters most."""
    cells: list[list[float]]
    """The mean loss of probability of the squares that cover a place: 7 rows of 7, from above."""
    cropped: bool
    """Whether the cells are of the largest centred square of the image, all that the model sees."""
    picture: str
    """A PNG file in base64: the image, yellow where hiding it costs the class most."""


class ErrorDetail(BaseModel):
    """Why the server refused a request."""

    code: str
    """A word for programs."""
    message: str
    """A sentence for people."""
    file: str | None = None
    """The client's name of the image concerned, if one is."""


class ErrorResponse(BaseModel):
    """The body of every response whose status is not 200."""

    error: ErrorDetail


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorResponse}
    for status in (400, 401, 403, 408, 413, 415, 421, 429, 503, "default")
}
"""The errors of routes that take images, as FastAPI describes them.

With "default", which all others are like, it does not claim its own form of status 422, too.
"""


def response_type(model: Model) -> type[PredictResponse] | type[MultilabelResponse]:
    """Return the type of a model's responses."""
    return MultilabelResponse if model.task == "multilabel" else PredictResponse


def describe_all(
    model: Model, names: Sequence[str], outputs: Sequence[ModelOutput], top: int
) -> PredictResponse | MultilabelResponse:
    """Build the response to a request; the arguments are lists of those of `describe`."""
    pairs = list(zip(names, outputs, strict=True))
    if model.task == "multilabel":
        return MultilabelResponse(answers=[describe_labels(model, *pair, top) for pair in pairs])
    return PredictResponse(answers=[describe(model, *pair, top) for pair in pairs])


def describe(model: Model, name: str, output: ModelOutput, top: int) -> Prediction:
    """Build the prediction of an image from the model's output.

    Args:
        model: the model that ran.
        name: the client's name of the image.
        output: the output for the image, with n = 1.
        top: how many classes to name.
    """
    best = _top_classes(model, output.probs[0], top)
    stages = None if output.stages_used is None else int(output.stages_used[0])
    indices = model.members_in_stages(stages)
    members = {}
    for i in indices:
        member_best = _top_classes(model, output.member_probs[0, i], top)
        members[model.members[i]] = MemberPrediction(
            label=member_best[0].label, probability=member_best[0].probability, top=member_best
        )
    prediction = Prediction(
        file=name,
        label=best[0].label,
        probability=best[0].probability,
        top=best,
        members=members,
        members_used=None if stages is None else len(indices),
    )
    if False in model.sets:
        prediction.set = model.sets_from_probs(output.probs)[0]
    if model.unknown is not None:
        prediction.unknown = bool(model.unknown_from_probs(output.probs)[0])
    return prediction


def describe_labels(model: Model, name: str, output: ModelOutput, top: int) -> MultilabelPrediction:
    """As `describe`, of a model that gives an image any number of labels."""
    answer = describe_answer(model, name, output, top)
    shown = {key: answer[key] for key in ("labels", "top", "members")}
    return MultilabelPrediction.model_validate({"file": name, **shown})


def _top_classes(model: Model, probs: np.ndarray, top: int) -> list[ClassProbability]:
    order = np.argsort(-probs, kind="stable")[:top]
    return [ClassProbability(label=model.classes[i], probability=float(probs[i])) for i in order]
