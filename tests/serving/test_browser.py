"""The folder for the browser: its files, what is refused, and the pinned onnxruntime-web."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, external_data_helper
from support.fake_runs import fake_run
from support.server import card, colour_graph, write_model
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.errors import ExportError
from threefold.runtime.model import Model
from threefold.serving import browser, onnxruntime_web
from threefold.serving.browser import write_web
from threefold.serving.onnxruntime_web import read_runtime

PINNED = {"ort.js": b"// runs the model", "ort.wasm": b"\0asm"}
"""Contents that stand for the real runtime in these tests."""


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pin a runtime of a few bytes instead of the real one."""
    files = {
        name: file._replace(sha256=hashlib.sha256(PINNED[name]).hexdigest())
        for name, file in onnxruntime_web.FILES.items()
    }
    monkeypatch.setattr(onnxruntime_web, "FILES", files)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.onnx")


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return write_package(tmp_path / "ort.tgz")


def write_package(path: Path, *, changed: bool = False, link: bool = False) -> Path:
    """Write an npm package as `npm pack` does."""
    with tarfile.open(path, "w:gz") as archive:
        for name, file in onnxruntime_web.FILES.items():
            content = PINNED[name] + (b"!" if changed else b"")
            info = tarfile.TarInfo(f"package/dist/{file.name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("package/dist/more")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def use_npm(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put a shell script on the path as npm."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name_in_card(folder: Path) -> str:
    return str(json.loads((folder / "card.json").read_text())["name"])


def test_the_folder_holds_what_it_needs(tmp_path: Path, runtime: Path) -> None:
    model = write_model(tmp_path / "m.onnx", model_card=card(temperature=float("inf")))
    folder = tmp_path / "web"

    written = write_web(model, folder, runtime)

    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    runtime_files = {path.name: path.read_bytes() for path in (folder / "ort").iterdir()}
    runtime_files.pop("LICENSE")
    web_card = json.loads((folder / "card.json").read_text())
    expected_accuracy = "88.4% (86.3% to 90.2%); 1000 rows, test, protocol honest"
    assert set(names_in(folder)) == browser.FOLDER_FILES
    assert written.bytes == sum(sizes)
    assert (folder / "model.onnx").read_bytes() == model.read_bytes()
    assert runtime_files == PINNED
    assert web_card["classes"] == list(Model(model).classes)
    assert web_card["temperature"] is None
    assert web_card["model"]["bytes"] == model.stat().st_size
    assert expected_accuracy in (folder / "README.md").read_text()


def test_the_page_names_its_own_files_only(tmp_path: Path, model: Path, runtime: Path) -> None:
    folder = tmp_path / "web"

    write_web(model, folder, runtime)

    page = (folder / "index.html").read_text()
    scripts = "".join(path.read_text() for path in folder.glob("*.js"))
    imported = set(re.findall(r'from "\./([\w/.]+)"', scripts))
    assert "Content-Security-Policy" in page
    assert "unsafe" not in page
    assert imported <= {str(path.relative_to(folder)) for path in folder.rglob("*.js")}
    for path in (*folder.glob("*.js"), folder / "index.html", folder / "style.css"):
        assert not re.search(r"https?:|//\w+\.\w|@import", path.read_text()), path.name


def test_the_same_command_again_replaces_the_folder(
    tmp_path: Path, model: Path, runtime: Path
) -> None:
    folder = tmp_path / "web"
    write_web(model, folder, runtime)
    write_model(model, model_card=card(name="new"))

    write_web(model, folder, runtime)

    assert name_in_card(folder) == "new"
    assert names_in(tmp_path) == ["m.onnx", "ort.tgz", "web"]


def test_nothing_else_is_ever_replaced(tmp_path: Path, model: Path, runtime: Path) -> None:
    folder = tmp_path / "web"
    write_web(model, folder, runtime)
    (folder / "mine.txt").write_text("keep")
    (tmp_path / "link").symlink_to(folder)

    message = r"other files: .*web; got mine.txt; fix: choose a new folder"
    with pytest.raises(ExportError, match=message):
        write_web(model, folder, runtime)
    assert (folder / "mine.txt").read_text() == "keep"
    with pytest.raises(ExportError, match="other files"):
        write_web(model, tmp_path, runtime)
    with pytest.raises(ExportError, match="cannot write the folder"):
        write_web(model, model, runtime)
    (folder / "mine.txt").unlink()
    with pytest.raises(ExportError, match="other files"):
        write_web(model, tmp_path / "link", runtime)


def test_an_empty_folder_is_used(tmp_path: Path, model: Path, runtime: Path) -> None:
    (tmp_path / "empty").mkdir()

    write_web(model, tmp_path / "empty", runtime)

    assert set(names_in(tmp_path / "empty")) == browser.FOLDER_FILES


def test_the_runtime_comes_from_a_package_or_a_folder(tmp_path: Path, runtime: Path) -> None:
    with tarfile.open(runtime) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")

    assert read_runtime(runtime) == PINNED
    for folder in ("unpacked", "unpacked/package", "unpacked/package/dist"):
        assert read_runtime(tmp_path / folder) == PINNED


def test_only_the_pinned_runtime_is_accepted(tmp_path: Path) -> None:
    changed = write_package(tmp_path / "changed.tgz", changed=True)
    link = write_package(tmp_path / "link.tgz", link=True)
    for path, message in (
        (changed, "not the supported onnxruntime-web"),
        (link, "/etc/passwd"),
        (tmp_path / "none.tgz", "No such file"),
        (tmp_path, "got no such file"),
    ):
        with pytest.raises(ExportError, match=message) as error:
            read_runtime(path)
        assert "--web-runtime PATH" in str(error.value)


def test_npm_is_asked_for_exactly_one_version(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "arguments"
    script = f'echo "$@" > {log}; cp {runtime} onnxruntime-web-0.tgz'
    use_npm(monkeypatch, tmp_path / "bin", script)

    contents = read_runtime()

    package = f"onnxruntime-web@{onnxruntime_web.VERSION}"
    assert contents == PINNED
    assert log.read_text().split()[:3] == ["pack", package, "--ignore-scripts"]


def test_without_npm_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    message = r"npm is needed.*npm pack onnxruntime-web@.*--web-runtime PATH"
    with pytest.raises(ExportError, match=message):
        read_runtime()


def test_where_npm_fails_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_npm(monkeypatch, tmp_path / "bin", "echo no network >&2; exit 1")

    message = "npm cannot get onnxruntime-web; got no network; fix: install npm"
    with pytest.raises(ExportError, match=message):
        read_runtime()
    assert not list(tmp_path.glob("**/*.tgz"))


def test_a_model_with_weights_outside_of_it_is_refused(tmp_path: Path, runtime: Path) -> None:
    graph: Any = colour_graph()
    weights = next(t for t in graph.graph.initializer if t.name == "weights")
    (tmp_path / "w.bin").write_bytes(weights.raw_data)
    external_data_helper.set_external_data(weights, "w.bin")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    model = write_model(tmp_path / "m.onnx", graph)

    with pytest.raises(ExportError, match="external data that is not there"):
        write_web(model, tmp_path / "web", runtime)
    assert names_in(tmp_path) == ["m.onnx", "ort.tgz", "w.bin"]


def test_the_command_takes_an_exported_file(tmp_path: Path, model: Path, runtime: Path) -> None:
    command = ["export", str(model), "--web", str(tmp_path / "web"), "--web-runtime", str(runtime)]

    result = CliRunner().invoke(app, command)

    assert result.exit_code == 0
    assert "python -m http.server" in result.output
    assert (tmp_path / "web/index.html").exists()
    for bad in (["export", str(model)], [*command, "--method", "mean"]):
        assert isinstance(CliRunner().invoke(app, bad).exception, ExportError)


def test_onnxruntime_web_is_read_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["export", str(run), "--out", str(tmp_path / "m.onnx"), "--web", str(tmp_path / "w")]

    result = CliRunner().invoke(app, command)

    assert isinstance(result.exception, ExportError)
    assert "npm is needed" in str(result.exception)
    assert not (tmp_path / "m.onnx").exists()


def test_a_full_folder_is_refused_before_the_export(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")

    result = CliRunner().invoke(app, ["export", str(tmp_path / "no run"), "--web", str(tmp_path)])

    assert "the folder holds other files" in str(result.exception)


def test_the_old_folder_stays_if_the_new_one_fails(
    tmp_path: Path, model: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web"
    write_web(model, folder, runtime)
    write_model(model, model_card=card(name="new"))
    replace = os.replace

    def fail_for_the_new_folder(source: Path, target: Path) -> None:
        if Path(target) == folder and Path(source).suffix != ".old":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_new_folder)
    with pytest.raises(ExportError, match="No space left on device"):
        write_web(model, folder, runtime)
    assert name_in_card(folder) == "colours"
    assert names_in(tmp_path) == ["m.onnx", "ort.tgz", "web"]
