"""The precision of training: measured once per network, recorded, and without side effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.stages import build_tiny, interrupt, make_rows, make_task, without_path

from threefold.errors import RecipeError
from threefold.models.pipeline import to_pixels
from threefold.training.stages import loop as stages
from threefold.training.stages.loop import train_stage
from threefold.training.steps import precision
from threefold.training.steps.precision import half_precision, pick_precision, training_speeds

CPU = torch.device("cpu")
IMAGES = to_pixels(make_rows(8, 0).pixels, CPU)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def with_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that computes bfloat16 natively."""
    monkeypatch.setattr(precision, "half_precision", lambda device: "bfloat16")


def pretend_speeds(monkeypatch: pytest.MonkeyPatch, **speeds: float) -> list[str]:
    """Replace the measurement; returns a list of the precisions that it is asked for."""
    asked: list[str] = []

    def measure(member: object, images: object, names: Sequence[str]) -> dict[str, float]:
        asked.extend(names)
        return speeds

    monkeypatch.setattr(precision, "training_speeds", measure)
    return asked


@pytest.mark.parametrize(
    ("float32", "bfloat16", "picked"),
    [(107.0, 51.0, "float32"), (100.0, 105.0, "float32"), (50.0, 125.0, "bfloat16")],
)
def test_only_a_clear_gain_in_speed_takes_half_precision(
    float32: float,
    bfloat16: float,
    picked: str,
    with_half: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_speeds(monkeypatch, float32=float32, bfloat16=bfloat16)
    notes: list[str] = []

    assert pick_precision(build_tiny(), IMAGES, "tiny at 32 px", note=notes.append) == picked
    assert notes == [
        f"tiny at 32 px trains in {picked}: {float32:.0f} in float32 and "
        f"{bfloat16:.0f} in bfloat16 images a second"
    ]


def test_recorded_choice_is_used_again(
    tmp_path: Path, with_half: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run trains in the precision that it began in, even if it is slower today."""
    file = tmp_path / "precision.json"
    pretend_speeds(monkeypatch, float32=1.0, bfloat16=2.0)
    first = [pick_precision(build_tiny(), IMAGES, name, file) for name in ("a", "b")]
    asked = pretend_speeds(monkeypatch, float32=2.0, bfloat16=1.0)

    again = [pick_precision(build_tiny(), IMAGES, name, file) for name in ("a", "b")]
    other = pick_precision(build_tiny(), IMAGES, "c", file)

    assert first == again == ["bfloat16", "bfloat16"]
    assert other == "float32"
    assert asked == ["float32", "bfloat16"]


def test_another_run_takes_what_was_measured_on_this_machine(
    tmp_path: Path, with_half: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_speeds(monkeypatch, float32=1.0, bfloat16=2.0)
    pick_precision(build_tiny(), IMAGES, "a", tmp_path / "one.json")
    asked = pretend_speeds(monkeypatch, float32=2.0, bfloat16=1.0)
    notes: list[str] = []
    file = tmp_path / "two.json"

    same = pick_precision(build_tiny(), IMAGES, "a", file, notes.append)

    assert (same, asked) == ("bfloat16", [])
    assert notes == ["a trains in bfloat16, which was faster here before"]
    frozen = build_tiny()
    next(frozen.parameters()).requires_grad_(False)
    for member, images in ((frozen, IMAGES), (build_tiny(), IMAGES[:4])):
        other = pick_precision(member, images, "a", tmp_path / f"{len(asked)}.json")
        assert other == "float32"
    assert asked == ["float32", "bfloat16"] * 2


@pytest.mark.parametrize("content", ["", "[]", '{"a": "float8"}'])
def test_damaged_record_is_measured_again(
    content: str, tmp_path: Path, with_half: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "precision.json"
    file.write_text(content)
    pretend_speeds(monkeypatch, float32=1.0, bfloat16=2.0)

    assert pick_precision(build_tiny(), IMAGES, "a", file) == "bfloat16"


def test_measurement_changes_neither_network_nor_random_numbers() -> None:
    member = build_tiny("gated").train()
    before = {key: value.clone() for key, value in member.state_dict().items()}
    random = torch.get_rng_state()

    speeds = training_speeds(member, IMAGES, ("float32", "bfloat16"))

    assert min(speeds.values()) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in member.state_dict().items())
    assert all(parameter.grad is None for parameter in member.parameters())


def test_a_neighbour_slows_both_precisions_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is busy in the first turns; the fastest step of each is of a quiet one."""
    order: list[str] = []

    def time_step(network: object, images: object, name: str) -> float:
        order.append(name)
        busy = 8.0 if len(order) <= 6 else 1.0
        return busy * (0.010 if name == "float32" else 0.015)

    monkeypatch.setattr(precision, "_time_step", time_step)

    speeds = training_speeds(build_tiny(), IMAGES, ("float32", "bfloat16"))

    assert order[:4] == ["float32", "bfloat16", "float32", "bfloat16"]
    assert speeds["float32"] / speeds["bfloat16"] == pytest.approx(1.5)


def test_measured_precision_gives_the_bits_of_the_same_named_one(
    with_half: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_speeds(monkeypatch, float32=1.0, bfloat16=2.0)

    auto, named = (
        train_stage(build_tiny(), make_task(f"train.precision={name}")).state
        for name in ("auto", "bfloat16")
    )

    assert all(torch.equal(auto[name], named[name]) for name in auto)


@pytest.mark.parametrize(
    "sets",
    [(), pytest.param(("train.clip_grad=0.5", "train.sam=0.05"), marks=pytest.mark.slow)],
)
def test_loss_scaling_takes_the_steps_of_float32(
    sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where float16 is slow but computes the same: scaled gradients are scaled back."""
    monkeypatch.setattr(stages, "check_precision", lambda name, device: None)
    options = ("stages.one.epochs=2", "train.optimizer=sgd", "members.plain.head.noise=0.0", *sets)

    start, half, full = (
        (
            train_stage(
                build_tiny("plain", options[2]), make_task(*options, f"train.precision={name}")
            ).state
            if name
            else build_tiny().state_dict()
        )
        for name in ("", "float16", "float32")
    )

    names = [name for name, _ in build_tiny().named_parameters()]
    moved, error = (
        torch.cat([(full[name] - other[name]).flatten() for name in names]).norm()
        for other in (start, half)
    )
    assert 0 < float(error) < 0.1 * float(moved)


@pytest.mark.slow
def test_loss_scale_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "check_precision", lambda name, device: None)
    task = make_task(
        "stages.one.epochs=2",
        "train.precision=float16",
        resume_path=tmp_path / ".resume",
        save_interval=0.0,
    )
    interrupt(task, 1)

    resumed = train_stage(build_tiny(), task)

    whole = train_stage(build_tiny(), without_path(task))
    assert all(torch.equal(value, whole.state[name]) for name, value in resumed.state.items())


def test_float16_on_a_processor_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"needs a CUDA device: train.precision; got device cpu"):
        train_stage(build_tiny(), make_task("train.precision=float16"))


def test_half_precision_is_what_the_hardware_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)

    assert half_precision(CPU) == ""
    assert pick_precision(build_tiny(), IMAGES, "a") == "float32"

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert half_precision(CPU) == "bfloat16"


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_emulated_bfloat16_is_no_half_precision(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    """CUDA emulates bfloat16 on cards before Ampere, slower than float32."""

    def is_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)

    assert half_precision(torch.device("cuda")) == expected
