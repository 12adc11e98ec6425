"""Cached features: computed once, found again, rebuilt when damaged, bounded on disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.notes import Notes
from support.tiny_runs import tiny_tree

from threefold.data.dataset import ImageDataset, Sources
from threefold.errors import RecipeError, RunError
from threefold.files import cache_folder, sha256, temporary_path
from threefold.models.member import Member, build_member
from threefold.models.pipeline import to_pixels
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec
from threefold.training.features import cache as features
from threefold.training.features import compute as feature_pass
from threefold.training.features import engines
from threefold.training.features import store as feature_store
from threefold.training.features.cache import FeatureCache
from threefold.training.features.store import FeatureStore
from threefold.training.squares import resize_images

N = 70
"""More than two batches, and no multiple of one."""


def make_sources(n: int = N) -> Sources:
    """Noise images of two sizes' worth of classes."""
    images = np.random.default_rng(0).integers(0, 256, (n, 40, 36, 3), dtype=np.uint8)
    ids = tuple(f"{i:03d}" for i in range(n))
    return Sources(ImageDataset(images, np.arange(n) % 3, ids, ("a", "b", "c")), None, (), ())


def make_recipe(*sets: str) -> Recipe:
    stages = [{"name": "probe", "kind": "head"}]
    return Recipe.parse(tiny_tree(Path("x"), stages=stages), ["features.engine=torch", *sets])


def make_cache(folder: Path, *sets: str, **options: Any) -> FeatureCache:
    sources = options.pop("sources", None) or make_sources()
    return FeatureCache(sources, make_recipe(*sets), folder=folder, **options)


def spec_of(cache: FeatureCache, name: str = "plain") -> MemberSpec:
    return cache.recipe.member(name)


def build_on(cache: FeatureCache, spec: MemberSpec) -> Member:
    """A member with a fresh head on the backbone of the cache."""
    member = build_member(spec, 3, pretrained=False)
    member.backbone = cache.load(spec)
    return member


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images in each pass of a backbone."""
    counts: list[int] = []

    def counting(engine: engines.Engine, pixels: np.ndarray) -> np.ndarray:
        if pixels.any():  # the probe for the size of a row is black
            counts.append(len(pixels))
        return engines.compute(engine, pixels)

    monkeypatch.setattr(features, "compute", counting)
    monkeypatch.setattr(feature_pass, "compute", counting)
    return counts


def files(folder: Path) -> dict[str, str]:
    """Hash of every part."""
    return {path.name: sha256(path) for path in sorted(folder.rglob("*.npy"))}


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "linear"},
        {"kind": "linear", "sequence": "levels"},
        {"kind": "gru", "units": 8, "sequence": "rows"},
        {"kind": "lstm", "units": 8, "sequence": "spatial"},
    ],
    ids=["pooled", "levels", "rows", "spatial"],
)
def test_head_on_cached_features_answers_as_the_member(tmp_path: Path, head: Any) -> None:
    cache = make_cache(tmp_path)
    spec = spec_of(cache).model_copy(update={"head": spec_of(cache).head.model_validate(head)})
    member = build_on(cache, spec)
    pixels = resize_images(list(cache.sources.train.images), 32, "squash")
    with torch.inference_mode():
        expected = member.eval()(to_pixels(pixels, torch.device("cpu")))

    rows = cache.rows("train", spec, np.arange(N))
    with torch.inference_mode():
        answers = member.head(torch.from_numpy(rows.features).float())

    torch.testing.assert_close(answers, expected, rtol=0, atol=5e-3)
    np.testing.assert_array_equal(rows.labels, np.arange(N) % 3)


def test_a_second_cache_reads_and_computes_nothing(tmp_path: Path, passes: list[int]) -> None:
    first = make_cache(tmp_path)
    expected = first.rows("train", spec_of(first), np.arange(N)).features
    computed = sum(passes)

    again = make_cache(tmp_path)
    read = again.rows("train", spec_of(again), np.arange(N)[::-1]).features

    assert computed == sum(passes) == N
    np.testing.assert_array_equal(read[::-1], expected)


def test_more_images_and_new_names_compute_only_what_is_new(
    tmp_path: Path, passes: list[int]
) -> None:
    cache = make_cache(tmp_path, sources=make_sources(N - 6))
    cache.rows("train", spec_of(cache), np.arange(N - 6))
    renamed = replace(make_sources().train, ids=tuple(f"x{i:03d}" for i in range(N)))

    more = make_cache(tmp_path, sources=Sources(renamed, None, (), ()))
    more.rows("train", spec_of(more), np.arange(N))

    assert sum(passes) == N


def test_other_weights_size_and_engine_are_not_mixed_up(tmp_path: Path, passes: list[int]) -> None:
    changes = [(), ("seed=5",), ("members.plain.img_size=40",), ("members.plain.resize=crop",)]
    changes += [("features.engine=onnxruntime",), ("members.plain.backbone=test_efficientnet",)]
    for change in changes:
        cache = make_cache(tmp_path, *change)
        cache.rows("train", spec_of(cache), np.arange(N))

    assert sum(passes) == N * len(changes)


def test_copies_are_augmented_and_cached_likewise(tmp_path: Path, passes: list[int]) -> None:
    cache = make_cache(tmp_path)
    plain = cache.rows("train", spec_of(cache), np.arange(N)).features

    rows = cache.rows("train", spec_of(cache), np.arange(N), copies=2)
    again = make_cache(tmp_path).rows("train", spec_of(cache), np.arange(N), copies=2)
    other = make_cache(tmp_path, "augment.rotation=40")
    others = other.rows("train", spec_of(other), np.arange(N), copies=1)

    assert sum(passes) == N + 2 * N + N
    assert rows.features.shape == (3 * N, plain.shape[1])
    np.testing.assert_array_equal(rows.features[:N], plain)
    np.testing.assert_array_equal(again.features, rows.features)
    np.testing.assert_array_equal(rows.labels, np.tile(np.arange(N) % 3, 3))
    for copy in (rows.features[N : 2 * N], rows.features[2 * N :]):
        assert (copy != plain).any(axis=1).all()
    assert (others.features[N:] != rows.features[N : 2 * N]).any(axis=1).all()


def test_damaged_part_is_found_and_rebuilt(
    tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", 32)
    cache = make_cache(tmp_path)
    expected = cache.rows("train", spec_of(cache), np.arange(N)).features
    before = files(tmp_path)
    path = next(iter(sorted(tmp_path.rglob("*.npy"))))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (tmp_path / path.parent.name / f"{next(reversed(before))[:-4]}.json").write_text("{")

    rebuilt = make_cache(tmp_path).rows("train", spec_of(cache), np.arange(N)).features

    assert sum(passes) > N
    np.testing.assert_array_equal(rebuilt, expected)
    assert files(tmp_path) == before


def test_killed_midway_resumes_to_the_same_files(
    tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", 32)
    whole = make_cache(tmp_path / "whole")
    members = [whole.recipe.member(name) for name in ("plain", "gated")]
    whole.prepare("train", members, np.arange(N), copies=1)
    write, count = FeatureStore.write, [0]

    def killed(store: FeatureStore, images: list[str], values: np.ndarray) -> None:
        count[0] += 1
        if count[0] == 4:
            (store.folder / "half.npy").write_bytes(b"half")
            os.utime(store.folder / "half.npy", (0, 0))
            raise KeyboardInterrupt
        write(store, images, values)

    monkeypatch.setattr(FeatureStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "cut").prepare("train", members, np.arange(N), copies=1)
    monkeypatch.setattr(FeatureStore, "write", write)
    passes.clear()

    make_cache(tmp_path / "cut").prepare("train", members, np.arange(N), copies=1)

    assert sum(passes) == 4 * N - 3 * 32
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_files_that_are_being_written_are_kept(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "key")
    with store.locked():
        pass
    living = temporary_path(store.folder / "part.npy")
    dead = living.with_name(living.name.replace(f"-{os.getpid()}.", "-4194305."))
    paths = [living, dead, store.folder / "young.npy", store.folder / "old.npy"]
    for path in paths:
        path.touch()
    os.utime(paths[-1], (0, 0))

    with store.locked():
        pass

    assert {path for path in paths if path.exists()} == {living, store.folder / "young.npy"}


def test_a_part_cut_short_is_an_error(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "key")
    store.write(["a", "b"], np.ones((2, 5000), np.float16))
    (path,) = store.folder.glob("*.npy")
    os.truncate(path, 1000)

    with pytest.raises(RunError, match="removed or changed while they are in use"):
        store.read(["a", "b"])


def test_stores_unused_for_longest_are_deleted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path)
    cache.rows("train", spec_of(cache), np.arange(N))
    size = feature_store.folder_size(next(path for path in tmp_path.iterdir() if path.is_dir()))
    monkeypatch.setenv("THREEFOLD_CACHE_GB", str(2.5 * size / 1e9))
    for age, change in enumerate(("seed=1", "seed=2", "seed=3")):
        for used in tmp_path.rglob(".used"):
            os.utime(used, (age, used.stat().st_mtime - 100))
        later = make_cache(tmp_path, change)
        later.rows("train", spec_of(later), np.arange(N))

    newest = make_cache(tmp_path, "seed=3")._source(spec_of(cache)).key[:24]
    kept = {path.name.split("-")[0] for path in tmp_path.iterdir() if path.is_dir()}
    assert newest in kept
    assert len(kept) == 2
    assert cache._source(spec_of(cache)).key[:24] not in kept


@pytest.mark.parametrize("limit", ["0", "1e-6"])
def test_features_beyond_the_limit_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    expected = make_cache(tmp_path / "a")
    rows = expected.rows("train", spec_of(expected), np.arange(N))
    monkeypatch.setenv("THREEFOLD_CACHE_GB", limit)
    notes = Notes()
    cache = make_cache(tmp_path / "b", watcher=notes)

    for _ in range(2):
        answers = cache.rows("train", spec_of(cache), np.arange(N))

    np.testing.assert_array_equal(answers.features, rows.features)
    assert not list(tmp_path.glob("b/*/*.npy"))
    assert [text for text in notes.notes if "stay in memory" in text and "GB" in text]


def test_too_little_memory_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE_GB", "0")
    monkeypatch.setattr(feature_store, "available_memory", lambda: 1000)
    cache = make_cache(tmp_path)

    with pytest.raises(RunError, match=r"do not fit into memory.*0.0 GB.*fix"):
        cache.rows("train", spec_of(cache), np.arange(N))

    assert not passes


def test_full_disk_keeps_what_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    def full(*_: Any) -> None:
        raise RunError("cannot write", where="cache", got="No space left on device")

    monkeypatch.setattr(FeatureStore, "write", full)
    notes = Notes()
    cache = make_cache(tmp_path, watcher=notes)

    cache.rows("train", spec_of(cache), np.arange(N))
    cache.rows("train", spec_of(cache), np.arange(N))

    assert sum(passes) == N
    assert any("No space left" in text and "stay in memory" in text for text in notes.notes)


def test_limit_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE_GB", "plenty")

    with pytest.raises(RecipeError, match=r"not a size.*THREEFOLD_CACHE_GB.*got plenty"):
        feature_store.cache_limit()


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THREEFOLD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("features") == tmp_path / "xdg" / "threefold" / "features"

    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "own"))
    assert cache_folder("features") == tmp_path / "own" / "features"
