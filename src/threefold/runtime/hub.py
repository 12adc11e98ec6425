"""Exported files on the Hugging Face hub: hf://USER/NAME in place of a path; needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from threefold.errors import ExportError, is_disk_error
from threefold.extras import require_package

MODEL: Final = "model.onnx"
PUBLISHED: Final = ("model.onnx*", "README.md", "results.json", "recipe.toml", "weights/*")
"""Files of a repository that `threefold push` has written."""

_ADDRESS: Final = re.compile(
    # Of the two slashes, one is lost where the address has become a path.
    r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?"
)


def is_address(path: str | Path) -> bool:
    """Whether a path is an address of the hub, such as hf://user/name or hf://user/name@v1."""
    return str(path).startswith(("hf:/", "hf:\\"))


def local_path(path: str | Path) -> Path:
    """Return the path of a file, which is downloaded first if `path` is an address.

    Errors as `find_model`.
    """
    return find_model(path) if is_address(path) else Path(path)


def find_model(address: str | Path) -> Path:
    """Return the exported file at an address, from the hub's cache on this machine or from the hub.

    Args:
        address: hf://USER/NAME, or hf://USER/NAME@REVISION.

    Raises:
        ExportError: it is no address, or the hub cannot be reached or has no such file.
        MissingExtraError: huggingface_hub is not installed.
    """
    repository, revision = _split(address)
    folder = download(repository, revision, patterns=(f"{MODEL}*",))
    return _require_model(folder, address)


def _require_model(folder: Path, address: str | Path) -> Path:
    """The exported file in a downloaded folder."""
    if not (folder / MODEL).exists():
        raise ExportError(
            "the repository has no exported file",
            where=address,
            expected=MODEL,
            fix="publish one with `threefold push RUN USER/NAME`",
        )
    return folder / MODEL


def pull(repository: str, folder: Path | None = None, revision: str = "") -> Path:
    """Download a published run; returns the path of its exported file.

    Args:
        repository: USER/NAME, with or without hf:// before it.
        folder: where to put it; None = a new folder of the repository's name.
        revision: a branch, tag or commit; empty = the newest.

    Raises:
        ExportError: the folder holds other files, or as `find_model`.
        MissingExtraError: as `find_model`.
    """
    name, inner = _split(repository if is_address(repository) else f"hf://{repository}")
    target = folder or Path(name.partition("/")[2])
    if target.exists() and any(target.iterdir()) and not (target / MODEL).exists():
        raise ExportError("the folder holds other files", where=target, fix="choose another --out")
    download(name, revision or inner, target)
    return _require_model(target, f"hf://{name}")


def download(
    repository: str,
    revision: str | None = None,
    folder: Path | None = None,
    patterns: tuple[str, ...] = PUBLISHED,
) -> Path:
    """Download files of a repository; returns the folder that they are in.

    Args:
        repository: USER/NAME.
        revision: a branch, tag or commit; None = the newest.
        folder: where to put them; None = the hub's cache.
        patterns: which files.

    Raises:
        ExportError: the hub cannot be reached, or has no such repository.
        MissingExtraError: huggingface_hub is not installed.
    """
    fix = "pip install huggingface_hub"
    require_package("huggingface_hub", "addresses of the hub need", fix=fix)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    where = f"hf://{repository}" + (f"@{revision}" if revision else "")
    arguments: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    try:
        return Path(snapshot_download(repository, local_dir=folder, **arguments))
    except HFValidationError as error:
        raise ExportError("not the name of a repository", where=where, got=error) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ExportError(
            "the hub has no such repository, or it is private",
            where=where,
            fix="check the name; for a private one, run `hf auth login` or set HF_TOKEN",
        ) from None
    except LocalEntryNotFoundError:
        raise ExportError(
            "the hub cannot be reached, and the file is not in its cache on this machine",
            where=where,
            fix="go online once, or give the path of a file",
        ) from None
    except network_errors() as error:
        if is_disk_error(error):
            raise ExportError("cannot write", where=folder or where, got=error) from None
        got = " ".join(str(error).split())[:200]
        raise ExportError("cannot download from the hub", where=where, got=got) from None


def network_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises where there is no network: OSError, and its own errors.

    The client is requests, httpx or httpx2, by the version of huggingface_hub, whose own error for
    a refusal inherits from that client's.
    """
    from huggingface_hub.errors import HfHubHTTPError

    own = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (*own, OSError)


def _split(address: str | Path) -> tuple[str, str | None]:
    """Repository and revision of an address."""
    match = _ADDRESS.fullmatch(str(address).replace("\\", "/"))
    if match is None:
        raise ExportError(
            "not an address of the hub",
            where=address,
            expected="hf://USER/NAME, or hf://USER/NAME@REVISION",
        )
    return match["repository"], match["revision"]
