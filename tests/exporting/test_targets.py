"""Exports to torch's and OpenVINO's formats answer like the pipeline or are not written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.disk import files_up_to
from support.exports import noise_images
from torch import nn

from threefold.errors import ExportError
from threefold.exporting import checksums, targets
from threefold.files import sha256
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.predictions.export_schema import ExportReport


class TinyNetwork(nn.Module):
    """Pixels in 0..255 to logits, with a batch norm that is not the identity."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.norm.running_mean += 0.1  # type: ignore[operator]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (b, 4)."""
        logits: torch.Tensor = self.fc(self.norm(self.conv(pixels / 255)).clamp(0, 6).mean((2, 3)))
        return 5 * logits


class Mean(nn.Module):
    """The mean of the members."""

    def forward(self, member_probs: torch.Tensor) -> torch.Tensor:
        """Probabilities (b, k)."""
        return member_probs.mean(1)


@pytest.fixture(scope="module")
def tiny_pipeline() -> Pipeline:
    members = {
        name: MemberPipeline(
            [Predictor(TinyNetwork(i)), Predictor(TinyNetwork(9 + i))], 16 + i, "squash"
        )
        for i, name in enumerate("ab")
    }
    return Pipeline(members, Combiner(Mean()), ("w", "x", "y", "z"))


def export_pipeline(pipeline: Pipeline, path: Path, **options: Any) -> ExportReport:
    return targets.export(
        pipeline, path, noise_images(), {"name": "tiny"}, labels=[0] * 6, rows="test", **options
    )


@pytest.mark.slow
def test_a_pt2_file_answers_for_any_batch_and_size(tiny_pipeline: Pipeline, tmp_path: Path) -> None:
    extra = {targets.CARD_FILE: ""}

    report = export_pipeline(tiny_pipeline, tmp_path / "m.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)

    assert report.max_difference <= 1e-5
    assert report.bytes == (tmp_path / "m.pt2").stat().st_size
    card = json.loads(extra[targets.CARD_FILE])
    assert card["classes"] == ["w", "x", "y", "z"]
    assert card["members"] == ["a", "b"]
    assert card["name"] == "tiny"
    assert card["parity"]["images"] == 6
    module = program.module()
    for shape in ((1, 9, 31, 3), (5, 40, 17, 3), (2, 16, 16, 3)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        for actual, expected in zip(module(images), tiny_pipeline(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["m.pt2", "m.pt2.sha256"]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_our_pt2_files_hold_no_pickled_weights(tiny_pipeline: Pipeline, tmp_path: Path) -> None:
    export_pipeline(tiny_pipeline, tmp_path / "m.pt2")
    images = torch.zeros(1, 20, 20, 3, dtype=torch.uint8)
    answers = targets.load(tmp_path / "m.pt2")(images)
    torch.testing.assert_close(answers[0], tiny_pipeline(images)[0], rtol=0, atol=1e-5)

    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        names = [name for name in archive.namelist() if name.endswith(".json")]
        configs = [name for name in names if "weights" in name or "constants" in name]
        assert configs
        for name in configs:
            assert '"use_pickle": true' not in archive.read(name).decode(), name


def test_damage_is_found_by_the_checksums(tmp_path: Path) -> None:
    """They are those of sha256sum; nothing is loaded that does not have its own."""
    target = tmp_path / "m.xml"
    digests = {}
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_bytes(name.encode() * 9)
        digests[name] = hashlib.sha256(name.encode() * 9).hexdigest()
    with pytest.raises(ExportError, match=r"cannot read: .*m\.xml\.sha256.*fix: export it again"):
        targets.load(target)

    checksums.write_checksums(target, digests)
    checksums.check_checksums(target)
    lines = checksums.checksum_path(target).read_text().splitlines()
    assert lines == [f"{digest}  {name}" for name, digest in digests.items()]

    for name in (*digests, "m.xml.sha256"):
        content = (tmp_path / name).read_bytes()
        flip(tmp_path / name)
        with pytest.raises(ExportError, match=r"damaged: .*/m\.|cannot read: .*fix: export it"):
            targets.load(target)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ExportError, match=r"cannot read: .*m\.bin; got No such file"):
        targets.load(target)


@pytest.mark.filterwarnings("ignore")  # OpenVINO warns of its own modules
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_an_openvino_file_answers(tiny_pipeline: Pipeline, tmp_path: Path, precision: str) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")

    report = export_pipeline(
        tiny_pipeline, tmp_path / "m.xml", precision=precision, calibration=noise_images(20)
    )

    assert report.max_difference <= report.tolerance
    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.xml", "m.xml.sha256"]
    assert report.bytes == sum((tmp_path / name).stat().st_size for name in ("m.bin", "m.xml"))
    model = openvino.Core().read_model(tmp_path / "m.xml")
    card = json.loads(model.get_rt_info(["threefold"]).astype(str))
    assert card["classes"] == ["w", "x", "y", "z"]
    assert card["precision"] == precision
    assert card["parity"]["rows"] == "test"
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = np.random.default_rng(0).integers(0, 256, (3, 33, 21, 3), dtype=np.uint8)
    probs, members = (value.detach().numpy() for value in tiny_pipeline(torch.from_numpy(images)))
    outputs = compiled({"images": images})
    np.testing.assert_allclose(outputs["probs"], probs, atol=report.tolerance)
    np.testing.assert_allclose(outputs["member_probs"], members, atol=report.tolerance)

    export_pipeline(tiny_pipeline, tmp_path / "m.xml")  # over the old one

    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.xml", "m.xml.sha256"]
    answers = targets.load(tmp_path / "m.xml")({"images": images})["probs"]
    np.testing.assert_allclose(answers, probs, atol=1e-4)
    flip(tmp_path / "m.bin")
    with pytest.raises(ExportError, match=r"not have its checksum: it is damaged: .*m\.bin"):
        targets.load(tmp_path / "m.xml")


def test_without_openvino_the_error_says_what_to_install(
    tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    with pytest.raises(
        ExportError, match=r"OpenVINO is not installed: .*m\.xml; fix: .*pip install .*\[openvino\]"
    ):
        export_pipeline(tiny_pipeline, tmp_path / "m.xml")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["m.xml", *(pytest.param(name, marks=pytest.mark.slow) for name in ("m.onnx", "m.pt2"))]
)
def test_answers_that_differ_leave_nothing_and_the_old_file(
    tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "m.xml":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    (tmp_path / name).write_text("old")
    original = Pipeline.predict_proba
    monkeypatch.setattr(
        Pipeline, "predict_proba", lambda self, images: original(self, images)[:, ::-1]
    )

    with pytest.raises(ExportError, match="would answer differently"):
        export_pipeline(tiny_pipeline, tmp_path / name)

    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "old"


def test_unsupported_targets_are_refused(tiny_pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"a name that ends in \.onnx, \.pt2, \.xml, \.mlpackage or \.tflite"
    ):
        export_pipeline(tiny_pipeline, tmp_path / "m.h5")
    with pytest.raises(ExportError, match=r"a \.pt2 file holds float32 only.*got int8"):
        export_pipeline(tiny_pipeline, tmp_path / "m.pt2", precision="int8")


def test_a_target_that_cannot_be_written_is_refused(
    tiny_pipeline: Pipeline, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ExportError, match="cannot write"):
        export_pipeline(tiny_pipeline, tmp_path / "file" / "m.pt2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries about themselves
@pytest.mark.parametrize("suffix", [".pt2", ".xml"])
def test_a_full_disk_leaves_the_old_file(
    tiny_pipeline: Pipeline, tmp_path: Path, suffix: str
) -> None:
    if suffix == ".xml":
        pytest.importorskip("openvino")
    export_pipeline(tiny_pipeline, tmp_path / f"m{suffix}")
    before = digests(tmp_path)

    for size in (0, 100, 1_000, 5_000):
        with files_up_to(size), pytest.raises(ExportError, match=r"cannot write|fix: free disk"):
            export_pipeline(tiny_pipeline, tmp_path / f"m{suffix}")
        assert digests(tmp_path) == before, size


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path) for path in files}
