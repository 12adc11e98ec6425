"""What a plan leaves out where the time does not allow it."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.tiny_runs import make_folder

from threefold.data.load import load_data
from threefold.recipe.recipe import Recipe
from threefold.training.features.cache import ImageSeconds
from threefold.training.planning import image_size
from threefold.training.planning.basis import Clock, DataSummary, Decision
from threefold.training.planning.image_size import ProbePlan, drop_late_members


def measure_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: float,
    per_image: float,
    reading: float = 0.0,
) -> image_size.ProbePlan:
    """Choose the size for three networks and 12 images of 40 pixels, without comparing sizes.

    Args:
        tmp_path: receives the images.
        monkeypatch: leaves the comparison out.
        left: seconds of a budget of 60.
        per_image: seconds for the features of an image at the usual size, 128 px.
        reading: seconds to read an image.
    """
    root = make_folder(tmp_path)
    networks = [
        {"name": f"m{i}", "backbone": "test_efficientnet", "weights": "none"} for i in range(3)
    ]
    draft = Recipe.parse(
        {
            "data": {"source": "folder", "root": str(root)},
            "stages": [{"name": "head", "kind": "head"}],
            "members": networks,
        }
    )
    monkeypatch.setattr(image_size, "PROBE_SHARE", 0.0)
    cache = Mock(seconds_per_image=Mock(return_value=ImageSeconds(reading, per_image)))
    clock = Clock(60, time.monotonic() + left)
    summary = DataSummary(12, 12, ("cat", "dog"), 6, 6, side=40)
    sources = load_data(draft.data, draft.seed)
    return image_size.choose_size(draft, summary, sources, cache, clock, "good")


@pytest.mark.parametrize(("left", "members"), [(100.0, 3), (16.0, 2), (12.0, 1), (2.0, 1)])
def test_members_that_cannot_be_exported_in_time_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float, members: int
) -> None:
    measured = measure_size(tmp_path, monkeypatch, left, per_image=1e-9)

    assert len(measured.costs) == members
    is_said = measured.decisions[0].reason.startswith(f"the budget allows {members} of 3 members")
    assert is_said == (members < 3)


@pytest.mark.parametrize(
    ("per_image", "members", "size"),
    [
        (0.50, 3, 128),  # 18 s for three members, of 20
        (0.60, 3, 96),
        (1.20, 2, 96),  # 16 s; three members would take 17 s at 64 px
        (2.40, 1, 96),
        (6.00, 1, 64),
    ],
)
def test_members_are_dropped_before_images_are_much_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_image: float, members: int, size: int
) -> None:
    measured = measure_size(tmp_path, monkeypatch, 50.0, per_image)

    assert (len(measured.costs), measured.img_size) == (members, size)


def test_large_photographs_are_read_once_for_all_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading twelve of them takes most of the minute; what is left is enough for all members."""
    measured = measure_size(tmp_path, monkeypatch, 58.0, per_image=0.2, reading=3.0)

    assert (len(measured.costs), measured.img_size) == (3, 96)
    assert measured.seconds == pytest.approx(36 + 12 * 0.2 * (96 / 128) ** 2 * 3)


@pytest.mark.parametrize(("left", "members"), [(70.0, 3), (50.0, 2), (30.0, 1), (1.0, 1)])
def test_members_whose_heads_take_too_long_are_dropped(left: float, members: int) -> None:
    size = Decision("img_size", 96, "why")
    # In three folds 13, 26 and 39 s for the heads of one, two and three members with the features
    # that are left; then 8 s for the scores and 3 s for each export.
    measured = ProbePlan(96, [1.0, 1.0, 1.0], 0.1, 25, size, head_seconds=10 / 3, wanted=3)

    kept = drop_late_members(measured, Clock(100, time.monotonic() + left))

    assert len(kept.costs) == members
    assert kept.seconds == pytest.approx(2.5 * members)
    assert kept.decisions[0].reason.startswith("the budget allows") == (members < 3)


def test_a_budget_counts_from_when_it_began() -> None:
    clock = Clock.start(100, time.monotonic() - 60)

    assert clock.left == pytest.approx(40, abs=5)
    assert clock.spent == pytest.approx(60, abs=5)
