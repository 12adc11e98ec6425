"""The table of heads: hits survive their file, and a planted difference is found and paired."""

from __future__ import annotations

from pathlib import Path

import development_sets
import numpy as np
import pytest
from head_seeds import (
    BACKBONES,
    HEADS,
    Fit,
    compare_heads,
    make_recipe,
    sentence,
    stack_hits,
)
from hits import pack_hits

SETS = ("trashnet", "flowers5", "elpv", "demo")
IMAGES = 60


def make_fit(name: str, backbone: str, head: str, seed: int, correct: np.ndarray) -> Fit:
    return Fit(
        set=name,
        backbone=backbone,
        head=head,
        seed=seed,
        hits=pack_hits(correct),
        images=len(correct),
        seconds=1.0,
        size=128,
        hardware="a machine",
        date="2026-01-01",
        commit="abc",
    )


@pytest.mark.parametrize("name", development_sets.SETS)
def test_recipe_of_a_set_has_every_head(tmp_path: Path, name: str) -> None:
    (tmp_path / "train").mkdir()

    recipe = make_recipe(name, tmp_path, 64)

    assert len(recipe.members) == len(BACKBONES) * len(HEADS)


def draw_fits(share: dict[str, float], seeds: int) -> list[Fit]:
    """Heads with these accuracies, on the same easy and hard images."""
    rng = np.random.default_rng(0)
    fits = []
    for name in SETS:
        for backbone in BACKBONES:
            difficulty = rng.random(IMAGES)
            for seed in range(seeds):
                for head, accuracy in share.items():
                    noise = 0.05 * rng.standard_normal(IMAGES)
                    correct = difficulty + noise < accuracy
                    fits.append(make_fit(name, backbone, head, seed, correct))
    return fits


def image_names() -> dict[str, list[str]]:
    return {name: [f"{i}.png" for i in range(IMAGES)] for name in SETS}


@pytest.mark.parametrize("count", [1, 8, 13])
def test_hits_survive_packing(count: int) -> None:
    correct = np.random.default_rng(count).random(count) < 0.5

    fit = make_fit("demo", "a", "STD", 0, correct)

    assert (fit.correct == correct).all()


def test_only_complete_seeds_count() -> None:
    fits = draw_fits({"STD": 0.7, "GRU": 0.7}, seeds=3)

    hits, columns, seeds = stack_hits(fits[:-1], image_names())

    assert seeds == 2
    assert hits["GRU"]["demo"].shape == (2, 3 * IMAGES)
    assert columns["demo"][0] == columns["demo"][IMAGES] == "demo/0.png"


def test_a_better_head_is_found() -> None:
    fits = draw_fits({"STD": 0.7, "RNN": 0.7, "GRU": 0.85}, seeds=4)

    rows = compare_heads(*stack_hits(fits, image_names())[:2])

    standard, rnn, gru = rows
    assert standard.difference == 0
    assert abs(rnn.difference) < 0.03
    assert rnn.image_interval[0] < 0 < rnn.image_interval[1]
    assert gru.difference == pytest.approx(0.15, abs=0.05)
    assert gru.set_interval[0] > 0.05
    assert gru.image_interval[0] > 0.05
    assert "GRU is better than STD and none is worse" in sentence(rows)


def test_sets_count_equally_and_images_by_number() -> None:
    def hits(small: float, large: float) -> dict[str, np.ndarray]:
        return {
            "elpv": np.arange(100) < np.full((2, 1), 100 * small),
            "demo": np.arange(300) < np.full((2, 1), 300 * large),
        }

    columns = {
        "elpv": np.array([f"elpv/{i}" for i in range(100)]),
        "demo": np.array([f"demo/{i}" for i in range(300)]),
    }

    rows = compare_heads({"STD": hits(0.5, 0.5), "GRU": hits(0.9, 0.5)}, columns)

    assert rows[1].difference == pytest.approx(0.2)
    assert rows[1].image_difference == pytest.approx(0.1)
