"""The distillation loss: its minimum, its gradient and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.stages import make_rows
from support.tiny_runs import tiny_tree

from threefold.ensembles.scaling import apply_temperature
from threefold.models.member import build_member
from threefold.recipe.recipe import Recipe
from threefold.training.pixel_cache import PixelRows
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask
from threefold.training.steps.losses import soft_loss, soften


def make_logits(n: int = 6, k: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_teacher_probs() -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(3), 25)


def train(
    *sets: str, teacher_probs: np.ndarray | None = None, fit: PixelRows | None = None
) -> dict[str, torch.Tensor]:
    """Weights of the tiny network after a stage on 25 fit rows."""
    tree = tiny_tree(Path("x"), distill={"run": "y", "student": "plain"})
    recipe = Recipe.parse(tree, ["train.gate=false", "stages.one.schedule=constant", *sets])
    torch.manual_seed(0)
    member = build_member(recipe.member("plain"), 3)
    task = StageTask(
        recipe.stages[0],
        recipe,
        fit=fit or make_rows(25, 0),
        select=make_rows(12, 1),
        seed=1,
        num_classes=3,
        teacher_probs=teacher_probs,
    )
    return train_stage(member, task).state


def are_close(a: dict[str, Any], b: dict[str, Any], atol: float = 0.0) -> bool:
    return all(torch.allclose(a[name].double(), b[name].double(), rtol=0, atol=atol) for name in a)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_softening_is_temperature_scaling(temperature: float) -> None:
    probs = make_logits().softmax(-1).numpy()
    probs[0] = [1, 0, 0, 0]

    softened = soften(probs, temperature, torch.device("cpu")).numpy()

    np.testing.assert_allclose(softened, apply_temperature(probs, temperature), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_is_zero_only_at_the_teacher(temperature: float) -> None:
    teacher = make_logits()
    softened = (teacher / temperature).softmax(-1)

    assert float(soft_loss(teacher + 3, softened, temperature)) == pytest.approx(0, abs=1e-12)
    assert float(soft_loss(make_logits(seed=1), softened, temperature)) > 0.01


def test_gradient_at_temperature_1_is_cross_entropys() -> None:
    softened, student = make_logits().softmax(-1), make_logits(seed=1).requires_grad_()

    (ours,) = torch.autograd.grad(soft_loss(student, softened, 1.0), student)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(student, softened), student)

    torch.testing.assert_close(ours, expected)


def test_gradient_at_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, equation 4: (z - v) / k per row, at any high temperature."""
    teacher, student = make_logits(), make_logits(seed=1).requires_grad_()

    loss = soft_loss(student, (teacher / 1e4).softmax(-1), 1e4)
    (gradient,) = torch.autograd.grad(loss, student)

    gap = student.detach() - teacher
    expected = (gap - gap.mean(-1, keepdim=True)) / student.shape[1]
    torch.testing.assert_close(gradient * len(student), expected, rtol=1e-3, atol=1e-5)


def test_alpha_0_ignores_the_teacher() -> None:
    probs = make_teacher_probs()

    assert are_close(train("distill.alpha=0", teacher_probs=probs), train("distill.alpha=0"))
    assert not are_close(
        train("distill.alpha=0.1", teacher_probs=probs), train("distill.alpha=0.1")
    )


@pytest.mark.parametrize(("alpha", "ignored"), [(1, True), (0.5, False)])
def test_alpha_1_ignores_the_labels(alpha: float, ignored: bool) -> None:
    probs, rows = make_teacher_probs(), make_rows(25, 0)
    changed = rows._replace(labels=(rows.labels + 1) % 3)

    ours, other = (
        train(f"distill.alpha={alpha}", teacher_probs=probs, fit=fit) for fit in (rows, changed)
    )

    assert are_close(ours, other) == ignored


@pytest.mark.parametrize(
    "mixing", [(), ("augment.mixup=0.4", "augment.cutmix=1.0")], ids=["plain", "mixed"]
)
def test_teacher_with_one_hot_probs_acts_like_labels(mixing: tuple[str, ...]) -> None:
    """Mixing treats both alike. SGD, because Adam would hide the size of the gradients."""
    sets = ("distill.alpha=1", "distill.temperature=1", "train.optimizer=sgd", *mixing)
    one_hot = np.eye(3)[make_rows(25, 0).labels]

    by_labels = train(*sets)

    assert are_close(train(*sets, teacher_probs=one_hot), by_labels, atol=1e-4)
    rolled = np.roll(one_hot, 1, axis=0)
    assert not are_close(train(*sets, teacher_probs=rolled), by_labels, atol=1e-3)
