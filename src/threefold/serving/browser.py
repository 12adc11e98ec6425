"""A folder that classifies images in the browser: the server's page, an exported file, onnxruntime-web; no server side."""

from __future__ import annotations

import html
import json
import os
import shutil
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Final

from threefold.errors import ExportError
from threefold.files import sha256
from threefold.runtime.model import Model, as_json
from threefold.serving.limits import ServerLimits
from threefold.serving.onnxruntime_web import VERSION, read_runtime

PAGE: Final = {
    "index.html": "index.html",
    "style.css": "style.css",
    "icon.svg": "icon.svg",
    "app.js": "app.js",
    "backend.js": "browser.js",
    "worker.js": "worker.js",
    "decode.js": "decode.js",
    "deepgrey.js": "deepgrey.js",
    "sets.js": "sets.js",
}
"""File of the folder -> file of `web/`."""
OURS: Final = {*PAGE, "model.onnx", "card.json", "README.md", "ort"}
"""All that such a folder holds."""
CSP: Final = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""What the page may do. WebAssembly is compiled in the worker only, so the page itself does without 'wasm-unsafe-eval'."""
MAX_BYTES: Final = 2**31 - 2**20
"""Largest model file: browsers hold it in one array."""


def write_web(
    model: str | Path,
    folder: str | Path,
    runtime: str | Path | None = None,
    limits: ServerLimits | None = None,
) -> dict[str, Any]:
    """Write a folder that any static host can serve and that answers as the exported file does.

    Args:
        model: an exported file.
        folder: the folder to write; one that this function wrote is replaced, another one must be empty.
        runtime: onnxruntime-web, see `webruntime.read_runtime`; None = npm gets it.
        limits: bytes, pixels and side of an image that the page takes (default: the server's).

    Returns:
        path, bytes (of the whole folder), model_bytes, runtime_bytes, runtime (its name and version).

    Raises:
        ExportError: not an exported file, one with weights outside of it, no onnxruntime-web, or the folder holds other files.
    """
    source, target, limits = Path(model), Path(folder), limits or ServerLimits()
    loaded = Model(source)
    require_free(target)
    parts = read_runtime(runtime)
    growing = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.part")
    try:
        (growing / "ort").mkdir(parents=True)
        _copy_model(source, growing / "model.onnx")
        for name, content in parts.items():
            (growing / "ort" / name).write_bytes(content)
        (growing / "ort" / "LICENSE").write_bytes(_stored("ort-license.txt"))
        for name, stored in PAGE.items():
            (growing / name).write_bytes(_stored(stored))
        card = _card(loaded, growing / "model.onnx", limits)
        (growing / "card.json").write_text(
            json.dumps(card, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )
        (growing / "index.html").write_text(_index(card), encoding="utf-8")
        (growing / "README.md").write_text(_readme(card), encoding="utf-8")
        _move(growing, target)
    except OSError as error:
        raise ExportError(
            "cannot write the folder",
            where=target,
            got=error.strerror or error,
            fix="free disk space or choose another folder",
        ) from None
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    whole = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {
        "path": str(target),
        "bytes": whole,
        "model_bytes": card["model"]["bytes"],
        "runtime_bytes": sum(map(len, parts.values())),
        "runtime": card["runtime"],
    }


def require_free(target: Path) -> None:
    """Refuse a folder that `write_web` would have to refuse: nothing of somebody else's is overwritten.

    Raises:
        ExportError: it is a link or a file, or holds other files than such a folder's.
    """
    try:
        found = set(os.listdir(target)) if target.exists() else set()
    except OSError as error:
        raise ExportError(
            "cannot write the folder", where=target, got=error.strerror or error
        ) from None
    if target.is_symlink() or (found and (found - OURS or "card.json" not in found)):
        got = ", ".join(sorted(found - OURS)[:3]) or "something else"
        raise ExportError(
            "the folder holds other files", where=target, got=got, fix="choose a new folder"
        )


def _copy_model(source: Path, copy: Path) -> None:
    """The file alone; opened once more, so that one with weights outside of it is found out."""
    if source.stat().st_size > MAX_BYTES:
        raise ExportError(
            "the model is too large for a browser", where=source, expected="at most 2 GB"
        )
    shutil.copyfile(source, copy)
    try:
        Model(copy)
    except ExportError as error:
        raise ExportError(
            "the model does not work as one file by itself, which a browser needs",
            where=source,
            got=error.got or error,
            fix="export it as one file",
        ) from None


def _card(model: Model, copy: Path, limits: ServerLimits) -> dict[str, Any]:
    """What the page reads: the model card, the limits, and which file and which program it belongs to."""
    return {
        **as_json(model.card),
        "limits": {key: getattr(limits, key) for key in ("file_bytes", "pixels", "side")},
        "model": {"file": copy.name, "bytes": copy.stat().st_size, "sha256": sha256(copy)},
        "runtime": f"onnxruntime-web {VERSION}",
    }


def _index(card: dict[str, Any]) -> str:
    """The server's page with what its server's headers say otherwise, and a first line for those who open it as a file."""
    name = html.escape(str(card.get("name") or "threefold"))
    changes = {
        '<meta charset="utf-8">': f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{CSP}">\n<meta name="referrer" content="no-referrer">',
        '<h1 id="name">threefold</h1>': f'<h1 id="name">{name}</h1>',
        '<p id="headline" class="soft">&nbsp;</p>': '<p id="headline" class="soft">Opened as a file, this page cannot work: it needs a web server, see README.md.</p>',
    }
    return _replaced(_stored("index.html").decode(), changes)


def _replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        before, found, after = text.partition(old)
        if not found:
            raise AssertionError(f"the page has no {old}")
        text = before + new + after
    return text


def _readme(card: dict[str, Any]) -> str:
    """What the folder is, for whoever finds it."""
    score = card.get("score") or {}
    told = ""
    if "accuracy" in score:
        low, high = score.get("interval") or (score["accuracy"],) * 2
        told = f"Expected accuracy {score['accuracy']:.1%} ({low:.1%} to {high:.1%}); {score.get('n')} rows, {score.get('rows')}, protocol {score.get('protocol')}.\n"
    return f"""# {card.get("name") or "threefold"}

A page that classifies images in the browser: {len(card["classes"])} classes, {len(card["members"])} members. No image leaves the computer.
{told}
Put this folder on any static web host. To try it here:

    python -m http.server --directory . 8080

and open port 8080 of this machine in a browser. Opened as a file (file://) it cannot work: browsers load no models that way.

`model.onnx` is the model ({card["model"]["bytes"]:,} bytes, SHA-256 {card["model"]["sha256"]}), `card.json` its card, `ort/`
{card["runtime"]} (MIT, see `ort/LICENSE`), the rest the page of threefold (Apache-2.0).
"""


def _stored(name: str) -> bytes:
    return (resources("threefold.serving") / "web" / name).read_bytes()


def _move(growing: Path, target: Path) -> None:
    """Put the new folder in the place of the old one."""
    old = growing.with_suffix(".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(growing, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
