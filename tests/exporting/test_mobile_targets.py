"""Core ML packages and LiteRT files hold the pipeline after its resize, or are not written.

Core ML itself runs on macOS only and was not run: its packages are computed by `mil_program`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import noise_images
from support.networks import pipeline_of, settle
from torch import nn

from threefold.ensembles.averaging import MeanEnsemble
from threefold.errors import ExportError
from threefold.exporting import targets
from threefold.exporting.fixed_size import FixedSize, on_canvas
from threefold.models.member import build_member
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.models.shared import HeadsPipeline, SharedBackbone
from threefold.models.views import Views
from threefold.recipe.schema import HeadSpec, MemberSpec, ViewSpec

CLASSES = ("a", "b", "c")


class Small(nn.Module):
    """Pixels in 0..255 to logits, with the operations of most networks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (b, 3)."""
        logits: torch.Tensor = self.fc(self.body(pixels / 255).mean((2, 3)))
        return 9 * logits


def pipeline(canvas_b: int = 16, mixing: np.ndarray | None = None) -> Pipeline:
    members = {
        name: MemberPipeline([Predictor(Small(i)), Predictor(Small(5 + i))], canvas, "crop")
        for i, (name, canvas) in enumerate({"a": 16, "b": canvas_b}.items())
    }
    return Pipeline(members, Combiner(MeanEnsemble().to_module()), CLASSES, None, mixing)


def write(path: Path, made: Pipeline | None = None, **options: Any) -> Any:
    return targets.export(
        made or pipeline(), path, noise_images(), {"name": "tiny"}, rows="test", **options
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_a_fixed_size_answers_as_the_pipeline(mixed: bool) -> None:
    mixing = np.array([[0.5, 0.5, 0, 0], [0, 0.25, 0.25, 0.5]]) if mixed else None
    made, images = pipeline(mixing=mixing), noise_images()
    network = FixedSize(made, "m")

    square = torch.from_numpy(np.stack(on_canvas(made, images))).permute(0, 3, 1, 2).float()
    answers = network(square)[0].numpy()

    np.testing.assert_allclose(answers, made.predict_proba(images), rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_a_shared_backbone_runs_once() -> None:
    spec = MemberSpec(
        name="m", backbone="test_resnet", weights="none", img_size=32, head=HeadSpec(kind="gru")
    )
    members = [build_member(spec, 3) for _ in range(2)]
    settle(members[0], 255 * torch.rand(4, 3, 32, 32))
    shared = SharedBackbone(members[0], Views(ViewSpec(), 32, 0), "squash")
    parts = {name: HeadsPipeline(shared, [m.head]) for name, m in zip("ab", members, strict=True)}
    made = Pipeline(parts, Combiner(MeanEnsemble().to_module()), CLASSES)
    network = FixedSize(made, "m")
    runs: list[int] = []
    network.networks[0].register_forward_hook(lambda *_: runs.append(1))

    pixels = torch.from_numpy(made.parts[0].pixels(noise_images()))
    answers = network(pixels)[0].detach().numpy()

    np.testing.assert_allclose(answers, made.predict_proba(noise_images()), rtol=0, atol=1e-5)
    assert len(runs) == 1


@pytest.mark.parametrize("suffix", [".mlpackage", ".tflite"])
def test_what_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    module = "coremltools" if suffix == ".mlpackage" else "litert_torch"
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ExportError, match=r"is not installed: .*; fix: .*pip install"):
        write(tmp_path / f"m{suffix}")
    with pytest.raises(ExportError, match=rf"a \{suffix} file holds float32 only.*got int8"):
        write(tmp_path / f"m{suffix}", precision="int8")
    with pytest.raises(ExportError, match=r"images of one size: .*; got crop to 16, crop to 20"):
        FixedSize(pipeline(20), f"m{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # coremltools warns of versions
def test_a_core_ml_package_holds_the_pipeline(tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")
    target = tmp_path / "m.mlpackage"

    report = write(target)
    report = write(target)  # over the old one

    assert report.max_difference < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.name, "m.mlpackage.sha256"]
    spec = coremltools.utils.load_spec(str(target))
    (image,) = spec.description.input
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == (
        "image",
        16,
        16,
    )
    assert [output.name for output in spec.description.output] == ["probs", "member_probs"]
    card = json.loads(spec.description.metadata.userDefined["threefold"])
    assert card["classes"] == list(CLASSES)
    assert card["parity"]["images"] == 6
    assert "Core ML itself was not run" in card["checked"]
    for line in (tmp_path / "m.mlpackage.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


@pytest.mark.filterwarnings("ignore")
def test_core_ml_weights_that_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")
    save = coremltools.models.MLModel.save

    def damage(model: Any, path: str) -> None:
        save(model, path)
        weights = Path(path) / "Data/com.apple.CoreML/weights/weight.bin"
        content = np.fromfile(weights, np.uint8)
        content[-64:] = 0x3F
        content.tofile(weights)

    monkeypatch.setattr(coremltools.models.MLModel, "save", damage)

    with pytest.raises(ExportError, match="would answer differently"):
        write(tmp_path / "m.mlpackage")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("backbone", "kind", "size"),
    [
        ("tf_efficientnet_lite0.in1k", "lstm", 64),
        ("test_resnet", "linear", 64),
        ("convnext_atto", "linear", 64),
        ("test_vit", "gru", 160),
    ],
)
def test_families_convert_to_core_ml(tmp_path: Path, backbone: str, kind: Any, size: int) -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    head = HeadSpec(kind=kind, units=16)
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=size, head=head)
    member = build_member(spec, 3)
    settle(member, 255 * torch.rand(8, 3, size, size))

    report = write(tmp_path / "m.mlpackage", pipeline_of(member, size))

    assert report.max_difference < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_loop_in_core_ml_is_refused_in_one_line(tmp_path: Path) -> None:
    """No check here knows it, and nothing is written unchecked."""
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    head = HeadSpec(kind="gru", units=4, sequence="rows")
    spec = MemberSpec(name="m", backbone="test_resnet", weights="none", img_size=64, head=head)

    with pytest.raises(ExportError, match=r"operation of Core ML.*got while_loop; fix: export to"):
        write(tmp_path / "m.mlpackage", pipeline_of(build_member(spec, 3), 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_a_litert_file_answers(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="litert-torch is not installed")
    made, target = pipeline(), tmp_path / "m.tflite"

    report = write(target, made)

    assert report.max_difference < 1e-5
    names = ["m.tflite", "m.tflite.json", "m.tflite.sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    card = json.loads((tmp_path / "m.tflite.json").read_text())
    assert (card["classes"], card["parity"]["rows"]) == (list(CLASSES), "test")
    image = on_canvas(made, noise_images()[:1])[0][None]
    answers = targets.load(target)(args_0=image)
    probs, member_probs = made(torch.from_numpy(image))
    np.testing.assert_allclose(answers["output_0"], probs.detach(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(answers["output_1"], member_probs.detach(), rtol=0, atol=1e-5)
    target.write_bytes(target.read_bytes()[:-1] + b"x")
    with pytest.raises(ExportError, match="it is damaged"):
        targets.load(target)
