"""What computes the features of a frozen backbone: torch or onnxruntime, whichever is faster here.

Engines answer batches of one fixed size, the last one padded. So an image gets the same features in
whatever company it is computed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from threefold.errors import RecipeError
from threefold.models.features import export_graph
from threefold.models.pipeline import ImageRows
from threefold.training.steps.precision import autocast, half_precision

BATCH: Final = 16
"""Images in a batch."""

WORTH_SECONDS: Final = 4.0
"""Work for plain torch from which it is worth to look for something faster."""

WORTH_TIMING: Final = 60.0
"""Work for plain torch from which every network is timed, whatever was the fastest for another."""

KEPT_SESSIONS: Final = 4
"""Sessions of onnxruntime that a process keeps: plan, first answer and tuning use the same."""

TOLERANCES: Final = {"onnxruntime": 1e-3, "torch-float16": 1e-2, "torch-bfloat16": 1e-2}
"""Largest relative error of an image's features (Euclidean norm) against torch in float32.

bfloat16 errs by 2e-2 on EfficientNet-Lite0, where it is slow, too.
"""


class Engine(Protocol):
    """Computes features of a batch."""

    name: str
    """Part of the key of cached features."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Map float32 pixels (n, 3, s, s) in 0..255 to float32 features (n, ...)."""


class TorchEngine:
    """The backbone in torch, channels last.

    Args:
        extractor: the backbone.
        device: where it runs.
        precision: float32, or float16 or bfloat16 (mixed precision).
    """

    def __init__(
        self, extractor: nn.Module, device: torch.device, precision: str = "float32"
    ) -> None:
        self.name = f"torch-{precision}"
        self.extractor, self.device, self.precision = extractor, device, precision
        extractor.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Map float32 pixels (n, 3, s, s) in 0..255 to float32 features (n, ...)."""
        images = torch.from_numpy(pixels).to(self.device, memory_format=torch.channels_last)
        with autocast(self.precision, self.device):
            features: np.ndarray = self.extractor(images).float().cpu().numpy()
        return features


class OnnxEngine:
    """The backbone in onnxruntime, on the CPU.

    Args:
        extractor: the backbone.
        size: side of the images in pixels.
    """

    def __init__(self, extractor: nn.Module, size: int) -> None:
        self.name = "onnxruntime"
        self.session = open_session(export_graph(extractor, size))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Map float32 pixels (n, 3, s, s) in 0..255 to float32 features (n, ...)."""
        features: np.ndarray = self.session.run(None, {"pixels": pixels})[0]
        return features


def open_session(graph: bytes) -> Any:
    """Open an ONNX graph in onnxruntime, on the CPU, for batches of `BATCH` images."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", BATCH)
    # Its threads would wait in a loop, and take the cores of those that decode the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # One arena for all sessions: as much memory as the largest needs, not the sum of all.
    _register_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def compute(engine: Engine, pixels: np.ndarray) -> np.ndarray:
    """Compute the features of any number of images, in batches of one size.

    Args:
        engine: what computes them.
        pixels: float32 (n, 3, s, s) in 0..255, n at least 1.

    Returns:
        float16 (n, ...).
    """
    answers = answer_in_batches(engine, pixels)
    # Beyond float16's range a feature would become infinite, and a head useless.
    limit = float(np.finfo(np.float16).max)
    return answers.clip(-limit, limit).astype(np.float16)


def answer_in_batches(answer: Callable[[np.ndarray], np.ndarray], pixels: ImageRows) -> np.ndarray:
    """Answer any number of images in batches of `BATCH`, the last one padded.

    Args:
        answer: maps a batch to its answers (b, ...).
        pixels: (n, ...), n at least 1.

    Returns:
        The answers (n, ...).
    """
    parts = []
    for begin in range(0, len(pixels), BATCH):
        batch = pixels[begin : begin + BATCH]
        count = len(batch)
        if count < BATCH:
            batch = np.concatenate([batch, np.repeat(batch[-1:], BATCH - count, axis=0)])
        parts.append(answer(np.ascontiguousarray(batch))[:count])
    return np.concatenate(parts)


class EngineChoice(NamedTuple):
    """An engine, and why it was chosen."""

    engine: Engine
    reason: str
    measured: bool
    """Whether speeds were compared, so that the choice says something about this machine."""


@cache
def _register_arena() -> None:
    """Give onnxruntime one memory arena for those sessions that ask for it."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, None)


_sessions: OrderedDict[tuple[str, int], OnnxEngine] = OrderedDict()


def make_engine(
    name: str, extractor: nn.Module, size: int, device: torch.device, key: str = ""
) -> Engine:
    """Make an engine by its name: torch-float32, -float16 or -bfloat16, or onnxruntime.

    Args:
        name: which one.
        extractor: the backbone.
        size: side of the images in pixels.
        device: where torch runs.
        key: identifies weights and form of the extractor; a session of the same key is used again.

    Raises:
        RecipeError: onnxruntime cannot run the backbone.
    """
    if name.startswith("torch-"):
        return TorchEngine(extractor, device, name.removeprefix("torch-"))
    place = (key, size)
    if key and place in _sessions:
        _sessions.move_to_end(place)
        return _sessions[place]
    try:
        engine = OnnxEngine(extractor, size)
    except Exception as error:
        raise RecipeError(
            "onnxruntime cannot run this backbone",
            where="features.engine = onnxruntime",
            got=f"{type(error).__name__}: {str(error)[:120]}",
            fix='set features.engine = "auto" or "torch"',
        ) from None
    if key:
        _sessions[place] = engine
        if len(_sessions) > KEPT_SESSIONS:
            _sessions.popitem(last=False)
    return engine


def choose_engine(
    extractor: nn.Module,
    sample: np.ndarray,
    count: int,
    device: torch.device,
    *,
    key: str = "",
    usual: str = "",
) -> EngineChoice:
    """Choose the fastest engine whose answers agree with torch's in float32.

    Args:
        extractor: the backbone.
        sample: float32 (n, 3, s, s) in 0..255, some of the images.
        count: number of images to compute.
        device: where torch runs.
        key: see `make_engine`.
        usual: the fastest engine for another network here. It is taken without a comparison of
            speeds, unless the work is long.
    """
    batch = np.ascontiguousarray(np.resize(sample, (BATCH, *sample.shape[1:])))
    plain = TorchEngine(extractor, device)
    began = time.monotonic()
    expected = plain(batch)
    first = time.monotonic() - began
    if first * count / BATCH < WORTH_SECONDS:
        return EngineChoice(plain, "few images: torch without a search", measured=False)
    trusts = bool(usual) and first * count / BATCH < WORTH_TIMING
    if trusts and usual == plain.name:
        return EngineChoice(plain, "the fastest for another network", measured=False)
    names = ["torch-float16"] if device.type == "cuda" else ["onnxruntime"]
    if device.type == "cpu" and half_precision(device):
        names.append("torch-bfloat16")
    if trusts:  # first, since its answers alone decide
        names.sort(key=lambda name: name != usual)
    engines: dict[str, Engine] = {plain.name: plain}
    refused = []
    for name in names:
        try:
            engine = make_engine(name, extractor, sample.shape[-1], device, key)
            error = relative_error(engine(batch), expected)
        except Exception as problem:  # whatever fails here, torch in float32 works
            refused.append(f"{name} fails ({type(problem).__name__})")
            continue
        if not error <= TOLERANCES[name]:
            refused.append(f"{name} differs by {error:.1e}")
            continue
        if trusts and name == usual:
            reason = "the fastest for another network; the answers agree with torch's"
            return EngineChoice(engine, reason, measured=False)
        engines[name] = engine
    speeds = {name: BATCH / _seconds(engine, batch) for name, engine in engines.items()}
    best = max(speeds, key=lambda name: speeds[name])
    measured = [f"{name} {speed:.0f} images/s" for name, speed in speeds.items()]
    return EngineChoice(engines[best], ", ".join([*measured, *refused]), measured=True)


def relative_error(answers: np.ndarray, expected: np.ndarray) -> float:
    """Largest over the images of |answer - expected| / |expected|, Euclidean norms."""
    rows = len(expected)
    difference = np.linalg.norm((answers - expected).reshape(rows, -1), axis=1)
    return float((difference / np.linalg.norm(expected.reshape(rows, -1), axis=1)).max())


def _seconds(engine: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> float:
    """Time of one batch; the engine has run before."""
    began = time.monotonic()
    engine(batch)
    return time.monotonic() - began
