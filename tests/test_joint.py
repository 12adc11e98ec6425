"""The joint network: E2E-3M's form, its frozen and trainable parts, and that frozen it is the stacked ensemble."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_tree

from threefold.models__member import JointMember, Member, build_joint, build_member, describe_joint
from threefold.recipe import Recipe
from threefold.recipe_schema import HeadSpec, MemberSpec, StageSpec
from threefold.stacked import stacked_network
from threefold.stages import StageTask, train_stage
from threefold.training__optimizers import parameter_groups, set_trainable, train_mode


def base(backbone: str = "test_resnet", head: HeadSpec | None = None) -> Member:
    return build_member(
        MemberSpec(
            name="m", backbone=backbone, weights="none", img_size=32, head=head or HeadSpec()
        ),
        10,
    )


def joint(kind: str = "mlp") -> JointMember:
    torch.manual_seed(0)
    bases = [base(), base("test_efficientnet", HeadSpec(kind="bilstm", units=8)), base()]
    return build_joint(HeadSpec(kind=kind), bases, 10)  # type: ignore[arg-type]


def trainable(network: torch.nn.Module, regex: str) -> int:
    set_trainable(network, StageSpec(name="s", epochs=1, lr=1.0, trainable=regex))
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_the_trainable_parameters_of_a_frozen_joint_network_are_the_authors() -> None:
    assert (
        trainable(joint(), "^head") == 167_946
    )  # printed by the authors' notebook for three members, ten classes
    assert trainable(joint("linear"), "^head") == 310  # equation 19 and its bias
    everything = joint()
    assert trainable(everything, ".") == sum(p.numel() for p in everything.parameters())


def test_it_maps_the_members_softmaxes_in_their_order() -> None:
    network, pixels = joint().eval(), torch.rand(4, 3, 32, 32) * 255
    probs = torch.stack([b(pixels).softmax(-1) for b in network.bases], 1)
    stacked = stacked_network(3, 10, 4096).eval()
    stacked.load_state_dict(network.head.state_dict())
    torch.testing.assert_close(network(pixels).softmax(-1), stacked(probs))


def test_frozen_members_stay_in_evaluation_and_do_not_change() -> None:
    network = joint()
    set_trainable(network, StageSpec(name="s", epochs=1, lr=1.0, trainable="^head"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train_mode(network)
    assert not any(
        module.training for b in network.bases for module in b.modules()
    )  # batch norm, noise, dropout
    assert network.head.training
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (24, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 24)
    recipe = Recipe.parse(tiny_tree("."))  # type: ignore[arg-type]
    stage = StageSpec(name="s", epochs=1, lr=1e-2, trainable="^head")
    train_stage(network, StageTask(stage, recipe, data, data, 0, 10))
    changed = {
        name
        for name, tensor in network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_trainable_members_learn_through_the_joint_head() -> None:
    network = joint()
    set_trainable(network, StageSpec(name="s", epochs=1, lr=1.0))
    train_mode(network)
    torch.nn.functional.cross_entropy(
        network(torch.rand(6, 3, 32, 32) * 255), torch.arange(6)
    ).backward()
    for b in network.bases:
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in b.parameters())


def test_layer_decay_reaches_into_every_member() -> None:
    network = joint()
    set_trainable(network, StageSpec(name="s", epochs=1, lr=1.0))
    groups = list(parameter_groups(network, 1.0, 0.5))
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    names = dict(network.named_parameters())
    assert scale[id(names["head.1.weight"])] == 1.0
    for number in range(3):
        stem = next(p for name, p in names.items() if name.startswith(f"bases.{number}.backbone."))
        assert scale[id(stem)] < 0.5


@pytest.mark.parametrize(
    ("kind", "words"), [("mlp", "a hidden layer of 4096 units"), ("linear", "one linear layer")]
)
def test_it_is_described_in_plain_words(kind: str, words: str) -> None:
    text = describe_joint(HeadSpec(kind=kind), ["a", "b"])  # type: ignore[arg-type]
    assert text == f"a, b joined into one network: {words} on their softmaxes."
