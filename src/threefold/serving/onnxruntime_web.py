"""onnxruntime-web, which runs an exported file in a browser: taken from npm or from a path, one version, checked by hash.

Only what is pinned here is taken, so that the folder that is written is the one that was tested. No script of the package
is run, and nothing of it lies in this package.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from threefold.data.sources.archives import read_members
from threefold.errors import DataError, ExportError

VERSION: Final = "1.30.0"
"""The version of the npm package onnxruntime-web."""
PARTS: Final = {
    "ort.js": (
        "ort.wasm.bundle.min.mjs",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "ort.wasm": (
        "ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
"""Name in the folder that is written -> name in the package's `dist`, SHA-256. The first is not called .mjs, which some
static hosts do not send as a script."""
SECONDS: Final = 600
"""How long npm may take."""
_BY_HAND: Final = (
    f"install npm (Node.js), or get the package elsewhere with `npm pack onnxruntime-web@{VERSION}` and give the .tgz file, "
    "or the folder it unpacks to, as --web-runtime PATH"
)


def read_runtime(path: str | Path | None = None) -> dict[str, bytes]:
    """The files that a page needs to run a model: name in `PARTS` -> content, each as its hash says.

    Args:
        path: the package as `npm pack` writes it (.tgz), or a folder that it was unpacked to; None = ask npm for it.

    Raises:
        ExportError: no npm, npm fails, or the package is not of `VERSION`.
    """
    if path is not None:
        return _checked(_read(Path(path)), path)
    with tempfile.TemporaryDirectory() as folder:
        archive = _pack(Path(folder))
        return _checked(_read(archive), archive.name)


def _pack(folder: Path) -> Path:
    """Let npm download the package, which it checks against the registry's own hash."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            "npm is needed to get onnxruntime-web", got="no npm on the path", fix=_BY_HAND
        )
    words = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        got = done.stderr.strip() or done.stdout.strip()
    except subprocess.TimeoutExpired:
        got = f"no answer within {SECONDS} seconds"
    except OSError as error:
        got = str(error.strerror)
    archives = sorted(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise ExportError(
            "npm cannot get onnxruntime-web", got=got[-300:] or "nothing", fix=_BY_HAND
        )
    return archives[0]


def _read(path: Path) -> dict[str, bytes]:
    """The pinned files by their names in the package, as far as they are there."""
    names = [name for name, _ in PARTS.values()]
    try:
        if not path.is_dir():
            return read_members(path, names)
        places = [path / "package" / "dist", path / "dist", path]
        return {
            name: found.read_bytes()
            for name in names
            if (found := next((p / name for p in places if (p / name).is_file()), None))
        }
    except (DataError, OSError) as error:
        raise ExportError(
            "cannot read onnxruntime-web", where=path, got=error, fix=_BY_HAND
        ) from None


def _checked(found: dict[str, bytes], where: object) -> dict[str, bytes]:
    for name, digest in PARTS.values():
        got = hashlib.sha256(found[name]).hexdigest() if name in found else ""
        if got != digest:
            raise ExportError(
                "not the onnxruntime-web that is used",
                where=where,
                expected=f"version {VERSION}, {name} with SHA-256 {digest[:12]}...",
                got=f"{got[:12]}..." if got else "no such file",
                fix=_BY_HAND,
            )
    return {ours: found[name] for ours, (name, _) in PARTS.items()}
