"""Members chosen by measurement: what each adds at its cost, and what is left out with a reason."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.sources import load_source
from support.tiny_runs import make_folder

from threefold.errors import RecipeError
from threefold.models.flops import count_macs
from threefold.models.hub import has_published_weights, weights_licence
from threefold.models.member import has_token_grid
from threefold.recipe.recipe import Recipe
from threefold.stats.scores import log_loss
from threefold.training.planning.basis import Clock, Decision
from threefold.training.planning.candidates import (
    AUTO,
    CANDIDATES,
    Candidate,
    Screening,
    choose,
    gather_candidates,
    halves_loss,
    screen,
)
from threefold.training.planning.image_size import ProbePlan
from threefold.training.planning.plan import plan_folder

LABELS = np.repeat([0, 1], 50)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


def answers(of_labels: np.ndarray) -> np.ndarray:
    """Probabilities (n, 2) that give the labels these probabilities."""
    probs = np.stack([of_labels, 1 - of_labels], 1)
    return np.where(LABELS[:, None] == 0, probs, probs[:, ::-1])


def untrained(backbone: str, weights: str = "none") -> Candidate:
    return Candidate(backbone, "small", "mit", weights=weights)


def screen_tiny(
    root: Path, candidates: list[Candidate], clock: Clock | None = None, seconds: float = 0.001
) -> Screening:
    """Screen candidates at 32 pixels on 36 images; test_resnet takes `seconds` for one of them."""
    sources = load_source("folder", make_folder(root))
    member = {"name": "a", "backbone": "test_resnet", "weights": "none"}
    tree = {
        "data": {"root": str(root)},
        "train": {"device": "cpu"},
        "stages": [{"name": "head", "kind": "head"}],
        "members": [member],
    }
    measured = ProbePlan(32, [1.0], seconds, 36, Decision("img_size", 32, "as given"), wanted=3)
    return screen(candidates, Recipe.parse(tree), sources, measured, clock or Clock.start(0))


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.backbone for candidate in candidates]


def test_a_member_is_taken_for_what_it_adds() -> None:
    even = np.arange(100) % 2 == 0
    good = answers(np.where(even, 0.95, 0.6))
    other = answers(np.where(even, 0.6, 0.92))

    assert choose(np.stack([good, good, other]), LABELS, [1.0, 1.0, 1.0]) == [0, 2]


def test_no_member_is_added_that_does_not_help() -> None:
    good = answers(np.full(100, 0.9))

    assert choose(np.stack([good, good, good]), LABELS, [1.0, 1.0, 1.0]) == [0]


@pytest.mark.parametrize(("better", "chosen"), [(0.702, [0]), (0.95, [1])])
def test_a_higher_cost_must_pay(better: float, chosen: list[int]) -> None:
    cheap, dear = answers(np.full(100, 0.7)), answers(np.full(100, better))

    assert choose(np.stack([cheap, dear]), LABELS, [1.0, 8.0], most=1) == chosen


def test_costs_stay_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    probs = np.stack([answers(rng.uniform(0.3, 0.9, 100)) for _ in range(5)])
    costs = [1.0, 2.0, 3.0, 4.0, 5.0]

    assert sum(costs[i] for i in choose(probs, LABELS, costs)) > 3.5
    assert sum(costs[i] for i in choose(probs, LABELS, costs, 3.5)) <= 3.5
    assert choose(probs, LABELS, costs, 0.5) == []


def test_rows_that_did_not_choose_show_the_flattery() -> None:
    """Of candidates that are noise, the best on some rows are no better on others."""
    rng = np.random.default_rng(1)
    noise = rng.uniform(0.05, 0.95, (40, 100))
    probs, costs = np.stack([answers(row) for row in noise]), [1.0] * 40

    chosen_on_all = log_loss(probs[choose(probs, LABELS, costs)].mean(0), LABELS)

    assert halves_loss(probs, LABELS, costs) > chosen_on_all
    alone = halves_loss(probs[:1], LABELS, [1.0])
    assert alone == pytest.approx(log_loss(probs[0], LABELS))


def test_a_candidate_that_says_nothing_is_not_taken(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    path = tmp_path / "zero.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, path)
    candidates = [untrained("test_resnet", str(path)), untrained("test_efficientnet")]

    screening = screen_tiny(tmp_path / "images", candidates)

    assert names(screening.chosen) == ["test_efficientnet"]
    assert max(entry.loss for entry in screening.screened) > 1.0  # of three classes: a guess
    assert screening.measured.costs == [1.0]
    # The ensemble chose one member, not the budget.
    assert "budget" not in screening.measured.decisions[0].reason


def test_the_outcome_is_told_in_full(tmp_path: Path) -> None:
    candidates = [untrained("test_convnext"), untrained("test_resnet")]

    screening = screen_tiny(tmp_path, candidates)

    text = screening.explain()
    assert text.startswith(f"screened 2, took {len(screening.chosen)}; log losses")
    for entry in screening.screened:
        assert f"{entry.candidate.backbone} {entry.loss:.3f} (mit)" in text
    assert f"{screening.loss:.3f}, and {screening.halves:.3f} on images that did not" in text
    costs = [count_macs(c.backbone, 32) for c in screening.chosen]
    assert screening.measured.costs == [cost / costs[0] for cost in costs]
    assert costs == sorted(costs)


def test_what_cannot_be_used_is_skipped(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    candidates = [
        untrained("test_resnet", str(broken)),
        untrained("test_efficientnet", "pretrained"),  # there is no hub
        untrained("no_such_network"),
        untrained("test_convnext"),
    ]

    screening = screen_tiny(tmp_path / "images", candidates)

    assert names(screening.chosen) == ["test_convnext"]
    for candidate in candidates[:3]:
        skipped = [n for n in screening.notes if f"{candidate.backbone} skipped: " in n]
        assert len(skipped) == 1
        assert "\n" not in skipped[0]


def test_without_any_usable_candidate_the_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no candidate can be used.*test_resnet skipped.*fix"):
        screen_tiny(tmp_path, [untrained("test_resnet", "pretrained")])


@pytest.mark.slow
def test_short_of_time_the_better_half_goes_on(tmp_path: Path) -> None:
    backbones = ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "test_nfnet"]
    seconds = 1000.0  # as predicted; what the tiny networks take does not matter beside it
    costs = [count_macs(name, 32) for name in backbones]
    on_all_rows = 36 * seconds * sum(costs) / costs[0]
    # A fifth of the time is for screening, and it would take 1.1 times as long.
    clock = Clock(60.0, time.monotonic() + 5 * on_all_rows / 1.1)

    screening = screen_tiny(tmp_path, [untrained(name) for name in backbones], clock, seconds)

    assert len(screening.screened) == 3


def test_curated_candidates_are_what_the_table_says() -> None:
    for candidate in CANDIDATES:
        assert has_published_weights(candidate.backbone), candidate
        assert candidate.licence == weights_licence(candidate.backbone)
        assert candidate.licence in ("apache-2.0", "mit", "bsd-3-clause")
        assert has_token_grid(candidate.backbone) == bool(candidate.img_size)
    assert len({candidate.backbone for candidate in CANDIDATES}) == len(CANDIDATES)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_size_classes_are_those_of_the_networks(candidate: Candidate) -> None:
    macs = count_macs(candidate.backbone, 224)

    classes = {"small": (0, 2e9), "medium": (2e9, 8e9), "large": (8e9, 1e12)}
    low, high = classes[candidate.size]
    assert low <= macs < high


def test_without_a_hub_the_local_candidates_remain() -> None:
    cpu = torch.device("cpu")

    candidates, notes = gather_candidates((), cpu, "good")

    assert set(names(candidates)) >= {f"tf_efficientnet_lite{i}.in1k" for i in range(3)}
    assert len(notes) == 1
    assert notes[0].startswith("no model hub: HF_HUB_OFFLINE is set; screened from ")
    with pytest.raises(RecipeError, match="unknown backbone"):
        gather_candidates(("no_such_network",), cpu, "good")


@pytest.mark.slow
def test_plan_chooses_its_members(tmp_path: Path) -> None:
    sets = ("train.device=cpu", "members.0.img_size=32")

    plan = plan_folder(make_folder(tmp_path), 0, (AUTO,), sets, "fast")

    decision = next(d for d in plan.decisions if d.key == "members")
    backbones = {member.backbone for member in plan.recipe.members}
    assert backbones <= {f"tf_efficientnet_lite{i}.in1k" for i in range(3)}
    assert decision.value == ", ".join(member.name for member in plan.recipe.members)
    assert decision.reason.startswith(f"screened 3, took {len(backbones)}; log losses")
    assert "no model hub: HF_HUB_OFFLINE is set" in decision.reason
    assert all(member.img_size == 32 for member in plan.recipe.members)
