"""Synthetic data sets: each loads, is equal for equal seeds, and can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.sources import load_source

from threefold.data.synthetic import SAMPLES, draw_images, write_sample
from threefold.errors import DataError


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_loads_with_its_counts(tmp_path: Path, name: str) -> None:
    root = write_sample(name, tmp_path, per_class=4)

    sources = load_source(name, root)

    groups = len(set(sources.train.groups or ("all",)))

    assert np.bincount(sources.train.labels).tolist() == [4 * groups] * len(sources.train.classes)
    if sources.test is not None:
        assert np.bincount(sources.test.labels).tolist() == [2] * len(sources.train.classes)
    assert name == "folder" or sources.notes[0].startswith("not the complete ")
    assert not sources.skipped


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "cassava2020"])
def test_pixels_depend_on_the_seed_only(tmp_path: Path, name: str) -> None:
    def pixels(seed: int, folder: str) -> list[bytes]:
        root = write_sample(name, tmp_path / folder, seed=seed, per_class=2)
        train = load_source(name, root).train
        return [train.pixels(row).tobytes() for row in range(len(train))]

    assert pixels(1, "a") == pixels(1, "b") != pixels(2, "c")


@pytest.mark.parametrize(("classes", "grey"), [(10, True), (10, False), (24, False), (100, False)])
def test_classes_can_be_learned(classes: int, grey: bool) -> None:
    """The nearest mean of colour and spectrum classifies new images far above chance."""

    def features(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        images = draw_images(labels, classes, (28, 28), rng).astype(float)
        images = images[..., 1:2] if grey else images
        centred = images.mean(-1) - images.mean((1, 2, 3))[:, None, None]
        spectrum = np.abs(np.fft.fft2(centred))[:, :6, :]
        return np.column_stack([images.mean((1, 2)), spectrum.reshape(len(labels), -1) / 300])

    rng, labels = np.random.default_rng(0), np.repeat(np.arange(classes), 8)
    fit = features(labels, rng)
    means = np.stack([fit[labels == label].mean(0) for label in range(classes)])
    new = features(labels, rng)

    preds = np.argmin(((new[:, None] - means) ** 2).sum(-1), 1)

    assert np.mean(preds == labels) > 0.5


def test_invalid_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample of that data set; expected folder, mnist"):
        write_sample("csv", tmp_path)
    with pytest.raises(DataError, match="expected 2 or more, got 1"):
        write_sample("mnist", tmp_path, per_class=1)
