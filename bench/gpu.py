"""What a GPU makes of training: speed of networks, cost of heads, and two data sets to their end.

    python bench/gpu.py --out OUT [--cifar FOLDER] [--fashion FOLDER] [--minutes 10]
    python bench/gpu.py --out OUT --device cpu --tiny

Prints three tables, and appends each line to OUT/gpu.jsonl as soon as it is measured:

1. networks: images a second of a training step (forward, backward, AdamW) of the paper's networks
   and of the EfficientNet-Lite ones in float32 and in the half precision of the GPU, compiled by
   torch, too, with `--compile`; and the share of the measured peak of a matrix product that its
   multiply-adds take (three times those of an answer).
2. heads: time of a training step with each of the paper's heads, as a ratio to the linear one; all
   take turns. The target is 1.02.
3. data sets: `threefold train` of a whole data set, with the minutes it took and its accuracy on
   the test images. FOLDER has train/CLASS and test/CLASS.

A case starts only while time is left. `--tiny` uses small images, batches and networks, so that the
whole script passes on a CPU in a minute; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from threefold.models.backbones import PAPER_BACKBONES
from threefold.models.flops import count_macs
from threefold.models.member import build_member
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.training.provenance import commit, hardware
from threefold.training.steps.precision import autocast, half_precision

LITE = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
HEADS = ("linear", "rnn", "gru", "lstm", "bilstm")
HEAD_BACKBONE = "tf_efficientnet_lite0"
STEPS = 10
"""Steps in a measurement, after `WARM_UP` others."""
WARM_UP = 3


class Size(NamedTuple):
    """How large the measured cases are."""

    matrix: int
    """Rows and columns of the matrices whose product is the peak."""
    image: int
    """Largest side of an image in pixels; a network's own side if that is smaller."""
    batch: int
    head_units: int
    rounds: int
    networks: int
    """How many networks at most."""


FULL = Size(matrix=8192, image=299, batch=128, head_units=2048, rounds=15, networks=99)
TINY = Size(matrix=256, image=64, batch=4, head_units=32, rounds=1, networks=1)


class Bench:
    """The device, the sizes, the time that is left, and the file of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.size = TINY if options.tiny else FULL
        self.end = time.monotonic() + 60 * options.minutes
        self.file = options.out / "gpu.jsonl"
        self.compile = options.compile
        self.precisions = ["float32"]
        half = half_precision(self.device)
        if half:
            self.precisions.append(half)

    def seconds_left(self) -> float:
        """Seconds until no new case starts."""
        return self.end - time.monotonic()

    def record(self, **values: Any) -> None:
        """Append a line of results, and print it."""
        line = json.dumps(values)
        with self.file.open("a", encoding="utf-8") as file:
            print(line, file=file)
        print(line, flush=True)

    def seconds_per_call(self, call: Callable[[], object]) -> float:
        """Seconds of one call, of `STEPS` in a row."""
        for _ in range(WARM_UP):
            call()
        self._wait()
        began = time.perf_counter()
        for _ in range(STEPS):
            call()
        self._wait()
        return (time.perf_counter() - began) / STEPS

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_peaks(bench: Bench) -> dict[str, float]:
    """Multiply-adds a second of a square matrix product in each precision."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as float32 convolutions do by default
    peaks = {}
    n = bench.size.matrix
    for precision in bench.precisions:
        a = torch.randn(n, n, device=bench.device, dtype=getattr(torch, precision))
        b = torch.randn_like(a)
        seconds = bench.seconds_per_call(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        peaks[precision] = n**3 / seconds
        bench.record(part="peak", precision=precision, tflops=round(2e-12 * peaks[precision], 3))
    return peaks


def networks_to_measure(bench: Bench) -> list[tuple[str, int]]:
    """timm's names and the sides of the images: the smallest of the paper's, then the Lite ones."""
    pairs = [(name, 224) for name in LITE]
    pairs += [(row.timm, min(row.sizes)) for row in PAPER_BACKBONES]
    return [(name, min(side, bench.size.image)) for name, side in pairs][: bench.size.networks]


def training_step(
    bench: Bench, network: nn.Module, side: int, precision: str
) -> Callable[[], None]:
    """Return a function that takes one training step on noise."""
    images = 255 * torch.rand(bench.size.batch, 3, side, side, device=bench.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (bench.size.batch,), device=bench.device)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=precision == "float16")
    network.train()

    def step() -> None:
        with autocast(precision, bench.device):
            logits = network(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_member(bench: Bench, name: str, side: int, head: HeadSpec) -> nn.Module:
    """Make a member with random weights on the device."""
    spec = MemberSpec(name="m", backbone=name, weights="none", img_size=side, head=head)
    member = build_member(spec, 10).to(device=bench.device)
    return member.to(memory_format=torch.channels_last)


def measure_networks(bench: Bench, peaks: dict[str, float]) -> None:
    """Time a training step of each network."""
    for name, side in networks_to_measure(bench):
        macs = None
        for precision in bench.precisions:
            for compiled in (False, True) if bench.compile else (False,):
                if bench.seconds_left() < 0:
                    return
                member = make_member(bench, name, side, HeadSpec())
                if macs is None:
                    macs = count_macs(member, side)
                network = torch.compile(member) if compiled else member
                step = training_step(bench, network, side, precision)
                try:
                    seconds = bench.seconds_per_call(step)
                except torch.OutOfMemoryError:
                    bench.record(part="network", network=name, precision=precision, error="memory")
                    continue
                speed = bench.size.batch / seconds
                bench.record(
                    part="network",
                    network=name,
                    side=side,
                    precision=precision,
                    compiled=compiled,
                    images_per_second=round(speed, 1),
                    share_of_peak=round(3 * macs * speed / peaks[precision], 3),
                )


def measure_heads(bench: Bench) -> None:
    """Time a training step with each head, in turns."""
    precision = bench.precisions[-1]
    side = min(224, bench.size.image)
    steps = {}
    for kind in HEADS:
        head = HeadSpec(kind=kind, units=bench.size.head_units)
        member = make_member(bench, HEAD_BACKBONE, side, head)
        steps[kind] = training_step(bench, member, side, precision)
    ratios: dict[str, list[float]] = {kind: [] for kind in HEADS}
    for _ in range(bench.size.rounds):
        seconds = {kind: bench.seconds_per_call(step) for kind, step in steps.items()}
        for kind in HEADS:
            ratios[kind].append(seconds[kind] / seconds["linear"])
    for kind in HEADS:
        bench.record(
            part="head",
            head=kind,
            precision=precision,
            ratio=round(statistics.median(ratios[kind]), 3),
            least=round(min(ratios[kind]), 3),
            most=round(max(ratios[kind]), 3),
        )


def train_data_set(bench: Bench, name: str, folder: Path, sets: list[str], out: Path) -> None:
    """Train the recipe of CIFAR-10 on a data set until its end, or until the time is over."""
    run = out / f"run-{name}"
    command = [sys.executable, "-m", "threefold", "train", "cifar10", "--out", str(run)]
    sets = [*sets, f"data.root={folder.resolve()}", f"budget_minutes={bench.seconds_left() / 60}"]
    for text in sets:
        command += ["--set", text]
    environment = dict(os.environ)
    if bench.device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    minutes = (time.perf_counter() - began) / 60
    results = json.loads((run / "results.json").read_text("utf-8"))
    expected = {key: results[key] for key in ("chosen", "expected") if key in results}
    bench.record(part="data set", name=name, minutes=round(minutes, 2), **expected)


def main() -> None:
    """Measure what the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; --device cpu --tiny tries all")
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    today = datetime.date.today().isoformat()
    bench.record(part="start", date=today, hardware=hardware(), device=where, commit=commit())
    peaks = measure_peaks(bench)
    measure_heads(bench)
    for name, folder in (("cifar-10", options.cifar), ("fashion-mnist", options.fashion)):
        if folder is not None:
            train_data_set(bench, name, folder, options.sets, options.out)
    measure_networks(bench, peaks)


if __name__ == "__main__":
    main()
