"""An ONNX file of a fixed size answers as the pipeline, of operators that TensorRT reads.

TensorRT itself was not run: what it reads is its published table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fastapi.testclient import TestClient
from support.cascades import CascadeCase
from support.exports import copy_with_card, noise_images
from support.networks import pipeline_of, settle
from support.server import encode
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.errors import DataError, ExportError
from threefold.exporting import targets, tensorrt
from threefold.models.member import build_member
from threefold.models.pipeline import Pipeline
from threefold.models.tracing import OPSET
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.runtime.model import Model
from threefold.serving.app import make_app
from threefold.serving.browser import write_web

SIZE = 32


def small_pipeline(backbone: str = "test_resnet", kind: Any = "gru", size: int = SIZE) -> Pipeline:
    head = HeadSpec(kind=kind, units=4) if kind != "linear" else HeadSpec(kind=kind)
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=size, head=head)
    member = build_member(spec, 3)
    settle(member, 255 * torch.rand(8, 3, size, size))
    return pipeline_of(member, size)


def write(path: Path, pipeline: Pipeline, **options: Any) -> Any:
    return targets.export(
        pipeline, path, noise_images(), {"name": "tiny"}, rows="test", fixed_size=True, **options
    )


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def model(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("fixed") / "m.onnx"
    report = write(path, pipeline)
    assert report.max_difference < 1e-5
    return threefold.load(path)


def test_it_answers_images_of_any_size(pipeline: Pipeline, model: Model) -> None:
    images = noise_images()
    together = np.stack([model.fit_canvas(image) for image in images])

    alone, batch = model.predict_proba(images), model.answer(together)

    np.testing.assert_allclose(alone, pipeline.predict_proba(images), rtol=0, atol=1e-5)
    np.testing.assert_allclose(batch, alone, rtol=0, atol=1e-6)
    assert model.measure_latency(images[:2], 1)["n"] == 2


def test_its_graph_and_card_state_the_size(model: Model) -> None:
    graph = onnx.load(model.path)

    (images,) = graph.graph.input
    axes = images.type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", SIZE, SIZE, 3]
    assert tensorrt.find_problems(graph) == []
    assert model.card["fixed_size"] == SIZE
    assert "TensorRT was not run" in model.card["tensorrt"]
    assert model.card["parity"]["images"] == 6
    (part,) = model.card["preprocessing"]
    assert part["input"] == "uint8 RGB (32, 32, 3), upright, resized before"
    assert (part["resize"], part["filter"], part["pixels"]) == (
        "squash",
        "triangle, antialiased",
        SIZE,
    )
    assert tensorrt.trtexec_line(model.path).endswith(
        "m.onnx --minShapes=images:1x32x32x3 --optShapes=images:8x32x32x3 "
        f"--maxShapes=images:32x32x32x3 --noTF32 --saveEngine={model.path.with_suffix('.plan')}"
    )


def test_the_server_resizes_each_image(pipeline: Pipeline, model: Model) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 50, 3), dtype=np.uint8)

    with TestClient(make_app(model)) as client:
        files = [("files", (f"{i}.png", encode(image, "PNG"))) for i, image in enumerate(images)]
        answers = client.post("/predict?top=1000", files=files).json()["answers"]

    probs = [{top["label"]: top["probability"] for top in answer["top"]} for answer in answers]
    rows = [[row[name] for name in model.classes] for row in probs]
    np.testing.assert_allclose(rows, pipeline.predict_proba(list(images)), rtol=0, atol=1e-5)


def test_what_the_file_cannot_do_is_one_line(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"images of one size.*expected \(b, 32, 32, 3\).*fit_"):
        model.answer(np.zeros((1, 40, 32, 3), np.uint8))
    with pytest.raises(DataError, match=r"too large for this model; expected sides of at most"):
        model.predict(np.zeros((1, 256 * SIZE + 1, 3), np.uint8))
    with pytest.raises(ExportError, match=r"a file of a fixed size; fix: .*without --fixed-size"):
        write_web(model.path, tmp_path / "site")
    words = ["export", str(tmp_path), "--fixed-size", "--web", str(tmp_path / "site")]
    refused = CliRunner().invoke(app, words)
    assert "fix: leave out --fixed-size or --web" in str(refused.exception)
    other = copy_with_card(model, tmp_path / "other.onnx", fixed_size=40)
    with pytest.raises(ExportError, match=r"inputs or outputs are not those of a pipeline"):
        threefold.load(other)
    unsized = copy_with_card(model, tmp_path / "unsized.onnx", preprocessing=[])
    with pytest.raises(ExportError, match=r"card is damaged.*fixed size 32, got several sizes"):
        threefold.load(unsized)


def test_what_is_refused_before_it_is_written(
    tmp_path: Path, pipeline: Pipeline, cascade_case: CascadeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"cascade: .*m.onnx; fix: add --no-cascade"):
        write(path, cascade_case.pipeline, cascade=cascade_case.cascade)
    with pytest.raises(ExportError, match=r"images of one size: .*squash to 12, squash to 8|to 8,"):
        write(path, cascade_case.pipeline)
    with pytest.raises(ExportError, match=r"holds float32 only: .*got int8; fix: leave"):
        write(path, pipeline, precision="int8")
    with pytest.raises(ExportError, match=r"--fixed-size is for ONNX: .*m.pt2"):
        write(tmp_path / "m.pt2", pipeline)
    monkeypatch.setattr(tensorrt, "OPERATORS", tensorrt.OPERATORS - {"Conv", "Softmax"})
    with pytest.raises(
        ExportError, match=r"does not read this graph.*10.6, got Conv, Softmax; fix"
    ):
        write(path, pipeline)
    assert not list(tmp_path.iterdir())


def graph_of(nodes: Sequence[Any], opset: int = OPSET) -> Any:
    """A graph of these nodes on 8-bit images and float values."""
    value = onnx.helper.make_tensor_value_info
    inputs = [
        value("images", onnx.TensorProto.UINT8, ["b", 4, 4, 3]),
        value("x", onnx.TensorProto.FLOAT, ["b", 3, 4, 4]),
        value("axes", onnx.TensorProto.INT64, [1]),
    ]
    outputs = [value("y", onnx.TensorProto.FLOAT, None)]
    axis = onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, [axis])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("name", "inputs", "options", "problem"),
    [
        ("Relu", ["x"], {}, ""),
        ("ReduceMean", ["x", "axis"], {}, ""),
        ("Cast", ["images"], {"to": onnx.TensorProto.FLOAT}, ""),
        ("Col2Im", ["x"], {}, "Col2Im"),
        ("FusedConv", ["x"], {"domain": "com.microsoft"}, "com.microsoft.FusedConv"),
        ("Transpose", ["images"], {"perm": [0, 3, 1, 2]}, "Transpose of 8-bit pixels"),
        ("ReduceMean", ["x", "axes"], {}, "ReduceMean over axes that are computed"),
        ("Unsqueeze", ["x", "axes"], {}, "Unsqueeze over axes that are computed"),
        ("MaxPool", ["x"], {"kernel_shape": [2, 2], "dilations": [2, 2]}, "MaxPool with dilations"),
        ("LSTM", ["x"], {"layout": 1}, "LSTM with another layout"),
        ("Resize", ["x"], {"mode": "cubic"}, "Resize of mode cubic"),
        ("Resize", ["x"], {"mode": "linear", "antialias": 1}, "Resize with antialiasing"),
    ],
)
def test_what_tensorrt_does_not_read_is_named(
    name: str, inputs: list[str], options: dict[str, Any], problem: str
) -> None:
    node = onnx.helper.make_node(name, inputs, ["y"], **options)

    problems = tensorrt.find_problems(graph_of([node]))

    assert problems == ([problem] if problem else [])


def test_branches_weights_outputs_and_opsets_are_seen() -> None:
    second = onnx.helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2, 2])
    inner = onnx.helper.make_graph([onnx.helper.make_node("Unique", ["x"], ["z"])], "then", [], [])
    branch = onnx.helper.make_node("If", ["x"], ["w"], then_branch=inner, else_branch=inner)
    model = graph_of([second, branch], opset=23)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros(1, np.int8), "small_numbers")
    )

    problems = tensorrt.find_problems(model)

    assert problems == [
        "opset 23",
        "weights of type int8",
        "MaxPool with a second output",
        "Unique",
    ]


def test_the_plain_graph_is_not_for_tensorrt(cascade_case: CascadeCase) -> None:
    assert "Transpose of 8-bit pixels" in tensorrt.find_problems(cascade_case.graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "kind", "size"),
    [
        ("tf_efficientnet_lite0.in1k", "lstm", 64),
        ("convnext_atto", "linear", 64),
        ("test_vit", "gru", 160),
        ("mobilenetv3_small_050", "rnn", 64),
    ],
)
def test_families_have_a_fixed_size(tmp_path: Path, backbone: str, kind: Any, size: int) -> None:
    report = write(tmp_path / "m.onnx", small_pipeline(backbone, kind, size))

    assert report.max_difference < 1e-5
