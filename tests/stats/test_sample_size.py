"""The rows that a comparison needs: power by simulation, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.errors import DataError
from threefold.stats.sample_size import required_rows, required_rows_from_counts


@pytest.mark.parametrize(("discordant", "difference"), [(0.1, 0.03), (0.3, -0.06), (0.05, 0.05)])
def test_the_required_rows_give_the_requested_power(discordant: float, difference: float) -> None:
    n = required_rows(discordant, difference)
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    counts = np.random.default_rng(0).multinomial(n, shares, 20_000)[:, :2]

    # The formula is for McNemar's normal test; the exact test has slightly less power.
    power = (np.abs(counts[:, 0] - counts[:, 1]) > 1.96 * np.sqrt(counts.sum(1))).mean()

    assert power == pytest.approx(0.8, abs=0.04) if discordant > abs(difference) else power > 0.8
    assert required_rows(discordant, difference, power=0.9) >= n


def test_required_rows_by_hand_and_from_counts() -> None:
    # (1.959964 sqrt(0.2) + 0.841621 sqrt(0.2 - 0.01))^2 / 0.01 = 154.6
    assert required_rows(0.2, 0.1) == 155
    assert required_rows_from_counts(15, 5, 100) == 155
    assert required_rows_from_counts(5, 15, 100) == 155


def test_required_rows_refuse() -> None:
    for discordant, difference in ((0.1, 0.2), (0.1, 0), (1.2, 0.1), (np.nan, 0.1), (0.1, np.nan)):
        with pytest.raises(DataError, match="no two classifiers have this difference"):
            required_rows(discordant, difference)
    for power, alpha in ((1.0, 0.05), (0.04, 0.05), (0.8, 0)):
        with pytest.raises(DataError, match="no such test"):
            required_rows(0.2, 0.1, power, alpha)
    for counts in ((5, 5, 100), (-1, 5, 100), (60, 50, 100)):
        with pytest.raises(DataError, match="no difference to detect"):
            required_rows_from_counts(*counts)
