"""Examine an installation: versions, devices, memory, disk, caches, and how fast the machine is."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from threefold.errors import ExportError, RunError
from threefold.extras import install_command
from threefold.files import cache_folder, write_bytes
from threefold.machine import (
    available_memory,
    folder_size,
    free_disk,
    package_versions,
    processor_name,
    usable_cores,
)
from threefold.runtime.devices import DEVICES

PACKAGES: Final = ("threefold", "numpy", "pillow", "onnxruntime")
OPTIONAL: Final = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "scikit-learn": "report",
    "fastapi": "serve",
    "pyarrow": "parquet",
    "datasets": "hf",
    "pi-heif": "heif",
    "openvino": "openvino",
    "tensorboard": "tensorboard",
    "mlflow-skinny": "mlflow",
    "wandb": "wandb",
}
"""Other packages, and the extra that installs each."""
CACHES: Final = ("features", "archives", "images", "shards", "files", "buckets", "verified")
"""Kinds of cached files, see `files.cache_folder`."""

LEAST_DISK: Final = 5e9
LEAST_MEMORY: Final = 3e9
"""Bytes below which a usual run may not fit."""

_SECONDS: Final = 0.5
"""How long each measurement of speed takes."""


class Finding(NamedTuple):
    """One line about the installation."""

    section: str
    name: str
    value: str
    problem: str = ""
    """What is wrong, and what to do; empty if nothing is."""


def examine(measure_speed: bool = False) -> Iterator[Finding]:
    """Yield what there is to say about this installation.

    Args:
        measure_speed: also time arithmetic, decoding and the disk, some seconds in all.
    """
    yield from _versions()
    yield from _devices()
    yield from _places()
    yield from _environment()
    if measure_speed:
        yield from _speeds()


def _versions() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("versions", "python", version)
    versions = package_versions((*PACKAGES, *OPTIONAL))
    for name in PACKAGES:
        yield Finding("versions", name, versions[name] or "?")
    for name, extra in OPTIONAL.items():
        value = versions[name] or f"not installed: {install_command(extra)}"
        yield Finding("versions", name, value)


def _devices() -> Iterator[Finding]:
    cores, all_cores = usable_cores(), os.cpu_count() or 1
    count = f"{cores} cores" if cores == all_cores else f"{cores} of {all_cores} cores"
    yield Finding("machine", "processor", f"{processor_name()}, {count}")
    memory = available_memory()
    problem = ""
    if memory < LEAST_MEMORY:
        problem = "little memory: close programs, or set a smaller img_size and train.batch_size"
    yield Finding("machine", "memory", f"{memory / 1e9:.1f} GB available", problem)
    import onnxruntime

    available = onnxruntime.get_available_providers()
    names = [name for name, device in DEVICES.items() if device.provider in available]
    yield Finding("machine", "prediction on", ", ".join(names))
    yield Finding("machine", "training on", _torch_device())


def _torch_device() -> str:
    """The device that training takes, as `train.device = auto` chooses it."""
    if importlib.util.find_spec("torch") is None:
        return "nothing: torch is not installed"
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return f"{name}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        return "Apple GPU"
    return f"CPU, {torch.get_num_threads()} threads"


def _places() -> Iterator[Finding]:
    for kind in CACHES:
        folder = cache_folder(kind)
        size = f"{folder_size(folder) / 1e9:.2f} GB in {folder}"
        yield Finding("disk", f"cache, {kind}", size, _write_problem(folder))
    here = Path.cwd()
    free = free_disk(here)
    problem = ""
    if free < LEAST_DISK:
        problem = (
            "little space: free some, or choose another --out; `threefold clean` empties caches"
        )
    yield Finding("disk", "free here", f"{free / 1e9:.1f} GB in {here}", problem)


def _write_problem(folder: Path) -> str:
    """Why a cache cannot be written; empty if it can be."""
    probe = folder / ".doctor"
    try:
        write_bytes(probe, b"x")
        probe.unlink()
    except (RunError, OSError) as error:
        return f"cannot be written ({error}); set THREEFOLD_CACHE to a folder of yours"
    return ""


def _environment() -> Iterator[Finding]:
    """Variables that change what happens here, those that slow things down as problems."""
    slow = {
        "PYTHONDONTWRITEBYTECODE": "every start compiles all packages again, some ten seconds",
        "OMP_NUM_THREADS": "limits the cores that training and prediction use",
    }
    for name in ("THREEFOLD_CACHE", "THREEFOLD_CACHE_GB", "HF_HUB_OFFLINE", "HF_HOME", *slow):
        value = os.environ.get(name)
        if not value:
            continue
        problem = slow.get(name, "")
        if name == "OMP_NUM_THREADS" and value == str(usable_cores()):
            problem = ""
        yield Finding("environment", name, value, f"{problem}: unset it" if problem else "")


def _speeds() -> Iterator[Finding]:
    a = np.ones((1024, 1024), np.float32)
    rate = _rate(lambda: a @ a)
    yield Finding("speed", "matrix product", f"{rate * 2 * 1024**3 / 1e9:,.0f} GFLOP/s in float32")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8)).resize((500, 375))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()
    rate = _rate(lambda: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    yield Finding("speed", "decoding", f"{rate:,.0f} JPEGs of 500 x 375 a second, one thread")
    yield Finding("speed", "disk", _disk_speed())
    network = _network_speed()
    if network:
        yield Finding("speed", "network", network)


def _rate(work: Callable[[], object]) -> float:
    """How often a second a function can be called."""
    work()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        work()
        calls += 1
    return calls / (time.perf_counter() - began)


def _disk_speed() -> str:
    data = os.urandom(2**20) * 64
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        return f"the current folder cannot be written ({error})"
    return f"{len(data) / 1e6 / seconds:,.0f} MB/s written here"


def _network_speed() -> str:
    """Images a second of a small network without weights; empty without torch and timm."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("timm") is None:
        return ""
    torch: Any = importlib.import_module("torch")
    timm: Any = importlib.import_module("timm")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network = network.to(memory_format=torch.channels_last)
    images = torch.zeros(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        rate = _rate(lambda: network(images))
    return f"{8 * rate:,.0f} images a second, EfficientNet-Lite0 at 224 px, torch on the CPU"


def remove_cache(kind: str) -> int:
    """Delete the cached files of a kind; returns how many bytes that frees.

    Raises:
        ExportError: they cannot be deleted.
    """
    folder = cache_folder(kind)
    size = folder_size(folder)
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise ExportError("cannot delete the cache", where=folder, got=error) from None
    return size - folder_size(folder)
