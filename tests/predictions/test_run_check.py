"""`threefold doctor RUN`: every file is verified, and what can be made again is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.command_line import threefold_command
from support.tiny_runs import hash_files

from threefold.files import sha256
from threefold.predictions.run_check import CHOICES, RunCheck, check_run, remove_damaged
from threefold.predictions.run_folder import RunFolder
from threefold.training.choice_record import ChoiceRecord
from threefold.training.run import Run


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.dir, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def faulty(copy: Path, check: RunCheck) -> set[str]:
    return {fault.path.relative_to(copy).as_posix() for fault in check.faults}


def all_files(run: Path) -> set[str]:
    """Files of a run but for locks and the measured choices, which are not hashed."""
    paths = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return {path for path in paths if path not in CHOICES and not path.endswith(".lock")}


def test_a_sound_run_has_no_fault(copy: Path) -> None:
    check = check_run(copy)

    assert check.faults == ()
    assert check.unknown == ()
    assert check.verified == len(all_files(copy)) - 1  # the manifest has its own checksum


def test_a_flip_in_any_file_is_found(copy: Path) -> None:
    missed = []
    for name in sorted(all_files(copy)):
        kept = (copy / name).read_bytes()
        flip(copy / name)
        if name not in faulty(copy, check_run(copy)):
            missed.append(name)
        (copy / name).write_bytes(kept)

    assert missed == []
    assert check_run(copy).faults == ()


def test_a_changed_choice_of_an_engine_is_found(copy: Path) -> None:
    ChoiceRecord(copy / "features.json").put("key", "torch-float32")
    assert check_run(copy).faults == ()
    text = (copy / "features.json").read_text()
    (copy / "features.json").write_text(text.replace("float32", "float16"))

    assert faulty(copy, check_run(copy)) == {"features.json"}
    assert ChoiceRecord(copy / "features.json").get("key") == ""


def test_what_cannot_be_made_again_is_left(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    for name in ("recipe.toml", "ledger.json"):
        flip(copy / name)

    check = check_run(copy)
    deleted = remove_damaged(copy, check) if not (copy / "recipe.toml").is_dir() else []

    assert check.unknown == ("notes.txt",)
    assert faulty(copy, check) >= {"recipe.toml", "ledger.json"}
    assert [fault.can_mend for fault in check.faults if fault.path.name == "recipe.toml"] == [False]
    assert deleted == []
    opened = RunFolder(copy).test_opened()
    assert opened is not None
    assert opened.times == 1


@pytest.mark.slow
def test_mending_brings_back_the_same_bits(copy: Path, finished: Run) -> None:
    damaged = ["oof.npz", "chosen.npz", "run.json", "model.onnx", "jobs/gated/fold1/two/probs.npz"]
    for name in damaged:
        flip(copy / name)
    (copy / "thumbs.npz").unlink()

    found = threefold_command("doctor", str(copy), "--json")
    mended = threefold_command("doctor", str(copy), "--mend")

    names = {Path(fault["path"]).name for fault in json.loads(found.stdout)["faults"]}
    assert found.returncode == 1
    assert names == {Path(name).name for name in damaged} | {"thumbs.npz"}
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "0 damaged or missing" in mended.stdout
    assert hash_files(copy) == hash_files(finished.dir)
    assert sha256(copy / "model.onnx") == sha256(finished.dir / "model.onnx")
