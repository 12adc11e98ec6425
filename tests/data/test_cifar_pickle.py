"""Pickled batches: plain data and arrays of bytes are read, and everything else is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cifar import META, pickle_as_python2

from threefold.data.published import CIFAR10_CLASSES
from threefold.data.sources.cifar_pickle import read_batch
from threefold.errors import DataError


def test_meta_files_equal_the_official_ones() -> None:
    """The checksums are torchvision's for `batches.meta` and `meta`."""
    contents = {name: pickle_as_python2(meta) for name, meta in META.items()}

    meta = read_batch(contents["cifar10"], "meta")

    assert {name: hashlib.md5(content).hexdigest() for name, content in contents.items()} == {
        "cifar10": "5ff9c542aee3614f3951f8cda6e48888",
        "cifar100": "7973b15100ade9c7d40fb424638fde48",
    }

    label_names = [name.encode() for name in CIFAR10_CLASSES]

    assert meta == {**META["cifar10"], "label_names": label_names}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(max_size=9)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), st.integers(2, 5))
def test_plain_data_equals_what_pickle_reads(tree: dict[str, Any], protocol: int) -> None:
    assert read_batch(pickle.dumps(tree, protocol), "x") == tree


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_equal_what_pickle_reads(protocol: int, order: str) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(4, 6).copy(order=order)  # type: ignore[call-overload]
    official = pickle_as_python2({"data": array, "labels": [1, 300, 70_000], "text": "x" * 300})
    by_pickle = pickle.loads(official, encoding="bytes")

    batch = read_batch(pickle.dumps({"data": array, "again": array}, protocol), "x")

    assert batch["data"] is batch["again"]
    assert np.array_equal(batch["data"], array)
    assert np.array_equal(by_pickle[b"data"], array)
    assert np.array_equal(read_batch(official, "x")["data"], array)
    assert by_pickle[b"labels"] == read_batch(official, "x")["labels"] == [1, 300, 70_000]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    def __setstate__(self, state: object) -> None: ...

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


HOSTILE: dict[str, Any] = {
    "os.system": Evil(os.system, "touch MARK"),
    "eval": Evil(eval, "open('MARK', 'w')"),
    "exec": Evil(exec, "open('MARK', 'w')"),
    "open": Evil(open, "MARK", "w"),
    "getattr": Evil(getattr, "x", "upper"),
    "bytes of any length": Evil(bytearray, 10**12),
    "an object": Stateful(),
    "a set": {1, 2},
    "a numpy file": Evil(np.load, "MARK"),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"data": [HOSTILE[case]]}, protocol)

    with pytest.raises(
        DataError,
        match=r"asks for more than plain data: batch; got (the name|opcode|a call|a state)",
    ):
        read_batch(content, "batch")
    assert not list(tmp_path.iterdir())


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
RAW = {
    "REDUCE of text": b"\x80\x02}U\x01aU\x01b)Rs.",
    "object array": pickle.dumps({"data": np.array([os.system], dtype=object)}, 2),
    "floats": pickle.dumps({"data": np.zeros(3)}, 2),
    "another class": b"\x80\x02}U\x01a" + RECONSTRUCT + b"cos\nsystem\nK\0\x85U\x01b\x87Rs.",
    "persistent": b"\x80\x02U\x01aQ.",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(U\x01aios\nsystem\n.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
}


@pytest.mark.parametrize("case", RAW)
def test_hostile_opcodes_do_nothing(case: str) -> None:
    with pytest.raises(DataError, match="asks for more than plain data"):
        read_batch(RAW[case], "batch")


@given(st.binary(max_size=60), st.integers(0, 400))
def test_any_bytes_give_a_dictionary_or_a_data_error(noise: bytes, at: int) -> None:
    sound = pickle_as_python2(
        {"data": np.zeros((2, 3), np.uint8), "labels": [1, 2], "names": ["a", "b"]}
    )

    for content in (noise, sound[:at], sound[:at] + noise + sound[at + len(noise) :]):
        with suppress(DataError):
            assert isinstance(read_batch(content, "x"), dict)


def test_wrong_shapes_are_refused() -> None:
    content = pickle_as_python2({"data": np.zeros((2, 3), np.uint8)})

    for shape in (b"K\2K\4\x86", b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff\x86"):
        with pytest.raises(DataError, match=r"cannot read the pickle: x; got an array of shape"):
            read_batch(content.replace(b"K\2K\3\x86", shape), "x")


def test_other_trees_are_refused() -> None:
    with pytest.raises(DataError, match="not a dictionary: x; got list"):
        read_batch(pickle.dumps([1], 2), "x")
