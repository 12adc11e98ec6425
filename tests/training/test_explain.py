"""Explanations of a run, and features of any images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.frozen_runs import GATED, PROBE, frozen_run

from threefold.data.images import decode
from threefold.errors import DataError, RecipeError
from threefold.models.features import FeatureExtractor
from threefold.models.gradcam import grad_cam
from threefold.models.resize import resize_square
from threefold.training.embedding import Embedding, embed, pooled_members, write_embedding
from threefold.training.explain import cosines, run_heat, similar_images
from threefold.training.features.frozen import frozen_backbone
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

SIZE = 128


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two members with random heads, large enough for a feature map of 4 x 4."""
    members = [{**spec, "img_size": SIZE} for spec in (PROBE, GATED)]
    return frozen_run(tmp_path_factory.mktemp("explained"), members=members)


class Counts(Watcher):
    """Counts the images that backbones answer."""

    images = 0

    def features(self, done: int, total: int) -> None:
        self.images = total


def image_paths(run: Run) -> list[Path]:
    return [Path(path) for path in run.sources.train.images]  # type: ignore[union-attr]


def test_the_heat_is_the_mean_of_all_networks(run: Run) -> None:
    pixels = run.sources.train.pixels(0)

    heat = run_heat(run, ["probe", "gated"], pixels, 2)

    maps = []
    for fold in range(2):
        for name in ("probe", "gated"):
            member = run.load_member(run.recipe.member(name), fold, 3)
            maps.append(grad_cam(member, pixels[None], [2], size=SIZE)[0])
    mean = np.mean(maps, axis=0)
    assert np.ptp(mean) > 0
    np.testing.assert_allclose(heat, mean / mean.max(), atol=1e-5)


def test_an_image_is_most_like_itself(run: Run) -> None:
    paths = image_paths(run)

    neighbours = similar_images(run, paths[5], 4)

    train = run.sources.train
    assert neighbours[0].id == train.ids[5]
    assert neighbours[0].label == train.classes[train.labels[5]]
    assert neighbours[0].similarity == pytest.approx(1, abs=1e-5)
    similarities = [neighbour.similarity for neighbour in neighbours]
    assert similarities == sorted(similarities, reverse=True)
    assert len(similar_images(run, paths[5], 1000)) == len(train)


def test_cosines_are_those_of_the_angles() -> None:
    rows = np.array([[2, 0], [0, 3], [1, 1], [-4, 0], [0, 0]], np.float16)

    similarity = cosines(rows, np.array([5, 0], np.float16))

    np.testing.assert_allclose(similarity, [1, 0, np.sqrt(0.5), -1, 0], atol=1e-6)


def test_features_are_those_of_the_backbone(run: Run, tmp_path: Path) -> None:
    paths = image_paths(run)[:3]
    counts = Counts()

    first = embed(run.dir, paths, counts)
    again = Counts()
    second = embed(run.dir, paths, again)

    spec = pooled_members(run.recipe)[0]
    extractor = FeatureExtractor(frozen_backbone(run.folder, spec), "pooled")
    with torch.inference_mode():
        expected = [
            extractor(resize_square(torch.from_numpy(decode(str(path)))[None], SIZE, "squash"))
            for path in paths
        ]
    np.testing.assert_allclose(first.features, torch.cat(expected), rtol=2e-3, atol=2e-3)
    assert first.backbones == (f"test_resnet at {SIZE} px",)
    assert np.array_equal(first.features, second.features)
    assert again.images == 0  # read from the cache


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_features_are_written_with_their_paths(tmp_path: Path, suffix: str) -> None:
    features = np.arange(6, dtype=np.float16).reshape(2, 3)
    embedding = Embedding(("é.png", "b.png"), features, ("one", "two"), (1, 2))
    path = tmp_path / f"f.{suffix}"
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")

    write_embedding(path, embedding)

    if suffix == "npz":
        with np.load(path) as arrays:
            names, values = arrays["paths"].tolist(), arrays["features"]
            assert arrays["widths"].tolist() == [1, 2]
    else:
        table = parquet.read_table(path)
        names, values = table["path"].to_pylist(), np.array(table["features"].to_pylist())
        assert table.schema.metadata[b"threefold.widths"] == b"1, 2"
    assert names == ["é.png", "b.png"]
    np.testing.assert_array_equal(values, features)


def test_wrong_words_are_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    paths = image_paths(run)[:1]

    with pytest.raises(DataError, match=r"ends in \.npz or \.parquet"):
        write_embedding(tmp_path / "f.csv", Embedding((), np.zeros((0, 1)), (), ()))
    with pytest.raises(RecipeError, match="no such member; expected probe, gated, got nobody"):
        embed(run.dir, paths, members=["nobody"])
    with pytest.raises(RecipeError, match="leave --size out"):
        embed(run.dir, paths, size=64)
    with pytest.raises(RecipeError, match="unknown backbone"):
        embed("no_such_network", paths)
    with pytest.raises(DataError, match="no images to embed"):
        embed(run.dir, [])
