"""Made-up data in official formats: every one loads, is the same for the same seed, and can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from threefold.datasets import load_data
from threefold.errors import DataError
from threefold.recipe_schema import DataSpec
from threefold.samples import SAMPLES, draw, write_sample


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_loads_with_its_counts(tmp_path: Path, name: str) -> None:
    spec = DataSpec(source=name, root=str(write_sample(name, tmp_path, per_class=4)))  # type: ignore[arg-type]
    sources = load_data(spec, 0)
    groups = len(set(sources.train.groups or ("all",)))
    assert np.bincount(sources.train.labels).tolist() == [4 * groups] * len(sources.train.classes)
    if sources.test is not None:
        assert np.bincount(sources.test.labels).tolist() == [2] * len(sources.train.classes)
    assert name == "folder" or sources.notes[0].startswith("not the whole of ")
    assert not sources.skipped


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "cassava2020"])
def test_the_seed_decides_the_pixels(tmp_path: Path, name: str) -> None:
    def pixels(seed: int, folder: str) -> list[bytes]:
        root = write_sample(name, tmp_path / folder, seed=seed, per_class=2)
        train = load_data(DataSpec(source=name, root=str(root)), 0).train  # type: ignore[arg-type]
        return [train.pixels(row).tobytes() for row in range(len(train))]

    assert pixels(1, "a") == pixels(1, "b") != pixels(2, "c")


@pytest.mark.parametrize(("classes", "grey"), [(10, True), (10, False), (24, False), (100, False)])
def test_classes_can_be_told_apart(classes: int, grey: bool) -> None:
    """By the nearest mean colour and spectrum, on pictures that the means have not seen: far above chance."""

    def features(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        images = draw(labels, classes, (28, 28), rng).astype(float)
        images = images[..., 1:2] if grey else images
        spectrum = np.abs(np.fft.fft2(images.mean(-1) - images.mean((1, 2, 3))[:, None, None]))[
            :, :6, :
        ]
        return np.column_stack([images.mean((1, 2)), spectrum.reshape(len(labels), -1) / 300])

    rng, labels = np.random.default_rng(0), np.repeat(np.arange(classes), 8)
    fit = features(labels, rng)
    means = np.stack([fit[labels == label].mean(0) for label in range(classes)])
    new = features(labels, rng)
    answers = np.argmin(((new[:, None] - means) ** 2).sum(-1), 1)
    assert np.mean(answers == labels) > 0.5


def test_what_cannot_be_made_up(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample of that data set; expected folder, mnist"):
        write_sample("csv", tmp_path)
    with pytest.raises(DataError, match="expected 2 or more, got 1"):
        write_sample("mnist", tmp_path, per_class=1)
