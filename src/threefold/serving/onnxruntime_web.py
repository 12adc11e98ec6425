"""Get onnxruntime-web, which runs an exported file in a browser, from npm or from a path.

Only one version is accepted, pinned by hash, so that the written folder is the one that was tested.
No script of the npm package is run, and this package contains nothing of it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from threefold.data.sources.archives import read_members
from threefold.errors import DataError, ExportError
from threefold.files import TemporaryFolder

VERSION: Final = "1.30.0"
"""The version of the npm package onnxruntime-web."""


class RuntimeFile(NamedTuple):
    """A file of the npm package."""

    name: str
    """Its name in the package's folder `dist`."""
    sha256: str


FILES: Final = {
    # Not called .mjs: some static hosts do not send such files as scripts.
    "ort.js": RuntimeFile(
        "ort.wasm.bundle.min.mjs",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "ort.wasm": RuntimeFile(
        "ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
"""Name in the written folder -> file of the npm package."""
NPM_SECONDS: Final = 600
"""How long npm may take."""
_FIX: Final = (
    "install npm (Node.js), or get the package elsewhere with "
    f"`npm pack onnxruntime-web@{VERSION}` and give the .tgz file, or the folder it unpacks to, "
    "as --web-runtime PATH"
)


def read_runtime(path: str | Path | None = None) -> dict[str, bytes]:
    """Read the files that a page needs to run a model, and check their hashes.

    Args:
        path: the package as `npm pack` writes it (.tgz), or a folder it was unpacked to; None =
            download it with npm.

    Returns:
        Content by name, the names being the keys of `FILES`.

    Raises:
        ExportError: there is no npm, npm fails, or the package is not that of `VERSION`.
    """
    if path is not None:
        return _read_checked(Path(path), path)
    with TemporaryFolder() as folder:
        archive = _download(Path(folder))
        return _read_checked(archive, archive.name)


def _download(folder: Path) -> Path:
    """Let npm download the package; npm checks it against the hash of the registry."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            "npm is needed to get onnxruntime-web", got="no npm on the path", fix=_FIX
        )
    command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--silent"]
    try:
        process = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=NPM_SECONDS
        )
        output = process.stderr.strip() or process.stdout.strip()
    except subprocess.TimeoutExpired:
        output = f"no answer within {NPM_SECONDS} seconds"
    except OSError as error:
        output = str(error.strerror)
    archives = sorted(folder.glob("*.tgz"))
    if len(archives) != 1:
        got = output[-300:] or "nothing"
        raise ExportError("npm cannot get onnxruntime-web", got=got, fix=_FIX)
    return archives[0]


def _read_checked(path: Path, where: object) -> dict[str, bytes]:
    """Read the files of `FILES`; errors name `where`."""
    contents = _read(path)
    checked = {}
    for target_name, (name, sha256) in FILES.items():
        content = contents.get(name)
        digest = "" if content is None else hashlib.sha256(content).hexdigest()
        if content is None or digest != sha256:
            raise ExportError(
                "not the supported onnxruntime-web",
                where=where,
                expected=f"version {VERSION}, {name} with SHA-256 {sha256[:12]}...",
                got=f"{digest[:12]}..." if digest else "no such file",
                fix=_FIX,
            )
        checked[target_name] = content
    return checked


def _read(path: Path) -> dict[str, bytes]:
    """Read the files that are there, by their names in the package."""
    names = [file.name for file in FILES.values()]
    try:
        if not path.is_dir():
            return read_members(path, names)
        contents = {}
        for folder in (path, path / "dist", path / "package" / "dist"):
            for name in names:
                if (folder / name).is_file():
                    contents[name] = (folder / name).read_bytes()
        return contents
    except (DataError, OSError) as error:
        raise ExportError("cannot read onnxruntime-web", where=path, got=error, fix=_FIX) from None
