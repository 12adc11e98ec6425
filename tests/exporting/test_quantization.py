"""Weights in fewer bytes: what is stored, what stays float32, and the parity gate."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.exports import noise_images, run_pipeline
from torch import nn

import threefold
from threefold.errors import ExportError
from threefold.exporting import onnx_networks, targets
from threefold.exporting.export import export
from threefold.exporting.parity import check, compare
from threefold.exporting.quantization import PRECISIONS, SMALLEST, convert, halve, quantize
from threefold.files import sha256
from threefold.models.tracing import OPSET, example_pixels
from threefold.predictions.export_schema import CorrectAnswers
from threefold.runtime.tolerances import TOLERANCES
from threefold.training.run import Run


class SmallNetwork(nn.Module):
    """Normalization, eight convolutions, a linear layer, softmax: a member that traces fast."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 16, 16, 16, 16, 16, 16, 32]
        pairs = itertools.pairwise(widths)
        self.convs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2 if b == 32 else 1, 1), nn.ReLU())
                for a, b in pairs
            )
        )
        self.fc = nn.Linear(32, 40)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Probabilities (b, 40)."""
        logits: torch.Tensor = self.fc(self.convs((pixels - 120) / 60).mean((2, 3)))
        return logits.softmax(-1)


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    torch.manual_seed(0)
    network = SmallNetwork().eval().requires_grad_(False)
    for part in network.convs:
        part[0].weight *= 2.5  # as drawn, every image gets nearly the same answer
    return onnx_networks.trace(network, *example_pixels(16), ("pixels", "probs"))


def predict(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    probs: np.ndarray = session.run(["probs"], {"pixels": pixels})[0]
    return probs


def noise_pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (count, 3, 16, 16)).astype(np.float32)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_halves_are_the_nearest_values_and_take_half_the_bytes(
    small: onnx.ModelProto, precision: str, dtype: torch.dtype
) -> None:
    pixels = noise_pixels(20)
    large = [
        t
        for t in small.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims, dtype=int) >= SMALLEST
    ]

    model = halve(small, precision)

    onnx.checker.check_model(model, full_check=True)
    stored = initializers(model)
    # Seven convolutions and the linear layer; the first convolution and biases are small.
    assert len(large) == 8
    for tensor in large:
        half = stored[f"{tensor.name}_{precision}"]
        values = onnx.numpy_helper.to_array(tensor)
        assert 2 * len(half.raw_data) == values.nbytes
        expected = torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy()
        np.testing.assert_array_equal(np.frombuffer(half.raw_data, np.int16), expected.ravel())
    difference = np.abs(predict(model, pixels) - predict(small, pixels)).max()
    assert 0 < difference < TOLERANCES[precision].difference


def test_converting_leaves_the_model_as_it_is(small: onnx.ModelProto) -> None:
    before = small.SerializeToString()

    for precision in PRECISIONS:
        convert(small, precision, noise_pixels(16))

    assert small.SerializeToString() == before


def test_int8_leaves_the_first_layers_and_softmax_in_float32(small: onnx.ModelProto) -> None:
    pixels = noise_pixels(20, seed=1)

    model = convert(small, "int8", noise_pixels(64))

    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    weights = [
        t
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) >= 2
    ]
    # A quarter of eight convolutions stays float32; the linear layer is int8.
    assert len(weights) == 7
    for tensor in weights:
        assert np.abs(onnx.numpy_helper.to_array(tensor)).max() <= 64  # 7 bits: no kernel overflows
    per_channel = [
        t
        for t in model.graph.initializer
        if t.name.endswith("_scale") and list(t.dims) in ([16], [32], [40])
    ]
    assert len(per_channel) >= 7
    producers = {out: node for node in model.graph.node for out in node.output}
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert producers[softmax.output[0]].op_type == "Softmax"
    quantized = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert "pixels" not in quantized
    assert "probs" not in quantized
    difference = np.abs(predict(model, pixels) - predict(small, pixels)).max()
    assert difference < TOLERANCES["int8"].difference


def test_a_temporary_folder_that_refuses_deletion_is_named(
    small: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_stack(*_: object, **__: object) -> None:  # as TemporaryDirectory's cleanup does
        raise RecursionError

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fill_the_stack)

    with pytest.raises(PermissionError, match="Permission denied") as error:
        quantize(small, np.zeros((2, 3, 16, 16), np.float32))

    assert error.value.filename == tempfile.gettempdir()


def test_int8_ranges_come_from_the_calibration_images(small: onnx.ModelProto) -> None:
    pixels, similar = noise_pixels(20), noise_pixels(16)
    expected = predict(small, pixels)

    calibrated = convert(small, "int8", similar)
    miscalibrated = convert(small, "int8", np.full_like(similar, 120))

    error = np.abs(predict(calibrated, pixels) - expected).mean()
    assert error < np.abs(predict(miscalibrated, pixels) - expected).mean()


def test_int8_without_images_is_refused(small: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="needs training images"):
        convert(small, "int8")


@pytest.mark.slow
def test_every_precision_of_a_run(finished: Run, tmp_path: Path) -> None:
    test = finished.sources.test
    assert test is not None
    labels = np.array(test.classes)[test.labels]
    sizes = {}

    for precision in PRECISIONS[1:]:
        report = export(finished, tmp_path / f"{precision}.onnx", precision=precision)
        model = threefold.load(report.path)
        sizes[precision] = report.bytes
        assert model.card["precision"] == precision == report.precision
        assert report.images == 12
        assert report.rows == "test"
        accuracy = model.card["parity"]["accuracy"]
        assert accuracy["after"] - accuracy["before"] == accuracy["gained"] - accuracy["lost"]
        correct = np.array(model.predict([test.pixels(i) for i in range(12)])) == labels
        assert correct.sum() == accuracy["after"]

    assert sizes["float16"] < 0.75 * (finished.dir / "model.onnx").stat().st_size
    assert abs(sizes["float16"] - sizes["bfloat16"]) < 20_000


def test_int8_is_calibrated_on_training_images_only(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = finished.sources.train, finished.sources.test
    assert test is not None
    train_images = {train.pixels(i).tobytes() for i in range(len(train))}
    test_images = {test.pixels(i).tobytes() for i in range(len(test))}
    calibration: set[bytes] = set()

    def spy(*args: Any, **options: Any) -> None:
        calibration.update(image.tobytes() for image in options["calibration"])
        raise ExportError("stopped by the test")

    monkeypatch.setattr(targets, "export", spy)
    with pytest.raises(ExportError, match="stopped by the test"):
        export(finished, "never.onnx", precision="int8")

    assert calibration
    assert calibration <= train_images
    assert not calibration & test_images


@pytest.mark.slow
def test_a_precision_that_changes_too_much_is_not_written(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = TOLERANCES["bfloat16"]._replace(difference=1e-9)
    monkeypatch.setitem(TOLERANCES, "bfloat16", strict)  # type: ignore[arg-type]

    with pytest.raises(
        ExportError,
        match=r"expected difference <= 1e-09, got \d\.\d\de-\d\d over 6 images; fix: use",
    ):
        targets.export(
            run_pipeline(finished), tmp_path / "m.onnx", noise_images(), precision="bfloat16"
        )
    assert not list(tmp_path.iterdir())


def test_an_unknown_precision_is_refused(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"expected float32 \| float16 \| bfloat16 \| int8, got int4"
    ):
        export(finished, tmp_path / "m.onnx", precision="int4")


def probs_of(*classes: int) -> np.ndarray:
    """Probabilities (n, 3) whose largest is that of these classes."""
    return np.eye(3, dtype=np.float32)[list(classes)] * 0.4 + 0.2


def test_the_report_counts_what_changed() -> None:
    before, after = probs_of(0, 1, 2, 0), probs_of(0, 2, 1, 1)

    report = compare(before, after, "int8", labels=[0, 1, 1, 2], rows="test")

    assert report.max_difference == pytest.approx(0.4)
    assert (report.top1_agreement, report.changed, report.ties) == (0.25, 3, 0)
    assert report.accuracy == CorrectAnswers(
        before=2, after=2, lost=1, gained=1, change=0.0, counted_loss=0
    )


def test_ties_are_not_counted_as_changed() -> None:
    before = np.array([[0.50005, 0.49995], [0.9, 0.1]], np.float32)
    after = np.array([[0.49996, 0.50004], [0.9, 0.1]], np.float32)

    report = compare(before, after, labels=[0, 0])

    assert (report.changed, report.ties, report.top1_agreement) == (0, 1, 0.5)
    assert report.accuracy is not None
    assert report.accuracy.lost == 1
    check(report, "m.onnx")


@pytest.mark.parametrize(
    ("moved", "labels", "message"),
    [
        (4, None, r"at most 3 of 100 images with another class, got 4"),
        (2, [0] * 100, r"at most 1 correct answers of 100 lost on balance, got 2"),
    ],
)
def test_changed_classes_and_lost_answers_are_refused(
    moved: int, labels: list[int] | None, message: str
) -> None:
    before = np.tile(np.array([[0.51, 0.49]], np.float32), (100, 1))
    after = before.copy()
    after[:moved] = after[:moved, ::-1]

    with pytest.raises(ExportError, match=message):
        check(compare(before, after, "int8", labels=labels), "m.onnx")
    check(compare(before, before, "int8", labels=labels), "m.onnx")


def test_answers_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ExportError, match="got inf over 2 images"):
        check(compare(probs_of(0, 1), np.full((2, 3), np.nan, np.float32), "float16"), "m.onnx")


def test_the_card_names_what_the_file_was_made_of(finished: Run) -> None:
    weights = finished.folder.job_folder(finished.last_job("gated", 1)) / "weights.safetensors"
    backbone = finished.load_member(finished.recipe.members[0], 0, 3).backbone

    card = threefold.load(finished.dir / "model.onnx").card

    assert (card["precision"], card["opset"]) == ("float32", OPSET)
    first, second = card["preprocessing"]
    assert (first["pixels"], second["pixels"], first["resize"]) == (32, 40, "squash")
    assert first["mean"][0] == pytest.approx([255 * m for m in backbone.default_cfg["mean"]])
    assert set(card["hashes"]["weights"]) == {"plain/0", "plain/1", "gated/0", "gated/1"}
    assert card["hashes"]["weights"]["gated/1"] == sha256(weights)
    assert card["hashes"]["recipe"] == finished.recipe.digest()
    assert card["parity"]["accuracy"]["lost"] == 0
