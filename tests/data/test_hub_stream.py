"""Data sets of the hub that are streamed: read once, in order, kept, and resumed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.hub_server import Hub, hub_server

from threefold.data.detect_source import detect_source, seems_data
from threefold.data.sources.hub_stream import parse_address
from threefold.errors import DataError

hub_library = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")

LOAD = """
import json, sys
from threefold.data.load import load_data
from threefold.data.detect_source import detect_source, find_fold_column
from threefold.data.sources import hub_stream
hub_stream.SAVE_SECONDS = 0.0
stop = int(sys.argv[2])
if stop:
    original = hub_stream._image_of
    def count(cell, seen=[]):
        seen.append(1)
        if len(seen) > stop:
            import os
            os._exit(9)
        return original(cell)
    hub_stream._image_of = count
spec = detect_source(sys.argv[1])
spec = spec.model_copy(update={"fold_column": find_fold_column(spec)})
sources = load_data(spec, 0)
print(json.dumps([
    [part.ids[i], *part.label_names(i), int(part.pixels(i)[0, 0, 0]), (part.folds or [""] * 99)[i]]
    for part in (sources.train, sources.test) for i in range(len(part))
]))
"""


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def shard(shades: range) -> bytes:
    """Write a parquet file as the hub has them: images as structs, classes as numbers."""
    features = hub_library.Features(
        {
            "image": hub_library.Image(),
            "label": hub_library.ClassLabel(names=["wolf", "ant"]),
            "fold": hub_library.Value("int64"),
        }
    )
    rows = {
        "image": [{"bytes": png(shade), "path": f"{shade}.png"} for shade in shades],
        "label": [shade % 2 for shade in shades],
        "fold": [shade % 3 for shade in shades],
    }
    stream = io.BytesIO()
    hub_library.Dataset.from_dict(rows, features=features).to_parquet(stream, batch_size=2)
    return stream.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a data set of two training files and a test file."""
    with hub_server() as hub:
        hub.repositories["owner/pets"] = {
            "data/train-00000-of-00002.parquet": shard(range(6)),
            "data/train-00001-of-00002.parquet": shard(range(6, 12)),
            "data/test-00000-of-00001.parquet": shard(range(12, 16)),
        }
        yield hub


def load(address: str, hub: Hub, cache: Path, stop: int = 0) -> subprocess.CompletedProcess[str]:
    """Load in a process of its own, for which this hub is the hub; 9 = it was killed."""
    variables = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache / "hf"),
        "THREEFOLD_CACHE": str(cache / "threefold"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    command = [sys.executable, "-c", LOAD, address, str(stop)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def expected() -> list[Any]:
    train = [[f"train/{i:07d}", ("wolf", "ant")[i % 2], i, str(i % 3)] for i in range(12)]
    return train + [[f"test/{i:07d}", ("wolf", "ant")[i % 2], i, ""] for i in range(12, 16)]


@pytest.mark.slow
def test_rows_are_read_once_and_kept(hub: Hub, tmp_path: Path) -> None:
    killed = load("hf://datasets/owner/pets", hub, tmp_path, stop=8)
    resumed = load("hf://datasets/owner/pets", hub, tmp_path)

    assert killed.returncode == 9, killed.stderr
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == expected()

    hub.repositories.clear()  # the second time needs no network
    again = load("hf://datasets/owner/pets", hub, tmp_path)

    assert json.loads(again.stdout) == expected(), again.stderr


def test_addresses() -> None:
    assert parse_address("hf://datasets/a/b@main:small") == ("a/b", "main", "small")
    assert parse_address("hf:/datasets/a/b") == ("a/b", None, None)
    with pytest.raises(DataError, match="not an address of a data set"):
        parse_address("hf://models/a/b")
    assert detect_source("hf://datasets/a/b").root == "hf://datasets/a/b"
    assert seems_data("hf://datasets/a/b")
