"""Calibration, prediction sets and unknown images of an exported file equal those on arrays."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import copy_with_card, plain_images, save_images
from torch import nn

import threefold
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.calibration import fit_calibration
from threefold.errors import ExportError
from threefold.evaluation.uncertainty import Uncertainty, fit_uncertainty, uncertainty_card
from threefold.exporting import targets
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.runtime.model import Model
from threefold.runtime.predict import write_predictions

CLASSES = ("oak", "elm", "ash")


def tiny_network(seed: int) -> nn.Module:
    """Mean colours and a linear layer: it answers each picture differently, and is too sure."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    network.requires_grad_(False)
    network[2].weight.mul_(0.15)
    return network


def biased_labels(probs: np.ndarray) -> np.ndarray:
    """Labels that the network is too sure of, with a bias to the first class."""
    softer = probs**0.6 * np.array([2.0, 1.0, 0.7])
    shares = (softer / softer.sum(1, keepdims=True)).cumsum(1)
    return (np.random.default_rng(1).random((len(probs), 1)) > shares).sum(1).clip(max=2)


@dataclass(frozen=True)
class TwoMembers:
    """Two small members, the mean of their answers to `plain_images`, and labels for these."""

    members: dict[str, MemberPipeline]
    probs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class UncertainFile:
    """An exported file, its prediction sets, and calibrated answers (n, k) computed on arrays."""

    model: Model
    uncertainty: Uncertainty
    probs: np.ndarray


def export_calibrated(two: TwoMembers, path: Path, calibration: str) -> UncertainFile:
    """Export with this kind of calibration and its prediction sets."""
    fitted = fit_calibration(calibration, two.probs, two.labels)
    assert fitted.name == calibration
    uncertainty = fit_uncertainty(fitted.probs, two.labels, alpha=0.2, reject=0.1)
    combiner = Combiner(MeanEnsemble().to_module(), fitted.to_module())
    card = {"calibration": fitted.state(), **uncertainty_card(uncertainty.as_dict())}
    report = targets.export(Pipeline(two.members, combiner, CLASSES), path, plain_images(20), card)
    assert report.max_difference < 1e-5
    return UncertainFile(threefold.load(path), uncertainty, fitted.apply(two.probs))


def predict_lines(model: Model, folder: Path, form: str) -> list[str]:
    """The lines that `predict` writes for `plain_images`."""
    save_images(plain_images(), folder)
    out = io.StringIO()
    assert write_predictions(out, print, model.path, [str(folder)], 2, form) == 0
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def two() -> TwoMembers:
    members = {
        name: MemberPipeline([Predictor(tiny_network(i))], 8, "squash")
        for i, name in enumerate(("a", "b"))
    }
    mean = Pipeline(members, Combiner(MeanEnsemble().to_module()), CLASSES)
    probs = mean.predict_proba(plain_images())
    return TwoMembers(members, probs, biased_labels(probs))


@pytest.fixture(scope="module")
def exported(two: TwoMembers, tmp_path_factory: pytest.TempPathFactory) -> UncertainFile:
    """A file with vector scaling."""
    return export_calibrated(two, tmp_path_factory.mktemp("file") / "model.onnx", "vector")


@pytest.fixture(scope="module")
def old(two: TwoMembers, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A file without prediction sets."""
    path = tmp_path_factory.mktemp("file") / "old.onnx"
    pipeline = Pipeline(two.members, Combiner(MeanEnsemble().to_module()), CLASSES)
    targets.export(pipeline, path, plain_images(4))
    return threefold.load(path)


def test_the_file_answers_with_its_calibration(two: TwoMembers, exported: UncertainFile) -> None:
    probs = exported.model.predict_proba(plain_images())

    np.testing.assert_allclose(probs, exported.probs, atol=1e-5)
    assert np.abs(exported.probs - two.probs).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "temperature"])
def test_other_calibrations_are_in_the_file_too(two: TwoMembers, tmp_path: Path, name: str) -> None:
    exported = export_calibrated(two, tmp_path / "m.onnx", name)

    probs = exported.model.predict_proba(plain_images())

    np.testing.assert_allclose(probs, exported.probs, atol=1e-5)
    if name != "none":
        assert np.abs(exported.probs - two.probs).max() > 0.05


def test_the_file_gives_the_sets_that_were_measured(exported: UncertainFile) -> None:
    model, images = exported.model, plain_images()

    for by_class in (False, True):
        sets = model.predict_sets(images, by_class)

        inside = exported.uncertainty.sets[by_class].predict_sets(exported.probs)
        expected = [{CLASSES[i] for i in np.flatnonzero(row)} for row in inside]
        assert [set(names) for names in sets] == expected
        assert [names[0] for names in sets] == model.predict(images)
        assert {len(names) for names in sets} > {1}

    assert model.predict_sets(images) != model.predict_sets(images, by_class=True)
    assert model.predict_sets([]) == []


def test_the_file_flags_unknown_images(exported: UncertainFile) -> None:
    unknown = exported.model.is_unknown(plain_images())

    expected = exported.uncertainty.unknown.is_unknown(exported.probs)
    assert unknown.tolist() == expected.tolist()
    assert 0 < unknown.mean() < 0.3
    assert exported.model.is_unknown([]).shape == (0,)


def test_predict_prints_the_set_and_unknown_images(exported: UncertainFile, tmp_path: Path) -> None:
    sets = exported.model.predict_sets(plain_images())
    unknown = exported.uncertainty.unknown.is_unknown(exported.probs)

    lines = predict_lines(exported.model, tmp_path, "text")
    entries = [json.loads(line) for line in predict_lines(exported.model, tmp_path, "json")]

    for line, names, is_unknown in zip(lines, sets, unknown, strict=True):
        assert f"; 80% set {{{', '.join(names)}}}" in line
        assert line.endswith("; unknown?") == is_unknown
    assert [entry["set"] for entry in entries] == sets
    assert [entry["unknown"] for entry in entries] == unknown.tolist()


def test_files_without_sets_name_what_they_lack(old: Model) -> None:
    for predict, missing in (
        (old.predict_sets, "prediction sets"),
        (old.is_unknown, "threshold for unknown images"),
    ):
        message = rf"the model file has no {missing}: .*old\.onnx; fix: export it again"
        with pytest.raises(ExportError, match=message) as error:
            predict(plain_images(1))
        assert "\n" not in str(error.value)


def test_files_without_sets_predict(old: Model, tmp_path: Path) -> None:
    lines = predict_lines(old, tmp_path, "text")

    assert all(line.count(";") == 0 and "%" in line for line in lines)
    assert not {"set", "unknown"} & set(json.loads(predict_lines(old, tmp_path, "json")[0]))


@pytest.mark.parametrize(
    "card",
    [
        {"conformal": [{"state": {"method": "lac"}}]},
        {"conformal": [{}]},
        {"conformal": "yes"},
        {"unknown": {"state": {"score": "energy", "rate": 0.1, "n": 3, "threshold": 1}}},
        {"unknown": {"state": {"score": "1 - max"}}},
    ],
)
def test_a_damaged_card_is_one_line(
    exported: UncertainFile, tmp_path: Path, card: dict[str, Any]
) -> None:
    path = copy_with_card(exported.model, tmp_path / "m.onnx", **card)

    with pytest.raises(
        ExportError, match=r"the model card is damaged: .*m\.onnx; got conformal or unknown: "
    ):
        threefold.load(path)


def test_sets_need_no_torch_and_no_scipy(exported: UncertainFile, tmp_path: Path) -> None:
    save_images(plain_images(1), tmp_path)
    code = (
        "import sys, threefold\n"
        f"m = threefold.load({str(exported.model.path)!r})\n"
        f"a = [{str(tmp_path / '000.png')!r}]\n"
        "print(m.predict_sets(a), m.predict_sets(a, by_class=True), m.is_unknown(a))\n"
        "bad = {'torch', 'timm', 'sklearn', 'scipy', 'onnx', 'pydantic'} & set(sys.modules)\n"
        "assert not bad, bad"
    )

    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
