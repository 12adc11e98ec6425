"""Bundles for models too large for one file: they load, are checked, and are written whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.server import card, colour_graph

import threefold
from threefold.errors import ExportError
from threefold.exporting import onnx_files, onnx_graph
from threefold.exporting.parity import check, compare
from threefold.files import sha256
from threefold.predictions.export_schema import ExportReport
from threefold.runtime import model_file
from threefold.runtime.model import KEY

RED = np.full((5, 7, 3), (200, 0, 0), np.uint8)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file may hold a hundred bytes, and every tensor of eight bytes or more moves out."""
    monkeypatch.setattr(onnx_files, "LIMIT", 50)
    monkeypatch.setattr(onnx_files, "SMALLEST", 8)


def write_colours(
    path: Path,
    scale: float = 1.0,
    wrong: bool = False,
    measured: list[np.ndarray] | None = None,
) -> ExportReport:
    """Export the colour model with scaled weights.

    Args:
        path: the file.
        scale: factor of the weights.
        wrong: fail the parity gate.
        measured: receives the answers that the gate saw.
    """
    model = colour_graph()
    weights = next(t for t in model.graph.initializer if t.name == "weights")
    values = np.frombuffer(weights.raw_data, np.float32) * scale
    weights.raw_data = values.astype(np.float32).tobytes()

    def measure(answers: np.ndarray) -> ExportReport:
        if measured is not None:
            measured.append(answers)
        report = compare(answers, answers)
        return check(report.replace(changed=int(wrong)), path)

    return onnx_graph.write_onnx(model, path, card(), [RED], measure)


@pytest.mark.usefixtures("small_limit")
def test_a_bundle_is_two_files_that_answer(tmp_path: Path) -> None:
    measured: list[np.ndarray] = []

    report = write_colours(tmp_path / "m.onnx", measured=measured)
    model = threefold.load(tmp_path / "m.onnx")

    bundle = model.card["bundle"]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", bundle["file"]]
    data = tmp_path / bundle["file"]
    assert bundle["file"] == f"m.onnx.{sha256(data)[:16]}.bin"
    assert (bundle["sha256"], bundle["bytes"]) == (sha256(data), data.stat().st_size)
    assert report.bytes == data.stat().st_size + (tmp_path / "m.onnx").stat().st_size
    assert model.predict([RED]) == ["red"]
    np.testing.assert_allclose(model.predict_proba([RED]), measured[0])


@pytest.mark.usefixtures("small_limit")
def test_the_data_file_holds_the_tensors_aligned(tmp_path: Path) -> None:
    write_colours(tmp_path / "m.onnx")

    head = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    tensors = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}

    places = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in head.graph.initializer
        if t.external_data
    }
    assert set(places) == {"weights", "scales"}
    assert {int(place["offset"]) % onnx_files.ALIGN for place in places.values()} == {0}
    for tensor in colour_graph().graph.initializer:
        values = onnx.numpy_helper.to_array(tensors[tensor.name])
        np.testing.assert_array_equal(values, onnx.numpy_helper.to_array(tensor))


@pytest.mark.usefixtures("small_limit")
def test_a_bundle_moves_with_both_files_and_not_with_one(tmp_path: Path) -> None:
    write_colours(tmp_path / "m.onnx")
    (tmp_path / "away").mkdir()
    (data,) = tmp_path.glob("*.bin")

    os.replace(tmp_path / "m.onnx", tmp_path / "away/renamed.onnx")
    with pytest.raises(ExportError, match="external data that is not there"):
        threefold.load(tmp_path / "away/renamed.onnx")

    os.replace(data, tmp_path / "away" / data.name)
    assert threefold.load(tmp_path / "away/renamed.onnx").predict([RED]) == ["red"]


@pytest.mark.usefixtures("small_limit")
def test_a_cut_data_file_is_refused(tmp_path: Path) -> None:
    write_colours(tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.bin")
    data.write_bytes(data.read_bytes()[:-5])

    with pytest.raises(ExportError, match="beyond the end of its file"):
        threefold.load(tmp_path / "m.onnx")


@pytest.mark.usefixtures("small_limit")
def test_a_new_export_removes_the_old_data_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_colours(tmp_path / "m.onnx")
    first = set(tmp_path.glob("*.bin"))
    (tmp_path / "m.onnx.notes.bin").write_bytes(b"mine")
    (tmp_path / f"m.onnx.{'0' * 16}.bin").write_bytes(b"mine, too: no model names it")

    write_colours(tmp_path / "m.onnx", scale=0.5)

    second = set(tmp_path.glob("*.bin"))
    assert not first & second
    assert len(second) == 3

    write_colours(tmp_path / "m.onnx", scale=0.5)  # the same data again
    assert set(tmp_path.glob("*.bin")) == second
    assert threefold.load(tmp_path / "m.onnx").predict([RED]) == ["red"]

    monkeypatch.setattr(onnx_files, "LIMIT", 10**6)
    write_colours(tmp_path / "m.onnx")
    assert len(set(tmp_path.glob("*.bin"))) == 2


@pytest.mark.usefixtures("small_limit")
def test_a_refused_export_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    write_colours(tmp_path / "m.onnx")
    before = sorted(os.listdir(tmp_path))

    with pytest.raises(ExportError, match="another class"):
        write_colours(tmp_path / "m.onnx", scale=0.5, wrong=True)

    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.usefixtures("small_limit")
def test_the_old_model_answers_after_an_interrupted_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_colours(tmp_path / "m.onnx")
    original = onnx_files.write_file

    def interrupt(path: Path, content: bytes) -> None:
        if path.name == "m.onnx":  # the data file is in its place, the model file is not yet
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(onnx_files, "write_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_colours(tmp_path / "m.onnx", scale=0.5)

    assert threefold.load(tmp_path / "m.onnx").predict([RED]) == ["red"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "LIMIT", 50)
    (tmp_path / "file").write_text("")

    with pytest.raises(ExportError, match="cannot write"):
        write_colours(tmp_path / "file" / "m.onnx")


def test_memory_follows_the_size_on_disk_not_the_card(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "w.bin").write_bytes(bytes(100))
    os.symlink(tmp_path / "w.bin", tmp_path / "link.bin")
    files = ("../w.bin", "..", "", "link.bin", "no", 5)

    assert model_file.bytes_beside(path, {"bundle": {"file": "w.bin", "bytes": 2**60}}) == 100
    for card_entries in ({}, {"bundle": 3}, *({"bundle": {"file": name}} for name in files)):
        assert model_file.bytes_beside(path, card_entries) == 0


def test_a_small_model_is_one_file_with_its_card(tmp_path: Path) -> None:
    write_colours(tmp_path / "m.onnx")

    props = onnx.load(tmp_path / "m.onnx").metadata_props
    assert [p.key for p in props] == [KEY, model_file.CHECKSUM]
    assert "bundle" not in threefold.load(tmp_path / "m.onnx").card
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]
