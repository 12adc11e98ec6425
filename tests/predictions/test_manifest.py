"""The manifest of a run: what was changed, swapped or removed is found; a kill does no harm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from threefold.errors import DamagedFileError, RunError
from threefold.predictions import manifest
from threefold.predictions.manifest import MANIFEST, ManifestFiles

NAME = "some.npz"


def write(folder: Path, value: int = 1) -> ManifestFiles:
    """Write a file of a run."""
    files = ManifestFiles(folder)
    files.write_arrays(NAME, x=np.full(100, value))
    return files


def hashes(folder: Path) -> list[str]:
    """The hashes of the file in the manifest."""
    return list(json.loads((folder / MANIFEST).read_text())["files"][NAME])


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "emptied": lambda p: p.write_bytes(b""),
    "removed": lambda p: p.unlink(),
    "a folder": lambda p: replace(p, Path.mkdir),
    "a circle of links": lambda p: replace(p, lambda q: q.symlink_to(q.name)),
    "a pipe": lambda p: replace(p, os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_any_damage_is_one_line_with_its_remedy(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    write(tmp_path)
    damage(tmp_path / NAME)

    with pytest.raises(DamagedFileError, match=r"some\.npz.*fix: .*run `threefold train ") as error:
        ManifestFiles(tmp_path).read_arrays(NAME)

    assert "\n" not in str(error.value)
    assert ManifestFiles(tmp_path).has(NAME) or not (tmp_path / NAME).exists()


def test_the_same_file_of_another_run_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    (tmp_path / "a" / NAME).write_bytes((tmp_path / "b" / NAME).read_bytes())

    with pytest.raises(DamagedFileError, match=r"changed since.*or is that of another run"):
        ManifestFiles(tmp_path / "a").verify(NAME)
    assert ManifestFiles(tmp_path / "b").read_arrays(NAME)["x"][0] == 2


@pytest.mark.parametrize("had_one", [False, True])
def test_a_kill_between_manifest_and_file_blames_nobody(
    tmp_path: Path, had_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if had_one:
        write(tmp_path, 1)
    write_bytes = manifest.write_bytes

    def killed(path: Path, content: bytes, *, durable: bool = True) -> None:
        if path.name == NAME:
            raise KeyboardInterrupt
        write_bytes(path, content, durable=durable)

    with monkeypatch.context() as context:
        context.setattr(manifest, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)

    files = ManifestFiles(tmp_path)
    assert files.has(NAME) == had_one
    if had_one:
        assert files.read_arrays(NAME)["x"][0] == 1
    write(tmp_path, 2)
    assert len(hashes(tmp_path)) == 1
    assert ManifestFiles(tmp_path).read_arrays(NAME)["x"][0] == 2


def test_a_file_that_another_program_writes_is_recorded(tmp_path: Path) -> None:
    files = write(tmp_path)
    before = hashes(tmp_path)

    with files.recording(NAME) as path:
        assert NAME not in ManifestFiles(tmp_path).manifest
        path.write_bytes(b"new")
    assert hashes(tmp_path) != before
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="no"), files.recording(NAME):
        raise ValueError("no")  # the file is as it was

    assert hashes(tmp_path) == before
    files.verify(NAME)


def test_what_is_known_is_not_hashed_anew(tmp_path: Path) -> None:
    files = write(tmp_path)
    (tmp_path / NAME).write_bytes(b"damaged")
    (tmp_path / "other").write_bytes(b"x")

    files.record_new([NAME, "other", "absent"])

    assert set(files.manifest) == {NAME, "other"}
    with pytest.raises(DamagedFileError):
        files.verify(NAME)


def test_a_run_without_manifest_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / MANIFEST).unlink()

    assert ManifestFiles(tmp_path).read_arrays(NAME)["x"][0] == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1, "files": {}, "sha256": "0"}'])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)

    with pytest.raises(RunError, match=r"manifest\.json") as error:
        ManifestFiles(tmp_path).verify(NAME)

    assert "\n" not in str(error.value)
