"""Does a recurrent head help? Seven heads x three backbones x seven data sets x several seeds.

    uv run python bench/head_seeds.py run --data ARCHIVES --work FOLDER [--seeds 10] [--size 128]
    uv run python bench/head_seeds.py table --work FOLDER [--data ARCHIVES]

The backbones are frozen EfficientNet-Lite0, 1 and 2 with ImageNet weights; heads train on their
cached features and differ in nothing else: STD has no recurrent layer; RNN, GRU, LSTM and BiLSTM
read the pooled features as one time step, as in the paper; `rows` and `spatial` are GRUs over the
rows or the places of the feature map. Each trains by the paper's optimizer; the seed decides the
initial weights, the batches and the select rows, on which the best epoch is chosen. `exact` is the
logistic regression that a recipe's linear head is, for comparison.

Each fit is one line of FOLDER/heads.jsonl with its answers to the test images, so an interrupted
series goes on where it stopped. Seeds are the outermost loop. Where another machine made the file,
`table` needs --data, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from development_sets import SETS, prepare
from hits import pack_hits, unpack_hits
from scipy.stats import ttest_1samp

from threefold.data.dataset import Sources
from threefold.data.load import load_data
from threefold.data.splits import Roles, refit_roles
from threefold.models.heads import build_head
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import FoldSpec, HeadSpec, MemberSpec
from threefold.stats.paired_tests import holm, seeds_difference
from threefold.training.features.cache import FeatureCache, FeatureRows
from threefold.training.features.heads import HeadNetwork, head_probs
from threefold.training.features.probe import Targets, choose_l2, fit_linear
from threefold.training.provenance import commit, hardware, stable_seed
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask

BACKBONES = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
UNITS, FC = 512, 512
"""Widths of the recurrent layer and of the layer after it; a quarter to a half of the paper's."""
HEADS = {
    "STD": HeadSpec(kind="linear", fc=FC),
    "RNN": HeadSpec(kind="rnn", units=UNITS, fc=FC),
    "GRU": HeadSpec(kind="gru", units=UNITS, fc=FC),
    "LSTM": HeadSpec(kind="lstm", units=UNITS, fc=FC),
    "BiLSTM": HeadSpec(kind="bilstm", units=UNITS, fc=FC),
    "rows": HeadSpec(kind="gru", units=UNITS, fc=FC, sequence="rows"),
    "spatial": HeadSpec(kind="gru", units=UNITS, fc=FC, sequence="spatial"),
    "exact": HeadSpec(kind="linear"),
}
REFERENCE = "STD"
EPOCHS, LR = 15, 1e-3
LARGEST = 1000
"""Sets with more training images than this are reduced to 100 images of each class."""


class Fit(NamedTuple):
    """One head on one backbone, set and seed.

    Attributes:
        hits: which test images it answers correctly, packed bits in hexadecimal.
        images: number of test images.
    """

    set: str
    backbone: str
    head: str
    seed: int
    hits: str
    images: int
    seconds: float
    size: int
    hardware: str
    date: str
    commit: str

    @property
    def correct(self) -> np.ndarray:
        """Which test images it answers correctly, booleans (n,)."""
        return unpack_hits(self.hits, self.images)


def read_fits(path: Path) -> list[Fit]:
    """Read the fits of a file, one JSON object a line; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Fit(**json.loads(line)) for line in lines if line]


def make_recipe(name: str, folder: Path, size: int) -> Recipe:
    """Make the recipe that has the settings of all heads on a set."""
    data: dict[str, Any] = {"root": str(folder), "group_regex": SETS[name].group_regex}
    if sum(1 for _ in (folder / "train").glob("*/*")) > LARGEST:
        data["limit_per_class"] = 100
    members = [
        {
            "name": f"{backbone}-{head}",
            "backbone": backbone,
            "img_size": size,
            "head": spec.model_dump(),
        }
        for backbone in BACKBONES
        for head, spec in HEADS.items()
    ]
    scheme = "grouped" if SETS[name].group_regex else "stratified"
    stage = {"name": "head", "kind": "head", "epochs": EPOCHS, "lr": LR, "schedule": "one-cycle"}
    return Recipe.parse(
        {
            "data": data,
            "folds": {"scheme": scheme},
            "train": {"optimizer": "adam-keras", "weight_decay": 0.0, "precision": "float32"},
            "stages": [stage],
            "members": members,
        }
    )


class Experiment:
    """The features of one set, and what trains heads on them.

    Args:
        name: a key of `SETS`.
        folder: its images.
        size: side of the images in pixels.
    """

    def __init__(self, name: str, folder: Path, size: int) -> None:
        self.recipe = make_recipe(name, folder, size)
        self.sources: Sources = load_data(self.recipe.data, seed=0)
        self.cache = FeatureCache(self.sources, self.recipe)

    def roles(self, seed: int) -> Roles:
        """Return the fit rows and select rows of a seed."""
        train = self.sources.train
        scheme = "stratified" if train.groups is None else "grouped"
        folds = FoldSpec(scheme=scheme, select=0.15)
        return refit_roles(train.labels, train.groups, folds, seed)

    def features(self, spec: MemberSpec, split: str) -> FeatureRows:
        """Return the features of all training or test images."""
        images = self.sources.train if split == "train" else self.sources.test
        assert images is not None
        return self.cache.rows(split, spec, np.arange(len(images)))

    def fit(self, backbone: str, head: str, seed: int) -> np.ndarray:
        """Train a head and return which test images it answers correctly, booleans (n,)."""
        spec = self.recipe.member(f"{backbone}-{head}")
        roles = self.roles(seed)
        train, test = self.features(spec, "train"), self.features(spec, "test")
        fit, select = (
            FeatureRows(train.features[rows], train.labels[rows])
            for rows in (roles.fit, roles.select)
        )
        classes = len(self.sources.train.classes)
        if head == "exact":
            targets = Targets(fit.labels, classes)
            l2 = choose_l2(fit.features, targets, select.features, select.labels).head.l2
            exact = fit_linear(train.features, Targets(train.labels, classes), l2)
            return np.asarray(exact.probs(test.features).argmax(1) == test.labels)
        # The same for all heads of a backbone and a seed, so that they are paired.
        torch.manual_seed(stable_seed(seed, backbone))
        network = HeadNetwork(build_head(spec.head, train.features.shape[1], classes))
        task = StageTask(
            stage=self.recipe.stage("head"),
            recipe=self.recipe,
            fit=fit,
            select=select,
            seed=stable_seed(seed, backbone, "batches"),
            num_classes=classes,
        )
        train_stage(network, task)
        return np.asarray(head_probs(network, test.features).argmax(1) == test.labels)


def run(args: argparse.Namespace) -> None:
    """Fit what is missing in the file."""
    path = args.work / "heads.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    done = {(f.set, f.backbone, f.head, f.seed) for f in read_fits(path)}

    @cache
    def experiment(name: str) -> Experiment:
        return Experiment(name, prepare(name, args.data, args.work / "sets"), args.size)

    for seed in range(args.seeds):
        for name in args.sets.split(","):
            for backbone in BACKBONES:
                for head in HEADS:
                    if (name, backbone, head, seed) in done:
                        continue
                    began = time.monotonic()
                    correct = experiment(name).fit(backbone, head, seed)
                    fit = Fit(
                        set=name,
                        backbone=backbone,
                        head=head,
                        seed=seed,
                        hits=pack_hits(correct),
                        images=len(correct),
                        seconds=round(time.monotonic() - began, 2),
                        size=args.size,
                        hardware=hardware(),
                        date=date.today().isoformat(),
                        commit=commit(),
                    )
                    with path.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(fit._asdict()) + "\n")
                    print(
                        f"seed {seed}, {name}, {backbone}, {head}: {correct.mean():.4f}", flush=True
                    )


class Row(NamedTuple):
    """One head against the reference.

    Attributes:
        accuracy: mean over sets, backbones and seeds.
        difference: mean over the sets of the difference in accuracy to the reference.
        set_interval, set_p: for other sets, by a t-test over the sets.
        image_difference: mean difference over all images.
        image_interval, image_p: for other seeds and other images of these sets.
        per_set: difference on each set.
    """

    head: str
    accuracy: float
    difference: float
    set_interval: tuple[float, float]
    set_p: float
    image_difference: float
    image_interval: tuple[float, float]
    image_p: float
    per_set: dict[str, float]


def stack_hits(
    fits: Sequence[Fit], groups: dict[str, Sequence[str]]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], int]:
    """Arrange the hits of the seeds that are complete.

    Args:
        fits: the fits.
        groups: of each set, the name of each test image, or of its group.

    Returns:
        For each head and set, hits (seeds, backbones * images); for each set, the names of the
        columns; and the number of seeds.
    """
    table = {(f.head, f.set, f.backbone, f.seed): f for f in fits}
    heads = [head for head in HEADS if any(f.head == head for f in fits)]
    sets = [name for name in SETS if any(f.set == name for f in fits)]
    seeds = [
        seed
        for seed in sorted({f.seed for f in fits})
        if all((h, s, b, seed) in table for h in heads for s in sets for b in BACKBONES)
    ]
    hits = {
        head: {
            name: np.stack(
                [
                    np.concatenate([table[head, name, b, seed].correct for b in BACKBONES])
                    for seed in seeds
                ]
            )
            for name in sets
        }
        for head in heads
        if seeds
    }
    columns = {
        name: np.array([f"{name}/{group}" for group in groups[name]] * len(BACKBONES))
        for name in sets
    }
    return hits, columns, len(seeds)


def compare_heads(
    hits: dict[str, dict[str, np.ndarray]], columns: dict[str, np.ndarray]
) -> list[Row]:
    """Compare every head with the reference, paired over seeds and images.

    Args:
        hits: booleans (seeds, columns) of each head and set; two seeds or more.
        columns: the image, or its group, of each column. The three backbones' answers to one image
            count as one observation.
    """
    rows = []
    names = np.concatenate(list(columns.values()))
    reference = hits[REFERENCE]
    for head, of_set in hits.items():
        per_set = {name: float(of_set[name].mean() - reference[name].mean()) for name in of_set}
        differences = np.array(list(per_set.values()))
        over_sets = ttest_1samp(differences, 0.0)
        interval = over_sets.confidence_interval()
        over_images = seeds_difference(
            np.concatenate(list(of_set.values()), axis=1),
            np.concatenate(list(reference.values()), axis=1),
            names,
        )
        row = Row(
            head=head,
            accuracy=float(np.mean([value.mean() for value in of_set.values()])),
            difference=float(differences.mean()),
            set_interval=(float(interval.low), float(interval.high)),
            set_p=float(over_sets.pvalue),
            image_difference=over_images.estimate,
            image_interval=(over_images.low, over_images.high),
            image_p=over_images.p,
            per_set=per_set,
        )
        rows.append(row)
    return rows


def sentence(rows: Sequence[Row]) -> str:
    """Say in one sentence which heads differ from the reference, after Holm over the heads."""
    others = [row for row in rows if row.head not in (REFERENCE, "exact")]
    adjusted = holm([row.set_p for row in others])
    differing = [row for row, p in zip(others, adjusted, strict=True) if p <= 0.05]
    better = [row.head for row in differing if row.difference > 0]
    worse = [row.head for row in differing if row.difference < 0]
    largest = max(others, key=lambda row: row.difference)
    text = (
        f"Of {len(others)} recurrent heads, {', '.join(better) or 'none'} is better than "
        f"{REFERENCE} and {', '.join(worse) or 'none'} is worse"
    )
    return (
        f"{text} over {len(rows[0].per_set)} sets (t-test over the sets, Holm, 5 %); the best of "
        f"them, {largest.head}, differs by {100 * largest.difference:+.2f} points."
    )


def print_table(work: Path, archives: Path | None) -> None:
    """Print the table and the sentence as markdown.

    Args:
        work: folder of the fits and the sets.
        archives: folder of the archives, for sets that are not there yet.
    """
    fits = read_fits(work / "heads.jsonl")
    groups = {}
    for name in dict.fromkeys(f.set for f in fits):
        folder = prepare(name, archives, work / "sets")
        # In the order of the ids, which is that of the answers.
        paths = sorted((folder / "test").glob("*/*"), key=Path.as_posix)
        files = [path.name for path in paths]
        groups[name] = SETS[name].groups(files) or [f"{p.parent.name}/{p.name}" for p in paths]
    hits, columns, seeds = stack_hits(fits, groups)
    if seeds < 2 or len(columns) < 2:
        raise SystemExit("two complete seeds and two sets are needed: go on with `run`")
    rows = compare_heads(hits, columns)
    others = [row for row in rows if row.head != REFERENCE]
    by_sets = dict(zip([r.head for r in others], holm([r.set_p for r in others]), strict=True))
    by_images = dict(zip([r.head for r in others], holm([r.image_p for r in others]), strict=True))
    minutes = sum(f.seconds for f in fits) / 60
    dates = sorted({f.date for f in fits})
    commits = ", ".join(dict.fromkeys(f.commit for f in fits))
    print(
        f"{len(columns)} sets, {len(BACKBONES)} backbones, {seeds} seeds, {fits[0].size} px; "
        f"{minutes:.0f} minutes, {fits[0].hardware}, {dates[0]} to {dates[-1]}, commit {commits}\n"
    )
    print(
        f"| head | accuracy | minus {REFERENCE}, points: mean of the sets, for other sets "
        "| p, Holm "
        "| mean of the images, for other seeds and images | p, Holm | lowest, highest set |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if row.head == REFERENCE:
            print(f"| {row.head} | {row.accuracy:.4f} | | | | | |")
            continue
        low, high = min(row.per_set.values()), max(row.per_set.values())
        print(
            f"| {row.head} | {row.accuracy:.4f} "
            f"| {_points(row.difference, row.set_interval)} | {by_sets[row.head]:.2g} "
            f"| {_points(row.image_difference, row.image_interval)} | {by_images[row.head]:.2g} "
            f"| {100 * low:+.2f}, {100 * high:+.2f} |"
        )
    print(f"\n{sentence(rows)}")


def _points(difference: float, interval: tuple[float, float]) -> str:
    low, high = (100 * value for value in interval)
    return f"{100 * difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    """Fit heads, or print the table of those that are fitted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("--work", type=Path, required=True, help="folder of sets and results")
    parser.add_argument("--data", type=Path, help="folder of the archives")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    if args.step == "run":
        run(args)
    else:
        print_table(args.work, args.data)


if __name__ == "__main__":
    main()
