"""The joint network: frozen and trainable parts, and equality with the stacked ensemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_runs import tiny_tree

from threefold.ensembles.stacked import stacked_network
from threefold.models.member import JointMember, Member, build_joint, build_member, describe_joint
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import HeadSpec, MemberSpec, StageSpec, TrainSpec
from threefold.training.pixel_cache import PixelRows
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask
from threefold.training.steps.optimizers import create_optimizer, set_trainable, train_mode

EVERYTHING = StageSpec(name="s", epochs=1, lr=1.0)
HEAD_ONLY = StageSpec(name="s", epochs=1, lr=1e-2, trainable="^head")


def base(backbone: str = "test_resnet", head: HeadSpec | None = None) -> Member:
    head = head or HeadSpec()
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=32, head=head)
    return build_member(spec, 10)


def joint(kind: str = "mlp") -> JointMember:
    torch.manual_seed(0)
    bases = [base(), base("test_efficientnet", HeadSpec(kind="bilstm", units=8)), base()]
    return build_joint(HeadSpec(kind=kind), bases, 10)  # type: ignore[arg-type]


def trainable(network: torch.nn.Module, stage: StageSpec) -> int:
    set_trainable(network, stage)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_trainable_parameters_are_the_authors() -> None:
    network = joint()

    assert trainable(network, EVERYTHING) == sum(p.numel() for p in network.parameters())
    # printed in the authors' notebook for three members and ten classes
    assert trainable(network, HEAD_ONLY) == 167_946
    assert trainable(joint("linear"), HEAD_ONLY) == 310  # equation 19 and its bias


def test_the_head_reads_softmaxes_in_order() -> None:
    network, pixels = joint().eval(), torch.rand(4, 3, 32, 32) * 255
    stacked = stacked_network(3, 10, 4096).eval()
    stacked.load_state_dict(network.head.state_dict())

    probs = torch.stack([b(pixels).softmax(-1) for b in network.bases], 1)

    torch.testing.assert_close(network(pixels).softmax(-1), stacked(probs))


def test_frozen_members_stay_in_eval_mode() -> None:
    network = joint()
    set_trainable(network, HEAD_ONLY)

    train_mode(network)

    assert not any(module.training for b in network.bases for module in b.modules())
    assert network.head.training


def test_frozen_members_do_not_change() -> None:
    network = joint()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
    rows = PixelRows(pixels, rng.integers(0, 10, 24))
    recipe = Recipe.parse(tiny_tree(Path()))

    train_stage(network, StageTask(HEAD_ONLY, recipe, rows, rows, seed=0, num_classes=10))

    after = network.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_members_learn_through_the_joint_head() -> None:
    network = joint()
    set_trainable(network, EVERYTHING)
    train_mode(network)
    logits = network(torch.rand(6, 3, 32, 32) * 255)

    torch.nn.functional.cross_entropy(logits, torch.arange(6)).backward()

    for b in network.bases:
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in b.parameters())


def test_layer_decay_reaches_every_member() -> None:
    network = joint()
    names = {id(p): name for name, p in network.named_parameters()}

    groups = create_optimizer(network, TrainSpec(layer_decay=0.5), 1.0).param_groups

    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert set(scale) == set(names.values())
    assert scale["head.1.weight"] == 1.0
    for number in range(3):
        assert scale[f"bases.{number}.head.classifier.weight"] == 1.0
        prefix = f"bases.{number}.backbone."
        backbone = [value for name, value in scale.items() if name.startswith(prefix)]
        assert backbone[0] < 0.5
        assert max(backbone) == 0.5


@pytest.mark.parametrize(
    ("kind", "words"), [("mlp", "a hidden layer of 4096 units"), ("linear", "one linear layer")]
)
def test_description(kind: str, words: str) -> None:
    text = describe_joint(HeadSpec(kind=kind), ["a", "b"])  # type: ignore[arg-type]

    assert text == f"a, b joined into one network: {words} on their softmaxes."
