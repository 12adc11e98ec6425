"""Predictions of trained networks: in torch, or in onnxruntime where many images wait on a CPU."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from torch import nn

from threefold.models.pipeline import ImageRows, predict_probs
from threefold.models.tracing import TracingError, simplify, trace_network
from threefold.training.distributed.portable import portable, portable_rows
from threefold.training.distributed.ranks import RankGroup, Ranks, current_ranks
from threefold.training.features.engines import BATCH, answer_in_batches, open_session
from threefold.training.pixel_cache import slice_rows

WORTH_PIXELS: Final = 8_000_000
"""Pixels from which exporting a network pays: an EfficientNet-Lite0 takes torch some 4 s for them.

The choice depends on nothing that varies between two runs, so that a resumed run repeats it.
"""

TOLERANCE: Final = 1e-4
"""Largest difference of a probability from torch's with which onnxruntime is trusted."""


def predict_images(predictor: nn.Module, pixels: ImageRows) -> np.ndarray:
    """Run a predictor on images, in float32; it is left in eval mode. All ranks take part.

    Args:
        predictor: maps pixels (b, 3, canvas, canvas) in 0..255 to probabilities.
        pixels: uint8 (n, canvas, canvas, 3).

    Returns:
        Its outputs, float32 (n, ...).
    """
    ranks = current_ranks()
    if isinstance(ranks, RankGroup):
        ranks.send("predict", portable(predictor), portable_rows(pixels))
    return answer_share(ranks, predictor, pixels)


def answer_share(ranks: Ranks, predictor: nn.Module, pixels: ImageRows) -> np.ndarray:
    """Answer this rank's share of images; returns the answers of all ranks.

    Args:
        ranks: the group, all of which call this.
        predictor: as for `predict_images`.
        pixels: all images.
    """
    return ranks.gather(len(pixels), lambda rows: _answer(predictor, slice_rows(pixels, rows)))


def _answer(predictor: nn.Module, pixels: ImageRows) -> np.ndarray:
    device = next(predictor.parameters()).device
    if device.type == "cpu" and math.prod(pixels.shape[:3]) >= WORTH_PIXELS:
        session = _try_session(predictor.eval(), pixels[:BATCH])
        if session is not None:
            return _run(session, pixels)
    return predict_probs(predictor, pixels)


def _try_session(predictor: nn.Module, sample: np.ndarray) -> Any:
    """Export a predictor; None if that fails, or its answers to a sample are not torch's."""
    size = sample.shape[1]
    try:
        graph = trace_network(simplify(predictor, size), size, ("pixels", "probs"))
        session = open_session(graph)
        answers = _run(session, sample)
    except (TracingError, RuntimeError, ValueError):
        return None
    except Exception as error:  # onnxruntime has an error type for each kind of problem
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return None
    difference = np.abs(answers - predict_probs(predictor, sample)).max()
    return session if difference <= TOLERANCE else None


def _run(session: Any, pixels: ImageRows) -> np.ndarray:
    """Answer uint8 images (n, size, size, 3)."""

    def answer(batch: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32)
        probs: np.ndarray = session.run(None, {"pixels": images})[0]
        return probs

    return answer_in_batches(answer, pixels)
