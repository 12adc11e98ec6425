"""The precision of training: float32, or half precision where that is measured to be faster.

Half precision is for training steps only. Predictions are always computed in float32, as in the
exported file.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.files import cache_folder
from threefold.training.choice_record import ChoiceRecord
from threefold.training.provenance import hardware
from threefold.training.randomness import keep_generators
from threefold.training.steps.allocator import reuse_freed_memory

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The half precisions by name."""

GAIN: Final = 1.2
"""Times that half precision must be faster to be worth its rounding errors."""

STEPS: Final = 4
"""Most timed training steps in each precision, after one that is not timed."""

LONG_STEP: Final = 0.5
"""Seconds of a step of which two are enough."""

CPU_IMAGES: Final = 8
"""Images in a timed step on a CPU, where larger batches are no faster per image."""

_CACHE: Final = "features"
"""Kind of the cache that has the choices of this machine; emptied with it."""


def check_precision(name: str, device: torch.device) -> None:
    """Refuse float16 where it has no fast arithmetic.

    Raises:
        RecipeError: `name` is float16 and the device is not CUDA.
    """
    if name == "float16" and device.type != "cuda":
        raise RecipeError(
            "float16 training needs a CUDA device",
            where="train.precision",
            got=f"device {device.type}",
            fix="set train.precision = auto",
        )


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context of a training step."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def half_precision(device: torch.device) -> str:
    """Return the half precision that the hardware computes natively, or an empty string.

    A processor without it emulates it (10 times slower than float32), so there is nothing to time.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    supported = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return "bfloat16" if device.type == "cpu" and supported else ""


def pick_precision(
    member: nn.Module,
    images: Tensor,
    network: str,
    file: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Pick the fastest precision for training a network (`train.precision = "auto"`).

    Hardware support says little: with AVX512-BF16 a training step of EfficientNet-Lite0 at 96 px
    took twice as long in bfloat16 as in float32. So both are timed on the network, once on a
    machine: the answer is recorded in the run, which uses it again when it is resumed, and in the
    cache for other runs.

    Args:
        member: the network in training mode, with the parameters frozen that do not train.
        images: float (b, 3, s, s) in 0..255, a batch as in training.
        network: names the network and its image size in the record.
        file: the record (JSON); None = measure without a record.
        note: receives the choice in words.

    Returns:
        float32, bfloat16 or float16.
    """
    half = half_precision(images.device)
    if not half:
        return "float32"
    record = ChoiceRecord(file)
    if known := _known(record, network):
        return known
    if file is None:
        return _measure_precision(member, images, network, half, note)
    with record.locked():  # all folds are to have the same
        if known := _known(record, network):
            return known
        machine = ChoiceRecord(cache_folder(_CACHE) / "precision.json")
        key = _machine_key(member, images, network)
        name = _known(machine, key)
        if name:
            note(f"{network} trains in {name}, which was faster here before")
        else:
            name = _measure_precision(member, images, network, half, note)
            machine.put(key, name)
        record.put(network, name, must_be_kept=True)  # or a resumed run could have other bits
    return name


def _known(record: ChoiceRecord, key: str) -> str:
    """Return a recorded precision; empty if there is none."""
    name = record.get(key)
    return name if name in ("float32", *DTYPES) else ""


def _machine_key(member: nn.Module, images: Tensor, network: str) -> str:
    """Name all that the speed of a training step depends on."""
    trained = ",".join(name for name, value in member.named_parameters() if value.requires_grad)
    digest = hashlib.sha256(f"{network} {tuple(images.shape)} {trained}".encode()).hexdigest()[:24]
    place = f"{hardware()}, {torch.get_num_threads()} threads, {images.device}"
    return f"{digest} on {place}, torch {torch.__version__}"


def _measure_precision(
    member: nn.Module, images: Tensor, network: str, half: str, note: Callable[[str], None]
) -> str:
    """Time training steps in float32 and in a half precision, and say which is faster."""
    speeds = training_speeds(member, images, ("float32", half))
    name = "float32" if speeds[half] < GAIN * speeds["float32"] else half
    figures = " and ".join(f"{speed:.0f} in {key}" for key, speed in speeds.items())
    note(f"{network} trains in {name}: {figures} images a second")
    return name


def training_speeds(
    member: nn.Module, images: Tensor, precisions: Sequence[str]
) -> dict[str, float]:
    """Time training steps (forward and backward) of a copy of a network.

    The precisions take turns, so that a busy neighbour slows all of them. Neither the network nor
    any random generator changes.

    Args:
        member: the network in training mode, on the device of the images.
        images: float (b, 3, s, s) in 0..255, or what the network takes instead.
        precisions: among float32, bfloat16 and float16.

    Returns:
        Images a second by precision, of the fastest step; 0 if the memory is too small.
    """
    device = images.device
    if device.type == "cpu":
        images = images[:CPU_IMAGES]
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    fastest = dict.fromkeys(precisions, math.inf)
    network = copy.deepcopy(member)
    with keep_generators(device), reuse_freed_memory():
        for turn in range(STEPS + 1):
            for precision in precisions:
                seconds = _time_step(network, images, precision)
                if turn > 0:  # the first turn is slower
                    fastest[precision] = min(fastest[precision], seconds)
            if turn > 1 and max(fastest.values()) > LONG_STEP:
                break
    return {name: len(images) / seconds for name, seconds in fastest.items()}


def _time_step(network: nn.Module, images: Tensor, precision: str) -> float:
    """Seconds of one forward and backward pass; infinite if the memory is too small."""
    began = time.perf_counter()
    try:
        with autocast(precision, images.device):
            logits = network(images)
        logits.float().square().mean().backward()
    except torch.OutOfMemoryError:
        return math.inf
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began
