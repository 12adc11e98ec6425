"""The stage loop: never worse than its start, the same bits every time, clear errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.stages import build_tiny, make_rows, make_task, train_whole_and_in_parts

from threefold.errors import OutOfMemoryError, RecipeError, RunError
from threefold.models.pipeline import Predictor, pick_device, predict_probs
from threefold.training.checkpoints import Checkpoint, accept_stage
from threefold.training.pixel_cache import PixelRows, StoredPixels
from threefold.training.stages.loop import train_stage
from threefold.training.steps import device_pixels
from threefold.training.steps.losses import BatchLoss


def make_checkpoint(
    margins: np.ndarray, epoch: int, metric: str = "accuracy", labels: np.ndarray | None = None
) -> Checkpoint:
    """A checkpoint of two classes; margins (n,) are the log odds of the labels, by default 0."""
    labels = np.zeros(len(margins), int) if labels is None else labels
    of_label = 1 / (1 + np.exp(-margins))
    probs = np.empty((len(margins), 2))
    probs[np.arange(len(labels)), labels] = of_label
    probs[np.arange(len(labels)), 1 - labels] = 1 - of_label
    return Checkpoint({}, probs, labels, epoch, metric)


def test_stage_learns_and_returns_the_best_weights() -> None:
    member, select = build_tiny(), make_rows(12, 1)

    outcome = train_stage(member, make_task("stages.one.epochs=6"))

    records = outcome.history["epochs"]
    best = max(records, key=lambda r: (r["select_accuracy"], -r["select_loss"]))
    assert best["select_accuracy"] > 0.6
    assert outcome.history["best_epoch"] == best["epoch"]
    probs = predict_probs(Predictor(member), select.pixels)
    assert (probs.argmax(1) == select.labels).mean() == best["select_accuracy"]
    assert all(
        torch.equal(outcome.state[name], value) for name, value in member.state_dict().items()
    )


def test_rows_of_a_file_train_as_those_in_memory_do(tmp_path: Path) -> None:
    rows = make_rows(24, 0)
    order = np.random.default_rng(0).permutation(24)
    np.save(tmp_path / "squares.npy", rows.pixels[order])
    mapped = StoredPixels([(tmp_path / "squares.npy", np.argsort(order))])
    in_memory, of_file = build_tiny(), build_tiny()

    expected = train_stage(in_memory, make_task(fit=rows)).state
    state = train_stage(of_file, make_task(fit=PixelRows(mapped, rows.labels))).state

    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_stage_that_ruins_the_weights_returns_its_start() -> None:
    member = build_tiny()
    train_stage(member, make_task("stages.one.epochs=6"))
    start = {name: value.clone() for name, value in member.state_dict().items()}
    ruinous = make_task(
        "stages.one.lr=3.0",
        "stages.one.schedule=constant",
        "train.optimizer=sgd",
        "stages.one.epochs=1",
        first=False,
    )

    outcome = train_stage(member, ruinous)

    assert not outcome.history["accepted"]
    assert outcome.history["best_epoch"] == -1
    assert all(torch.equal(start[name], value) for name, value in member.state_dict().items())


def test_only_gains_beyond_the_noise_are_accepted() -> None:
    rng = np.random.default_rng(0)
    margins = draw_margins(rng, 200)

    start = make_checkpoint(margins, -1)
    noisy = make_checkpoint(margins + rng.normal(0, 0.1, 200), 0)
    better = make_checkpoint(margins + rng.uniform(0, 0.2, 200), 0)

    assert not accept_stage(start, noisy, first=False).accepted
    assert accept_stage(start, better, first=False).accepted
    assert not accept_stage(start, start, first=False).accepted
    assert accept_stage(start, noisy, first=True).accepted
    assert accept_stage(start, noisy, first=False, enabled=False).accepted


def draw_margins(rng: np.random.Generator, n: int) -> np.ndarray:
    """Log odds of which 20 % are negative; none is near 0, where noise would change the class."""
    return np.where(rng.random(n) < 0.8, 1, -1) * (0.5 + rng.exponential(1, n))


METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc")


@pytest.mark.parametrize("metric", METRICS)
def test_gate_measures_the_metric_against_its_noise(metric: str) -> None:
    rng = np.random.default_rng(2)
    labels = (np.arange(400) % 10 == 0).astype(int)  # 10 % of class 1
    margins = rng.normal(1, 1, 400)
    start = make_checkpoint(margins, -1, metric, labels)

    better = make_checkpoint(margins + np.where(labels == 1, 2.0, -0.02), 0, metric, labels)
    verdict = accept_stage(start, better, first=False)
    errors = [float(text.split(" ")[0].rstrip(",")) for text in verdict.reason.split("+- ")[1:]]

    assert verdict.accepted
    assert better.better_than(start)
    assert metric.replace("_", " ") in verdict.reason
    assert all(0 < error < 0.2 for error in errors)


def test_error_of_a_mean_metric_equals_the_analytical_one() -> None:
    """With equal classes balanced accuracy is accuracy, and so is its error, up to the draws."""
    rng, labels = np.random.default_rng(3), np.arange(400) % 2
    margins = rng.normal(0.5, 1, (2, 400))

    errors = []
    for metric in ("accuracy", "balanced_accuracy"):
        start, best = (make_checkpoint(m, i - 1, metric, labels) for i, m in enumerate(margins))
        reason = accept_stage(start, best, first=False).reason
        errors.append(float(reason.split("+- ")[1].split(",")[0]))

    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize(
    ("metric", "winner"),
    [
        ("accuracy", "frequent"),
        ("balanced_accuracy", "rare"),
        ("macro_f1", "rare"),
        ("log_loss", "frequent"),
        ("roc_auc", "rare"),
    ],
)
def test_checkpoints_are_compared_by_the_metric(metric: str, winner: str) -> None:
    """One checkpoint answers the frequent class better, the other the rare one."""
    labels = np.repeat([0, 1], [90, 10])
    margins = {
        "frequent": np.repeat([2.0, -1.0, -4.0], [90, 9, 1]),
        "rare": np.repeat([-0.5, 0.5, 2.0], [20, 70, 10]),
    }

    frequent, rare = (
        make_checkpoint(margins[name], 0, metric, labels) for name in ("frequent", "rare")
    )

    assert frequent.better_than(rare) == (winner == "frequent")
    assert rare.better_than(frequent) == (winner == "rare")


def test_metric_that_is_not_defined_leaves_the_log_loss() -> None:
    margins = np.array([0.5, 1.0, 2.0])  # all rows have label 0: no ROC curve
    worse, better = (make_checkpoint(margins + i, i, "roc_auc") for i in (0, 1))

    assert better.better_than(worse)
    assert not worse.better_than(better)
    assert accept_stage(worse, better, first=False).accepted


@pytest.mark.parametrize("metric", METRICS)
def test_stage_keeps_the_epoch_that_is_best_by_the_metric(metric: str) -> None:
    task = make_task("stages.one.epochs=4", f"train.metric={metric}", fit=make_rows(24, 0))

    outcome = train_stage(build_tiny(), task)

    history = outcome.history
    sign = -1 if metric == "log_loss" else 1
    best = max(
        history["epochs"], key=lambda r: (sign * r["select_metric"], -r["select_loss"], -r["epoch"])
    )
    assert history["metric"] == metric
    assert history["best_epoch"] == best["epoch"]
    assert set(best) >= {"select_accuracy", "select_loss", "select_metric"}


@pytest.mark.parametrize(
    ("sets", "reasons"),
    [
        ((), ("improved by more than its noise", "within its noise")),
        (("protocol=paper",), ("not tested against noise",)),
        (("train.gate=false",), ("not tested against noise",)),
    ],
)
def test_recipe_enables_the_acceptance_test(
    sets: tuple[str, ...], reasons: tuple[str, ...]
) -> None:
    outcome = train_stage(build_tiny(), make_task("stages.one.epochs=3", *sets, first=False))

    assert outcome.history["reason"].startswith(reasons)


def test_pure_noise_is_rarely_accepted() -> None:
    rng = np.random.default_rng(1)

    accepted = 0
    for _ in range(400):
        margins, noise = draw_margins(rng, 100), rng.normal(0, 0.1, (2, 100))
        start, noisy = (make_checkpoint(margins + e, i - 1) for i, e in enumerate(noise))
        accepted += accept_stage(start, noisy, first=False).accepted

    assert 0.10 < accepted / 400 < 0.22  # one standard error of a normal: 16 %


def test_out_of_memory_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(device_pixels, "to_pixels", out_of_memory)

    with pytest.raises(
        RunError,
        match=r"not enough memory: stage one; got not even for 2 images at once; "
        r"fix: set a smaller img_size",
    ):
        train_stage(build_tiny(), make_task())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("train.optimizer=adam-keras", "train.weight_decay=0", "stages.one.schedule=time"),
        ("train.optimizer=sgd", "train.clip_grad=1.0", "stages.one.schedule=cosine"),
        ("train.ema=0.5", "train.label_smoothing=0.1", "train.accumulate=2"),
        ("augment.mixup=0.4", "augment.cutmix=1.0"),
        ("augment.crop=0.5", "augment.policy=randaugment", "augment.color=0.3"),
        (
            "augment.erasing=0.5",
            "augment.vflip=true",
            "augment.zoom=0.3",
            "augment.shift=0.3",
            "augment.channel_shift=10.0",
        ),
        ("train.class_weights=balanced", "train.sampler=balanced", "train.layer_decay=0.7"),
        ("train.precision=bfloat16",),
        ("train.sam=0.1",),
    ],
    ids=lambda options: options[0].split("=")[0] if options else "plain",
)
def test_options_take_effect_and_repeat_exactly(options: tuple[str, ...]) -> None:
    first, second, plain = (
        train_stage(build_tiny("gated"), make_task(*sets, "stages.one.epochs=1")).state
        for sets in (options, options, ())
    )

    assert all(torch.equal(first[name], second[name]) for name in first)
    if options:
        assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_accumulation_takes_the_step_of_the_whole_batch() -> None:
    sets = (
        "stages.one.epochs=1",
        "train.optimizer=sgd",
        "stages.one.trainable=head",
    )

    whole, parts = train_whole_and_in_parts(*sets)

    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_average_of_a_short_stage_forgets_its_start() -> None:
    """With a decay of 0.9999 and no warm-up, 12 steps would leave 99.9 % of the start."""
    start = build_tiny().state_dict()

    averaged, last = (
        train_stage(build_tiny(), make_task("stages.one.epochs=4", f"train.ema={decay}"))
        for decay in (0.9999, 0.0)
    )

    assert averaged.history["best_epoch"] >= 2
    moved = torch.cat([(averaged.state[n] - start[n]).flatten().float() for n in start])
    whole = torch.cat([(last.state[n] - start[n]).flatten().float() for n in start])
    assert 0.3 < float(moved.norm() / whole.norm()) < 1.2
    assert not torch.equal(moved, whole)


def test_infinite_loss_is_an_error_with_a_fix() -> None:
    task = make_task(
        "stages.one.lr=1e30",
        "train.optimizer=sgd",
        "stages.one.schedule=constant",
        "stages.one.epochs=5",
    )

    with pytest.raises(
        RunError, match=r"not (numbers|finite): stage one, epoch \d+.*lower the stage's lr"
    ):
        train_stage(build_tiny(), task)


def test_past_deadline_still_gives_a_complete_stage() -> None:
    outcome = train_stage(build_tiny(), make_task("stages.one.epochs=50", deadline=-math.inf))

    assert len(outcome.history["epochs"]) == 1
    assert outcome.history["reason"].endswith("cut short by the time budget")


def test_unknown_device_is_an_error() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(RecipeError, match=r"no such device here: train.device.*quantum"):
        pick_device("quantum")


def test_fixed_batch_norm_keeps_statistics_and_trains_the_rest() -> None:
    start, member = build_tiny().state_dict(), build_tiny()

    train_stage(member, make_task("stages.one.epochs=1", "stages.one.batch_norm=fixed"))

    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in member.state_dict().items():
        assert torch.equal(value, start[name]) == name.endswith(statistics), name


def test_stage_trains_at_its_size_and_is_measured_at_the_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    member, sides = build_tiny(), set()
    fit = make_rows(24, 0)
    small = fit._replace(pixels=fit.pixels[:, ::2, ::2])
    forward = type(member).forward

    def watch(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        sides.add((self.training, pixels.shape[-1]))
        return forward(self, pixels)

    monkeypatch.setattr(type(member), "forward", watch)
    train_stage(member, make_task("stages.one.epochs=1", fit=small))

    assert sides == {(True, 16), (False, 32)}


def test_patience_stops_a_stage_that_no_longer_improves() -> None:
    ruinous = ("stages.one.lr=3.0", "stages.one.schedule=constant", "train.optimizer=sgd")
    task = make_task(
        *ruinous,
        "train.gate=false",
        "stages.one.epochs=9",
        "stages.one.patience=2",
        first=False,
    )

    history = train_stage(build_tiny(), task).history

    assert len(history["epochs"]) == history["best_epoch"] + 1 + 2 < 9
    assert history["stopped"] == "stopped early: no better epoch in 2"
    assert history["reason"].endswith(history["stopped"])


def test_weights_that_one_step_spoils_are_no_result() -> None:
    """The loss of the only step is computed before it: nothing later would notice."""
    task = make_task("train.batch_size=1000", "stages.one.lr=1e30", "stages.one.epochs=1")

    with pytest.raises(RunError, match=r"not numbers: stage one, epoch 0.*lower the stage's lr"):
        train_stage(build_tiny(), task)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_of_the_cpu_is_one_clear_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchLoss, "__call__", Mock(side_effect=error))

    with pytest.raises(OutOfMemoryError, match=r"not enough memory.*even for 2 images.*img_size"):
        train_stage(build_tiny(), make_task())
