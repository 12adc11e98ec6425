"""Several seeds of a recipe are one contender, and what is shown of it is about other seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.saved_models import model, save

from threefold.evaluation.compare import compare_saved
from threefold.stats.crossed_effects import seeds_accuracy


def seeds_of(folder: Path, name: str, rights: tuple[float, ...], **more: object) -> str:
    """Files of a recipe's seeds, as `compare` takes them."""
    models = {
        f"{name}{i}": model(right=right, seed=10 * i + ord(name), **more)
        for i, right in enumerate(rights)
    }
    return ",".join(save(folder, **models))


@pytest.mark.parametrize("rights", [(0.9, 0.7), (0.9, 0.8, 0.7)])
def test_the_interval_of_a_recipe_is_not_that_of_a_seed(
    tmp_path: Path, rights: tuple[float, ...]
) -> None:
    summary, rows = compare_saved(
        [seeds_of(tmp_path, "x", rights), seeds_of(tmp_path, "y", rights)]
    )

    score, hits = summary.scores[0], rows.probs[: len(rights)].argmax(-1) == rows.labels
    over = seeds_accuracy(hits)
    assert score.interval == pytest.approx((over.low, over.high))
    assert score.accuracy == pytest.approx(np.mean(score.seeds)) == pytest.approx(hits.mean())
    assert score.interval[1] - score.interval[0] > 0.2  # one seed's is below 0.1
    assert (score.temperature, score.balanced_accuracy_interval) == (None, None)


def test_what_the_intervals_are_for_is_said(tmp_path: Path) -> None:
    two, _ = compare_saved(
        [seeds_of(tmp_path, "x", (0.9, 0.8)), seeds_of(tmp_path, "y", (0.7,) * 2)]
    )
    groups = tuple(f"g{i % 30}" for i in range(300))
    three, _ = compare_saved(
        [seeds_of(tmp_path, name, (0.8,) * 3, groups=groups) for name in ("v", "w")]
    )
    one, _ = compare_saved(save(tmp_path, a=model(seed=1), b=model(seed=2)))

    first, second, *_ = two.warnings
    assert (
        first == "all intervals are for other seeds and other images, measured on 2 seeds of each"
    )
    assert second.startswith("two seeds say little about others")
    assert "other seeds and other groups, measured on 3 seeds" in three.warnings[0]
    assert not any("seeds" in line for line in [*three.warnings[1:], *one.warnings])
