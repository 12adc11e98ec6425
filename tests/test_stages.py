"""The stage loop: never worse than its start, the same bits every time, loud when it breaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, tiny_tree

from threefold.checkpoints import Checkpoint, gate
from threefold.errors import RecipeError, RunError
from threefold.models__member import Member, build_member
from threefold.models__pipeline import Predictor, pick_device, pick_precision, predict_probs
from threefold.recipe import Recipe
from threefold.stages import StageTask, train_stage


def data(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Coloured noise (n, 32, 32, 3) with its class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    pixels = np.array(list(COLOURS.values()))[labels][:, None, None, :] + rng.normal(
        0, 70, (n, 32, 32, 3)
    )
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def task(*sets: str, first: bool = True, seed: int = 1, **more: Any) -> StageTask:
    recipe = Recipe.parse(tiny_tree(Path("x")), sets)
    values: dict[str, Any] = {"fit": data(24, 0), "select": data(12, 1), **more}
    return StageTask(recipe.stages[0], recipe, seed=seed, num_classes=3, first=first, **values)


def fresh(name: str = "plain") -> Member:
    torch.manual_seed(0)
    return build_member(Recipe.parse(tiny_tree(Path("x"))).member(name), 3)


def test_it_learns_and_keeps_the_best_weights() -> None:
    member = fresh()
    outcome = train_stage(member, task("stages.one.epochs=6"))
    records = outcome.history["epochs"]
    best = max(records, key=lambda r: (r["select_accuracy"], -r["select_loss"]))
    assert best["select_accuracy"] > 0.6
    assert outcome.history["best_epoch"] == best["epoch"]
    probs = predict_probs(Predictor(member), data(12, 1)[0])
    assert (probs.argmax(1) == data(12, 1)[1]).mean() == best["select_accuracy"]
    assert all(
        torch.equal(outcome.state[name], value) for name, value in member.state_dict().items()
    )


def test_a_stage_that_ruins_the_weights_gives_back_those_it_started_with() -> None:
    member = fresh()
    train_stage(member, task("stages.one.epochs=6"))
    start = {name: value.clone() for name, value in member.state_dict().items()}
    outcome = train_stage(
        member,
        task(
            "stages.one.lr=3.0",
            "stages.one.schedule=constant",
            "train.optimizer=sgd",
            "stages.one.epochs=1",
            first=False,
        ),
    )
    assert not outcome.history["kept"]
    assert outcome.history["best_epoch"] == -1
    assert all(torch.equal(start[name], value) for name, value in member.state_dict().items())


def checkpoint(losses: np.ndarray, hits: np.ndarray, epoch: int) -> Checkpoint:
    return Checkpoint({}, float(hits.mean()), losses, hits, epoch)


def test_the_gate_keeps_what_helps_by_more_than_its_noise_and_drops_the_rest() -> None:
    rng = np.random.default_rng(0)
    start = checkpoint(rng.uniform(0, 1, 200), rng.random(200) < 0.8, -1)
    noisy = checkpoint(start.losses + rng.normal(0, 1, 200), start.hits, 0)
    better = checkpoint(start.losses - rng.uniform(0, 0.2, 200), start.hits, 0)
    assert not gate(start, noisy, first=False, on=True)[0]
    assert gate(start, better, first=False, on=True)[0]
    assert not gate(start, start, first=False, on=True)[0]
    assert gate(start, noisy, first=True, on=True)[0]
    assert gate(start, noisy, first=False, on=False)[0]


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ((), ("helped by more than its noise", "within its noise")),
        (("protocol=paper",), ("gate off",)),
        (("train.gate=false",), ("gate off",)),
    ],
)
def test_the_recipe_says_whether_there_is_a_gate(
    sets: tuple[str, ...], told: tuple[str, ...]
) -> None:
    outcome = train_stage(fresh(), task("stages.one.epochs=3", *sets, first=False))
    assert outcome.history["reason"].startswith(told)


def test_the_gate_lets_pure_noise_through_rarely() -> None:
    rng = np.random.default_rng(1)
    kept = 0
    for _ in range(400):
        start = checkpoint(rng.uniform(0, 1, 100), rng.random(100) < 0.8, -1)
        noisy = checkpoint(start.losses + rng.normal(0, 0.3, 100), start.hits, 0)
        kept += gate(start, noisy, first=False, on=True)[0]
    assert 0.10 < kept / 400 < 0.22  # one standard error of a normal: 16 %


def test_too_little_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("threefold.stages._Loop._loss", full)
    with pytest.raises(
        RunError,
        match=r"not enough memory: stage one; got \d+ images at once; fix: set train.accumulate = 2 ",
    ):
        train_stage(fresh(), task())


OPTIONS = [
    (),
    ("train.optimizer=adam-keras", "train.weight_decay=0", "stages.one.schedule=time"),
    ("train.optimizer=sgd", "train.clip_grad=1.0", "stages.one.schedule=cosine"),
    ("train.ema=0.5", "train.label_smoothing=0.1", "train.accumulate=2"),
    ("augment.mixup=0.4", "augment.cutmix=1.0"),
    (
        "augment.erasing=0.5",
        "augment.vflip=true",
        "augment.zoom=0.3",
        "augment.shift=0.3",
        "augment.channel_shift=10.0",
    ),
    ("train.class_weights=balanced", "train.sampler=balanced", "train.layer_decay=0.7"),
    ("train.precision=bfloat16",),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o[0].split("=")[0] if o else "plain")
def test_every_option_acts_and_repeats_bit_for_bit(options: tuple[str, ...]) -> None:
    first, second, plain = (
        train_stage(fresh("gated"), task(*o, "stages.one.epochs=1")).state
        for o in (options, options, ())
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    if options:
        assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_accumulation_gives_the_step_of_the_whole_batch() -> None:
    sets = (
        "stages.one.epochs=1",
        "train.optimizer=sgd",
        "stages.one.trainable=head",
        "augment.hflip=false",
        "augment.rotation=0",
    )
    member_sets = ("members.plain.head.noise=0.0",)
    whole, parts = (
        train_stage(fresh_quiet(), task(*sets, *member_sets, f"train.accumulate={a}")).state
        for a in (1, 4)
    )
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def fresh_quiet() -> Member:
    torch.manual_seed(0)
    return build_member(
        Recipe.parse(tiny_tree(Path("x")), ["members.plain.head.noise=0.0"]).member("plain"), 3
    )


def test_a_loss_that_is_no_number_stops_with_a_remedy() -> None:
    with pytest.raises(RunError, match=r"not a number: stage one, epoch \d+.*lower the stage's lr"):
        train_stage(
            fresh(),
            task(
                "stages.one.lr=1e30",
                "train.optimizer=sgd",
                "stages.one.schedule=constant",
                "stages.one.epochs=5",
            ),
        )


def test_a_deadline_in_the_past_still_gives_a_whole_stage() -> None:
    outcome = train_stage(fresh(), task("stages.one.epochs=50", deadline=-math.inf))
    assert len(outcome.history["epochs"]) == 1
    assert outcome.history["reason"].endswith("cut short by the time budget")


def test_devices_and_precision() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(RecipeError, match=r"no such device here: train.device.*quantum"):
        pick_device("quantum")
    assert pick_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    assert pick_precision("auto", torch.device("cpu")) in ("float32", "bfloat16")
