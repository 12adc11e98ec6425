"""Compare a GRU over five test-time views with the mean of five softmaxes.

    uv run python bench/view_heads.py [--size 96] [--epochs 30]

The features are frozen and pretrained, of the demo's training images in two folds. Both heads see
the same five crops in training and in test, for the same number of epochs. The script prints the
accuracy out of fold and the exact McNemar test.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from threefold.data.load import load_data
from threefold.data.splits import assign_roles
from threefold.models.member import build_member
from threefold.models.resize import resize_square
from threefold.models.views import Views
from threefold.recipe.schema import DataSpec, FoldSpec, MemberSpec, ViewSpec
from threefold.stats.paired_tests import mcnemar_exact
from threefold.stats.scores import wilson_interval
from threefold.training.provenance import commit, hardware


class OverViews(nn.Module):
    """A GRU over the views' features (b, v, c), then a linear layer."""

    def __init__(self, width: int, num_classes: int, units: int = 512) -> None:
        super().__init__()
        self.gru = nn.GRU(width, units, batch_first=True)
        self.classifier = nn.Linear(units, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, k)."""
        logits: Tensor = self.classifier(self.gru(features)[0][:, -1])
        return logits


class PerView(nn.Module):
    """A one-step GRU of the same width on each view; returns the log of the mean softmax."""

    def __init__(self, width: int, num_classes: int, units: int = 512) -> None:
        super().__init__()
        self.gru = nn.GRU(width, units, batch_first=True)
        self.classifier = nn.Linear(units, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, k)."""
        b, v, c = features.shape
        state = self.gru(features.reshape(b * v, 1, c))[0][:, -1]
        return self.classifier(state).softmax(-1).reshape(b, v, -1).mean(1).clamp(min=1e-9).log()  # type: ignore[no-any-return]


@torch.inference_mode()
def features_of(pixels: np.ndarray, size: int) -> Tensor:
    """Pooled features (n, 5, c) of five crops."""
    spec = MemberSpec(name="m", backbone="tf_efficientnet_lite0.in1k", img_size=size)
    member = build_member(spec, 10).eval()
    views = Views(ViewSpec(kind="five-crop", upsample=1.15), size, 0)
    parts = []
    for begin in range(0, len(pixels), 64):
        crops = views(
            resize_square(torch.from_numpy(pixels[begin : begin + 64]), views.canvas, "squash")
        )
        flat = (crops.flatten(0, 1) - member.mean) / member.std
        pooled = member.backbone.forward_head(
            member.backbone.forward_features(flat), pre_logits=True
        )
        parts.append(pooled.reshape(5, -1, pooled.shape[-1]).transpose(0, 1))
    return torch.cat(parts)


def train(head: nn.Module, features: Tensor, labels: Tensor, epochs: int) -> None:
    """Plain AdamW with cosine decay."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    """Extract features once, train both heads in two folds, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    data = load_data(DataSpec(source="demo"), 0).train
    features = features_of(np.stack([data.pixels(row) for row in range(len(data))]), args.size)
    mean, std = features.mean((0, 1)), features.std((0, 1)) + 1e-6
    features, labels = (features - mean) / std, torch.tensor(data.labels)
    hits: dict[str, np.ndarray] = {}
    for name, kind in (("mean of 5 softmaxes", PerView), ("GRU over 5 views", OverViews)):
        hits[name] = np.zeros(len(data), bool)
        for fold, roles in enumerate(assign_roles(data.labels, None, FoldSpec(k=2), "honest", 0)):
            torch.manual_seed(fold)
            head = kind(features.shape[2], len(data.classes))
            train(head, features[roles.fit], labels[roles.fit], args.epochs)
            with torch.inference_mode():
                hits[name][roles.score] = (
                    head(features[roles.score]).argmax(1) == labels[roles.score]
                ).numpy()
        low, high = wilson_interval(int(hits[name].sum()), len(data))
        print(f"{name:22}{hits[name].mean():.4f} [{low:.4f}, {high:.4f}]")
    a, b, p = mcnemar_exact(hits["GRU over 5 views"], hits["mean of 5 softmaxes"])
    print(
        f"only GRU correct {a}, only mean correct {b}, p = {p:.3f}; "
        f"{args.size} px, {hardware()}, commit {commit()}"
    )


if __name__ == "__main__":
    main()
