"""A browser for the tests of the pages, and onnxruntime-web for those without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from threefold.errors import ExportError
from threefold.serving import onnxruntime_web


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from support.browser import chromium

    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with onnxruntime-web, downloaded once."""
    folder = tmp_path_factory.mktemp("ort")
    try:
        contents = onnxruntime_web.read_runtime()
    except ExportError as error:
        pytest.skip(f"npm cannot get onnxruntime-web here: {error}")
    for name, content in contents.items():
        (folder / onnxruntime_web.FILES[name].name).write_bytes(content)
    return folder
