"""The loss of a student: zero at the teacher, cross-entropy's gradient at temperature 1, Hinton's limit when hot; labels where alpha is 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_tree
from test_stages import data

from threefold.models__member import build_member
from threefold.recipe import Recipe
from threefold.scaling import apply_temperature
from threefold.softloss import soft_loss, soften
from threefold.stages import StageTask, train_stage

CPU = torch.device("cpu")


def logits(n: int = 6, k: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_softening_is_the_temperature_of_calibration(temperature: float) -> None:
    probs = logits().softmax(-1).numpy()
    probs[0] = [1, 0, 0, 0]
    np.testing.assert_allclose(
        soften(probs, temperature, CPU).numpy(), apply_temperature(probs, temperature), atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_zero_at_the_teacher_and_only_there(temperature: float) -> None:
    teacher = logits()
    softened = (teacher / temperature).softmax(-1)
    assert float(soft_loss(teacher + 3, softened, temperature)) == pytest.approx(0, abs=1e-12)
    assert float(soft_loss(logits(seed=1), softened, temperature)) > 0.01


def test_at_temperature_1_its_gradient_is_that_of_cross_entropy_with_probabilities() -> None:
    softened, own = logits().softmax(-1), logits(seed=1).requires_grad_()
    (ours,) = torch.autograd.grad(soft_loss(own, softened, 1.0), own)
    (theirs,) = torch.autograd.grad(torch.nn.functional.cross_entropy(own, softened), own)
    torch.testing.assert_close(ours, theirs)


def test_when_hot_its_gradient_is_the_difference_of_centred_logits() -> None:
    """Hinton et al. 2015, equation 4: (z - v) / k for each row, whatever the temperature, thanks to the factor."""
    teacher, own = logits(), logits(seed=1).requires_grad_()
    (found,) = torch.autograd.grad(soft_loss(own, (teacher / 1e4).softmax(-1), 1e4), own)
    gap = own.detach() - teacher
    torch.testing.assert_close(
        found * len(own), (gap - gap.mean(-1, keepdim=True)) / own.shape[1], rtol=1e-3, atol=1e-5
    )


def trained(*sets: str, soft: np.ndarray | None = None, fit: Any = None) -> dict[str, torch.Tensor]:
    """Weights after two epochs of the tiny network; `soft` = what a teacher says of its 25 fit rows."""
    tree = tiny_tree(Path("x"), distill={"run": "y", "student": "plain"})
    recipe = Recipe.parse(tree, ["train.gate=false", "stages.one.schedule=constant", *sets])
    torch.manual_seed(0)
    member = build_member(recipe.member("plain"), 3)
    task = StageTask(
        recipe.stages[0],
        recipe,
        fit=fit or data(25, 0),
        select=data(12, 1),
        seed=1,
        num_classes=3,
        soft=soft,
    )
    return train_stage(member, task).state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> bool:
    return all(torch.allclose(a[name].double(), b[name].double(), rtol=0, atol=atol) for name in a)


def test_without_a_share_for_the_teacher_the_student_is_its_twin_bit_for_bit() -> None:
    soft = np.random.default_rng(0).dirichlet(np.ones(3), 25)
    assert same(trained("distill.alpha=0", soft=soft), trained("distill.alpha=0"))
    assert not same(trained("distill.alpha=0.1", soft=soft), trained("distill.alpha=0.1"))


def test_with_all_for_the_teacher_labels_of_fit_rows_teach_nothing() -> None:
    soft, (pixels, labels) = np.random.default_rng(0).dirichlet(np.ones(3), 25), data(25, 0)
    ours, other = (
        trained("distill.alpha=1", soft=soft, fit=(pixels, y)) for y in (labels, (labels + 1) % 3)
    )
    assert same(ours, other)
    ours, other = (
        trained("distill.alpha=0.5", soft=soft, fit=(pixels, y)) for y in (labels, (labels + 1) % 3)
    )
    assert not same(ours, other)


@pytest.mark.parametrize(
    "mixing", [(), ("augment.mixup=0.4", "augment.cutmix=1.0")], ids=["plain", "mixed"]
)
def test_a_teacher_that_says_the_labels_teaches_what_labels_do(mixing: tuple[str, ...]) -> None:
    """Also where images are mixed: the teacher's probabilities are mixed as the labels are. Plain SGD, so that gradients show."""
    sets = ("distill.alpha=1", "distill.temperature=1", "train.optimizer=sgd", *mixing)
    truth = np.eye(3)[data(25, 0)[1]]
    by_labels = trained(*sets)
    assert same(trained(*sets, soft=truth), by_labels, atol=1e-4)
    assert not same(trained(*sets, soft=np.roll(truth, 1, axis=0)), by_labels, atol=1e-3)
