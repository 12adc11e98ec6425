"""How many rows a comparison of two classifiers needs to show a difference in accuracy."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri  # scipy.stats imports slowly

from threefold.errors import DataError


def required_rows(
    discordant: float, difference: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Rows that McNemar's test needs to detect a difference in accuracy (Connor 1987).

    Args:
        discordant: share of rows that only one of the two gets right, 0 to 1.
        difference: difference of the accuracies, at most `discordant` in size.
        power: probability of detecting the difference, alpha to 1.
        alpha: significance level of the two-sided test.

    Raises:
        DataError: the shares are impossible, or there is no difference.
    """
    size = abs(difference)
    if not 0 < size <= discordant <= 1:
        raise DataError(
            "no two classifiers have this difference",
            expected="0 < |difference| <= discordant <= 1",
            got=(difference, discordant),
        )
    if not 0 < alpha < power < 1:
        raise DataError(
            "no such test", expected="0 < alpha < power < 1", got=f"alpha {alpha}, power {power}"
        )
    root = ndtri(1 - alpha / 2) * discordant**0.5 + ndtri(power) * (discordant - size**2) ** 0.5
    return int(np.ceil((root / size) ** 2))


def required_rows_from_counts(
    only_a: int, only_b: int, n: int, power: float = 0.8, alpha: float = 0.05
) -> int:
    """`required_rows` for shares equal to those of a first sample of n rows.

    Args:
        only_a, only_b: rows that only the first, or only the second, gets right.
        n: number of rows.
        power, alpha: as in `required_rows`.

    Raises:
        DataError: the counts are impossible, or equal: no number of rows shows a difference of 0.
    """
    if only_a == only_b or min(only_a, only_b) < 0 or not only_a + only_b <= n:
        raise DataError(
            "the counts show no difference to detect",
            expected="different counts, at most n together",
            got=(only_a, only_b, n),
        )
    return required_rows((only_a + only_b) / n, (only_a - only_b) / n, power, alpha)
