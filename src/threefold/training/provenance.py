"""Where figures come from: hardware, versions, commit, and seeds that depend only on names."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Final

import torch

from threefold.data.dataset import Sources
from threefold.machine import package_versions, processor_name

PACKAGES: Final = ("threefold", "torch", "timm", "numpy")
"""Those whose versions can change what is trained."""


def versions() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    return package_versions(PACKAGES)


def hardware() -> str:
    """Describe processor, cores and accelerator in one line."""
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {os.cpu_count()} cores{accelerator}"


def commit() -> str:
    """Return the git commit of the source tree; empty for an installed package."""
    try:
        process = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
        return process.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def stable_seed(*parts: object) -> int:
    """Return a seed below 2**31 that depends only on the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def data_digest(sources: Sources) -> str:
    """SHA-256 of the images' names, labels, groups and folds; their pixels do not count."""
    parts = [
        (d.ids, d.truth.tolist(), d.groups, *(() if d.folds is None else (d.folds,)))
        for d in (sources.train, sources.test)
        if d is not None
    ]
    return hashlib.sha256(repr((sources.train.classes, parts)).encode()).hexdigest()
