"""Members on a frozen backbone: the pipeline and its file hold it once and run it once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.exports import noise_images
from support.frozen_runs import GATED, PROBE, frozen_run
from torch import nn

from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.cascade import Cascade
from threefold.exporting import targets
from threefold.exporting.onnx_graph import build_graph
from threefold.models.member import create_backbone
from threefold.models.pipeline import (
    Combiner,
    MemberPipeline,
    Pipeline,
    Predictor,
    describe_preprocessing,
)
from threefold.models.shared import HeadsPipeline
from threefold.recipe.schema import MemberSpec
from threefold.runtime.model import load
from threefold.training.run import Run

ROWS = {**GATED, "name": "rows", "head": {"kind": "gru", "units": 8, "sequence": "rows"}}
SMALL = {**PROBE, "name": "small", "img_size": 24}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two members of three folds each on one backbone, one of them on the feature map."""
    folder = tmp_path_factory.mktemp("frozen")
    return frozen_run(folder, members=[PROBE, ROWS], folds={"k": 3, "select": 0.25})


@pytest.fixture(scope="module")
def exported(run: Run) -> onnx.ModelProto:
    path = run.dir / "model.onnx"
    report = targets.export(shared_pipeline(run), path, noise_images())
    assert report.max_difference < 1e-6
    return onnx.load(path)


def shared_pipeline(run: Run, members: tuple[str, ...] = ()) -> Pipeline:
    combiner = Combiner(MeanEnsemble().to_module())
    return run.pipeline(combiner, members or None)


def separate_pipeline(run: Run, *names: str) -> Pipeline:
    """The pipeline of the same networks, each with a backbone of its own."""
    members = {}
    for number, name in enumerate(names or run.recipe.combined):
        spec = run.recipe.member(name)
        views = run.views(spec)
        networks = [run.load_member(spec, fold, 3) for fold in run.final_folds]
        predictors = [Predictor(network, views) for network in networks]
        members[f"{name}{number}"] = MemberPipeline(predictors, views.canvas, spec.resize)
    return Pipeline(members, Combiner(MeanEnsemble().to_module()), ("blue", "green", "red"))


def count_passes(pipeline: Pipeline) -> int:
    """Count how often the first convolutions of all networks run for one image."""
    passes: list[nn.Module] = []
    first = {id(part.sample): part.sample for part in pipeline.parts}
    if not any(isinstance(part, HeadsPipeline) for part in pipeline.parts):
        predictors = [p for part in pipeline.parts for p in part.predictors]  # type: ignore[union-attr]
        first = {id(predictor): predictor for predictor in predictors}
    for network in first.values():
        convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_hook(lambda module, *_: passes.append(module))
    pipeline.predict_proba(noise_images(1))
    return len(passes)


def convolutions(model: onnx.ModelProto) -> int:
    return Counter(node.op_type for node in model.graph.node)["Conv"]


def change_convolution(network: nn.Module, number: int) -> None:
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    layers[number].weight.data += 0.1


def fitted_cascade(stages: list[list[int]]) -> Cascade:
    """A cascade of two stages as fitted, without any data."""
    cascade = Cascade(stages)
    cascade.thresholds_, cascade.temperatures_ = np.array([0.5]), np.array([1.0])
    cascade.disagreement_, cascade.n_ = 0.0, 1
    return cascade


def test_the_answers_are_those_of_separate_networks(run: Run) -> None:
    images = noise_images()
    shared, separate = shared_pipeline(run), separate_pipeline(run)

    with torch.inference_mode():
        for image in images:
            batch = torch.from_numpy(image[None])
            for answer, expected in zip(shared(batch), separate(batch), strict=True):
                assert torch.equal(answer, expected)
            for answer, expected in zip(
                shared.per_fold(batch), separate.per_fold(batch), strict=True
            ):
                assert torch.equal(answer, expected)
                assert len(answer) == 3


def test_an_image_passes_the_backbone_once(run: Run) -> None:
    assert count_passes(shared_pipeline(run)) == 1
    assert count_passes(separate_pipeline(run)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip", "multi-scale", "ten-crop"])
def test_views_are_one_pass_too(tmp_path: Path, kind: str) -> None:
    views = {"kind": kind, "upsample": 1.25}
    run = frozen_run(tmp_path, members=[PROBE, ROWS], views=views)
    images, pipeline = noise_images(3), shared_pipeline(run)

    answers = pipeline.predict_proba(images)

    np.testing.assert_array_equal(answers, separate_pipeline(run).predict_proba(images))
    assert count_passes(pipeline) == 1
    if kind == "flip":
        report = targets.export(pipeline, tmp_path / "m.onnx", images)
        assert report.max_difference < 1e-6
        assert convolutions(onnx.load(tmp_path / "m.onnx")) == backbone_convolutions(run)


def backbone_convolutions(run: Run) -> int:
    network = run.load_member(run.recipe.members[0], 0, 3)
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


@pytest.mark.slow
def test_the_file_has_the_backbone_once(run: Run, exported: onnx.ModelProto) -> None:
    weights = [onnx.numpy_helper.to_array(t) for t in exported.graph.initializer]
    large = [array.tobytes() for array in weights if array.size > 64]

    assert convolutions(exported) == backbone_convolutions(run)
    assert len(large) == len(set(large))
    backbone = (run.dir / "backbones").glob("*.safetensors")
    size, heads = (run.dir / "model.onnx").stat().st_size, 6
    assert size < 1.2 * next(backbone).stat().st_size + heads * 20_000


@pytest.mark.slow
def test_blocks_that_no_stage_trained_are_in_the_file_once(run: Run, tmp_path: Path) -> None:
    # Two separate networks that differ in their last convolution.
    pipeline = separate_pipeline(run, "probe", "probe")
    networks = [predictor.member for predictor in pipeline.parts[0].predictors]  # type: ignore[union-attr]
    change_convolution(networks[1], -1)

    report = targets.export(pipeline, tmp_path / "m.onnx", noise_images(3))

    model = onnx.load(tmp_path / "m.onnx")
    assert report.max_difference < 1e-6
    assert convolutions(model) == backbone_convolutions(run) + 1
    onnx.checker.check_model(model)


@pytest.mark.slow
def test_stages_of_a_cascade_share_weights_but_no_nodes(run: Run) -> None:
    pipeline = separate_pipeline(run, "probe", "probe")

    together = build_graph(pipeline)
    apart = build_graph(pipeline, stages=[[0], [1]])

    assert convolutions(together) == backbone_convolutions(run)
    assert convolutions(apart) == 2 * backbone_convolutions(run)
    weights = [
        sum(len(t.SerializeToString()) for t in g.graph.initializer) for g in (together, apart)
    ]
    assert weights[1] == pytest.approx(weights[0], rel=0.01)


def test_other_input_sizes_and_tuned_weights_are_not_shared(tmp_path: Path) -> None:
    run = frozen_run(tmp_path, members=[PROBE, SMALL])
    pipeline = shared_pipeline(run)

    assert count_passes(pipeline) == 2
    assert pipeline.predict_proba(noise_images(2)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_fewer_bytes_keep_the_sharing(
    run: Run, exported: onnx.ModelProto, tmp_path: Path, precision: str
) -> None:
    pipeline, path = shared_pipeline(run), tmp_path / "m.onnx"
    images = [run.sources.train.pixels(row) for row in range(36)]

    targets.export(pipeline, path, images, precision=precision, calibration=images)

    assert convolutions(onnx.load(path)) == backbone_convolutions(run)
    assert path.stat().st_size < 0.8 * exported.ByteSize()
    assert load(path).infer(images[:2]).member_probs.shape == (2, 2, 3)


@pytest.mark.slow
def test_members_of_some_folds_are_mixed_as_before(tmp_path: Path) -> None:
    members: list[dict[str, Any]] = [PROBE, {**GATED, "folds": [1]}]
    run = frozen_run(tmp_path, members=members)
    images, pipeline = noise_images(3), shared_pipeline(run)

    report = targets.export(pipeline, tmp_path / "m.onnx", images)

    assert pipeline.mixing is not None
    assert count_passes(pipeline) == 1
    assert report.max_difference < 1e-6
    assert convolutions(onnx.load(tmp_path / "m.onnx")) == backbone_convolutions(run)


@pytest.mark.slow
def test_torch_export_stores_the_backbone_once(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"

    report = targets.export(shared_pipeline(run), path, noise_images(3))

    assert report.max_difference < 1e-6
    graph = str(torch.export.load(path).graph)
    assert graph.count("aten.conv2d") == backbone_convolutions(run)


def test_the_card_describes_the_pixels_of_every_member(run: Run) -> None:
    entries = describe_preprocessing(shared_pipeline(run))

    assert entries == describe_preprocessing(separate_pipeline(run))


@pytest.mark.slow
@pytest.mark.parametrize(("views", "precision"), [("center", "float16"), ("flip", "float32")])
def test_a_cascade_computes_only_rows_of_images(tmp_path: Path, views: str, precision: str) -> None:
    # A network shares all weights but the first with a probe, whose backbone runs in each stage.
    run = frozen_run(tmp_path, members=[PROBE, ROWS], views={"kind": views})
    probe, rows = shared_pipeline(run).parts
    tuned = separate_pipeline(run, "probe").parts[0]
    for predictor in tuned.predictors:  # type: ignore[union-attr]
        change_convolution(predictor.member, 0)
    parts = {"probe": probe, "rows": rows, "tuned": tuned}
    pipeline = Pipeline(parts, Combiner(MeanEnsemble().to_module()), ("blue", "green", "red"))
    cascade = fitted_cascade([[1], [0, 2]])

    report = targets.export(
        pipeline,
        tmp_path / "m.onnx",
        noise_images(3),
        {"cascade": {"state": cascade.state()}},
        precision=precision,
        cascade=cascade,
    )

    assert report.max_difference < 1e-4


@pytest.mark.slow
def test_members_on_one_backbone_run_in_one_branch(tmp_path: Path) -> None:
    run = frozen_run(tmp_path, members=[PROBE, ROWS, SMALL])
    pipeline, images = shared_pipeline(run), noise_images(4)
    cascade = fitted_cascade([[2], [0, 1]])
    path = tmp_path / "m.onnx"

    targets.export(pipeline, path, images, {"cascade": {"state": cascade.state()}}, cascade=cascade)

    model = onnx.load(path)
    assert convolutions(model) == backbone_convolutions(run)  # those of the first stage
    (branch,) = [node for node in model.graph.node if node.op_type == "If"]
    inside = next(part.g for part in branch.attribute if part.name == "then_branch")
    assert sum(node.op_type == "Conv" for node in inside.node) == backbone_convolutions(run)
    session = onnxruntime.InferenceSession(path)
    answers = {
        stop: [
            session.run(
                ["probs", "stages_used"],
                {"images": image[None], "stop": np.array([stop], np.float32)},
            )
            for image in images
        ]
        for stop in (0.0, 2.0)
    }
    assert [int(used[0]) for _, used in answers[0.0]] == [1] * len(images)
    assert [int(used[0]) for _, used in answers[2.0]] == [2] * len(images)
    full = np.concatenate([probs for probs, _ in answers[2.0]])
    np.testing.assert_allclose(full, pipeline.predict_proba(images), atol=1e-6)


@pytest.mark.slow
def test_heads_on_levels_share_the_backbone(tmp_path: Path) -> None:
    levels = {**PROBE, "name": "levels", "head": {"kind": "linear", "sequence": "levels"}}
    run = frozen_run(tmp_path, members=[PROBE, levels])
    pipeline = shared_pipeline(run)

    report = targets.export(pipeline, tmp_path / "m.onnx", noise_images())

    assert count_passes(pipeline) == 1
    assert report.max_difference < 1e-6
    expected = separate_pipeline(run).predict_proba(noise_images())
    np.testing.assert_allclose(pipeline.predict_proba(noise_images()), expected, atol=1e-6)
    assert convolutions(onnx.load(tmp_path / "m.onnx")) == convolutions_of(PROBE)


def convolutions_of(member: dict[str, Any]) -> int:
    backbone = create_backbone(MemberSpec.model_validate(member), pretrained=False)
    return sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
