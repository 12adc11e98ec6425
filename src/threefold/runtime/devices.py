"""The devices that onnxruntime can answer on, and what installs the package of each."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from threefold.errors import ExportError


class Device(NamedTuple):
    """An execution provider of onnxruntime."""

    provider: str
    options: Mapping[str, str]
    """Those under which it computes in float32, as the CPU does."""
    fix: str
    """What installs it."""


DEVICES: Final[Mapping[str, Device]] = {
    "cpu": Device("CPUExecutionProvider", {}, "pip install onnxruntime"),
    "cuda": Device(
        "CUDAExecutionProvider",
        {"use_tf32": "0"},
        "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'",
    ),
    "coreml": Device(
        "CoreMLExecutionProvider",
        {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"},
        "on macOS: pip install --force-reinstall onnxruntime",
    ),
    "openvino": Device(
        "OpenVINOExecutionProvider",
        {"precision": "ACCURACY"},
        "pip uninstall -y onnxruntime; pip install onnxruntime-openvino",
    ),
}
"""By the name that --device takes. The packages of onnxruntime exclude one another: all of them
have the same module, and each has the CPU, too."""


def find_device(name: str) -> Device:
    """Return a device that the installed onnxruntime has been built for.

    Raises:
        ExportError: the name is unknown, or onnxruntime lacks the provider.
    """
    if name not in DEVICES:
        raise ExportError("unknown device", expected=", ".join(DEVICES), got=name[:40])
    import onnxruntime

    device = DEVICES[name]
    available = onnxruntime.get_available_providers()
    if device.provider not in available:
        raise ExportError(
            "onnxruntime has no such device",
            where=f"--device {name}",
            expected=device.provider,
            got=", ".join(available),
            fix=device.fix,
        )
    if name == "cuda":
        # Loads the libraries of CUDA's own packages; it prints those that it does not find.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    return device


def require_device(session: Any, name: str) -> None:
    """Refuse a session that has left its device for the CPU.

    onnxruntime does so with no more than a line in its log, such as when CUDA's libraries or a
    driver are missing.

    Raises:
        ExportError: the session's first provider is another.
    """
    device = DEVICES[name]
    providers = session.get_providers()
    if providers[:1] != [device.provider]:
        raise ExportError(
            "onnxruntime cannot use the device",
            where=f"--device {name}",
            expected=device.provider,
            got=", ".join(providers),
            fix=f"check its driver; {device.fix}",
        )
