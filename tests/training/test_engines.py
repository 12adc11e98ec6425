"""Engines: the same features from each, for an image in any company, and an honest choice."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from support.images import random_images

from threefold.errors import RecipeError
from threefold.models.features import FeatureExtractor, FeatureForm
from threefold.models.member import create_backbone
from threefold.recipe.schema import MemberSpec
from threefold.training.features import engines
from threefold.training.features.engines import BATCH, choose_engine, compute, make_engine

CPU = torch.device("cpu")


def make_extractor(
    form: FeatureForm = "pooled", name: str = "test_efficientnet"
) -> FeatureExtractor:
    torch.manual_seed(0)
    spec = MemberSpec(name="m", backbone=name, img_size=48, weights="none")
    return FeatureExtractor(create_backbone(spec, pretrained=False), form)


def make_pixels(n: int) -> np.ndarray:
    return random_images(n, 48, 48).permute(0, 3, 1, 2).float().numpy()


@pytest.fixture(autouse=True)
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without it, so that the tests are the same everywhere."""
    monkeypatch.setattr(engines, "half_precision", lambda _: "")


@pytest.mark.parametrize("form", ["pooled", "rows", "spatial"])
def test_onnxruntime_answers_as_torch(form: FeatureForm) -> None:
    pixels = make_pixels(BATCH)

    torch_answers = make_engine("torch-float32", make_extractor(form), 48, CPU)(pixels)
    onnx_answers = make_engine("onnxruntime", make_extractor(form), 48, CPU)(pixels)

    assert onnx_answers.shape == torch_answers.shape
    assert engines.relative_error(onnx_answers, torch_answers) < 1e-4


@pytest.mark.parametrize("name", ["torch-float32", "torch-bfloat16", "onnxruntime"])
def test_features_do_not_depend_on_the_other_images(name: str) -> None:
    engine = make_engine(name, make_extractor(), 48, CPU)
    pixels = make_pixels(BATCH + 9)
    order = np.random.default_rng(1).permutation(len(pixels))

    together = compute(engine, pixels)

    assert together.dtype == np.float16
    np.testing.assert_array_equal(compute(engine, pixels[order]), together[order])
    np.testing.assert_array_equal(compute(engine, pixels[3:5]), together[3:5])


def test_few_images_are_not_worth_a_search() -> None:
    choice = choose_engine(make_extractor(), make_pixels(5), 5, CPU)

    assert (choice.engine.name, choice.measured) == ("torch-float32", False)


def test_choice_names_speeds_and_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WORTH_SECONDS", 0.0)

    choice = choose_engine(make_extractor(), make_pixels(5), 10**6, CPU)

    assert choice.measured
    for name in ("torch-float32", "onnxruntime"):
        assert f"{name} " in choice.reason
    assert "images/s" in choice.reason


@pytest.mark.parametrize(("tolerance", "said"), [(1.0, "torch-bfloat16 "), (1e-6, "differs by")])
def test_bfloat16_is_tried_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, tolerance: float, said: str
) -> None:
    monkeypatch.setattr(engines, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(engines, "half_precision", lambda _: "bfloat16")
    monkeypatch.setitem(engines.TOLERANCES, "torch-bfloat16", tolerance)

    choice = choose_engine(make_extractor(), make_pixels(5), 10**6, CPU)

    assert said in choice.reason
    assert choice.engine.name != "torch-bfloat16" or tolerance == 1.0


def test_the_usual_engine_is_not_taken_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(engines, "half_precision", lambda _: "bfloat16")
    monkeypatch.setitem(engines.TOLERANCES, "torch-bfloat16", 1e-6)

    choice = choose_engine(make_extractor(), make_pixels(5), 1, CPU, usual="torch-bfloat16")

    assert choice.measured
    assert choice.engine.name != "torch-bfloat16"


def test_engine_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(
        engines, "make_engine", lambda *_: lambda pixels: np.ones((len(pixels), 256), np.float32)
    )

    choice = choose_engine(make_extractor(), make_pixels(5), 10**6, CPU)

    assert choice.engine.name == "torch-float32"
    assert "onnxruntime differs by" in choice.reason


def test_engine_that_fails_leaves_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(engines, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(engines, "export_graph", fail)

    choice = choose_engine(make_extractor(), make_pixels(5), 10**6, CPU)

    assert choice.engine.name == "torch-float32"
    assert "onnxruntime fails (RecipeError)" in choice.reason
    with pytest.raises(RecipeError, match=r"cannot run this backbone.*no such operator.*auto"):
        make_engine("onnxruntime", make_extractor(), 48, CPU)


def test_a_session_of_the_same_key_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_sessions", OrderedDict())
    monkeypatch.setattr(engines, "KEPT_SESSIONS", 1)

    first = make_engine("onnxruntime", make_extractor(), 48, CPU, "a")
    again = make_engine("onnxruntime", make_extractor(), 48, CPU, "a")
    make_engine("onnxruntime", make_extractor(), 48, CPU, "b")
    later = make_engine("onnxruntime", make_extractor(), 48, CPU, "a")

    assert again is first
    assert later is not first


def test_the_usual_engine_is_taken_without_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WORTH_SECONDS", 0.0)

    choice = choose_engine(make_extractor(), make_pixels(5), 1, CPU, usual="onnxruntime")
    long_work = choose_engine(make_extractor(), make_pixels(5), 10**8, CPU, usual="onnxruntime")

    assert (choice.engine.name, choice.measured) == ("onnxruntime", False)
    assert long_work.measured
