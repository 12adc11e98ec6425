"""How much of a scored row's label reaches a student through its teachers.

`uv run python bench/distill_leak.py`; minutes on one core.

The demo's 3,000 training images, a fifth of their labels changed at random. Linear heads on frozen
features of a pretrained EfficientNet-Lite0 (convex, so there is no seed), two folds. A student with
an honest score predicts the changed label of a scored row as often as its twin, which learns only
from labels of the other fold.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from threefold.data.dataset import ImageDataset
from threefold.data.load import load_data
from threefold.ensembles.cross_fit import stratified_parts
from threefold.ensembles.scaling import apply_temperature, fit_temperature
from threefold.models.member import Member, build_member
from threefold.models.resize import resize_square
from threefold.recipe.lookup import packaged
from threefold.stats.paired_tests import mcnemar_exact
from threefold.stats.scores import share_interval
from threefold.training.provenance import commit, hardware
from threefold.training.steps.losses import soft_loss, soften

CPU, K = torch.device("cpu"), 10
SETTINGS = ((0.5, 2.0), (0.9, 2.0), (0.9, 4.0), (1.0, 1.0))


def features(member: Member, images: ImageDataset) -> Tensor:
    """Pooled features (n, d) at 56 pixels, standardised."""
    parts = []
    for rows in np.array_split(np.arange(len(images)), len(images) // 50):
        batch = resize_square(
            torch.from_numpy(np.stack([images.pixels(int(i)) for i in rows])), 56, "squash"
        ).float()
        with torch.no_grad():
            maps = member.backbone.forward_features((batch - member.mean) / member.std)
            parts.append(member.backbone.forward_head(maps, pre_logits=True))
    return torch.cat(parts)


def fit_head(
    x: Tensor, y: np.ndarray, soft: np.ndarray | None = None, alpha: float = 0.0, t: float = 1.0
) -> Tensor:
    """Fit a linear head (d + 1, k) by L-BFGS, barely regularised, so that it memorises."""
    x1, labels = torch.cat([x, torch.ones(len(x), 1)], 1), torch.from_numpy(y)
    softened = soften(soft, t, CPU) if soft is not None else None
    head = torch.zeros(x1.shape[1], K, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x1 @ head
        total = (1 - alpha) * torch.nn.functional.cross_entropy(logits, labels) + 1e-5 * (
            head**2
        ).sum()
        if softened is not None:
            total = total + alpha * soft_loss(logits, softened, t)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return head.detach()


def answer(head: Tensor, x: Tensor) -> np.ndarray:
    """Probabilities (n, k)."""
    logits: Tensor = torch.cat([x, torch.ones(len(x), 1)], 1) @ head
    return logits.double().softmax(-1).numpy()


def out_of_fold(
    x: Tensor, y: np.ndarray, parts: np.ndarray, learn: Callable[[np.ndarray], Tensor]
) -> np.ndarray:
    """Answer each part by the head that `learn` fits on the other rows, booleans (n,)."""
    probs = np.empty((len(y), K))
    for part in np.unique(parts):
        probs[parts == part] = answer(learn(parts != part), x[parts == part])
    return probs


def teacher_probs(x: Tensor, y: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return a teacher's out-of-fold probabilities, calibrated by a temperature."""
    probs = out_of_fold(x, y, parts, lambda rows: fit_head(x[rows], y[rows]))
    return apply_temperature(probs, fit_temperature(probs, y))


def leak(x: Tensor, truth: np.ndarray) -> None:
    """Print accuracy on changed labels: of the twin, and of students by kind of teacher."""
    rng = np.random.default_rng(0)
    planted, y = rng.random(len(truth)) < 0.2, truth.copy()
    y[planted] = (truth[planted] + rng.integers(1, K, planted.sum())) % K
    parts = stratified_parts(y, parts=2)
    own, nested = teacher_probs(x, y, parts), np.empty((2, len(y), K))
    for part in (0, 1):
        rest = parts != part
        nested[part, rest] = teacher_probs(x[rest], y[rest], stratified_parts(y[rest], parts=2))
    print(f"\n{len(y)} rows, {planted.sum()} labels changed at random: out-of-fold answers")
    twin = out_of_fold(x, y, parts, lambda rows: fit_head(x[rows], y[rows]))
    honest = twin.argmax(1) == y
    show("twin, labels only", honest, planted, honest)
    teachers = {"the run's own teachers": own[None].repeat(2, 0), "nested teachers": nested}
    for (alpha, t), (name, soft) in product(SETTINGS, teachers.items()):

        def learn(
            rows: np.ndarray, soft: np.ndarray = soft, a: float = alpha, t: float = t
        ) -> Tensor:
            answered_part = int(parts[~rows][0])
            return fit_head(x[rows], y[rows], soft[answered_part][rows], a, t)

        probs = out_of_fold(x, y, parts, learn)
        show(f"alpha {alpha}, temperature {t}: {name}", probs.argmax(1) == y, planted, honest)


def show(name: str, right: np.ndarray, planted: np.ndarray, twin: np.ndarray) -> None:
    """Print the accuracy by the data's labels, on all rows and on those with changed labels."""
    low, high = share_interval(right[planted])
    test = mcnemar_exact(right[planted], twin[planted])
    print(
        f"{name:52} all {right.mean():.4f}   changed {right[planted].mean():.4f} "
        f"[{low:.4f}, {high:.4f}], against the twin p = {test.p:.2g}"
    )


def settings(x: Tensor, y: np.ndarray, test: Tensor, truth: np.ndarray) -> None:
    """Original labels: fit heads on all training rows, and score them on the test rows."""
    soft = teacher_probs(x, y, stratified_parts(y, parts=2))
    twin = answer(fit_head(x, y), test).argmax(1) == truth
    print(
        f"\n{len(y)} rows, original labels; test rows {len(truth)}\n"
        f"{'twin, labels only':40} {twin.mean():.4f}"
    )
    for alpha, t in SETTINGS:
        right = answer(fit_head(x, y, soft, alpha, t), test).argmax(1) == truth
        p = mcnemar_exact(right, twin)
        print(
            f"alpha {alpha}, temperature {t:<19} {right.mean():.4f}   "
            f"{p.only_a} against {p.only_b}, p = {p.p:.2g}"
        )


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    recipe = packaged("demo_tuned")
    sources = load_data(recipe.data, 0)
    assert sources.test is not None
    member = build_member(recipe.members[0], K).eval()
    assert isinstance(member, Member)
    train, test = features(member, sources.train), features(member, sources.test)
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    print(f"{hardware()}, commit {commit()}")
    leak(train, sources.train.labels)
    settings(train, sources.train.labels, test, sources.test.labels)


if __name__ == "__main__":
    main()
