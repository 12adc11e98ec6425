"""Images are decoded once: known ones are not decoded again until they change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sources import load_source

from threefold.data import images, verified
from threefold.data.dataset import Sources
from threefold.data.same_content import same_digests
from threefold.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of three images, old enough to be remembered."""
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED", -60.0)
    for i in range(6):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 4), i, np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded."""
    names: list[str] = []
    original = images._read

    def read(source: object, digest: object = None, **options: bool) -> object:
        names.append(Path(str(source)).name)
        return original(source, digest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "_read", read)
    return names


def load(folder: Path, **options: str) -> Sources:
    return load_source("folder", folder, **options)


def test_known_images_are_not_decoded_again(folder: Path, decoded: list[str]) -> None:
    load(folder)
    assert sorted(decoded) == [f"{i}.png" for i in range(6)]
    decoded.clear()

    first = load(folder).train
    assert decoded == []

    changed = folder / "a/2.png"
    Image.fromarray(np.full((3, 4), 99, np.uint8)).save(changed)
    (folder / "b/3.png").unlink()
    second = load(folder).train

    assert decoded == ["2.png"]
    assert first.digests is not None
    assert second.digests is not None
    assert first.digests[0] == second.digests[0] != b""
    assert first.digests[1] != second.digests[1]


def test_a_change_of_equal_size_and_time_is_seen(folder: Path, decoded: list[str]) -> None:
    path = folder / "a/0.png"
    load(folder)
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(DataError, match="1 of 6 images cannot be used"):
        load(folder)


def test_bad_images_are_reported_each_time(folder: Path) -> None:
    (folder / "a/2.png").write_bytes(b"")

    for _ in range(2):
        with pytest.raises(DataError, match="1 of 6 images cannot be used"):
            load(folder)
        assert len(load(folder, bad_images="skip").skipped) == 1


def test_files_that_are_being_written_are_not_remembered(
    folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "SETTLED", 60.0)
    load(folder)
    load(folder)

    assert len(decoded) == 12


def test_a_cut_or_foreign_cache_is_no_error(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    load(folder)
    (known,) = (tmp_path / "cache/verified").iterdir()
    known.write_bytes(known.read_bytes()[:70])
    decoded.clear()

    load(folder)
    load(folder)

    assert len(decoded) == 4


def test_an_interruption_loses_little(
    folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verified.check_hashed

    def stop(path: Path, content: bytes | None = None) -> object:
        if path.name == "5.png":
            raise KeyboardInterrupt
        return original(path, content)

    monkeypatch.setattr(verified, "check_hashed", stop)
    monkeypatch.setattr(images, "TASK", 1)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    monkeypatch.setattr(verified, "check_hashed", original)
    decoded.clear()

    load(folder)

    assert decoded == ["5.png"]


def test_equal_digests_are_grouped() -> None:
    digests = np.array([b"x", b"", b"y", b"x", b"", b"y", b"z", b"x"], "S16")

    assert same_digests(digests) == [[0, 3, 7], [2, 5]]
    assert same_digests(np.array([b"a"], "S16")) == []
    assert same_digests(np.array([], "S16")) == []
