"""The installation is examined, and its caches are emptied, by the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import threefold_command

from threefold import machine
from threefold.extras import install_command
from threefold.runtime import doctor
from threefold.runtime.doctor import examine, remove_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with 3,000 bytes of features."""
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path))
    (tmp_path / "features" / "key").mkdir(parents=True)
    (tmp_path / "features" / "key" / "part.npy").write_bytes(bytes(3000))
    return tmp_path


def test_doctor_names_versions_devices_and_places(cache: Path) -> None:
    findings = {(finding.section, finding.name): finding for finding in examine()}

    assert findings["versions", "numpy"].value.count(".") == 2
    assert findings["machine", "prediction on"].value.split(", ")[0] == "cpu"
    assert str(cache / "features") in findings["disk", "cache, features"].value
    assert findings["disk", "cache, features"].problem == ""


def test_little_memory_and_disk_are_problems(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**9)
    monkeypatch.setattr(doctor, "free_disk", lambda folder: 10**9)

    problems = [finding.name for finding in examine() if finding.problem]

    assert {"memory", "free here"} <= set(problems)


def test_cache_that_is_a_file_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "file"))

    problem = next(f.problem for f in examine() if f.name == "cache, features")

    assert "set THREEFOLD_CACHE to a folder of yours" in problem


def test_missing_package_names_its_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "train"})

    finding = next(f for f in examine() if f.name == "no-such-package")

    assert finding.value == f"not installed: {install_command('train')}"


def test_cleaning_frees_what_there_was(cache: Path) -> None:
    assert machine.folder_size(cache / "features") == 3000

    assert remove_cache("features") == 3000

    assert not (cache / "features").exists()
    assert remove_cache("archives") == 0


def test_clean_asks_first(cache: Path) -> None:
    refused = threefold_command("clean", stdin="")
    assert refused.returncode == 1
    assert "nothing was deleted" in refused.stderr
    assert (cache / "features" / "key" / "part.npy").exists()

    done = threefold_command("clean", "features", "--yes")

    assert done.returncode == 0, done.stderr
    assert not (cache / "features").exists()
    assert threefold_command("clean").stdout.endswith("nothing to delete\n")


@pytest.mark.slow
def test_doctor_as_json_can_be_read(cache: Path) -> None:
    outcome = threefold_command("doctor", "--json")

    records = json.loads(outcome.stdout)
    assert outcome.returncode == any(record["problem"] for record in records)
    assert {"versions", "machine", "disk"} <= {record["section"] for record in records}
