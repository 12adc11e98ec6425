"""This machine: its processor, memory and disk, and the end of processes. Standard library only."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import subprocess

MAX_DECODING_THREADS: Final = 16
"""Each holds an image in memory."""


def processor_name() -> str:
    """Return the processor's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed packages; empty of those that are not installed."""
    import importlib.metadata  # slow, and few commands need it

    found = dict.fromkeys(names, "")
    for name in found:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def is_one_of_several() -> bool:
    """Whether torchrun, or the like, has started this process as one of a group."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def usable_cores() -> int:
    """Return how many cores this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decoding_threads() -> int:
    """Return how many threads decode images: Pillow lets the others run, up to the disk's speed."""
    return min(MAX_DECODING_THREADS, usable_cores())


def end_process(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for the end of a process, or force it after some seconds; says how it ended."""
    import subprocess  # here, since most commands start no process

    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had; 0 where the system keeps none."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory() -> int:
    """Return the bytes of memory that a process can still take: the machine's or the container's.

    Where the system does not say, a number beyond any need.
    """
    numbers = [2**62]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        numbers.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = next(int(count) for name, count in counts if name == "inactive_file")
        numbers.append(limit - used + cached)
    return max(0, min(numbers))


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that need not exist yet."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if there is none."""
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        with suppress(OSError):  # deleted meanwhile
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total
