"""Exported files of any number of labels per image: the same answers, and the same labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.cascades import tiny_network
from support.exports import dimmed_images

import threefold
from threefold.ensembles.multilabel import MultilabelEnsemble
from threefold.ensembles.multilabel_module import multilabel_module
from threefold.errors import ExportError
from threefold.evaluation.multilabel import evaluate_multilabel
from threefold.exporting import targets
from threefold.exporting.multilabel import chosen_multilabel
from threefold.exporting.parity import check, compare, describe_report
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.predictions.export_schema import ExportReport
from threefold.predictions.multilabel import MultilabelPredictions

CLASSES = ("oak", "elm", "ash")
ENSEMBLE = MultilabelEnsemble(
    weights=np.array([0.25, 0.75]),
    slope=np.array([0.8, 1.0, 2.5]),
    intercept=np.array([0.3, 0.0, -1.0]),
    thresholds=np.array([0.35, 0.5, 0.6]),
)
CARD = {"task": "multilabel", "thresholds": ENSEMBLE.thresholds.tolist(), "method": "mean"}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    members = {
        name: MemberPipeline([Predictor(tiny_network(i), task="multilabel")], 8 + i, "squash")
        for i, name in enumerate(("first", "second"))
    }
    return Pipeline(members, Combiner(multilabel_module(ENSEMBLE)), CLASSES)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return dimmed_images(20)


def member_answers(pipeline: Pipeline, images: list[np.ndarray]) -> np.ndarray:
    """The members' answers (m, n, k)."""
    with torch.inference_mode():
        answers = [pipeline(torch.from_numpy(image[None]))[1] for image in images]
    return torch.cat(answers).numpy().transpose(1, 0, 2)


def test_the_module_is_the_ensemble() -> None:
    rng = np.random.default_rng(0)
    probs = rng.random((2, 500, 3)).astype(np.float32) ** 3
    probs[:, :4] = [[[0.0] * 3], [[1.0] * 3]]  # members that contradict each other
    probs[:, 4], probs[:, 5] = 0.0, 1.0

    answers = multilabel_module(ENSEMBLE)(torch.from_numpy(probs.transpose(1, 0, 2)))

    assert np.isfinite(answers.numpy()).all()
    np.testing.assert_allclose(answers.numpy(), ENSEMBLE(probs), atol=2e-5)


def middle_thresholds(pipeline: Pipeline, images: list[np.ndarray]) -> np.ndarray:
    """Thresholds (k,) that half of the images reach."""
    return np.asarray(np.sort(ENSEMBLE(member_answers(pipeline, images)), axis=0)[9:11].mean(0))


@pytest.fixture(scope="module")
def exported(
    pipeline: Pipeline, images: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    """An .onnx file with these thresholds, and its report."""
    path = tmp_path_factory.mktemp("file") / "m.onnx"
    card = {**CARD, "thresholds": middle_thresholds(pipeline, images).tolist()}
    return path, targets.export(pipeline, path, images, card)


def check_agreement(report: ExportReport) -> None:
    """A file answers like the pipeline."""
    assert report.max_difference < 1e-5
    assert (report.changed, report.task) == (0, "multilabel")
    assert "same labels 100.0%" in describe_report(report)


def test_the_file_answers_like_the_pipeline(exported: tuple[Path, ExportReport]) -> None:
    check_agreement(exported[1])


@pytest.mark.parametrize("suffix", ["xml", pytest.param("pt2", marks=pytest.mark.slow)])
def test_files_of_other_kinds_answer_like_the_pipeline(
    pipeline: Pipeline, images: list[np.ndarray], tmp_path: Path, suffix: str
) -> None:
    if suffix == "xml":
        pytest.importorskip("openvino")

    check_agreement(targets.export(pipeline, tmp_path / f"m.{suffix}", images, CARD))


def test_the_file_gives_the_labels_of_the_ensemble(
    pipeline: Pipeline, images: list[np.ndarray], exported: tuple[Path, ExportReport]
) -> None:
    expected = ENSEMBLE(member_answers(pipeline, images))
    ensemble = replace(ENSEMBLE, thresholds=middle_thresholds(pipeline, images))

    model = threefold.load(exported[0])

    np.testing.assert_allclose(model.predict_proba(images), expected, atol=1e-5)
    decided = ensemble.decide(expected)
    assert decided.sum(1).min() < decided.sum(1).max()
    for answer, row in zip(model.predict(images), decided, strict=True):
        assert set(answer) == {name for name, given in zip(CLASSES, row, strict=True) if given}


def test_the_card_promises_what_the_run_expects() -> None:
    rng = np.random.default_rng(0)
    targets_of_rows = (rng.random((60, 3)) < 0.5).astype(np.uint8)
    probs = np.clip(targets_of_rows + rng.normal(0, 0.6, (2, 60, 3)), 0.01, 0.99)
    evaluation = evaluate_multilabel(
        MultilabelPredictions.from_arrays(probs, targets_of_rows), None
    )
    expected = evaluation.expected.replace(mean_average_precision=0.25, n=7, macro_f1=0.125)
    results = SimpleNamespace(
        ensemble=evaluation.state,
        chosen=evaluation.chosen,
        scores=evaluation.scores,
        expected=expected,
    )
    run: Any = SimpleNamespace(folder=SimpleNamespace(multilabel_results=results))

    score = chosen_multilabel(run).card["score"]

    assert (score["value"], score["n"], score["macro_f1"]) == (0.25, 7, 0.125)
    assert score["interval"] == list(expected.mean_average_precision_interval)


@pytest.mark.slow
def test_int8_and_float16_keep_their_sigmoids(
    pipeline: Pipeline, images: list[np.ndarray], tmp_path: Path
) -> None:
    for precision in ("float16", "int8"):
        options: dict[str, Any] = {"precision": precision, "calibration": images}
        report = targets.export(pipeline, tmp_path / f"{precision}.onnx", images, CARD, **options)
        assert report.max_difference <= report.tolerance


def test_other_labels_are_refused_and_ties_are_not() -> None:
    thresholds = [0.5, 0.5]
    expected = np.array([[0.9, 0.5001], [0.2, 0.8]])
    tie = np.array([[0.9, 0.49995], [0.2, 0.8]])
    other = np.array([[0.9, 0.5001], [0.6, 0.8]])

    close = compare(expected, tie, labels=[[1, 1], [0, 1]], thresholds=thresholds)
    far = compare(expected, other, "int8", thresholds=thresholds)

    assert (close.ties, close.changed) == (1, 0)
    assert close.accuracy is not None
    assert (close.accuracy.before, close.accuracy.after, close.accuracy.counted_loss) == (2, 1, 0)
    assert (far.ties, far.changed, far.top1_agreement) == (0, 1, 0.5)
    with pytest.raises(ExportError, match="at most 0 of 2 images with other labels"):
        check(far.replace(changed_tolerance=0, tolerance=1.0), "m.onnx")
    # The most probable label is the same in both: it is not what counts.
    assert (expected.argmax(1) == other.argmax(1)).all()
