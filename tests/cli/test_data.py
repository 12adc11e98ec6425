"""`threefold data fetch` and `data check`: what they print, what they write, and how they fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import threefold_command
from support.download_server import Server, served
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.data.published import PUBLISHED
from threefold.data.synthetic import write_sample

runner = CliRunner()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_fetch_shows_the_terms_and_ends_with_what_to_type(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(server, "mnist", write_sample("mnist", tmp_path / "made", per_class=2), monkeypatch)
    done = runner.invoke(app, ["data", "fetch", "mnist", "--to", str(tmp_path / "here")])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[:2] == [f"MNIST: {PUBLISHED['mnist'].homepage}", "terms: CC BY-SA 3.0"]
    assert lines[2].startswith(str(tmp_path / "here/train-images-idx3-ubyte.gz"))
    assert f"next   threefold data check {tmp_path / 'here'} --as mnist" in lines
    found = runner.invoke(app, ["data", "check", str(tmp_path / "here"), "--as", "mnist"])
    assert (
        "20 training images, 10 test images, 10 classes (2 to 2 training images each)"
        in found.output
    )
    assert found.exit_code == 0


def test_the_default_folder_and_terms_that_restrict(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    served(
        server,
        "icassava2019",
        write_sample("icassava2019", tmp_path / "made", per_class=2),
        monkeypatch,
    )
    refused = runner.invoke(app, ["data", "fetch", "icassava2019"])
    assert "terms of iCassava 2019 have to be accepted" in str(refused.exception)
    assert "rules of the Kaggle competition" in refused.output
    assert not (tmp_path / "data").exists()
    assert runner.invoke(app, ["data", "fetch", "icassava2019", "--accept-licence"]).exit_code == 0
    assert (tmp_path / "data/icassava2019/cassavaleafdata.zip.unpacked").is_dir()


def test_no_network_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, through a proxy at which nobody listens."""
    import os
    import subprocess
    import sys

    proxy = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:1"
    )
    environment = {**os.environ, **proxy, "no_proxy": "", "NO_PROXY": ""}
    command = [sys.executable, "-m", "threefold", "data", "fetch", "cifar10", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error the server cannot be reached: https://www.cs.toronto.edu")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_check_as_text_and_as_json(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(24):
            pixels = (
                np.random.default_rng(100 * label + i)
                .integers(0, 255, (12, 10, 3))
                .astype(np.uint8)
            )
            Image.fromarray(pixels).save(tmp_path / name / f"user{i % 4}_{i}.png")
    (tmp_path / "dog/copy.png").write_bytes((tmp_path / "cat/user0_0.png").read_bytes())
    found = json.loads(runner.invoke(app, ["data", "check", str(tmp_path), "--json"]).output)
    assert found["classes"] == {"cat": {"train": 24}, "dog": {"train": 25}}
    assert found["usable"] is True
    assert {f["level"] for f in found["findings"]} == {
        "warning"
    }  # of equal images; near ones are notes
    (tmp_path / "dog/bad.png").write_bytes(b"GIF89a")
    (tmp_path / "dog/copy.png").rename(tmp_path / "dog/user9_9.png")
    done = runner.invoke(app, ["data", "check", str(tmp_path)])
    assert done.exit_code == 1
    assert (
        "49 training images, no test images, 2 classes (24 to 25 training images each)"
        in done.output
    )
    assert "sizes, of 49 looked at: 10 x 12 (49)" in done.output
    assert "error 1 images cannot be read: " in done.output
    assert "are in several classes as exact copies" in done.output
    assert "a run would stop here" in done.output
    (tmp_path / "dog/bad.png").unlink()
    grouped = runner.invoke(app, ["data", "check", str(tmp_path)]).output
    assert "note file names look like 5 groups (user0, user1, user2 ...)" in grouped


def test_exit_codes() -> None:
    assert threefold_command("data").returncode == 2
    absent = threefold_command("data", "check", "nowhere")
    assert (absent.returncode, absent.stderr) == (1, "error no such file or folder: nowhere\n")
    unknown = threefold_command("data", "fetch", "imagenet")
    assert unknown.stderr.startswith("error unknown published data set")
