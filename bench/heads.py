"""Time of recurrent heads relative to a linear head (STD), for a training step and inference.

    uv run python bench/heads.py [--size 96] [--batch 32] [--rounds 15] [--device cpu]

Every round times all heads in turn. The table has the median over rounds of the ratio to STD, which
does not depend on drifts of the machine. `full` rows use torch's recurrent layer, which also stores
the weights without effect.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from threefold.models.member import Member, build_member
from threefold.models.pipeline import pick_device
from threefold.models.recurrent import expand
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.training.provenance import commit, hardware

KINDS = ("linear", "rnn", "gru", "lstm", "bilstm")
FULL = ("gru", "lstm", "bilstm")


class FullLayer(nn.Module):
    """torch's recurrent layer over one time step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, None])[0][:, 0]


def build(backbone: str, kind: str, size: int, device: torch.device, full: bool = False) -> Member:
    """A member with the paper's head: 2048 units, noise 0.1, FC 1024, 10 classes."""
    head = HeadSpec(kind=kind, fc=1024, units=2048)  # type: ignore[arg-type]
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=size, head=head)
    member = build_member(spec, 10)
    if full:
        member.head.recurrent = FullLayer(expand(member.head.recurrent))
    return member.to(device=device).to(memory_format=torch.channels_last)


def measure(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def training_step(member: Member, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return a function that takes one training step with fused Adam."""
    optimizer = torch.optim.Adam(member.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        member.train()
        nn.functional.cross_entropy(member(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(member: Member, images: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs one forward pass."""

    @torch.inference_mode()
    def forward() -> None:
        member.eval()
        member(images)

    return forward


def main() -> None:
    """Time every head in turn and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="mobilenetv1_100")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    images = torch.rand(args.batch, 3, args.size, args.size, device=device).mul(255)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,), device=device)
    variants = {kind: build(args.backbone, kind, args.size, device) for kind in KINDS}
    variants |= {
        f"{kind} full": build(args.backbone, kind, args.size, device, full=True) for kind in FULL
    }
    print(
        f"{args.backbone} {args.size} px batch {args.batch}, {hardware()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}"
    )
    print(f"{'head':14}{'parameters':>12}{'train ms':>10}{'x STD':>8}{'infer ms':>10}{'x STD':>8}")
    actions = {
        name: (training_step(member, images, labels), inference(member, images))
        for name, member in variants.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(args.rounds + 2):
        for name, (train_step, infer) in actions.items():
            times[name].append((measure(train_step, device), measure(infer, device)))
    for name, member in variants.items():
        size = sum(p.numel() for p in member.parameters())
        cells = ""
        for part in (0, 1):
            mine, std = ([t[part] for t in times[n][2:]] for n in (name, "linear"))
            ratio = statistics.median(a / b for a, b in zip(mine, std, strict=True))
            cells += f"{statistics.median(mine) * 1e3:10.1f}{ratio:8.2f}"
        print(f"{name:14}{size:12,}{cells}")


if __name__ == "__main__":
    main()
