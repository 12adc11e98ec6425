"""Hostile model files are refused in one line, before onnxruntime opens them, at little cost."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.server import card, colour_graph, write_model

import threefold
from threefold.errors import ExportError
from threefold.files import sha256
from threefold.runtime import model_file


def refusal(path: Path) -> str:
    """The one-line error with which a file is refused within seconds."""
    start = time.monotonic()
    with pytest.raises(ExportError) as error:
        threefold.load(path)
    assert time.monotonic() - start < 5
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_a_sound_file_is_read_and_answers(tmp_path: Path) -> None:
    model = threefold.load(write_model(tmp_path / "m.onnx"))

    assert model.card == card()
    assert model.predict([np.full((5, 7, 3), (0, 0, 200), np.uint8)]) == ["blue"]


def test_the_model_of_another_run_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.onnx")
    manifest = {"files": {"model.onnx": ["0" * 64]}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    text = refusal(path)
    manifest["files"]["model.onnx"].append(sha256(path))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    assert "not the one that this run has exported" in text
    assert threefold.load(path).card == card()


@pytest.mark.parametrize("make", [getattr(os, "mkfifo", Path.touch), Path.mkdir, Path.touch])
def test_a_manifest_that_is_none_is_not_waited_for(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.onnx")
    make(tmp_path / "manifest.json")

    assert threefold.load(path).card == card()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def object_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (object_array(), "a NumPy array, which is never opened"),
        (object_archive(), "a zip archive, which is never opened"),
        (b"", "the file is empty"),
        (b"hello", "damaged or truncated"),
        (b"\xff" * 4096, "damaged or truncated"),
        (b"\x00" * 4096, "damaged or truncated"),
        # A graph of 2**63 bytes.
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged or truncated"),
    ],
)
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)

    assert reason in refusal(tmp_path / "m.onnx")


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(pickle.dumps(Trap(tmp_path / "trap")))

    assert "it looks like pickle" in refusal(tmp_path / "m.onnx")
    assert not (tmp_path / "trap").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = write_model(tmp_path / "m.onnx").read_bytes()

    for length in range(len(content)):
        (tmp_path / "m.onnx").write_bytes(content[:length])
        refusal(tmp_path / "m.onnx")


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")

    assert "not a regular file" in refusal(tmp_path / "pipe.onnx")
    assert "not a regular file" in refusal(tmp_path)
    assert "no such model file" in refusal(tmp_path / "nothing.onnx")


def write_external(location: str, folder: Path, **entries: int) -> Path:
    """Write a model whose weights are in another file, as external data of ONNX."""
    model = colour_graph()
    weights = next(t for t in model.graph.initializer if t.name == "weights")
    raw = weights.raw_data
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weights.external_data.add(key=key, value=str(value))
    (folder / "inside").mkdir()
    for place in (folder, folder / "inside"):
        (place / "weights.bin").write_bytes(raw)
    return write_model(folder / "inside/m.onnx", model)


def test_weights_in_a_plain_file_beside_the_model_are_read(tmp_path: Path) -> None:
    model = threefold.load(write_external("weights.bin", tmp_path, offset=0, length=36))
    assert model.predict([np.full((5, 7, 3), (200, 0, 0), np.uint8)]) == ["red"]


@pytest.mark.parametrize(
    "location",
    [
        "../weights.bin",
        "ABSOLUTE",
        "./weights.bin",
        "sub/../../weights.bin",
        "..\\weights.bin",
        "c:weights.bin",
        "..",
        "",
    ],
)
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    path = write_external(location.replace("ABSOLUTE", str(tmp_path / "weights.bin")), tmp_path)
    assert "not a plain file beside the model" in refusal(path)


@pytest.mark.parametrize("field", [b"\x6a", b"\x70"], ids=["external_data", "data_location"])
def test_fields_behind_a_tag_of_33_bits_are_refused(tmp_path: Path, field: bytes) -> None:
    """Some versions of protobuf drop the bits above 32: for them the field is one of the tensor."""
    path = write_external("../weights.bin", tmp_path)
    model = onnx.load(path, load_external_data=False)
    weights = next(t for t in model.graph.initializer if t.name == "weights")
    plain = weights.SerializeToString()
    position = plain.index(field)
    hidden_tag = bytes([field[0] | 0x80, 0x80, 0x80, 0x80, 0x10])
    hidden = plain[:position] + hidden_tag + plain[position + 1 :]
    # The tensor is the last field of the graph's own message here.
    graph = onnx.GraphProto(initializer=[weights]).SerializeToString()
    hidden_graph = b"\x2a" + bytes([len(hidden)]) + hidden
    assert graph == b"\x2a" + bytes([len(plain)]) + plain
    path.write_bytes(b"\x3a" + bytes([len(hidden_graph)]) + hidden_graph)

    assert "tag of more than 32 bits" in refusal(path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_behind_a_link_are_refused(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    path = write_external("weights.bin", tmp_path)
    (tmp_path / "inside/weights.bin").unlink()
    link(tmp_path / "weights.bin", tmp_path / "inside/weights.bin")
    assert "is a link" in refusal(path)


@pytest.mark.parametrize(
    "entries",
    [{"offset": 30}, {"length": 37}, {"offset": -8}, {"offset": 2**62}, {"length": 2**64}],
)
def test_weights_beyond_their_file_are_refused(tmp_path: Path, entries: dict[str, int]) -> None:
    text = refusal(write_external("weights.bin", tmp_path, **entries))
    assert "beyond the end" in text or "of shape [3, 3] with only" in text


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    assert "that is not there" in refusal(write_external("none.bin", tmp_path))


def model_hiding_a_tensor(place: str) -> onnx.ModelProto:
    """A model with a tensor of ../secret in a place that loaders may overlook."""
    model = colour_graph()
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[3])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(
        onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
    )
    inner = helper.make_graph(
        [constant], "inner", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [3])]
    )
    if place == "attribute":
        model.graph.node.insert(0, constant)
    elif place == "subgraph":
        model.graph.node.append(
            helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
        )
    elif place == "function":
        model.functions.append(
            helper.make_function("own", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)])
        )
    elif place == "sparse":
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[3]))
    else:
        model.training_info.append(onnx.TrainingInfoProto(algorithm=inner))
    return model


@pytest.mark.parametrize("place", ["attribute", "subgraph", "function", "sparse", "training"])
def test_external_tensors_are_found_in_every_place(tmp_path: Path, place: str) -> None:
    assert "'../secret'" in refusal(write_model(tmp_path / "m.onnx", model_hiding_a_tensor(place)))


@pytest.mark.parametrize(
    "dims", [[10**9, 10**9], [2**40], [3, 3, 1000], [-1, 3], [2**62, 2**62, 0, 5]]
)
def test_absurd_shapes_are_refused(tmp_path: Path, dims: list[int]) -> None:
    model = colour_graph()
    next(t for t in model.graph.initializer if t.name == "weights").dims[:] = dims

    assert "bytes of values" in refusal(write_model(tmp_path / "m.onnx", model))


def test_empty_tensors_are_accepted(tmp_path: Path) -> None:
    model = colour_graph()
    model.graph.initializer.append(helper.make_tensor("none", TensorProto.FLOAT, [5, 0], []))

    assert model_file.read_card(write_model(tmp_path / "m.onnx", model), "threefold") == card()


def test_deeply_nested_graphs_are_refused(tmp_path: Path) -> None:
    model, inner = colour_graph(), helper.make_graph([], "g", [], [])
    for _ in range(25):
        inner = helper.make_graph(
            [helper.make_node("If", ["x"], ["y"], then_branch=inner)], "g", [], []
        )
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner))

    assert "nested more than" in refusal(write_model(tmp_path / "m.onnx", model))


def test_too_many_fields_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "MAX_FIELDS", 20_000)
    write_model(tmp_path / "m.onnx")
    with (tmp_path / "m.onnx").open("ab") as file:
        file.write(b"\x28\x00" * 20_000)  # model_version, again and again

    assert "more than 20,000 fields" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "the model card is damaged"),
        ("[" * 100_000, "the model card is damaged"),
        ("[1]", "not an object"),
        ("{}", "no classes"),
        (json.dumps(card(classes=[])), "no classes"),
        (json.dumps(card(classes="abc")), "no classes"),
        (json.dumps(card(classes=["a", "b", 3])), "no classes"),
        (json.dumps(card(classes=["a", "b", "c\x1b[2J"])), "no classes"),
        (json.dumps(card(classes=["a", "b", "a"])), "two classes of one name"),
        (
            json.dumps(card(members=["only"])),
            "not those of a pipeline with 1 member and 3 classes",
        ),
        (
            json.dumps(card(classes=["a", "b"])),
            "not those of a pipeline with 2 members and 2 classes",
        ),
        (json.dumps(card(format=99)), "another format"),
        (json.dumps(card(blob="x" * model_file.MAX_CARD_BYTES)), "longer than 4 MB"),
    ],
)
def test_bad_cards_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    assert reason in refusal(write_model(tmp_path / "m.onnx", model_card=content))


def test_a_file_without_or_with_two_cards_is_refused(tmp_path: Path) -> None:
    model = colour_graph()

    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "not a threefold model" in refusal(tmp_path / "m.onnx")

    write_model(tmp_path / "m.onnx", model)
    model.metadata_props.append(model.metadata_props[0])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "2 times" in refusal(tmp_path / "m.onnx")


def memory_bomb(when: str) -> onnx.ModelProto:
    """A model of 1 kB that needs 8 GB, "at once" when it is loaded, or when it gets an image."""
    model = colour_graph()
    big = helper.make_tensor("big", TensorProto.INT64, [2], [45_000, 45_000])
    model.graph.initializer.append(big)
    model.graph.initializer.append(helper.make_tensor("half", TensorProto.FLOAT, [1, 1], [0.5]))
    source = "half" if when == "at once" else "first"
    nodes = (
        []
        if when == "at once"
        else [helper.make_node("Gather", ["logits", "one0"], ["first"], axis=1)]
    )
    model.graph.initializer.append(helper.make_tensor("one0", TensorProto.INT64, [1], [0]))
    nodes += [
        helper.make_node("Expand", [source, "big"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "half"], ["some"]),
        helper.make_node("Add", ["logits", "some"], ["moved"]),
    ]
    place = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Unsqueeze")
    model.graph.node[place].input[0] = "moved"
    for node in reversed(nodes):
        model.graph.node.insert(place, node)
    return model


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("when", ["at once", "with the image"])
def test_a_graph_that_needs_too_much_memory_is_stopped(tmp_path: Path, when: str) -> None:
    path = write_model(tmp_path / "m.onnx", memory_bomb(when))
    code = (
        "import sys, numpy as np, threefold\n"
        "try:\n    threefold.load(sys.argv[1]).predict([np.zeros((4, 4, 3), np.uint8)])\n"
        "except threefold.ExportError as error: print(error)\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith('VmHWM')))"
    )

    process = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True
    )

    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    message, peak = process.stdout.splitlines()
    assert "more memory than allowed" in message
    assert int(peak) < 1000


@pytest.mark.slow
def test_checking_reads_no_weights(tmp_path: Path) -> None:
    """300 MB of weights are skipped."""
    model = colour_graph()
    model.graph.initializer.append(
        helper.make_tensor("w", TensorProto.FLOAT, [75_000_000], bytes(300_000_000), raw=True)
    )
    path = write_model(tmp_path / "m.onnx", model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.monotonic()

    model_file.read_card(path, "threefold")

    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 5000
