"""The learning-rate finder: nothing changes, the seed decides, and suggestions do not diverge."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stages import build_tiny, make_task
from support.tiny_runs import hash_files, tiny_tree
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.errors import RecipeError, RunError
from threefold.recipe.recipe import Recipe
from threefold.training.planning.lr_finder import choose_stage, find_learning_rate
from threefold.training.planning.range_test import RangeTest, follow_losses, sweep_stage
from threefold.training.run import Run

RATES = np.geomspace(1e-6, 1e4, 40).tolist()
PROBES = {
    "stages": [
        {"name": "probe", "kind": "head"},
        {"name": "tune", "epochs": 1, "lr": 1e-3, "batch_norm": "fixed"},
    ],
    "members": [
        {
            "name": "plain",
            "backbone": "test_resnet",
            "weights": "none",
            "img_size": 32,
            "head": {"noise": 0.0},
        },
    ],
}


def descend(curvature: float, rates: list[float], noise: float = 0.0) -> Iterator[float]:
    """Losses of gradient descent on 1 + curvature / 2 * x^2, which diverges above 2 / curvature."""
    place, rng = 10.0, np.random.default_rng(0)
    for rate in rates:
        yield 1 + curvature / 2 * place**2 + noise * rng.normal()
        place -= rate * curvature * place


@pytest.mark.parametrize("curvature", [0.01, 1.0, 300.0])
def test_suggestions_lie_below_divergence(curvature: float) -> None:
    rates = np.geomspace(1e-6 / curvature, 1e3 / curvature, 120).tolist()

    test = follow_losses(rates, descend(curvature, rates))

    assert test.diverged
    assert len(test.rates) < len(rates)
    assert test.suggestion is not None
    assert rates[0] < test.suggestion < 2 / curvature
    assert test.suggestion == min(test.steepest or 0, test.minimum_tenth or 0)


def test_the_smoothed_loss_is_a_debiased_moving_average() -> None:
    losses = np.random.default_rng(1).uniform(1, 2, 30)

    test = follow_losses(np.geomspace(1e-5, 1, 30).tolist(), losses.tolist())

    weights = 0.9 ** np.arange(29, -1, -1.0)
    assert test.smoothed[-1] == pytest.approx(losses @ weights / weights.sum())
    assert not test.diverged


def test_noise_alone_suggests_nothing() -> None:
    rates = np.geomspace(1e-7, 1e-6, 100).tolist()

    test = follow_losses(rates, descend(1.0, rates, noise=30.0))

    assert not test.falls
    assert test.suggestion is None


def test_a_loss_that_is_no_number_ends_the_test() -> None:
    losses = [2.0] * 15 + [math.nan] + [1.0] * 15

    test = follow_losses(np.geomspace(1e-5, 1, 31).tolist(), losses)

    assert test.diverged
    assert len(test.losses) == len(test.rates) == 15


def sweep(seed: int) -> RangeTest:
    return sweep_stage(build_tiny(), make_task(seed=seed), RATES[:20])


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_network_and_generators_stay_as_they_are(name: str) -> None:
    member, task = build_tiny(name), make_task("train.ema=0.9")
    before = {key: tensor.clone() for key, tensor in member.state_dict().items()}
    trains = [parameter.requires_grad for parameter in member.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    drawn = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)

    test = sweep_stage(member, task, RATES)

    assert test.diverged
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == drawn
    after = member.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert [parameter.requires_grad for parameter in member.parameters()] == trains


def test_the_seed_decides_the_losses() -> None:
    first, second, other = sweep(1), sweep(1), sweep(2)

    assert np.array_equal(first.losses, second.losses)
    assert not np.array_equal(first.losses, other.losses)


def test_the_rates_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    step = torch.optim.AdamW.step

    def remember(self: torch.optim.AdamW, *args: object) -> object:
        used.append({group["lr"] for group in self.param_groups})
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    rates = np.geomspace(1e-6, 1e-3, 20).tolist()

    sweep_stage(build_tiny(), make_task(), rates)

    assert used == [{rate} for rate in rates]


def test_find_from_python_and_see_the_chart(tiny: Recipe, tmp_path: Path) -> None:
    found = threefold.find_learning_rate(
        tiny, member="gated", stage="one", steps=40, high=100.0, progress=False
    )

    assert (found.member, found.stage, found.recipe_rate) == ("gated", "one", 3e-3)
    assert len(found.test.rates) <= found.planned == 40
    assert "recipe 0.003" in found.plot().svg
    assert found.save(tmp_path / "lr.svg").read_text().startswith("<svg")
    assert found.save(tmp_path / "lr.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(RunError, match=r"\.svg or \.png"):
        found.save(tmp_path / "lr.jpeg")


def test_a_later_stage_starts_where_the_one_before_ends(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    recipe = Recipe.parse(tiny_tree(images))
    monkeypatch.setattr(
        "threefold.training.progress.watcher.Watcher.note", lambda self, text: notes.append(text)
    )

    first = find_learning_rate(recipe, stage="one", steps=20, high=1e-5, progress=False)
    later = find_learning_rate(recipe, stage="two", steps=20, high=1e-5, progress=False)

    assert any("trained first: plain one" in note for note in notes)
    assert later.test.losses.mean() < first.test.losses.mean()


def test_tuning_starts_from_the_probe(images: Path) -> None:
    recipe = Recipe.parse(tiny_tree(images, **PROBES, augment={}))

    found = find_learning_rate(recipe, steps=20, high=1e-6, progress=False)

    assert found.stage == "tune"
    assert found.test.losses.mean() < math.log(3)  # below that of no knowledge


def test_a_recurrent_head_on_frozen_features(images: Path) -> None:
    changes = {**PROBES, "stages": PROBES["stages"][:1], "augment": {}}
    changes["members"] = [{**PROBES["members"][0], "head": {"kind": "gru", "units": 8}}]
    recipe = Recipe.parse(tiny_tree(images, **changes))

    found = find_learning_rate(recipe, steps=30, high=100.0, progress=False)

    assert (found.stage, found.recipe_rate, found.schedule) == ("probe", 1e-3, "one-cycle")
    assert found.suggestion is not None


def test_exact_heads_and_unknown_names_are_refused(images: Path, tiny: Recipe) -> None:
    probes = Recipe.parse(tiny_tree(images, **PROBES))

    with pytest.raises(RecipeError, match="fitted exactly"):
        choose_stage(probes, stage="probe")
    with pytest.raises(RecipeError, match="no such member; expected plain, gated, got wide"):
        choose_stage(tiny, "wide")
    with pytest.raises(RecipeError, match="no such stage"):
        choose_stage(tiny, stage="three")
    with pytest.raises(RecipeError, match="no such folder, table or recipe"):
        find_learning_rate("nothing", progress=False)


@pytest.mark.slow
def test_the_verb_reads_a_run_and_leaves_it_alone(finished: Run, tmp_path: Path) -> None:
    before, chart = hash_files(finished.dir), tmp_path / "lr.png"
    words = ["lr-find", str(finished.dir), "--steps", "40", "--high", "1000", "--out", str(chart)]

    shown = CliRunner().invoke(app, words)
    tree = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    wrong = CliRunner().invoke(app, [*words[:-1], "lr.gif"])

    assert "member plain, stage one, fold 0" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if str(chart) not in line)
    assert f"--set stages.one.lr={tree['suggestion']:.2g}" in shown.stdout
    assert tree["suggestion"] == min(tree["steepest"], tree["minimum_tenth"])
    assert "ends in .svg or .png" in str(wrong.exception)
    assert hash_files(finished.dir) == before
