"""What large data cost in hours and GPU-hours, and what limits them, from stated throughputs.

    uv run python bench/scale_costs.py [--gpus 1,8,64] [--disk-gb-s 6] [--shared-gb-s 20]

Nothing is run: the tables are arithmetic on the recipes in bench/scale and on the rates below, each
with its source. Rank 0 decodes every image once to verify it and once for each size in use, and
hashes the image caches. Then come, for each network, the training passes, the select rows after
every epoch, and the score and test rows once. Training needs the slower of the GPUs and of the disk
that holds the cache; gradients are taken to be exchanged after the backward pass, not during it.
Ensembles, report and export are left out: they take minutes on one processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec

RECIPES = Path(__file__).parent / "scale"

GPUS_OF_A_MACHINE = 8
ANSWERS_PER_STEP = 3.0
"""Images that a GPU answers in the time in which it trains on one: forward and backward passes are
about three forward passes."""


class Rate(NamedTuple):
    """Images a second, and where the figure is from."""

    images: float
    source: str


TRAINING = {
    "resnet50": Rate(5_500, "estimate: A100 in PyTorch 2,470 (published) x 2.33, rounded down"),
    "inception_v3": Rate(2_600, "estimate: RTX 3090 in timm 782 (published) x 3.3"),
    "tf_efficientnet_b4": Rate(750, "estimate: A100 in PyTorch 331 (published) x 2.33"),
}
"""Images a second that one H200 trains on in bfloat16, with the sizes of the recipes. Published:
NVIDIA DeepLearningExamples; timm's benchmark-train-amp-nhwc-pt112-cu113-rtx3090. 2.33 is H200 to
A100 of NVIDIA's own ResNet-50."""

PARAMETERS = {"resnet50": 25.6e6, "inception_v3": 23.8e6, "tf_efficientnet_b4": 19.3e6}

DECODING = Rate(2_465, "published: Pillow, 8 workers of 16 virtual cores, ImageNet's JPEG")
DECODED_MEGAPIXELS = 0.2
"""Of the images of that rate."""

HASHING = 1.5e9
"""Assumption: bytes a second of SHA-256 on one core with instructions for it."""

NOTICEABLE = 0.2
"""Share of the computation from which the exchange of gradients is named."""


@dataclass(frozen=True)
class Workload:
    """A data set and the recipe that trains on it."""

    name: str
    recipe: str
    images: int
    test: int
    jpeg_bytes: float
    megapixels: float


WORKLOADS = (
    Workload("iNaturalist-19", "inaturalist19.toml", 268_243, 0, 300e3, 0.48),
    Workload("ImageNet-1k", "imagenet.toml", 1_281_167, 50_000, 110e3, 0.2),
    Workload("100 M images", "hundred-million.toml", 100_000_000, 0, 110e3, 0.2),
)


@dataclass(frozen=True)
class Machines:
    """What the machines can do.

    Attributes:
        disk: bytes a second that the disk of one machine reads.
        shared: bytes a second of the file system that several machines share.
        links: bytes a second between the GPUs of a machine.
        network: bytes a second between two machines.
    """

    disk: float = 6e9
    shared: float = 20e9
    links: float = 300e9
    network: float = 50e9

    def reading(self, gpus: int) -> float:
        """Bytes a second of the image cache that all GPUs together are given."""
        return self.disk if gpus <= GPUS_OF_A_MACHINE else self.shared

    def exchange(self, gpus: int, parameters: float) -> float:
        """Seconds of a ring all-reduce of float32 gradients."""
        if gpus == 1:
            return 0.0
        bandwidth = self.links if gpus <= GPUS_OF_A_MACHINE else self.network
        return 2 * (gpus - 1) / gpus * 4 * parameters / bandwidth


class Cost(NamedTuple):
    """The hours of a run on some GPUs, and what limits its training."""

    caching: float
    """Hours in which rank 0 verifies and decodes the images."""
    training: float
    busy: float
    """Share of the training in which the GPUs compute."""
    limit: str
    """What training waits for."""
    cache_bytes: float

    @property
    def hours(self) -> float:
        """Wall time."""
        return self.caching + self.training


def backbone_of(member: MemberSpec) -> str:
    """The architecture, for which the rates are."""
    return member.backbone.partition(".")[0]


def passes(recipe: Recipe, workload: Workload) -> tuple[float, float]:
    """Images that each network of a recipe trains on, and that it answers, over all folds."""
    folds = recipe.folds
    held_out = folds.holdout or 0.1
    if folds.scheme != "holdout":
        held_out = 1 / folds.k
    count = 1 if folds.scheme == "holdout" else folds.k
    rest = workload.images * (1 - held_out)
    fit, select = rest * (1 - folds.select), rest * folds.select
    epochs = sum(stage.epochs for stage in recipe.stages)
    measured = epochs + len(recipe.stages)
    answered = select * measured + workload.images * held_out + workload.test
    return count * fit * epochs, count * answered


def cost(workload: Workload, gpus: int, machines: Machines, recipe: Recipe | None = None) -> Cost:
    """Return what a run costs.

    Args:
        workload: the data.
        gpus: number of GPUs, in machines of eight.
        machines: what else they have.
        recipe: in place of the workload's own.
    """
    recipe = recipe or Recipe.load(RECIPES / workload.recipe)
    images = workload.images + workload.test
    sizes = {(member.img_size, member.resize) for member in recipe.members}
    cache = sum(images * 3 * size**2 for size, _ in sizes)
    decoded = (1 + len(sizes)) * images * workload.megapixels / DECODED_MEGAPIXELS
    caching = decoded / DECODING.images + cache / HASHING
    trained, answered = passes(recipe, workload)
    computing = exchanging = reading = training = 0.0
    for member in recipe.members:
        name = backbone_of(member)
        effective = trained + answered / ANSWERS_PER_STEP
        compute = effective / TRAINING[name].images / gpus
        steps = trained / recipe.train.batch_size
        exchange = steps * machines.exchange(gpus, PARAMETERS[name])
        read = (trained + answered) * 3 * member.img_size**2 / machines.reading(gpus)
        computing, exchanging, reading = computing + compute, exchanging + exchange, reading + read
        training += max(compute + exchange, read)
    limit = "GPUs"
    if exchanging > NOTICEABLE * computing:
        limit = "gradients"
    if reading > computing + exchanging:
        limit = "disk of the cache"
    return Cost(caching / 3600, training / 3600, computing / training, limit, cache)


def rates_table() -> Iterator[str]:
    """The rates that everything follows from."""
    yield "| what | images/s | source |"
    yield "|---|---|---|"
    for name, rate in TRAINING.items():
        yield f"| {name}, training, one H200 | {rate.images:,.0f} | {rate.source} |"
    yield f"| decoding, one machine | {DECODING.images:,.0f} | {DECODING.source} |"


def costs_table(gpus: list[int], machines: Machines) -> Iterator[str]:
    """Hours and GPU-hours of each data set."""
    yield "| data | GPUs | cache h | training h | GPUs busy | training waits for | h | GPU-hours |"
    yield "|---|---|---|---|---|---|---|---|"
    for workload in WORKLOADS:
        for count in gpus:
            parts = cost(workload, count, machines)
            yield (
                f"| {workload.name} | {count} | {parts.caching:,.1f} | {parts.training:,.1f} | "
                f"{parts.busy:.0%} | {parts.limit} | {parts.hours:,.1f} | "
                f"{parts.hours * count:,.0f} |"
            )


def space_table() -> Iterator[str]:
    """What the data take on disk."""
    yield "| data | images | recipe | JPEG files GB | image cache GB |"
    yield "|---|---|---|---|---|"
    for workload in WORKLOADS:
        cache = cost(workload, 1, Machines()).cache_bytes
        yield (
            f"| {workload.name} | {workload.images + workload.test:,} | "
            f"`bench/scale/{workload.recipe}` | "
            f"{(workload.images + workload.test) * workload.jpeg_bytes / 1e9:,.0f} | "
            f"{cache / 1e9:,.0f} |"
        )


def tables(gpus: list[int], machines: Machines) -> str:
    """All tables as Markdown."""
    parts = (rates_table(), space_table(), costs_table(gpus, machines))
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", default="1,8,64", help="numbers of GPUs, separated by commas")
    parser.add_argument("--disk-gb-s", type=float, default=6.0, help="disk of one machine")
    parser.add_argument("--shared-gb-s", type=float, default=20.0, help="shared file system")
    arguments = parser.parse_args()
    machines = Machines(disk=arguments.disk_gb_s * 1e9, shared=arguments.shared_gb_s * 1e9)
    print(tables([int(text) for text in arguments.gpus.split(",")], machines))


if __name__ == "__main__":
    main()
