"""Sharpness-aware minimization: gradients of the worst point nearby, weights back to their bits."""

from __future__ import annotations

import math

import pytest
import torch
from support.stages import build_tiny, make_task, train_whole_and_in_parts
from torch import nn

from threefold.training.stages.loop import train_stage
from threefold.training.steps.sharpness import sharpen_gradients


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()


INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()


def backward(network: nn.Module) -> None:
    network(INPUTS).square().mean().backward()


def test_gradients_are_those_of_the_point_uphill() -> None:
    """Equation 3 of the paper, written out: g(w + rho g(w) / |g(w)|)."""
    network, moved = make_network(), make_network()
    backward(moved)
    gradients = [p.grad.clone() for p in moved.parameters()]
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    with torch.no_grad():
        for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
            parameter += 0.3 * gradient / norm
    moved.zero_grad()
    backward(moved)

    backward(network)
    sharpen_gradients(network, 0.3, lambda: backward(network))

    for own, expected in zip(network.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-9, atol=1e-12)
        assert not torch.equal(own, expected)


def test_weights_and_statistics_are_those_of_a_single_pass() -> None:
    single, twice = make_network(), make_network()

    backward(single)
    backward(twice)
    sharpen_gradients(twice, 0.3, lambda: backward(twice))

    state = twice.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in single.state_dict().items())
    assert twice[1].track_running_stats


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_no_direction_means_no_move(value: float) -> None:
    network, plain = make_network(), make_network()
    backward(plain)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)

    sharpen_gradients(network, 0.3, lambda: backward(network))

    for own, expected in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, expected.grad)


def test_micro_batches_take_the_step_of_the_whole_batch() -> None:
    sets = (
        "stages.one.epochs=1",
        "stages.one.batch_norm=fixed",
        "train.sam=0.1",
        "train.optimizer=sgd",
    )

    whole, parts = train_whole_and_in_parts(*sets)

    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)


def test_frozen_weights_do_not_move_between_the_passes() -> None:
    member = build_tiny()
    start = {name: value.clone() for name, value in member.state_dict().items()}

    train_stage(member, make_task("train.sam=0.1", "stages.one.trainable=^head"))

    for name, value in member.state_dict().items():
        assert torch.equal(value, start[name]) == (not name.startswith("head")), name
