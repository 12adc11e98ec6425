"""Core ML packages: convert a pipeline, and answer with the saved package.

The package is an ML program (iOS 16, macOS 13 or newer) in float32. Its input is an RGB image of
the members' size, its outputs are `probs` and `member_probs`. coremltools converts on any system
but runs the result on macOS only; the answers here are those of `mil_program`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from threefold.errors import ExportError
from threefold.exporting.fixed_size import FixedSize, on_canvas
from threefold.exporting.mil_program import MilProgram
from threefold.extras import install_command
from threefold.models.pipeline import Pipeline
from threefold.runtime.model import KEY

CHECKED: Final = "the saved program, computed in torch; Core ML itself was not run"
"""What the parity report of a package is about, for its card."""


def import_coremltools(target: Path) -> Any:
    """Import coremltools.

    Raises:
        ExportError: it is not installed.
    """
    try:
        with _quiet():
            import coremltools
    except ImportError:
        raise ExportError(
            "coremltools is not installed",
            where=target,
            fix=install_command("coreml"),
        ) from None
    return coremltools


def convert(pipeline: Pipeline, target: Path) -> Any:
    """Convert a pipeline to a Core ML model.

    Args:
        pipeline: in eval mode.
        target: the file that will be written, for messages.

    Raises:
        ExportError: coremltools is missing or cannot convert, or the members have several sizes.
    """
    coremltools = import_coremltools(target)
    network = FixedSize(pipeline, target)
    example = torch.zeros(1, 3, network.size, network.size)
    colours = coremltools.colorlayout.RGB
    try:
        with _quiet(), torch.no_grad():
            traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
            return coremltools.convert(
                traced,
                inputs=[coremltools.ImageType("image", shape=example.shape, color_layout=colours)],
                outputs=[coremltools.TensorType(name) for name in ("probs", "member_probs")],
                convert_to="mlprogram",
                compute_precision=coremltools.precision.FLOAT32,
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=True,
            )
    except ExportError:
        raise
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error) from None
    except Exception as error:  # coremltools raises errors of many types
        raise ExportError(
            "Core ML cannot hold these networks",
            where=target,
            got=(str(error) or type(error).__name__).splitlines()[0][:160],
            fix="export to a name that ends in .onnx",
        ) from None


def save(model: Any, package: Path, card: Mapping[str, Any]) -> None:
    """Save a model with its card as the user-defined metadata `threefold`.

    Raises:
        ExportError: the package cannot be written.
    """
    text = json.dumps({**card, "checked": CHECKED}, ensure_ascii=False, default=float)
    model.user_defined_metadata[KEY] = text
    try:
        with _quiet():
            model.save(str(package))
    except OSError as error:
        raise ExportError("cannot write", where=package, got=error) from None


def predict_coreml(package: Path, pipeline: Pipeline, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return probabilities (n, k) of a saved package, computed by `mil_program`.

    Args:
        package: the saved package.
        pipeline: its pipeline, for the size of the images.
        images: uint8 (h, w, 3), any sizes.
    """
    coremltools = import_coremltools(package)
    with _quiet():
        program = MilProgram(package, coremltools)
    pixels = [image.transpose(2, 0, 1)[None] for image in on_canvas(pipeline, images)]
    return np.concatenate([program.run(one.astype(np.float32))["probs"] for one in pixels])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence coremltools: warnings about versions, and progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
