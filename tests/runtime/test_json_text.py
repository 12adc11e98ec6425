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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_json_is_json_in_every_encoding(encoding: str) -> None:
    tree = {"image": "café \udcff 写真.png"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")

    stream.write(json_line(tree, stream))
    stream.flush()

    assert json.loads(stream.buffer.getvalue().decode(encoding)) == tree
