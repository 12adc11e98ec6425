"""The program as a person runs it: commands in their own processes, stopped and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support.tiny_runs import make_folder, tiny_tree

from threefold.files import sha256
from threefold.recipe.recipe import Recipe

pytestmark = pytest.mark.slow


def start(*words: str | Path) -> subprocess.Popen[str]:
    """Start `threefold` with these words in a process of its own."""
    # A shell's background job ignores Ctrl-C, and so would every process that it starts.
    restore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-m", "threefold", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts if os.name == "posix" else None,
    )


def hashes(run: Path) -> dict[str, str]:
    """Hashes of a run's weights and arrays."""
    return {
        str(path.relative_to(run)): sha256(path)
        for path in sorted(run.rglob("*"))
        if path.suffix in (".safetensors", ".npz")
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny recipe, in a folder of its own."""
    folder = tmp_path_factory.mktemp("stopped")
    path = folder / "tiny.toml"
    path.write_text(Recipe.parse(tiny_tree(make_folder(folder / "images", 12, 4))).dump())
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> dict[str, str]:
    """Hashes of an uninterrupted run."""
    folder = recipe.parent / "uninterrupted"
    _, errors = start("train", recipe, "--out", folder).communicate()
    assert errors == ""
    return hashes(folder)


def stop(recipe: Path, folder: Path, sign: signal.Signals) -> tuple[int, str]:
    """Send a signal to a training run once a job is done; return its code and error output."""
    process = start("train", recipe, "--out", folder)
    while not list(folder.rglob("done.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    "sign", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_a_stopped_run_resumes_to_the_same_bits(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path, sign: signal.Signals
) -> None:
    folder = tmp_path / "stopped"
    code, errors = stop(recipe, folder, sign)

    resumed = start("train", recipe, "--out", folder, "--verbose")
    output, _ = resumed.communicate()

    if sign == signal.SIGINT:
        assert code == 130, errors
        assert f"Resume with: threefold train {recipe} --out {folder}" in errors
    assert resumed.returncode == 0
    assert "already done" in output
    assert hashes(folder) == uninterrupted


@pytest.mark.long
def test_fit_keeps_its_budget_and_exports(tmp_path: Path) -> None:
    root, folder = make_folder(tmp_path / "my photos", 30), tmp_path / "run"
    options = ["--budget", "1m", "--members", "tf_efficientnet_lite0"]
    began = time.monotonic()

    fit = start("fit", root, "--out", folder, *options)
    output, errors = fit.communicate()
    seconds = time.monotonic() - began
    answers, _ = start("predict", folder / "model.onnx", root / "red").communicate()

    assert fit.returncode == 0, errors
    assert "Expect" in output
    assert seconds < 240  # a bound on what is planned, not a benchmark
    lines = answers.splitlines()
    assert len(lines) == 30
    assert sum(": red " in line for line in lines) >= 27
