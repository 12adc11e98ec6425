"""The exported file answers like the pipeline or is not written, and loads without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from support.cascades import tiny_network
from support.exports import noise_images, run_pipeline

import threefold
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.registry import ENSEMBLES
from threefold.errors import DataError, ExportError
from threefold.evaluation.evaluate import evaluate
from threefold.exporting import export as export_module
from threefold.exporting import targets
from threefold.exporting.export import chosen_ensemble, export
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.models.tracing import simplify
from threefold.npz_files import read_arrays
from threefold.predictions.results_schema import Expected
from threefold.training.results.multiclass import evaluate_run
from threefold.training.run import Run


def test_the_file_gives_the_predictions_of_its_run(finished: Run) -> None:
    model = threefold.load(finished.dir / "model.onnx")
    test = finished.sources.test
    assert test is not None
    chosen = read_arrays(finished.dir / "chosen.npz")
    paths = [finished.recipe.data.root + "/" + i for i in test.ids]

    output = model.infer([test.pixels(i) for i in range(len(test))])

    np.testing.assert_allclose(output.probs, chosen["probs"], atol=1e-5)
    np.testing.assert_allclose(
        output.member_probs, finished.predictions("test").probs.transpose(1, 0, 2), atol=1e-5
    )
    np.testing.assert_array_equal(model.predict_proba(paths), output.probs)


def test_sizes_never_seen_in_tracing_agree_with_eager(finished: Run) -> None:
    model = threefold.load(finished.dir / "model.onnx")
    evaluation = evaluate_run(finished)
    pipeline = finished.pipeline(
        Combiner(evaluation.ensemble.to_module(), evaluation.calibration.to_module())
    )
    images = [*noise_images(), np.zeros((1, 1, 3), np.uint8), np.full((300, 7, 3), 255, np.uint8)]

    by_graph = np.concatenate([model.run(image[None]).probs for image in images])

    np.testing.assert_allclose(by_graph, pipeline.predict_proba(images), atol=1e-5)
    np.testing.assert_array_equal(model.predict_proba(images), by_graph)  # resized outside of it


@pytest.mark.slow
@pytest.mark.parametrize("method", ENSEMBLES)
def test_every_ensemble_exports_exactly(finished: Run, tmp_path: Path, method: str) -> None:
    report = targets.export(run_pipeline(finished, method), tmp_path / "m.onnx", noise_images())

    assert report.max_difference < 1e-5
    assert report.top1_agreement == 1.0


def test_answers_that_differ_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = MemberPipeline([Predictor(tiny_network(0))], 8, "squash")
    combiner = Combiner(MeanEnsemble().to_module())
    pipeline = Pipeline({"a": member}, combiner, ("blue", "green", "red"))
    original = Pipeline.predict_proba
    monkeypatch.setattr(
        Pipeline, "predict_proba", lambda self, images: original(self, images)[:, ::-1]
    )

    with pytest.raises(
        ExportError, match=r"would answer differently.*expected difference <= 0.0001"
    ):
        targets.export(pipeline, tmp_path / "m.onnx", noise_images(2))

    assert not (tmp_path / "m.onnx").exists()


def test_folding_batch_norm_keeps_the_answers(finished: Run) -> None:
    for spec in finished.recipe.members:
        predictor = Predictor(finished.load_member(spec, 0, 3)).eval()
        pixels = torch.rand(2, 3, spec.img_size, spec.img_size) * 255

        folded = simplify(predictor, spec.img_size)

        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(pixels), predictor(pixels), rtol=1e-4, atol=1e-5)


def test_the_graph_has_no_recurrent_operator_and_no_outside_data(finished: Run) -> None:
    model = onnx.load(finished.dir / "model.onnx", load_external_data=False)

    branches = [node for node in model.graph.node if node.op_type == "If"]
    inner = [node for branch in branches for part in branch.attribute for node in part.g.node]
    nodes = [node for node in [*model.graph.node, *inner] if node not in branches]

    # The second of two members, see `onnx_cascade`.
    assert [node.name for node in branches] == ["stage1"]
    assert not {node.op_type for node in nodes} & {"RNN", "GRU", "LSTM", "Loop", "Scan", "If"}
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert not any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer
    )
    onnx.checker.check_model(model)


def test_the_card_promises_what_the_run_expects(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Expected(
        accuracy=0.25, interval=(0.125, 0.5), n=7, rows="oof", basis="rows of a choice"
    )
    results = finished.results.model_copy(update={"expected": expected})
    monkeypatch.setattr(Run, "results", property(lambda _: results))

    score = chosen_ensemble(finished).card["score"]

    promised = (score["accuracy"], score["interval"], score["n"], score["rows"])
    assert promised == (0.25, [0.125, 0.5], 7, "oof")
    assert score["protocol"] == "honest"


def test_the_card_describes_the_run(finished: Run) -> None:
    card = threefold.load(finished.dir / "model.onnx").card

    assert card["classes"] == ["blue", "green", "red"]
    assert card["score"]["protocol"] == "honest"
    assert card["score"]["interval"][0] <= card["score"]["accuracy"]
    assert card["parity"]["max_difference"] <= card["parity"]["tolerance"]
    assert card["digest"] == finished.recipe.digest()


def test_loading_and_predicting_need_no_torch(finished: Run) -> None:
    image = f"{finished.recipe.data.root}/{finished.sources.test.ids[0]}"  # type: ignore[union-attr]
    code = (
        "import sys, threefold\n"
        f"model = threefold.load({str(finished.dir / 'model.onnx')!r})\n"
        f"probs = model.predict_proba([{image!r}])\n"
        "bad = {'torch', 'timm', 'sklearn', 'scipy', 'onnx', 'pydantic'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "print(probs.shape)"
    )

    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "(1, 3)"


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "pickle", "foreign"])
def test_a_file_that_is_not_ours_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.onnx"
    content: dict[str, Any] = {
        "empty": b"",
        "text": b"hello",
        "pickle": b"\x80\x04cposix\nsystem\n",
    }
    if kind == "foreign":
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["a"], ["b"])],
            "g",
            [onnx.helper.make_tensor_value_info("a", 1, [1])],
            [onnx.helper.make_tensor_value_info("b", 1, [1])],
        )
        onnx.save(
            onnx.helper.make_model(
                graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
            ),
            path,
        )
    elif kind != "missing":
        path.write_bytes(content[kind])

    with pytest.raises(ExportError) as error:
        threefold.load(path)

    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_inputs_that_are_not_images(finished: Run, tmp_path: Path) -> None:
    model = threefold.load(finished.dir / "model.onnx")
    (tmp_path / "x.jpg").write_bytes(b"not a picture")

    with pytest.raises(ExportError, match=r"expected uint8 in 0..255 .* got float64 \(4, 4, 2\)"):
        model.predict_proba([np.zeros((4, 4, 2))])
    with pytest.raises(DataError, match=r"x\.jpg"):
        model.predict_proba([tmp_path / "x.jpg"])
    assert model.predict_proba([]).shape == (0, 3)


def test_a_grey_image_is_read_as_colour(finished: Run, tmp_path: Path) -> None:
    model = threefold.load(finished.dir / "model.onnx")
    Image.new("L", (5, 9), 77).save(tmp_path / "grey.png")

    assert model.predict([tmp_path / "grey.png"])[0] in model.classes


def test_another_suffix_is_refused(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ends in \.onnx, \.pt2, \.xml, \.mlpackage or \.tflite"):
        export(finished, tmp_path / "model.pkl")


def test_evaluation_on_arrays_matches_results_json(finished: Run) -> None:
    costs = {"macs", "parameters"}  # these come from the networks
    stored = [score.model_dump(exclude=costs) for score in finished.results.scores]

    evaluation = evaluate(
        finished.predictions("oof"),
        finished.predictions("test"),
        finished.recipe.ensemble,
        finished.recipe.seed,
    )

    assert [score.model_dump(exclude=costs) for score in evaluation.scores] == stored
    assert evaluation.chosen == finished.results.chosen


def test_most_large_photographs_of_the_gate_are_made_smaller(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four are compared as they are; small images all are."""
    monkeypatch.setattr(export_module, "LARGE_PIXELS", 500)
    compared: list[tuple[int, ...]] = []
    original = targets.export

    def record(pipeline: Pipeline, path: Path, images: Any, *args: Any, **options: Any) -> Any:
        compared.extend(image.shape for image in images)
        return original(pipeline, path, images, *args, **options)

    monkeypatch.setattr(targets, "export", record)
    test = finished.sources.test
    assert test is not None
    whole = [test.pixels(row).shape for row in export_module.spread_rows(test, 32)]

    report = export(finished, tmp_path / "model.onnx")

    assert report.images == len(whole)
    assert compared[:4] == whole[:4]
    for shape, size in zip(compared[4:], whole[4:], strict=True):
        is_large = size[0] * size[1] > 500
        assert (shape[0] * shape[1] <= 500) if is_large else (shape == size)
    assert any(shape != size for shape, size in zip(compared, whole, strict=True))
