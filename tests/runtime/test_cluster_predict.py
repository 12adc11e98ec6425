"""Predictions on a Ray cluster: what a node answers, and the same file whatever dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.ray_cluster import CAN_START, ray_cluster
from support.server import card, write_model
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.errors import ExportError, error_from
from threefold.files import sha256
from threefold.runtime import cluster_predict, predict_file
from threefold.runtime.cluster_predict import Part, SentImage, answer_part
from threefold.runtime.model import CascadePolicy, Model
from threefold.runtime.model_output import ModelOutput
from threefold.runtime.predict import Engine
from threefold.runtime.predict_file import FileSummary, predict_to_file

COUNT = 24
BROKEN = 7
needs_cluster = pytest.mark.skipif(not CAN_START, reason="needs the group `cluster`, and Linux")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Images of a few sizes, one of them unreadable."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{number:02d}.png" for number in range(COUNT)]
    for path in paths:
        pixels = rng.integers(0, 256, (*rng.choice([5, 8, 11], 2), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    paths[BROKEN].write_bytes(b"no image")
    return paths


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.onnx", model_card=card())


def part_of(model: Path, paths: list[Path], **changes: Any) -> Part:
    values = {
        "model": str(model),
        "digest": sha256(model),
        "images": tuple(map(str, paths)),
        "policy": CascadePolicy(),
        "engine": Engine(batch=4),
    }
    return Part(**(values | changes))


def test_a_node_answers_as_this_machine(model: Path, images: list[Path]) -> None:
    readable = [path for path in images if path != images[BROKEN]]

    found = answer_part(part_of(model, readable))

    expected = Model(model).predict_proba(list(map(str, readable)))
    answers = [answer for answer in found.answers if isinstance(answer, ModelOutput)]
    assert np.allclose(np.concatenate([answer.probs for answer in answers]), expected, atol=1e-6)
    assert found.error == ()


def test_what_a_node_cannot_read_keeps_its_place(model: Path, images: list[Path]) -> None:
    content = images[2].read_bytes()
    sent = (str(images[BROKEN]), SentImage("row 2", content), ("DataError", "gone", *[""] * 4))

    found = answer_part(part_of(model, images, images=sent))

    first, second, third = found.answers
    assert not isinstance(first, ModelOutput)
    assert str(images[BROKEN]) in str(error_from(first))
    assert isinstance(second, ModelOutput)
    assert third == ("DataError", "gone", *[""] * 4)


def test_another_model_at_the_path_is_refused(model: Path, images: list[Path]) -> None:
    found = answer_part(part_of(model, images, digest="0" * 64))

    error = error_from(found.error)
    assert isinstance(error, ExportError)
    assert "another model file" in str(error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "ray"], "a cluster answers into a file"),
        (["--address", "host:6379"], "only a Ray cluster has an address"),
        (["--out", "a.csv", "--executor", "ray", "--budget", "5ms"], "holds for one machine"),
    ],
)
def test_options_that_make_no_sense(
    words: list[str],
    message: str,
    model: Path,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(app, ["predict", str(model), str(images[0]), *words])

    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not Path("a.csv").exists()


# With a real cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes, and a connection to them."""
    import ray

    with ray_cluster(tmp_path_factory.mktemp("caches")) as nodes:
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield nodes
        finally:
            ray.shutdown()


def predict(model: Path, images: list[Path], target: Path, **options: Any) -> FileSummary:
    folder = str(images[0].parent)
    return predict_to_file(target, lambda _: None, model, [folder], engine=Engine(), **options)


@pytest.mark.slow
@needs_cluster
def test_a_killed_node_changes_no_row(
    cluster: Any, model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_predict, "PART_IMAGES", 2)
    monkeypatch.setattr(predict_file, "FLUSH_SECONDS", 0.0)
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    nodes = [cluster.added[0]]

    def kill_one(done: int, total: int) -> None:
        if done and nodes:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    alone = predict(model, images, here)
    summary = predict(model, images, there, cluster=cluster.address, progress=kill_one)

    assert not nodes
    assert summary[:3] == alone[:3] == (COUNT, 0, 1)
    assert there.read_text() == here.read_text()
