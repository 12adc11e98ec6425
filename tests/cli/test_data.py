"""`threefold data fetch` and `data check`: what they print, what they write, and how they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_fetch_shows_the_terms_and_the_next_command(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mnist"
    sample = write_sample("mnist", tmp_path / "sample", per_class=2)
    served(server, "mnist", sample, monkeypatch)

    fetched = runner.invoke(app, ["data", "fetch", "mnist", "--to", str(folder)])
    checked = runner.invoke(app, ["data", "check", str(folder), "--as", "mnist"])

    lines = fetched.output.splitlines()
    assert fetched.exit_code == 0
    assert lines[:2] == [f"MNIST: {PUBLISHED['mnist'].homepage}", "terms: CC BY-SA 3.0"]
    assert lines[2].startswith(str(folder / "train-images-idx3-ubyte.gz"))
    assert f"next   threefold data check {folder} --as mnist" in lines
    counts = "20 training images, 10 test images, 10 classes (2 to 2 training images each)"
    assert checked.exit_code == 0
    assert counts in checked.output


def test_terms_that_restrict_must_be_accepted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = write_sample("icassava2019", tmp_path / "sample", per_class=2)
    served(server, "icassava2019", sample, monkeypatch)

    refused = runner.invoke(app, ["data", "fetch", "icassava2019"])
    written_when_refused = (tmp_path / "data").exists()
    accepted = runner.invoke(app, ["data", "fetch", "icassava2019", "--accept-licence"])

    assert "terms of iCassava 2019 have to be accepted" in str(refused.exception)
    assert "rules of the Kaggle competition" in refused.output
    assert not written_when_refused
    assert accepted.exit_code == 0
    assert (tmp_path / "data/icassava2019/cassavaleafdata.zip.unpacked").is_dir()


def test_no_network_is_one_line(tmp_path: Path) -> None:
    """In a new process, through a proxy at which nobody listens."""
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    environment = {
        **os.environ,
        **dict.fromkeys(proxies, "http://127.0.0.1:1"),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), ""),
    }
    command = [sys.executable, "-m", "threefold", "data", "fetch", "cifar10", "--to", str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("error the server cannot be reached: https://www.cs.toronto.edu")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """48 noise images of two classes by four users, and a copy of a cat among the dogs."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(24):
            random = np.random.default_rng(100 * label + i)
            pixels = random.integers(0, 255, (12, 10, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"user{i % 4}_{i}.png")
    copy = (tmp_path / "cat/user0_0.png").read_bytes()
    (tmp_path / "dog/user9_9.png").write_bytes(copy)
    return tmp_path


def test_check_as_json(folders: Path) -> None:
    (folders / "dog/user9_9.png").rename(folders / "dog/copy.png")

    report = json.loads(runner.invoke(app, ["data", "check", str(folders), "--json"]).output)

    assert report["classes"] == {"cat": {"train": 24}, "dog": {"train": 25}}
    assert report["usable"] is True
    # Equal images are warnings; images that are nearly equal are notes.
    assert {finding["level"] for finding in report["findings"]} == {"warning"}


def test_check_finds_a_file_that_is_no_image(folders: Path) -> None:
    (folders / "dog/bad.png").write_bytes(b"GIF89a")

    done = runner.invoke(app, ["data", "check", str(folders)])
    output = " ".join(done.output.split())  # findings are wrapped

    counts = "49 training images, no test images, 2 classes (24 to 25 training images each)"
    assert done.exit_code == 1
    assert counts in output
    assert "sizes, of 49 looked at: 10 x 12 (49)" in output
    assert "error 1 image cannot be read: " in output
    assert "is in several classes as exact copies" in output
    assert "a run would stop here" in output


def test_check_guesses_groups(folders: Path) -> None:
    output = runner.invoke(app, ["data", "check", str(folders)]).output

    assert "note file names look like 5 groups (user0, user1, user2 ...)" in output


def test_check_reads_images_as_the_fit_that_it_prepares(folders: Path) -> None:
    table = folders / "rows.csv"
    names = [path.relative_to(folders).as_posix() for path in sorted(folders.rglob("*.png"))]
    rows = [f"{name},{name[:3]},{name[4:7]}" for name in names]
    table.write_text("\n".join(["image,what,where", *rows]))
    words = ["data", "check", str(table), "--set"]

    without = runner.invoke(app, words[:-1]).output
    done = runner.invoke(app, [*words, "data.label_column=what", "--json"])
    foreign = runner.invoke(app, [*words, "train.batch_size=8"])
    unknown = runner.invoke(app, [*words, "data.label=what"])

    assert "data.label_column" in without
    assert set(json.loads(done.output)["classes"]) == {"cat", "dog"}
    assert "only keys of the data table" in str(foreign.exception)
    assert "unknown key, did you mean" in str(unknown.exception)


@pytest.mark.slow
def test_exit_codes() -> None:
    usage = threefold_command("data")
    absent = threefold_command("data", "check", "nowhere")
    unknown = threefold_command("data", "fetch", "imagenet")

    assert usage.returncode == 2
    assert (absent.returncode, absent.stderr) == (1, "error no such file or folder: nowhere\n")
    assert unknown.stderr.startswith("error unknown published data set")
