"""Freed memory is reused while networks train, and given back afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from threefold.training.steps import allocator
from threefold.training.steps.allocator import reuse_freed_memory

resource = pytest.importorskip("resource")

MEGABYTES = 64
IS_GLIBC = sys.platform == "linux" and allocator._glibc() is not None
needs_glibc = pytest.mark.skipif(not IS_GLIBC, reason="the C library is not glibc")


def count_faults() -> int:
    """Page faults of allocating, filling and freeing a large tensor four times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(MEGABYTES * 2**20, dtype=torch.uint8)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@needs_glibc
def test_freed_memory_is_reused_without_page_faults() -> None:
    outside = count_faults()

    with reuse_freed_memory():
        for _ in range(3):  # the heap grows until aligned blocks find room
            count_faults()
        inside = count_faults()

    assert inside < outside / 20


@needs_glibc
def test_memory_goes_back_to_the_system_at_the_end() -> None:
    with reuse_freed_memory():
        with reuse_freed_memory():
            count_faults()
        kept = resident_megabytes()
    left = resident_megabytes()

    assert kept - left > MEGABYTES / 2


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)

    with reuse_freed_memory():
        total = int(torch.ones(8).sum())

    assert total == 8
