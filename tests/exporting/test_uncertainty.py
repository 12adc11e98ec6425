"""An exported file calibrates, gives prediction sets and flags unknown images like the arrays."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import threefold
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.calibration import fit_calibration
from threefold.errors import ExportError
from threefold.evaluation.uncertainty import Uncertainty, fit_uncertainty, uncertainty_card
from threefold.exporting import onnx_files, targets
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.runtime import predict as answers
from threefold.runtime.model import Model

CLASSES = ("oak", "elm", "ash")


def tiny(seed: int) -> nn.Module:
    """Mean colours and a linear layer: it answers each picture differently, and is too sure."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).requires_grad_(
        False
    )
    net[2].weight.mul_(0.15)
    return net


def pictures(count: int = 200) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (count, 3))
    return [
        np.full((int(s), int(s) + 2, 3), colour, np.uint8)
        for colour, s in zip(colours, rng.integers(3, 20, count), strict=True)
    ]


def truth(probs: np.ndarray) -> np.ndarray:
    """Labels that the network is too sure of, with a bias to the first class."""
    softer = probs**0.6 * np.array([2.0, 1.0, 0.7])
    shares = (softer / softer.sum(1, keepdims=True)).cumsum(1)
    return (np.random.default_rng(1).random((len(probs), 1)) > shares).sum(1).clip(max=2)


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    members = {
        name: MemberPipeline([Predictor(tiny(i))], 8, "squash") for i, name in enumerate(("a", "b"))
    }
    plain = Pipeline(members, Combiner(MeanEnsemble().to_module()), CLASSES)
    probs = plain.predict_proba(pictures())
    return {"members": members, "probs": probs, "labels": truth(probs)}


def written(world: dict[str, Any], path: Path, name: str) -> tuple[Uncertainty, np.ndarray]:
    """Export with a calibration and its sets; returns the sets and the calibrated answers."""
    found = fit_calibration(name, world["probs"], world["labels"])
    assert found.name == name
    uncertainty = fit_uncertainty(found.probs, world["labels"], alpha=0.2, reject=0.1)
    pipeline = Pipeline(
        world["members"], Combiner(MeanEnsemble().to_module(), found.to_module()), CLASSES
    )
    card = {"calibration": found.state(), **uncertainty_card(uncertainty.as_dict())}
    report = targets.export(pipeline, path, pictures(20), card)
    assert report["max_difference"] < 1e-5
    return uncertainty, found.apply(world["probs"])


@pytest.fixture(scope="module")
def made(
    world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Uncertainty, np.ndarray]:
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    uncertainty, probs = written(world, path, "vector")
    return threefold.load(path), uncertainty, probs


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("temperature", marks=pytest.mark.slow),
        "vector",
    ],
)
def test_the_file_answers_with_its_calibration(
    world: dict[str, Any], tmp_path: Path, name: str
) -> None:
    _, expected = written(world, tmp_path / "m.onnx", name)
    np.testing.assert_allclose(
        threefold.load(tmp_path / "m.onnx").predict_proba(pictures()), expected, atol=1e-5
    )
    if name != "none":
        assert np.abs(expected - world["probs"]).max() > 0.05


def test_the_file_gives_the_sets_that_were_measured(
    made: tuple[Model, Uncertainty, np.ndarray],
) -> None:
    model, uncertainty, probs = made
    for by_class in (False, True):
        inside = uncertainty.sets[by_class].predict_sets(probs)
        sets = model.predict_sets(pictures(), by_class)
        assert [set(s) for s in sets] == [
            {CLASSES[i] for i in np.flatnonzero(row)} for row in inside
        ]
        assert [s[0] for s in sets] == model.predict(pictures())
        assert {len(s) for s in sets} > {1}
    assert model.predict_sets(pictures()) != model.predict_sets(pictures(), by_class=True)
    unknown = model.is_unknown(pictures())
    assert unknown.tolist() == uncertainty.unknown.is_unknown(probs).tolist()
    assert 0 < unknown.mean() < 0.3
    assert model.predict_sets([]) == []
    assert model.is_unknown([]).shape == (0,)


def answered(model: Model, tmp_path: Path, form: str) -> list[str]:
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / f"{i:03d}.png")
    out = io.StringIO()
    assert answers.write_predictions(out, print, model.path, [str(tmp_path)], 2, form) == 0
    return out.getvalue().splitlines()


def test_predict_prints_the_set_and_the_doubt(
    made: tuple[Model, Uncertainty, np.ndarray], tmp_path: Path
) -> None:
    model, uncertainty, probs = made
    sets, unknown = model.predict_sets(pictures()), uncertainty.unknown.is_unknown(probs)
    for line, names, doubt in zip(answered(model, tmp_path, "text"), sets, unknown, strict=True):
        assert f"; 80% set {{{', '.join(names)}}}" in line
        assert line.endswith("; unknown?") == doubt
    told = [json.loads(line) for line in answered(model, tmp_path, "json")]
    assert [entry["set"] for entry in told] == sets
    assert [entry["unknown"] for entry in told] == unknown.tolist()


def test_files_without_sets_work_and_say_what_they_lack(
    world: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = Pipeline(world["members"], Combiner(MeanEnsemble().to_module()), CLASSES)
    targets.export(pipeline, tmp_path / "old.onnx", pictures(4))
    model = threefold.load(tmp_path / "old.onnx")
    for use, what in (
        (model.predict_sets, "prediction sets"),
        (model.is_unknown, "threshold for unknown images"),
    ):
        with pytest.raises(
            ExportError, match=rf"the model file has no {what}: .*old\.onnx; fix: export it again"
        ) as error:
            use(pictures(1))
        assert "\n" not in str(error.value)
    folder = tmp_path / "images"
    folder.mkdir()
    assert all(line.count(";") == 0 and "%" in line for line in answered(model, folder, "text"))
    assert not {"set", "unknown"} & set(json.loads(answered(model, folder, "json")[0]))


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
    world: dict[str, Any], tmp_path: Path, card: dict[str, Any], made: Any
) -> None:
    import onnx

    model = onnx.load(made[0].path)
    onnx_files.set_card(model, {**made[0].card, **card})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(
        ExportError, match=r"the model card is damaged: .*m\.onnx; got conformal or unknown: "
    ):
        threefold.load(tmp_path / "m.onnx")


def test_sets_need_no_torch_and_no_scipy(
    made: tuple[Model, Uncertainty, np.ndarray], tmp_path: Path
) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    code = (
        "import sys, threefold\n"
        f"m = threefold.load({str(made[0].path)!r})\n"
        f"a = [{str(tmp_path / 'a.png')!r}]\n"
        "print(m.predict_sets(a), m.predict_sets(a, by_class=True), m.is_unknown(a))\n"
        "bad = {'torch', 'timm', 'sklearn', 'scipy', 'onnx', 'pydantic'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
