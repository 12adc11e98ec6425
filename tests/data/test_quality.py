"""Images that stand out: planted faults are found, and what is usual for a data set is not one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from threefold.data.quality import (
    FEWEST,
    QualityFinding,
    QualityMeter,
    find_outliers,
    measure_quality,
)
from threefold.errors import DataError


def photo(rng: np.random.Generator, width: int = 48, height: int = 40) -> Image.Image:
    """Coarse and fine structure, as photographs have."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height)), float)
    return Image.fromarray(np.uint8((smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255)))


def found(pictures: list[Image.Image]) -> list[tuple[str, str]]:
    meter = QualityMeter()
    passed = list(meter.watch(np.asarray(picture) for picture in pictures))
    assert len(passed) == len(pictures)
    return [(f.id, f.fault) for f in meter.findings([str(i) for i in range(len(pictures))])]


@pytest.fixture
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [photo(rng) for _ in range(60)]


def test_usual_images_do_not_stand_out(photos: list[Image.Image]) -> None:
    assert found(photos) == []


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("blurred", lambda p: p.filter(ImageFilter.GaussianBlur(2))),
        ("dark", lambda p: p.point(lambda v: v * 0.2)),
        ("bright", lambda p: p.point(lambda v: 210 + v * 0.17)),
        ("one colour", lambda p: Image.new("RGB", p.size, (200, 30, 30))),
        ("size", lambda p: p.resize((480, 400), Image.Resampling.NEAREST)),
        ("size", lambda p: p.crop((0, 0, 12, 10))),
        ("shape", lambda p: p.resize((144, 24), Image.Resampling.NEAREST)),
    ],
)
def test_a_planted_fault_is_found(photos: list[Image.Image], fault: str, change: object) -> None:
    photos[17] = change(photos[17])  # type: ignore[operator]

    assert (fault, "17") in {(kind, name) for name, kind in found(photos)}
    assert {name for name, _ in found(photos)} == {"17"}


@pytest.mark.parametrize("change", [lambda v: v * 0.2, lambda v: 210 + v * 0.17])
def test_what_all_images_are_is_no_fault(photos: list[Image.Image], change: object) -> None:
    assert found([picture.point(change) for picture in photos]) == []  # type: ignore[arg-type]


def test_mixed_formats_are_no_odd_sizes() -> None:
    """Portrait and landscape, of one to two megapixels, say."""
    rng = np.random.default_rng(0)
    sizes = [(48, 36), (36, 48), (60, 45), (64, 36)]

    assert found([photo(rng, *sizes[i % 4]) for i in range(60)]) == []


def test_a_black_image_has_one_fault(photos: list[Image.Image]) -> None:
    photos[5] = Image.new("RGB", (48, 40))

    assert found(photos) == [("5", "one colour")]


def test_the_most_unusual_comes_first(photos: list[Image.Image]) -> None:
    rows = [measure_quality(np.asarray(picture)) for picture in photos]
    rows[3] = rows[3]._replace(width=480, height=400)
    rows[4] = rows[4]._replace(width=4800, height=4000)

    findings = find_outliers(rows, [str(i) for i in range(60)])

    assert [f.id for f in findings] == ["4", "3"]
    assert isinstance(findings[0], QualityFinding)
    assert (findings[0].fault, findings[0].value) == ("size", "4800 x 4000")
    assert findings[0].score > findings[1].score > 3.5


def test_too_few_images_have_no_usual() -> None:
    flat = Image.new("RGB", (9, 9))
    rng = np.random.default_rng(0)

    assert found([flat, *(photo(rng) for _ in range(FEWEST - 2))]) == []
    assert found([flat, *(photo(rng) for _ in range(FEWEST - 1))]) != []
    assert found([]) == []
    with pytest.raises(DataError, match="images do not match the ids; expected 1, got 0"):
        find_outliers([], ["a"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (2, 2, 3), (700, 3)])
def test_any_shape_is_measured(shape: tuple[int, ...]) -> None:
    measured = measure_quality(np.full(shape, 9, np.uint8))

    assert (measured.height, measured.width) == shape[:2]
    assert (measured.spread, measured.sharpness) == (0, 0)
    assert measured.dark_end == measured.bright_end == 9
