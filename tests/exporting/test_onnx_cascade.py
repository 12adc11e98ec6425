"""The graph of a cascade: full answers by default, early answers as computed on arrays."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from support.cascades import CLASSES, CascadeCase
from support.exports import dimmed_images
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.ensembles.cascade import Cascade
from threefold.errors import ExportError
from threefold.exporting import onnx_files, quantization, targets
from threefold.exporting.export import chosen_ensemble
from threefold.exporting.onnx_cascade import add_cascade
from threefold.runtime.model import FAST, FULL, CascadePolicy, Model
from threefold.training.run import Run

runner = CliRunner()


def test_weights_of_later_members_go_into_a_bundle(
    cascade_case: CascadeCase, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(onnx_files, "LIMIT", 50)
    monkeypatch.setattr(onnx_files, "SMALLEST", 40)

    cascade_case.write(path, dimmed_images(4))

    tensors = onnx_files.weights(onnx.load(path, load_external_data=False).graph)
    assert len([tensor for tensor in tensors if tensor.external_data]) > 6  # of all three members
    bundle = threefold.load(path)
    for image in dimmed_images(20, side=9):
        output, expected = bundle.run(image[None], FAST), model.run(image[None], FAST)
        assert (output.probs == expected.probs).all()
        assert output.stages_used == expected.stages_used


@pytest.mark.slow
def test_later_members_in_half_precision(
    cascade_case: CascadeCase, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(quantization, "SMALLEST", 4)

    targets.export(
        cascade_case.pipeline,
        path,
        dimmed_images(20),
        cascade_case.card,
        precision="float16",
        cascade=cascade_case.cascade,
    )

    half, compared = threefold.load(path), 0
    for image in dimmed_images(side=9):
        output, expected = half.run(image[None], FAST), model.run(image[None], FAST)
        if output.stages_used == expected.stages_used:  # the others lie beside a threshold
            assert output.probs == pytest.approx(expected.probs, abs=0.02)
            compared += 1
    assert compared > 50


def test_the_default_answer_is_that_of_a_file_without_cascade(model: Model, flat: Model) -> None:
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    names = ["probs", "member_probs"]

    output = model.infer(dimmed_images())

    assert [entry.name for entry in session.get_inputs()] == ["images"]
    for image in dimmed_images():
        values = session.run(names, {"images": image[None]})
        expected = flat.session.run(names, {"images": image[None]})
        for value, expected_value in zip(values, expected, strict=True):
            np.testing.assert_array_equal(value, expected_value)
    np.testing.assert_array_equal(output.probs, flat.predict_proba(dimmed_images()))
    np.testing.assert_array_equal(output.stages_used, 3)
    assert flat.infer(dimmed_images(2)).stages_used is None


def test_fast_answers_are_those_computed_on_arrays(model: Model, cascade_case: CascadeCase) -> None:
    expected = cascade_case.cascade.predict(cascade_case.probs, cascade_case.full)

    fast, full = model.infer(dimmed_images(), FAST), model.infer(dimmed_images())

    np.testing.assert_array_equal(fast.stages_used, expected.stages)
    assert set(expected.stages) == {1, 2, 3}
    np.testing.assert_allclose(fast.probs, expected.probs, atol=1e-5)
    late = fast.stages_used == 3
    np.testing.assert_array_equal(fast.probs[late], full.probs[late])
    order = [stage[0] for stage in cascade_case.cascade.stages]
    for row, stages in enumerate(fast.stages_used):
        for place, member in enumerate(order):
            probs = full.member_probs[row, member] if place < stages else np.zeros(3)
            np.testing.assert_array_equal(fast.member_probs[row, member], probs)
    np.testing.assert_array_equal(model.predict_proba(dimmed_images(), FAST), fast.probs)
    assert model.predict(dimmed_images(), FAST) == [CLASSES[i] for i in fast.probs.argmax(1)]


@pytest.mark.parametrize("policy", [FULL, FAST])
def test_a_batch_answers_each_image_as_alone(model: Model, policy: CascadePolicy) -> None:
    images = dimmed_images(30, side=9)

    alone, together = model.infer(images, policy), model.run(np.stack(images), policy)

    np.testing.assert_array_equal(alone.stages_used, together.stages_used)
    np.testing.assert_allclose(alone.probs, together.probs, atol=1e-6)
    np.testing.assert_allclose(alone.member_probs, together.member_probs, atol=1e-6)


def test_members_that_do_not_run_are_not_computed(model: Model) -> None:
    """onnxruntime's own profile has no convolution of them."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 4
    options.profile_file_prefix = str(model.path.parent / "profile")
    session = onnxruntime.InferenceSession(
        str(model.path), options, providers=["CPUExecutionProvider"]
    )
    image = dimmed_images(1)[0][None]

    session.run(None, {"images": image, "stop": np.zeros(2, np.float32)})

    profile = Path(session.end_profiling())
    convolutions = [
        event
        for event in json.loads(profile.read_text())
        if event.get("args", {}).get("op_name") in ("Conv", "FusedConv")
    ]
    os.unlink(profile)
    assert len([e for e in convolutions if e["name"].endswith("kernel_time")]) == 2


def test_the_graph_is_valid_and_the_flat_one_is_unchanged(cascade_case: CascadeCase) -> None:
    flat = cascade_case.graph
    before = onnx.ModelProto()
    before.CopyFrom(flat)

    graph = cascade_case.graph_with_cascade()

    assert flat == before
    onnx.checker.check_model(graph, full_check=True)
    assert [node.name for node in graph.graph.node if node.op_type == "If"] == ["stage1", "stage2"]
    inside = {t.name for node in graph.graph.node for a in node.attribute for t in a.g.initializer}
    assert inside
    assert not inside & {t.name for t in graph.graph.initializer}


def test_a_cascade_of_other_members_is_refused(cascade_case: CascadeCase) -> None:
    with pytest.raises(ExportError, match="the cascade is of other members"):
        add_cascade(cascade_case.graph, cascade_case.cascade, [["a"], ["b"]])


def test_a_run_carries_its_cascade_into_the_file(finished: Run) -> None:
    results = finished.results
    cascade = results.cascade
    assert cascade is not None
    assert cascade.state is not None

    model = threefold.load(finished.dir / "model.onnx")

    assert model.cascade is not None
    assert model.cascade.state() == cascade.state == Cascade.from_state(cascade.state).state()
    assert [m.rows for m in cascade.measured] == ["oof, cross-fitted", "test"]
    assert cascade.members == tuple(model.members)
    costs = [row.macs * 2 for row in results.members]
    assert cascade.costs == tuple(costs)
    assert cascade.state["stages"] == [[int(i)] for i in np.argsort(costs)]
    assert results.export is not None
    latency = results.export.latency
    assert latency is not None
    assert latency.stages is not None
    assert len(latency.stages) == 2
    assert latency.n > 0


def test_a_run_without_a_cascade_is_exported_without(finished: Run) -> None:
    assert "cascade" in chosen_ensemble(finished).card
    run = Run.open(finished.dir)

    run.folder.results = finished.results.replace(cascade=None)

    assert "cascade" not in chosen_ensemble(run).card


@pytest.mark.slow
def test_a_cascade_is_left_out_or_in_the_way(finished: Run, tmp_path: Path) -> None:
    run = shutil.copytree(finished.dir, tmp_path / "run")
    fixed, flat = tmp_path / "fixed.onnx", tmp_path / "flat.onnx"

    refused = runner.invoke(app, ["export", str(run), "--out", str(fixed), "--fixed-size"])
    assert "cascade: " in str(refused.exception)
    assert "fix: add --no-cascade" in str(refused.exception)
    assert not fixed.exists()

    without = runner.invoke(app, ["export", str(run), "--out", str(flat), "--no-cascade"])
    assert without.exit_code == 0, without.output
    assert threefold.load(flat).cascade is None
    assert "cascade" not in threefold.load(flat).card

    words = ["export", str(run), "--out", str(fixed), "--fixed-size", "--members", "plain"]
    alone = runner.invoke(app, words)
    assert alone.exit_code == 0, alone.output
    assert "trtexec --onnx=" in alone.output
    assert threefold.load(fixed).card["fixed_size"] == 32


@pytest.mark.parametrize("kind", ["pt2", "xml", "mlpackage", "tflite", "onnx"])
def test_a_file_that_has_no_cascade_says_so(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ExportError("far enough")

    monkeypatch.setattr(targets, "export", stop)
    monkeypatch.setattr(targets, "check_kind", lambda *_: None)  # packages are not needed here
    path = tmp_path / f"m.{kind}"

    plain, flat = (
        runner.invoke(app, ["export", str(finished.dir), "--out", str(path), *more])
        for more in ([], ["--no-cascade"])
    )

    said = f"the cascade is left out: .{kind} files have none" in " ".join(plain.output.split())
    assert said == (kind != "onnx")
    assert "cascade" not in flat.output
