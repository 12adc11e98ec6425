"""What a linear head gains from several levels of a frozen backbone (Head2Toe, Evci et al. 2022).

    uv run python bench/head_levels.py --data ARCHIVES --work FOLDER [--sets elpv,demo] [--size 224]

For each development set (development_sets.py), heads are fitted on the last features of three
frozen networks, and on those of all levels: the penalty is chosen on a fifth of the training
images, the head is fitted on all of them, and the three answers are averaged. Accuracy and log loss
on the test images, and an exact McNemar test of the two answers. Images of at most 64 px are read
at 128 px.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from development_sets import SETS, prepare

from threefold.data.load import load_data
from threefold.data.splits import refit_roles
from threefold.models.member import last_level
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import FoldSpec
from threefold.stats.paired_tests import mcnemar_exact
from threefold.stats.scores import accuracy, correct, log_loss
from threefold.training.features.cache import FeatureCache
from threefold.training.features.probe import Targets, choose_l2, fit_linear
from threefold.training.planning.members import DEFAULT_MEMBERS

SMALL = 64
"""Images of at most this side are read at SMALL_SIZE."""

SMALL_SIZE = 128


def make_recipe(folder: Path, size: int) -> Recipe:
    """Return a recipe of three probes on all levels."""
    head = {"kind": "linear", "sequence": "levels"}
    members = [
        {"name": name, "backbone": backbone, "img_size": size, "head": head}
        for name, backbone in DEFAULT_MEMBERS
    ]
    stages = [{"name": "head", "kind": "head"}]
    return Recipe.parse({"data": {"root": str(folder)}, "stages": stages, "members": members})


def answer(train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int) -> np.ndarray:
    """Fit a head and return its probabilities (n, k) of the test images."""
    roles = refit_roles(labels, None, FoldSpec(select=0.2), 0)
    chosen = choose_l2(
        train[roles.fit],
        Targets(labels[roles.fit], num_classes),
        train[roles.select],
        labels[roles.select],
    )
    return fit_linear(train, Targets(labels, num_classes), chosen.head.l2).probs(test)


def compare(name: str, folder: Path, size: int) -> str:
    """Return the row of a set."""
    sources = load_data(make_recipe(folder, size).data, 0)
    assert sources.test is not None
    side = min(sources.train.pixels(0).shape[:2])
    recipe = make_recipe(folder, SMALL_SIZE if side <= SMALL else size)
    cache = FeatureCache(sources, recipe)
    num_classes = len(sources.train.classes)
    answers: dict[str, list[np.ndarray]] = {"last": [], "levels": []}  # the columns' order
    for member in recipe.members:
        train, labels = cache.rows("train", member, np.arange(len(sources.train)))
        test, test_labels = cache.rows("test", member, np.arange(len(sources.test)))
        backbone = cache.backbone(member)
        answers["levels"].append(answer(train, labels, test, num_classes))
        last = [last_level(backbone, features) for features in (train, test)]
        answers["last"].append(answer(last[0], labels, last[1], num_classes))
    means = {form: np.mean(probs, axis=0) for form, probs in answers.items()}
    cells = [
        f"{accuracy(probs, test_labels):.4f} / {log_loss(probs, test_labels):.3f}"
        for probs in means.values()
    ]
    hits = [correct(means[form], test_labels) for form in ("levels", "last")]
    names = [Path(image).name for image in sources.test.ids]
    paired = mcnemar_exact(*hits, SETS[name].groups(names))
    only = f"{paired.only_a} : {paired.only_b}, {paired.p:.2g}"
    return f"| {name} | {recipe.members[0].img_size} | {' | '.join(cells)} | {only} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--work", type=Path, required=True, help="where sets are unpacked")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    print("| set | px | last features | all levels | levels only : last only, p |")
    print("|---|---|---|---|---|")
    for name in arguments.sets.split(","):
        folder = prepare(name, arguments.data, arguments.work)
        print(compare(name, folder, arguments.size), flush=True)


if __name__ == "__main__":
    main()
