"""The whole, as a person runs it: commands in processes of their own, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_runs import make_folder, tiny_tree

from threefold.files import sha256
from threefold.recipe import Recipe

pytestmark = pytest.mark.slow


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "threefold", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would all that it starts.
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        if os.name == "posix"
        else None,
    )


def hashes(run: Path) -> dict[str, str]:
    return {
        str(p.relative_to(run)): sha256(p)
        for p in sorted(run.rglob("*"))
        if p.suffix in (".safetensors", ".npz")
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    path = folder / "tiny.toml"
    path.write_text(Recipe.parse(tiny_tree(make_folder(folder / "images", 12, 4))).dump())
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> dict[str, str]:
    """Hashes of an uninterrupted run."""
    run = start("train", str(recipe), "--out", str(recipe.parent / "whole"))
    assert run.communicate()[1] == ""
    return hashes(recipe.parent / "whole")


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_bits(
    recipe: Path, whole: dict[str, str], tmp_path: Path, sign: signal.Signals
) -> None:
    cut = start("train", str(recipe), "--out", str(tmp_path / "cut"))
    while not list((tmp_path / "cut").rglob("done.json")) and cut.poll() is None:
        time.sleep(0.01)
    cut.send_signal(sign)
    _, errors = cut.communicate()
    if sign == signal.SIGINT:
        assert cut.returncode == 130
        assert f"Resume with: threefold train {recipe} --out {tmp_path / 'cut'}" in errors
    again = start("train", str(recipe), "--out", str(tmp_path / "cut"), "--verbose")
    output, _ = again.communicate()
    assert again.returncode == 0
    assert "already done" in output
    assert hashes(tmp_path / "cut") == whole


def test_fit_keeps_its_budget_and_ends_in_a_file_that_answers(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "my photos", 30)
    began = time.monotonic()
    fit = start(
        "fit",
        str(root),
        "--out",
        str(tmp_path / "run"),
        "--budget",
        "1m",
        "--members",
        "tf_efficientnet_lite0",
    )
    output, errors = fit.communicate()
    assert fit.returncode == 0, errors
    assert "Expect" in output
    assert time.monotonic() - began < 240  # a bound on what is planned, not a benchmark
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "threefold",
            "predict",
            str(tmp_path / "run/model.onnx"),
            str(root / "red"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(answer) == 30
    assert sum(": red " in line for line in answer) >= 27
