"""The Keras form of Adam against Keras itself, and the learning-rate schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paths import GOLDEN

from threefold.models.backbones import CPU_FROZEN
from threefold.models.member import build_member
from threefold.recipe.schema import MemberSpec, StageSpec, TrainSpec
from threefold.training.steps.optimizers import KerasAdam, create_optimizer, lr_at, set_trainable

KERAS = np.load(GOLDEN / "keras_heads.npz", allow_pickle=False)
LR, EPOCHS, STEPS = float(KERAS["adam/lr"]), int(KERAS["adam/epochs"]), int(KERAS["adam/steps"])
SCHEDULES = ["constant", "time", "cosine", "one-cycle"]


def descend(param: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        param.grad = torch.from_numpy(KERAS["adam/gradients"][step]).to(param)
        optimizer.param_groups[0]["lr"] = lr_at("time", LR, step, STEPS, EPOCHS)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adam_follows_keras_with_time_decay(dtype: torch.dtype, tolerance: float) -> None:
    param = torch.nn.Parameter(torch.from_numpy(KERAS["adam/start"]).to(dtype))
    optimizer = KerasAdam([param], lr=LR)

    for step in range(STEPS):
        descend(param, optimizer, range(step, step + 1))
        np.testing.assert_allclose(
            param.detach().numpy(), KERAS["adam/after"][step], rtol=0, atol=tolerance
        )


def test_adam_of_torch_differs_from_keras() -> None:
    """Otherwise the golden gradients would not show where epsilon is added."""
    param = torch.nn.Parameter(torch.from_numpy(KERAS["adam/start"]).clone())

    descend(param, torch.optim.Adam([param], eps=1e-7), range(STEPS))

    assert np.abs(param.detach().numpy() - KERAS["adam/after"][-1]).max() > 1e-2


def test_adam_resumes_from_its_state() -> None:
    param = torch.nn.Parameter(torch.from_numpy(KERAS["adam/start"]).clone())
    first = KerasAdam([param], lr=LR)
    descend(param, first, range(8))
    copy = torch.nn.Parameter(param.detach().clone())

    second = KerasAdam([copy], lr=1.0)
    second.load_state_dict(first.state_dict())
    descend(copy, second, range(8, STEPS))

    np.testing.assert_allclose(copy.detach().numpy(), KERAS["adam/after"][-1], rtol=0, atol=1e-12)


def test_adam_updates_many_parameters_like_single_ones() -> None:
    """Also with groups, and with a parameter that gets its first gradient late."""
    start = torch.from_numpy(KERAS["adam/start"])
    gradients = torch.from_numpy(KERAS["adam/gradients"])
    early, late, never = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizer = KerasAdam(
        [{"params": [early, late, never]}, {"params": torch.nn.Parameter(start.clone()), "lr": 0.5}]
    )

    for step in range(STEPS):
        early.grad = gradients[step].clone()
        if step >= 5:
            late.grad = gradients[step - 5].clone()
        optimizer.step()

    for param, steps in ((early, STEPS), (late, STEPS - 5)):
        single = torch.nn.Parameter(start.clone())
        optimizer = KerasAdam([single])
        for step in range(steps):
            single.grad = gradients[step].clone()
            optimizer.step()
        assert torch.equal(param, single)
    assert torch.equal(never, start)


def test_adam_calls_the_closure_with_gradients() -> None:
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = KerasAdam([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert param.item() == pytest.approx(2.9, abs=1e-6)  # the first step of Adam is lr long


def test_adam_has_no_weight_decay() -> None:
    with pytest.raises(TypeError, match="weight_decay"):
        KerasAdam([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.1)  # type: ignore[call-arg]


LAST_BLOCKS = r"^head|^backbone\.(blocks\.[56]|conv_head|bn2)\."
"""The parameters of the last blocks of an EfficientNet-Lite and of the head."""


@pytest.mark.parametrize(
    "stage",
    [
        StageSpec(name="s", epochs=1, lr=1.0),
        StageSpec(name="s", epochs=1, lr=1.0, frozen=CPU_FROZEN),
        StageSpec(name="s", epochs=1, lr=1.0, trainable=LAST_BLOCKS),
    ],
    ids=["all", "frozen", "last blocks"],
)
@pytest.mark.parametrize("kind", ["adamw", "adam-keras"])
def test_layer_decay_falls_from_the_head_down(kind: str, stage: StageSpec) -> None:
    lite0 = MemberSpec(name="m", backbone="tf_efficientnet_lite0", weights="none", img_size=32)
    member = build_member(lite0, 3)
    trained = set_trainable(member, stage)
    spec = TrainSpec(optimizer=kind, layer_decay=0.8)
    names = {id(parameter): name for name, parameter in member.named_parameters()}

    optimizer = create_optimizer(member, spec, stage.lr)

    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(scales) == set(trained)
    assert all(scales[name] == 1.0 for name in trained if name.startswith("head."))
    below = [scales[name] for name in trained if name.startswith("backbone.")]
    assert below == sorted(below)
    assert max(below) == pytest.approx(0.8)
    blocks = {name.split(".")[2] for name in trained if "blocks." in name}
    assert (blocks == {"5", "6"}) == (stage.trainable == LAST_BLOCKS)
    for block in blocks - {min(blocks)}:
        first = {n: s for n, s in scales.items() if f"blocks.{block}." in n}
        earlier = {n: s for n, s in scales.items() if f"blocks.{int(block) - 1}." in n}
        assert min(first.values()) > max(earlier.values())


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_weight_decay_spares_norms_and_biases(backbone: str, layer_decay: float) -> None:
    """Without gradients, AdamW only decays."""
    member = build_member(MemberSpec(name="m", backbone=backbone, weights="none"), 3)
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    spec = TrainSpec(optimizer="adamw", weight_decay=0.1, layer_decay=layer_decay)

    create_optimizer(member, spec, 0.1).step()

    exempt = member.no_weight_decay()
    assert bool(exempt) == (backbone == "test_vit")
    for name, parameter in member.named_parameters():
        decayed = bool((parameter != 1.0).any())
        assert decayed == (parameter.ndim > 1 and name not in exempt), name


def test_time_decay_is_the_papers() -> None:
    assert lr_at("time", 1e-3, 0, 63_000, 20) == 1e-3
    # SVHN, EfficientNet-B0: 3,148 steps an epoch for 20 epochs leave 0.24 of the rate.
    share = lr_at("time", 1e-3, 20 * 3148, 20 * 3148, 20) / 1e-3
    assert share == pytest.approx(1 / (1 + 1e-3 * 3148), rel=1e-12)


def torch_rates(steps: int, schedule: type, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = schedule(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("steps", [10, 57])
def test_cosine_and_one_cycle_are_torchs(steps: int) -> None:
    schedulers = torch.optim.lr_scheduler
    torch_cosine = torch_rates(steps, schedulers.CosineAnnealingLR, T_max=steps)
    torch_cycle = torch_rates(steps, schedulers.OneCycleLR, max_lr=0.1, total_steps=steps + 1)

    cosine = [lr_at("cosine", 0.1, i, steps, 5) for i in range(steps)]
    one_cycle = [lr_at("one-cycle", 0.1, i, steps + 1, 5) for i in range(steps)]

    assert cosine == pytest.approx(torch_cosine, rel=1e-9)
    assert one_cycle == pytest.approx(torch_cycle, rel=1e-9)


@given(
    schedule=st.sampled_from(SCHEDULES),
    lr=st.floats(1e-7, 10.0),
    step=st.integers(0, 500),
    steps_total=st.integers(1, 400),
    epochs=st.integers(1, 50),
)
def test_rates_stay_between_zero_and_the_stages(
    schedule: str, lr: float, step: int, steps_total: int, epochs: int
) -> None:
    rate = lr_at(schedule, lr, step, steps_total, epochs)

    assert math.isfinite(rate)
    assert 0.0 <= rate <= lr * (1 + 1e-12)
    if schedule in ("cosine", "one-cycle") and step > steps_total:
        assert rate == lr_at(schedule, lr, steps_total, steps_total, epochs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stage_of_one_step_uses_its_rate(schedule: str) -> None:
    assert lr_at(schedule, 0.1, 0, 1, 1) == pytest.approx(0.1)
