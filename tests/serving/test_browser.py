"""The folder for the browser: what is in it, what is refused, and that nothing but the pinned runtime gets in."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, external_data_helper
from support.server import card, colour_graph, write_model
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.errors import ExportError
from threefold.runtime.model import Model
from threefold.serving import browser, onnxruntime_web

PINNED = {"ort.js": b"// runs the model", "ort.wasm": b"\0asm"}


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime of a few bytes in the place of the real one."""
    files = {
        target_name: file._replace(sha256=hashlib.sha256(PINNED[target_name]).hexdigest())
        for target_name, file in onnxruntime_web.FILES.items()
    }
    monkeypatch.setattr(onnxruntime_web, "FILES", files)


def package(path: Path, *, changed: bool = False, link: bool = False) -> Path:
    """An npm package as `npm pack` writes it."""
    with tarfile.open(path, "w:gz") as archive:
        for ours, (name, _) in onnxruntime_web.FILES.items():
            content = PINNED[ours] + b"!" * changed
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("package/dist/more")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def npm(folder: Path, script: str) -> Path:
    """An npm of our own on the path."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


def test_the_folder_holds_what_it_needs_and_asks_nobody_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", model_card=card(temperature=float("inf")))
    made = browser.write_web(model, tmp_path / "web", package(tmp_path / "ort.tgz"))
    folder = tmp_path / "web"
    assert {path.name for path in folder.iterdir()} == browser.FOLDER_FILES
    assert made.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (folder / "model.onnx").read_bytes() == model.read_bytes()
    assert {
        path.name: path.read_bytes()
        for path in (folder / "ort").iterdir()
        if path.name != "LICENSE"
    } == PINNED
    told = json.loads((folder / "card.json").read_text())
    assert told["classes"] == list(Model(model).classes)
    assert told["temperature"] is None
    assert told["model"]["bytes"] == model.stat().st_size
    page = (folder / "index.html").read_text()
    assert "Content-Security-Policy" in page
    assert "unsafe" not in page
    for path in (*folder.glob("*.js"), folder / "index.html", folder / "style.css"):
        assert not re.search(r"https?:|//\w+\.\w|@import", path.read_text()), path.name
    assert set(
        re.findall(r'from "\./([\w/.]+)"', "".join(p.read_text() for p in folder.glob("*.js")))
    ) <= {str(path.relative_to(folder)) for path in folder.rglob("*.js")}
    assert (
        "88.4% (86.3% to 90.2%); 1000 rows, test, protocol honest"
        in (folder / "README.md").read_text()
    )


def test_the_same_command_again_replaces_the_folder_and_nothing_else_is_ever_replaced(
    tmp_path: Path,
) -> None:
    model, runtime, folder = (
        write_model(tmp_path / "m.onnx"),
        package(tmp_path / "ort.tgz"),
        tmp_path / "web",
    )
    browser.write_web(model, folder, runtime)
    write_model(model, model_card=card(name="new"))
    browser.write_web(model, folder, runtime)
    assert json.loads((folder / "card.json").read_text())["name"] == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "ort.tgz", "web"]
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(
        ExportError, match=r"other files: .*web; got mine.txt; fix: choose a new folder"
    ):
        browser.write_web(model, folder, runtime)
    assert (folder / "mine.txt").read_text() == "keep"
    with pytest.raises(ExportError, match="other files"):
        browser.write_web(model, tmp_path, runtime)
    with pytest.raises(ExportError, match="cannot write the folder"):
        browser.write_web(model, model, runtime)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ExportError, match="other files"):
        browser.write_web(model, tmp_path / "link", runtime)
    (tmp_path / "empty").mkdir()
    browser.write_web(model, tmp_path / "empty", runtime)


def test_the_runtime_comes_from_a_package_or_a_folder_and_is_the_pinned_one(tmp_path: Path) -> None:
    archive = package(tmp_path / "ort.tgz")
    assert onnxruntime_web.read_runtime(archive) == PINNED
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    for folder in ("unpacked", "unpacked/package", "unpacked/package/dist"):
        assert onnxruntime_web.read_runtime(tmp_path / folder) == PINNED
    for other, got in (
        (package(tmp_path / "changed.tgz", changed=True), "not the supported onnxruntime-web"),
        (package(tmp_path / "link.tgz", link=True), "/etc/passwd"),
        (tmp_path / "none.tgz", "No such file"),
        (tmp_path, "got no such file"),
    ):
        with pytest.raises(ExportError, match=got) as error:
            onnxruntime_web.read_runtime(other)
        assert "--web-runtime PATH" in str(error.value)


def test_npm_is_asked_for_exactly_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = package(tmp_path / "ort.tgz")
    asked = npm(
        tmp_path / "bin", f'echo "$@" > {tmp_path}/asked; cp {archive} onnxruntime-web-0.tgz'
    )
    monkeypatch.setenv("PATH", f"{asked}:/usr/bin:/bin")
    assert onnxruntime_web.read_runtime() == PINNED
    assert (tmp_path / "asked").read_text().split()[:3] == [
        "pack",
        f"onnxruntime-web@{onnxruntime_web.VERSION}",
        "--ignore-scripts",
    ]


def test_without_npm_or_where_it_fails_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ExportError, match=r"npm is needed.*npm pack onnxruntime-web@.*--web-runtime PATH"
    ):
        onnxruntime_web.read_runtime()
    monkeypatch.setenv(
        "PATH", f"{npm(tmp_path / 'bin', 'echo no network >&2; exit 1')}:/usr/bin:/bin"
    )
    with pytest.raises(
        ExportError, match="npm cannot get onnxruntime-web; got no network; fix: install npm"
    ):
        onnxruntime_web.read_runtime()
    assert not list(tmp_path.glob("**/*.tgz"))


def test_a_model_with_weights_outside_of_it_is_refused(tmp_path: Path) -> None:
    graph: Any = colour_graph()
    weights = next(t for t in graph.graph.initializer if t.name == "weights")
    (tmp_path / "w.bin").write_bytes(weights.raw_data)
    external_data_helper.set_external_data(weights, "w.bin")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    model = write_model(tmp_path / "m.onnx", graph)
    with pytest.raises(ExportError, match="external data that is not there"):
        browser.write_web(model, tmp_path / "web", package(tmp_path / "ort.tgz"))
    assert not (tmp_path / "web").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "ort.tgz", "w.bin"]


def test_the_command_takes_an_exported_file(tmp_path: Path) -> None:
    model, runtime = write_model(tmp_path / "m.onnx"), package(tmp_path / "ort.tgz")
    words = ["export", str(model), "--web", str(tmp_path / "web"), "--web-runtime", str(runtime)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "python -m http.server" in done.output
    assert (tmp_path / "web/index.html").exists()
    for more in (["export", str(model)], [*words, "--method", "mean"]):
        assert isinstance(CliRunner().invoke(app, more).exception, ExportError)


def test_a_folder_that_is_not_free_is_refused_before_the_export(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "no run"), "--web", str(tmp_path)])
    assert "the folder holds other files" in str(done.exception)


def test_the_old_folder_stays_where_the_new_one_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runtime, folder = (
        write_model(tmp_path / "m.onnx"),
        package(tmp_path / "ort.tgz"),
        tmp_path / "web",
    )
    browser.write_web(model, folder, runtime)
    write_model(model, model_card=card(name="new"))
    replace = browser.os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source).suffix == ".part":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(browser.os, "replace", fails)
    with pytest.raises(ExportError, match="No space left on device"):
        browser.write_web(model, folder, runtime)
    assert json.loads((folder / "card.json").read_text())["name"] == "colours"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "ort.tgz", "web"]
