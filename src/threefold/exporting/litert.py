"""LiteRT files: convert a pipeline, and answer with the file.

Input and outputs are those of an .onnx file, for one image of the members' size: uint8
(1, size, size, 3) to probs (1, k) and member_probs (1, m, k), in float32. litert-torch converts;
ai-edge-litert, which it brings, runs the file.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from threefold.errors import ExportError
from threefold.exporting.fixed_size import FixedSize, on_canvas
from threefold.models.pipeline import Pipeline


def import_litert(target: Path) -> Any:
    """Import litert_torch.

    Raises:
        ExportError: it is not installed.
    """
    try:
        with _quiet():
            import litert_torch
    except ImportError:
        raise ExportError(
            "litert-torch is not installed",
            where=target,
            fix="pip install litert-torch, in an environment of its own: it needs torch < 2.15",
        ) from None
    return litert_torch


class _Images(nn.Module):
    """Takes images as an .onnx file does."""

    def __init__(self, network: FixedSize) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 (b, size, size, 3) to probs (b, k) and member_probs (b, m, k)."""
        probs, member_probs = self.network(images.permute(0, 3, 1, 2).float())
        return probs, member_probs


def write_litert(pipeline: Pipeline, path: Path, target: Path) -> None:
    """Write a pipeline as a LiteRT file.

    Args:
        pipeline: in eval mode.
        path: the file.
        target: where it will be published, for messages.

    Raises:
        ExportError: litert-torch is missing or cannot convert, or the members have several sizes.
    """
    litert_torch = import_litert(target)
    network = FixedSize(pipeline, target)
    example = torch.zeros(1, network.size, network.size, 3, dtype=torch.uint8)
    try:
        with _quiet():
            litert_torch.convert(_Images(network).eval(), (example,)).export(str(path))
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error) from None
    except Exception as error:  # litert-torch raises errors of many types
        raise ExportError(
            "LiteRT cannot hold these networks",
            where=target,
            got=(str(error) or type(error).__name__).splitlines()[0][:160],
            fix="export to a name that ends in .onnx",
        ) from None


def open_litert(path: Path) -> Any:
    """Return the runner of a LiteRT file: `runner(args_0=images)` gives `output_0`, `output_1`.

    Raises:
        ExportError: ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise ExportError(
            "ai-edge-litert is not installed", where=path, fix="pip install ai-edge-litert"
        ) from None
    return Interpreter(str(path), num_threads=1).get_signature_runner()


def predict_litert(path: Path, pipeline: Pipeline, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return probabilities (n, k) of a LiteRT file.

    Args:
        path: the file.
        pipeline: its pipeline, for the size of the images.
        images: uint8 (h, w, 3), any sizes.
    """
    runner = open_litert(path)
    answers = [runner(args_0=image[None])["output_0"] for image in on_canvas(pipeline, images)]
    return np.concatenate(answers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence litert-torch: warnings, and the steps that it prints."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
