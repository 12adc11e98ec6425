"""Models above the limit of one file: a bundle that loads, is checked, and is never half there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.server import card, colour_graph

import threefold
from threefold.errors import ExportError
from threefold.exporting import onnx_files, onnx_graph
from threefold.exporting.parity import check
from threefold.files import sha256
from threefold.runtime import model_file
from threefold.runtime.model import KEY

RED = np.full((5, 7, 3), (200, 0, 0), np.uint8)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file may hold a hundred bytes, and every tensor of eight bytes or more moves out."""
    monkeypatch.setattr(onnx_files, "LIMIT", 50)
    monkeypatch.setattr(onnx_files, "SMALLEST", 8)


def write(path: Path, scale: float = 1.0, wrong: bool = False) -> dict[str, Any]:
    """Export the colour model; `wrong` fails its gate."""
    model = colour_graph()
    weights = next(t for t in model.graph.initializer if t.name == "weights")
    weights.raw_data = (
        (np.frombuffer(weights.raw_data, np.float32) * scale).astype(np.float32).tobytes()
    )

    def measure(answers: np.ndarray) -> dict[str, Any]:
        report: dict[str, Any] = {
            "images": 1,
            "max_difference": 0.0,
            "tolerance": 1e-4,
            "changed": int(wrong),
            "changed_tolerance": 0,
        }
        report |= {"precision": "float32", "loss_tolerance": 0, "answer": answers[0].tolist()}
        return check(report, path)

    return onnx_graph.write_onnx(model, path, card(), [RED], measure)


@pytest.mark.usefixtures("small_limit")
def test_a_bundle_is_two_files_that_answer(tmp_path: Path) -> None:
    report = write(tmp_path / "m.onnx")
    model = threefold.load(tmp_path / "m.onnx")
    told = model.card["bundle"]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", told["file"]]
    data = tmp_path / told["file"]
    assert told["file"] == f"m.onnx.{sha256(data)[:16]}.bin"
    assert (told["sha256"], told["bytes"]) == (sha256(data), data.stat().st_size)
    assert report["bytes"] == data.stat().st_size + (tmp_path / "m.onnx").stat().st_size
    assert model.predict([RED]) == ["red"]
    np.testing.assert_allclose(model.predict_proba([RED])[0], report["answer"])
    head = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in head.graph.initializer
        if t.external_data
    }
    assert set(places) == {"weights", "scales"}
    assert {int(place["offset"]) % onnx_files.ALIGN for place in places.values()} == {0}
    whole = onnx.load(tmp_path / "m.onnx")
    for tensor in colour_graph().graph.initializer:
        found = next(t for t in whole.graph.initializer if t.name == tensor.name)
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(tensor)
        )


@pytest.mark.usefixtures("small_limit")
def test_a_bundle_moves_with_both_files_and_not_with_one(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx")
    (tmp_path / "away").mkdir()
    os.replace(tmp_path / "m.onnx", tmp_path / "away/renamed.onnx")
    with pytest.raises(ExportError, match="external data that is not there"):
        threefold.load(tmp_path / "away/renamed.onnx")
    (data,) = tmp_path.glob("*.bin")
    os.replace(data, tmp_path / "away" / data.name)
    assert threefold.load(tmp_path / "away/renamed.onnx").predict([RED]) == ["red"]


@pytest.mark.usefixtures("small_limit")
def test_a_cut_data_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.bin")
    data.write_bytes(data.read_bytes()[:-5])
    with pytest.raises(ExportError, match="beyond the end of its file"):
        threefold.load(tmp_path / "m.onnx")


@pytest.mark.usefixtures("small_limit")
def test_exported_again_the_old_data_goes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.onnx")
    first = set(tmp_path.glob("*.bin"))
    (tmp_path / "m.onnx.notes.bin").write_bytes(b"mine")
    (tmp_path / f"m.onnx.{'0' * 16}.bin").write_bytes(b"mine, too: no model names it")
    write(tmp_path / "m.onnx", scale=0.5)
    second = set(tmp_path.glob("*.bin"))
    assert not first & second
    assert len(second) == 3
    write(tmp_path / "m.onnx", scale=0.5)  # the same data again
    assert set(tmp_path.glob("*.bin")) == second
    assert threefold.load(tmp_path / "m.onnx").predict([RED]) == ["red"]
    monkeypatch.setattr(onnx_files, "LIMIT", 10**6)
    write(tmp_path / "m.onnx")
    assert len(set(tmp_path.glob("*.bin"))) == 2


@pytest.mark.usefixtures("small_limit")
def test_interrupted_anywhere_the_old_model_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.onnx")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ExportError, match="another class"):
        write(tmp_path / "m.onnx", scale=0.5, wrong=True)
    assert sorted(os.listdir(tmp_path)) == before
    honest = onnx_files.write_file

    def cut(path: Path, content: bytes) -> None:
        if path.name == "m.onnx":  # the data file is in its place, the model file is not yet
            raise KeyboardInterrupt
        honest(path, content)

    monkeypatch.setattr(onnx_files, "write_file", cut)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.onnx", scale=0.5)
    assert threefold.load(tmp_path / "m.onnx").predict([RED]) == ["red"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "LIMIT", 50)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "file" / "m.onnx")


def test_memory_counts_what_is_on_disk_not_what_a_card_claims(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(100))
    assert (
        model_file.bytes_beside(tmp_path / "m.onnx", {"bundle": {"file": "w.bin", "bytes": 2**60}})
        == 100
    )
    os.symlink(tmp_path / "w.bin", tmp_path / "link.bin")
    for claim in (
        {},
        {"bundle": 3},
        *({"bundle": {"file": f}} for f in ("../w.bin", "..", "", "link.bin", "no", 5)),
    ):
        assert model_file.bytes_beside(tmp_path / "m.onnx", claim) == 0


def test_the_card_is_where_it_was(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx")
    props = onnx.load(tmp_path / "m.onnx").metadata_props
    assert [p.key for p in props] == [KEY]
    assert "bundle" not in threefold.load(tmp_path / "m.onnx").card
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]
