"""A small pipeline whose cascade uses every stage, and files of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from support.exports import dimmed_images
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.cascade import Cascade, margins
from threefold.ensembles.stacked import StackedEnsemble
from threefold.evaluation.cascade_savings import cascade_card, fit_savings
from threefold.exporting import onnx_graph
from threefold.exporting.onnx_cascade import add_cascade
from threefold.exporting.parity import check, compare
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.predictions.export_schema import ExportReport

CLASSES = ("oak", "elm", "ash")
CANVASES = {"wide": 8, "cheap": 8, "other": 12}
"""Canvas of each member; the cascade runs cheap, other, wide."""


@dataclass(frozen=True)
class CascadeCase:
    """Three members of two networks, a stacked ensemble, and a cascade that uses every stage.

    Attributes:
        probs: members' answers (m, n, k) to `dimmed_images`.
        full: the ensemble's answers (n, k) to them.
        graph: the ONNX model without the cascade.
        card: the entry of the cascade in the model card.
    """

    pipeline: Pipeline
    cascade: Cascade
    probs: np.ndarray
    full: np.ndarray
    graph: onnx.ModelProto
    card: dict[str, Any]

    def graph_with_cascade(self) -> onnx.ModelProto:
        """A copy of the graph with the cascade built in."""
        return add_cascade(self.graph, self.cascade, onnx_graph.network_names(self.pipeline))

    def write(self, path: Path, images: list[np.ndarray]) -> ExportReport:
        """Write a file with the cascade."""
        return self._write(self.graph_with_cascade(), path, images, self.card)

    def write_without_cascade(self, path: Path, images: list[np.ndarray]) -> ExportReport:
        """Write a file of the same pipeline without the cascade."""
        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        return self._write(graph, path, images, {})

    def _write(
        self, graph: onnx.ModelProto, path: Path, images: list[np.ndarray], card: dict[str, Any]
    ) -> ExportReport:
        expected = self.pipeline.predict_proba(images)
        return onnx_graph.write_onnx(
            graph,
            path,
            onnx_graph.card_of(self.pipeline, "float32", card),
            images,
            lambda answers: check(compare(expected, answers), path),
        )


def make_cascade_case() -> CascadeCase:
    """Build the pipeline and fit its cascade."""
    members = {}
    for i, (name, canvas) in enumerate(CANVASES.items()):
        predictors = [Predictor(tiny_network(2 * i)), Predictor(tiny_network(2 * i + 1))]
        members[name] = MemberPipeline(predictors, canvas, "squash")
    mean = Combiner(MeanEnsemble().to_module())
    probs = member_answers(Pipeline(members, mean, CLASSES))
    labels = probs.mean(0).argmax(1)
    ensemble = StackedEnsemble(16, epochs=20).fit(probs, labels)
    pipeline = Pipeline(members, Combiner(ensemble.to_module()), CLASSES)
    full = pipeline.predict_proba(dimmed_images())
    fitted = fit_savings(
        probs,
        labels,
        full,
        [[1], [2], [0]],
        costs=[3, 1, 2],
        members=tuple(CANVASES),
        disagreement=0.4,
    )
    cascade = fitted.cascade
    cascade.thresholds_ = halving_thresholds(cascade, probs, full)
    entry = {**cascade_card(fitted.as_dict())["cascade"], "state": cascade.state()}
    graph = onnx_graph.build_graph(pipeline)
    return CascadeCase(pipeline, cascade, probs, full, graph, {"cascade": entry})


def tiny_network(seed: int) -> nn.Module:
    """A convolution, mean colours and a linear layer."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    network[4].weight.data.mul_(6.0)
    return network.requires_grad_(False)


@torch.inference_mode()
def member_answers(pipeline: Pipeline) -> np.ndarray:
    """The members' answers (m, n, k) float64 to `dimmed_images`."""
    answers = [pipeline(torch.from_numpy(image[None]))[1] for image in dimmed_images()]
    return torch.cat(answers).numpy().transpose(1, 0, 2).astype(np.float64)


def halving_thresholds(cascade: Cascade, probs: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Thresholds at which half of the remaining rows stop; none is near a row."""
    remaining, thresholds = np.ones(len(full), bool), []
    for max_stages in (1, 2):
        stops = cascade.stops("full", max_stages)
        row_margins = margins(cascade.predict(probs, full, stops).probs)
        ordered = np.sort(row_margins[remaining])
        middle = len(ordered) // 2
        thresholds.append(ordered[middle - 1 : middle + 1].mean())
        remaining &= row_margins < thresholds[-1]
    return np.array(thresholds)
