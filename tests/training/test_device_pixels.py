"""Images that stay on the device are those that are read batch by batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from threefold.training.steps import device_pixels
from threefold.training.steps.device_pixels import HostReader, ResidentReader, fits, pixel_reader

CPU = torch.device("cpu")


def make_pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)


def test_resident_images_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pixels, "CHUNK", 4)
    pixels, rows = make_pixels(11), np.array([10, 3, 3, 0])

    resident, read = ResidentReader(pixels, CPU)(rows), pixel_reader(pixels, CPU)(rows)

    assert torch.equal(resident, read)
    np.testing.assert_array_equal(read.permute(0, 2, 3, 1).numpy(), pixels[rows])
    assert resident.stride() == read.stride()


class SlowPixels:
    """Images on a disk, which notes what is read by which thread."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape = pixels, pixels.shape
        self.reads: list[tuple[list[int], str]] = []

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append((rows.tolist(), threading.current_thread().name))
        if rows.max() >= len(self.pixels):
            raise OSError("the disk is gone")
        return self.pixels[rows]


def test_announced_batches_are_read_once_in_order_by_one_thread() -> None:
    disk = SlowPixels(make_pixels(9))
    reader = HostReader(disk, CPU)  # type: ignore[arg-type]
    first, second, third = np.array([0, 4]), np.array([8, 1]), np.array([2, 2])

    reader.announce([first, second])
    answers = [reader(first)]
    reader.announce([second, third])
    answers += [reader(second), reader(third), reader(first)]

    for rows, answer in zip([first, second, third, first], answers, strict=True):
        assert torch.equal(answer, pixel_reader(disk.pixels, CPU)(rows))
    assert [rows for rows, _ in disk.reads] == [[0, 4], [8, 1], [2, 2], [0, 4]]
    assert [name.startswith("read-ahead") for _, name in disk.reads] == [True, True, True, False]


def test_an_error_of_a_batch_is_raised_when_it_is_asked_for() -> None:
    disk = SlowPixels(make_pixels(9))
    reader = HostReader(disk, CPU)  # type: ignore[arg-type]
    good, bad = np.array([3]), np.array([30])

    reader.announce([good, bad])

    assert reader(good).shape == (1, 3, 5, 5)
    with pytest.raises(OSError, match="the disk is gone"):
        reader(bad)


@pytest.mark.parametrize(("free", "expected"), [(4 * 750, True), (4 * 750 - 1, False)])
def test_images_take_a_share_of_the_free_memory(free: int, expected: bool) -> None:
    assert fits(make_pixels(10), free) is expected
