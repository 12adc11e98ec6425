"""What the plan measures, and when it takes a difference seriously."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.training.planning.measure import clearly_lower


@pytest.mark.parametrize(("shift", "expected"), [(0.5, True), (0.02, False), (-0.5, False)])
def test_a_difference_within_a_standard_error_is_none(shift: float, expected: bool) -> None:
    others = np.random.default_rng(0).exponential(1.0, 200)
    noise = np.random.default_rng(1).normal(0, 1.0, 200)
    losses = others - shift + noise - noise.mean()

    assert clearly_lower(losses, others) is expected


def test_images_of_a_group_count_as_one() -> None:
    groups = [f"g{row // 50}" for row in range(200)]
    of_groups = np.repeat([0.6, -0.5, 0.5, -0.3], 50)
    others = np.ones(200)

    assert clearly_lower(others - of_groups, others)
    assert not clearly_lower(others - of_groups, others, groups)
