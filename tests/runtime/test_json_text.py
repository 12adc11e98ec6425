"""What programs read is JSON, whatever the values and the terminal."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from threefold.cli.console import print_json
from threefold.runtime.json_text import json_line


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    nan, inf = float("nan"), float("inf")

    print_json({"a": nan, "b": [inf, -inf, 1.5], "c": (np.float32(nan), np.float32(0.5)), "d": 3})

    text = capsys.readouterr().out
    tree: Any = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert tree == {"a": None, "b": [None, None, 1.5], "c": [None, 0.5], "d": 3}


def test_a_terminal_obeys_nothing_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """CSI as one character (U+009B) clears a screen; so does no text that is printed."""
    controls = "".join(map(chr, [*range(32), *range(0x7F, 0xA0)]))
    tree = {f"name{controls}": [controls, "café"]}

    print_json(tree)

    text = capsys.readouterr().out
    assert json.loads(text) == tree
    assert not set(text) & (set(controls) - {"\n"})
    assert "\\u009b" in text
    assert "café" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_json_is_json_in_every_encoding(encoding: str) -> None:
    tree = {"image": "café \udcff 写真.png"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")

    stream.write(json_line(tree, stream))
    stream.flush()

    assert json.loads(stream.buffer.getvalue().decode(encoding)) == tree
