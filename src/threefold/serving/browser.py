"""Write a folder that classifies images in the browser: page, exported file and onnxruntime-web."""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Final

from threefold.errors import ExportError
from threefold.files import TemporaryFolder, flush_files, sha256
from threefold.names import count_of
from threefold.runtime.json_text import as_json
from threefold.runtime.model import Model
from threefold.serving.limits import ServerLimits
from threefold.serving.onnxruntime_web import VERSION, read_runtime

PAGE: Final = {
    "index.html": "index.html",
    "style.css": "style.css",
    "icon.svg": "icon.svg",
    "app.js": "app.js",
    "facts.js": "facts.js",
    "labels.js": "labels.js",
    "parts.js": "parts.js",
    "backend.js": "browser.js",
    "worker.js": "worker.js",
    "decode.js": "decode.js",
    "deepgrey.js": "deepgrey.js",
    "heat.js": "heat.js",
    "sets.js": "sets.js",
}
"""File of the folder -> file of `web/`."""
FOLDER_FILES: Final = frozenset({*PAGE, "model.onnx", "card.json", "README.md", "ort"})
"""Everything that such a folder holds."""
CSP: Final = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
"""What the page may do. Only the worker compiles WebAssembly, so the page does not need
'wasm-unsafe-eval'."""
MAX_BYTES: Final = 2**31 - 2**20
"""Largest model file: browsers keep it in one array."""
CARD_LIMITS: Final = ("file_bytes", "pixels", "side")
"""Limits that the page enforces."""


@dataclass(frozen=True)
class WebFolder:
    """A folder that `write_web` has written.

    Attributes:
        path: the folder.
        bytes: size of all its files.
        model_bytes: size of the model file.
        runtime_bytes: size of onnxruntime-web.
        runtime: name and version of onnxruntime-web.
    """

    path: Path
    bytes: int
    model_bytes: int
    runtime_bytes: int
    runtime: str


def write_web(
    model: str | Path,
    folder: str | Path,
    runtime: str | Path | Mapping[str, bytes] | None = None,
    limits: ServerLimits | None = None,
) -> WebFolder:
    """Write a folder for any static host whose page gives the answers of the exported file.

    Args:
        model: an exported file.
        folder: the new folder. A folder that this function wrote is replaced; any other must be
            empty.
        runtime: onnxruntime-web, see `read_runtime`, or what that returned; None = download it with
            npm.
        limits: bytes, pixels and side of the images that the page accepts (default: the server's).

    Raises:
        ExportError: the file is not a model, is of a fixed size or has weights outside of it,
            onnxruntime-web cannot be read, or the folder holds other files.
    """
    source, target, limits = Path(model), Path(folder), limits or ServerLimits()
    loaded = Model(source)
    if loaded.is_fixed_size:
        raise ExportError(
            "the page gives the model images of any size",
            where=source,
            got="a file of a fixed size",
            fix="export the run again without --fixed-size",
        )
    require_free(target)
    runtime_files = runtime if isinstance(runtime, Mapping) else read_runtime(runtime)
    try:
        temporary = TemporaryFolder(target.absolute())
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        partial = Path(temporary.name) / "new"
        (partial / "ort").mkdir(parents=True)
        _copy_model(source, partial / "model.onnx")
        for name, content in runtime_files.items():
            (partial / "ort" / name).write_bytes(content)
        (partial / "ort" / "LICENSE").write_bytes(_packaged("ort-license.txt"))
        for name, packaged_name in PAGE.items():
            (partial / name).write_bytes(_packaged(packaged_name))
        card = _card(loaded, partial / "model.onnx", limits)
        card_text = json.dumps(card, ensure_ascii=False, allow_nan=False)
        (partial / "card.json").write_text(card_text, encoding="utf-8")
        (partial / "index.html").write_text(_index_html(card), encoding="utf-8")
        (partial / "README.md").write_text(_readme(card), encoding="utf-8")
        flush_files(partial)
        _replace_folder(partial, target)
    except OSError as error:
        raise _unwritable(target, error) from None
    finally:
        temporary.cleanup()
    return WebFolder(
        path=target,
        bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        model_bytes=card["model"]["bytes"],
        runtime_bytes=sum(map(len, runtime_files.values())),
        runtime=card["runtime"],
    )


def require_free(target: Path) -> None:
    """Refuse a folder that `write_web` must not overwrite.

    Raises:
        ExportError: it is a link or a file, or holds other files than such a folder has.
    """
    try:
        names = set(os.listdir(target)) if target.exists() else set()
    except OSError as error:
        raise ExportError("cannot write the folder", where=target, got=error) from None
    foreign = sorted(names - FOLDER_FILES)
    is_ours = not names or ("card.json" in names and not foreign)
    if target.is_symlink() or not is_ours:
        raise ExportError(
            "the folder holds other files",
            where=target,
            got=", ".join(foreign[:3]) or "something else",
            fix="choose a new folder",
        )


def _copy_model(source: Path, copy: Path) -> None:
    """Copy the file and open the copy, which fails if weights lie outside of the file."""
    if source.stat().st_size > MAX_BYTES:
        raise ExportError(
            "the model is too large for a browser", where=source, expected="at most 2 GB"
        )
    shutil.copyfile(source, copy)
    try:
        Model(copy)
    except ExportError as error:
        raise ExportError(
            "the model does not work as a single file, which a browser needs",
            where=source,
            got=error.got or error,
            fix="export it as one file",
        ) from None


def _card(model: Model, copy: Path, limits: ServerLimits) -> dict[str, Any]:
    """The model card with what the page needs besides: limits, model file and runtime."""
    return {
        **as_json(model.card),
        "limits": {
            **{name: getattr(limits, name) for name in CARD_LIMITS},
            "pixels": min(limits.pixels, limits.graph_pixels),
        },
        "model": {"file": copy.name, "bytes": copy.stat().st_size, "sha256": sha256(copy)},
        "runtime": f"onnxruntime-web {VERSION}",
    }


def _index_html(card: dict[str, Any]) -> str:
    """The server's page, with its headers as meta tags and a hint for who opens it as a file."""
    name = html.escape(str(card.get("name") or "threefold"))
    charset = '<meta charset="utf-8">'
    hint = "This page does not work when opened as a file: it needs a web server, see README.md."
    replacements = {
        charset: (
            f'{charset}\n<meta http-equiv="Content-Security-Policy" content="{CSP}">\n'
            '<meta name="referrer" content="no-referrer">'
        ),
        '<h1 id="name">threefold</h1>': f'<h1 id="name">{name}</h1>',
        '<p id="headline" class="soft">&nbsp;</p>': f'<p id="headline" class="soft">{hint}</p>',
    }
    text = _packaged("index.html").decode()
    for old, new in replacements.items():
        if old not in text:
            raise AssertionError(f"index.html has no {old}")
        text = text.replace(old, new, 1)
    return text


def _readme(card: dict[str, Any]) -> str:
    """The README of the folder, for whoever finds it."""
    model = card["model"]
    return f"""# {card.get("name") or "threefold"}

A page that classifies images in the browser: {len(card["classes"])} \
{"labels" if card.get("task") == "multilabel" else "classes"}, \
{count_of(len(card["members"]), "member")}. No image leaves the computer.
{_expected_score(card.get("score") or {})}
Put this folder on any static web host. To try it here:

    python -m http.server --directory . 8080

and open port 8080 of this machine in a browser. The page does not work when opened as a file
(file://), because browsers load no models that way.

- `model.onnx`: the model, {model["bytes"]:,} bytes, SHA-256 {model["sha256"]}
- `card.json`: its model card
- `ort/`: {card["runtime"]} (MIT, see `ort/LICENSE`)
- everything else: the page of threefold (Apache-2.0)
"""


def _expected_score(score: dict[str, Any]) -> str:
    """What to expect: the accuracy, or what the score's key `metric` says."""
    metric = str(score.get("metric") or "accuracy").replace("_", " ")
    value = score.get("value", score.get("accuracy"))
    if value is None:
        return ""
    low, high = score.get("interval") or (value, value)
    return (
        f"Expected {metric} {value:.1%} ({low:.1%} to {high:.1%}); {score.get('n')} rows, "
        f"{score.get('rows')}, protocol {score.get('protocol')}.\n"
    )


def _packaged(name: str) -> bytes:
    return (resources("threefold.serving") / "web" / name).read_bytes()


def _replace_folder(partial: Path, target: Path) -> None:
    """Move the new folder to the target; the old folder stays if that fails."""
    old = partial.with_suffix(".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise


def _unwritable(target: Path, error: OSError) -> ExportError:
    return ExportError("cannot write the folder", where=target, got=error)
