"""The one-standard-error rule."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.stats.one_standard_error import simplest


def hits(right: int, n: int = 1000) -> np.ndarray:
    return np.arange(n) < right


def test_a_simpler_candidate_within_the_noise_is_taken() -> None:
    best, close = hits(900), hits(900)
    close[:5] = False
    close[995:999] = True  # one hit fewer, nine rows differ: a difference of 1 +- 3

    choice = simplest([close, best])

    assert (choice.chosen, choice.best) == (0, 1)
    assert choice.error == pytest.approx(0.003, abs=1e-4)


def test_a_clear_difference_takes_the_better_one() -> None:
    # The hits are nested: a difference of 2 +- 1.4 is more than noise.
    assert simplest([hits(800), hits(900), hits(902)]).chosen == 2
    assert simplest([hits(900), hits(800)]) == (0, 0, 0.0)
    assert simplest([hits(900), hits(900)]).chosen == 0
