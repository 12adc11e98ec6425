"""Images that stay on the device are those that are read batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from threefold.training.steps import device_pixels
from threefold.training.steps.device_pixels import fits, pixel_reader, resident_reader

CPU = torch.device("cpu")


def make_pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)


def test_resident_images_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pixels, "CHUNK", 4)
    pixels, rows = make_pixels(11), np.array([10, 3, 3, 0])

    resident, read = resident_reader(pixels, CPU)(rows), pixel_reader(pixels, CPU)(rows)

    assert torch.equal(resident, read)
    np.testing.assert_array_equal(read.permute(0, 2, 3, 1).numpy(), pixels[rows])
    assert resident.stride() == read.stride()


@pytest.mark.parametrize(("free", "expected"), [(4 * 750, True), (4 * 750 - 1, False)])
def test_images_take_a_share_of_the_free_memory(free: int, expected: bool) -> None:
    assert fits(make_pixels(10), free) is expected
