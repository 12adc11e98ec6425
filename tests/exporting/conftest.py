"""A pipeline with a cascade, and its file with and without the cascade. Tests only read them."""

from __future__ import annotations

import pytest
from support.cascades import CascadeCase, make_cascade_case
from support.exports import dimmed_images

import threefold
from threefold.runtime.model import Model


@pytest.fixture(scope="session")
def cascade_case() -> CascadeCase:
    return make_cascade_case()


@pytest.fixture(scope="session")
def model(cascade_case: CascadeCase, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The file with the cascade."""
    path = tmp_path_factory.mktemp("cascade") / "model.onnx"
    report = cascade_case.write(path, dimmed_images(20))
    assert report.max_difference < 1e-5
    return threefold.load(path)


@pytest.fixture(scope="session")
def flat(cascade_case: CascadeCase, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The file without the cascade."""
    path = tmp_path_factory.mktemp("flat") / "model.onnx"
    cascade_case.write_without_cascade(path, dimmed_images(4))
    return threefold.load(path)
