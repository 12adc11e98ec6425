"""A published run comes back from the hub with the same answers, and tells nothing private."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from support.command_line import threefold_command
from support.hub_server import TOKEN, Hub, hub_server
from support.tiny_runs import COLOURS, paint

from threefold.errors import ExportError
from threefold.exporting.hub_readme import write_readme
from threefold.exporting.hub_upload import push
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.runtime.hub import find_model, is_address, network_errors, pull
from threefold.runtime.model import load

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> Command:
    """The program, for which this hub is the hub."""

    def run(*words: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        variables = {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "" if token else "1",
        }
        return threefold_command(*map(str, words), variables=variables)

    return run


@pytest.mark.slow
def test_published_run_answers_alike_from_the_hub(
    finished: Any, online: Command, hub: Hub, tmp_path: Path
) -> None:
    image = tmp_path / "red.png"
    paint(image, COLOURS["red"], seed=5)
    words = ("predict", finished.dir / "model.onnx", image, "--json")
    expected = threefold_command(*map(str, words)).stdout

    pushed = online("push", finished.dir, "owner/tiny", "--licence", "apache-2.0")
    answer = online("predict", "hf://owner/tiny", image, "--json")
    pulled = online("pull", "owner/tiny", "--out", tmp_path / "copy", token="")

    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[0] == f"{hub.address}/owner/tiny"
    assert answer.stdout == expected, answer.stderr
    assert pulled.returncode == 0, pulled.stderr
    copy, original = load(tmp_path / "copy" / "model.onnx"), load(finished.dir / "model.onnx")
    assert np.array_equal(copy.predict_proba(image), original.predict_proba(image))
    files = hub.repositories["owner/tiny"]
    assert {"README.md", "model.onnx", "recipe.toml", "results.json"} <= files.keys()
    assert "weights/plain/fold0.safetensors" in files
    # Neither a folder of this machine nor the name of an image.
    text = b"".join(content for name, content in files.items() if not name.endswith(".onnx"))
    assert str(tmp_path.parent.parent).encode() not in text
    assert b"000.png" not in text


@pytest.mark.slow
def test_hub_errors_are_one_line(finished: Any, online: Command, tmp_path: Path) -> None:
    outcomes = {
        "does not know you": online("push", finished.dir, "owner/other", token=""),
        "no such repository": online("pull", "owner/nothing", "--out", tmp_path / "x"),
        "not an address": online("predict", "hf://just-a-name", "x.png"),
        "no such run": online("push", tmp_path / "nothing", "owner/tiny"),
    }

    for words, outcome in outcomes.items():
        assert outcome.returncode == 1
        assert len(outcome.stderr.strip().splitlines()) == 1, outcome.stderr
        if words != "no such run":
            assert words in outcome.stderr


def test_readme_states_accuracy_with_interval(finished: Any) -> None:
    text = write_readme(RunFolder.open(finished.dir), "owner/tiny", "apache-2.0")

    card = ModelCard(text)
    expected = finished.results.expected
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    accuracy = next(e for e in card.data.eval_results if e.metric_type == "accuracy")
    score = finished.results.score(finished.results.chosen, "ensemble", "test")
    assert accuracy.metric_value == pytest.approx(score.accuracy, abs=1e-4)
    low, high = expected.interval
    assert f"**{expected.accuracy:.1%}**" in text
    assert f"{low:.1%} to {high:.1%}" in text
    assert "hf://owner/tiny" in text
    assert all(f"| {name} |" in text for name in finished.results.classes)


def test_address_survives_being_a_path() -> None:
    assert is_address(Path("hf://owner/tiny"))
    assert not is_address("hf/owner")


def test_shown_recipe_has_no_folder(finished: Any) -> None:
    from threefold.exporting.hub_upload import without_folders

    recipe = without_folders(Recipe.load(finished.dir / "recipe.toml"))

    assert recipe.data.root == Path(finished.recipe.data.root).name


def test_push_without_a_network_is_one_line(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise network_errors()[0]("Name or service not known")

    monkeypatch.setattr("threefold.exporting.hub_upload.HfApi.create_repo", fail)

    with pytest.raises(ExportError, match=r"cannot reach the hub.*Name or service"):
        push(finished.dir, "owner/tiny")


def test_a_full_disk_is_no_fault_of_the_hub(
    finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.onnx")

    monkeypatch.setattr("threefold.exporting.hub_upload.HfApi.create_repo", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)

    with pytest.raises(ExportError, match=r"cannot write: model.onnx; got No space .*; fix: free"):
        push(finished.dir, "owner/tiny")
    with pytest.raises(ExportError, match=r"cannot write: .*got No space left.*; fix: free"):
        pull("owner/tiny", tmp_path / "new")


def test_offline_address_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot be reached"):
        find_model("hf://owner/never-fetched")
