"""What peers.py compares: each system is fitted, and answers the test images, in its own process.

    python bench/peer_systems.py fit SYSTEM --train FOLDER --model OUT --weights FOLDER --deadline T
    python bench/peer_systems.py predict SYSTEM --images FOLDER --model OUT --answers FILE.npz

All start from the same ImageNet weights of EfficientNet-Lite0, 1 and 2, in timm's format, which
stand for the cache of a model hub. FOLDER has one folder per class; T is in seconds of time.time().

- `fastai`: `vision_learner` and `fine_tune` with fastai's defaults: Resize(224), aug_transforms(),
  a fifth of the images for validation, batches of 64, one epoch of the head, then all layers.
- `probe`: features of the frozen network at 224 px, standardised, then scikit-learn's logistic
  regression with C chosen by 5-fold cross-validation of the log loss.
- `timm`: a plain loop: AdamW, one cycle, random resized crop and flip, batches of 32, one epoch of
  the linear head, then all layers; no validation images, the last epoch counts.
- `threefold`: `threefold fit`; here only its answers, by the exported file.

The answer of the three networks is the mean of their probabilities. An epoch is timed on a few
images first, and as many epochs follow as fit into the time. Where three networks would get fewer
than three epochs each, two or one are trained.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from development_sets import images_of
from PIL import Image

NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
COSTS = (1.0, 1.5, 2.0)
"""Rough cost of a training step of each network, to share the time among them."""
SIDE = 224
"""Side of the images in pixels."""
MIN_EPOCHS = 3
"""Epochs of all layers that each network should get before another network is trained."""
MARGIN = 0.92
"""Share of the remaining time that is planned for; the rest covers saving and wrong estimates."""
TIMED_IMAGES = 16
"""Images of the batch on which a step is timed."""


class Job(NamedTuple):
    """What a system is given to fit."""

    train: Path
    """One folder per class."""
    model: Path
    """Folder for the finished model."""
    weights: Path
    """Folder of NETWORK.safetensors."""
    deadline: float
    """In seconds of time.time()."""

    def seconds_left(self) -> float:
        """Seconds that may still be planned for."""
        return MARGIN * (self.deadline - time.time())


class EpochTimes(NamedTuple):
    """Seconds of one epoch of the head, and of one epoch of all layers."""

    head: float
    whole: float


class Schedule(NamedTuple):
    """Epochs of the head alone, then of all layers."""

    head: int
    whole: int


def schedule(seconds: float, epoch: EpochTimes) -> Schedule:
    """Plan the epochs of one network: one of the head, then as many as fit of all layers.

    Where none of all layers fits, the head has all the time, which may be too short for it as well.
    """
    whole = int((seconds - epoch.head) // epoch.whole)
    if whole >= 1:
        return Schedule(1, whole)
    return Schedule(int(seconds // epoch.head), 0)


def networks_to_train(seconds: float, first: EpochTimes) -> int:
    """Return how many networks to train, given the time of an epoch of the first, smallest one."""
    for count in range(len(NETWORKS), 1, -1):
        if seconds >= sum(COSTS[:count]) * (first.head + MIN_EPOCHS * first.whole):
            return count
    return 1


def train_networks(
    job: Job,
    start: Callable[[str], Any],
    time_epoch: Callable[[Any], EpochTimes],
    train: Callable[[Any, Schedule], None],
    save: Callable[[Any, Path], None],
) -> dict[str, Any]:
    """Train as many networks as there is time for, and return what was done.

    Args:
        job: the images, and when to be finished.
        start: makes a learner from the name of a network.
        time_epoch: times an epoch of a learner, whose weights may change.
        train: trains a learner.
        save: writes the trained network to a file.
    """
    epochs: dict[str, Schedule] = {}
    count = len(NETWORKS)
    for i, name in enumerate(NETWORKS):
        if i >= count:
            break
        measured = time_epoch(start(name))
        if i == 0:
            count = networks_to_train(job.seconds_left(), measured)
        seconds = job.seconds_left() * COSTS[i] / sum(COSTS[i:count])
        planned = schedule(seconds, measured)
        if planned.head < 1:
            break
        learner = start(name)
        train(learner, planned)
        save(learner, job.model / f"{name}.model")
        epochs[name] = planned
    return {"epochs": epochs}


def create_network(name: str, weights: Path, classes: int) -> Any:
    """Create a timm network with its pretrained weights and a fresh classifier (0 = none)."""
    import timm

    overlay = {"file": str(weights / f"{name}.safetensors")}
    return timm.create_model(
        name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
    )


def open_image(path: Path) -> Image.Image:
    """Decode an image to RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


# fastai


def fit_fastai(job: Job) -> dict[str, Any]:
    """Fit by fastai's `fine_tune`."""
    import torch
    from fastai.vision.all import (
        Callback,
        CancelFitException,
        ImageDataLoaders,
        Resize,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    class StopAtDeadline(Callback):  # type: ignore[misc]
        """Ends the training when the time is over, where the estimate was wrong."""

        def after_batch(self) -> None:
            if time.time() > job.deadline:
                raise CancelFitException

    def start(name: str) -> Any:
        set_seed(0)
        loaders = ImageDataLoaders.from_folder(
            job.train,
            valid_pct=0.2,
            seed=0,
            item_tfms=Resize(SIDE),
            batch_tfms=aug_transforms(),
        )
        overlay = {"file": str(job.weights / f"{name}.safetensors")}
        learner = vision_learner(loaders, name, pretrained_cfg_overlay=overlay)
        learner.add_cb(StopAtDeadline())
        return learner

    def time_epoch(learner: Any) -> EpochTimes:
        began = time.perf_counter()
        x, y = learner.dls.train.one_batch()
        load = (time.perf_counter() - began) / len(x)
        batch = x[:TIMED_IMAGES], y[:TIMED_IMAGES]
        whole = _time_step(lambda: learner.loss_func(learner.model(batch[0]), batch[1]).backward())
        with torch.no_grad():
            forward = _time_step(lambda: learner.model(batch[0]))
        fit_rows, valid_rows = len(learner.dls.train_ds), len(learner.dls.valid_ds)
        valid = valid_rows * (load + forward)
        # The backward pass of the head is small, but the loader's workers start in every epoch.
        head = fit_rows * (load + 1.1 * forward) + valid + 1.0
        return EpochTimes(head, fit_rows * (load + whole) + valid + 1.0)

    def train(learner: Any, planned: Schedule) -> None:
        with learner.no_bar(), learner.no_logging():
            if planned.whole:
                learner.fine_tune(planned.whole, freeze_epochs=planned.head)
            else:
                learner.fit_one_cycle(planned.head, slice(2e-3), pct_start=0.99)

    def save(learner: Any, path: Path) -> None:
        learner.remove_cb(StopAtDeadline)
        learner.export(path.resolve())

    return train_networks(job, start, time_epoch, train, save)


def predict_fastai(model: Path, paths: list[Path]) -> np.ndarray:
    """Mean of the learners' answers (n, k)."""
    from fastai.vision.all import load_learner

    answers = []
    for path in sorted(model.glob("*.model")):
        learner = load_learner(path)
        loader = learner.dls.test_dl(paths)
        with learner.no_bar():
            answers.append(learner.get_preds(dl=loader)[0].numpy())
    return np.asarray(np.mean(answers, 0))


def _time_step(step: Callable[[], object]) -> float:
    """Seconds per image of a step on `TIMED_IMAGES` images; the first call warms up."""
    step()
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) / TIMED_IMAGES


# Frozen features and logistic regression


def fit_probe(job: Job) -> dict[str, Any]:
    """Fit a logistic regression on the features of each network that there is time for."""
    import joblib
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images = images_of(job.train)
    paths, labels = [path for path, _ in images], [name for _, name in images]
    fitted = 0
    for name in NETWORKS:
        network = create_network(name, job.weights, 0).eval()
        features = frozen_features(network, paths, job.deadline)
        if features is None:
            break
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
        # Files lie in order of their names, so that without a shuffle folds hold whole series.
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        search = GridSearchCV(classifier, grid, scoring="neg_log_loss", cv=folds)
        search.fit(features, labels)
        joblib.dump((network, search.best_estimator_), job.model / f"{name}.model")
        fitted += 1
    return {"networks": fitted, "complete": fitted == len(NETWORKS)}


def predict_probe(model: Path, paths: list[Path]) -> np.ndarray:
    """Mean of the probes' answers (n, k)."""
    import joblib

    answers = []
    for path in sorted(model.glob("*.model")):
        network, classifier = joblib.load(path)
        answers.append(classifier.predict_proba(frozen_features(network, paths)))
    return np.asarray(np.mean(answers, 0))


def frozen_features(
    network: Any, paths: list[Path], deadline: float = float("inf")
) -> np.ndarray | None:
    """Pooled features (n, d) at 224 px, squashed to a square; None if the time is over."""
    import torch
    from timm.data import resolve_model_data_config
    from torchvision.transforms import v2

    config = resolve_model_data_config(network)
    transform = v2.Compose(
        [
            v2.Resize((SIDE, SIDE), v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    network = network.to(memory_format=torch.channels_last)
    rows = []
    for start in range(0, len(paths), 32):
        if time.time() > deadline:
            return None
        batch = torch.stack([transform(open_image(path)) for path in paths[start : start + 32]])
        with torch.inference_mode():
            rows.append(network(batch.to(memory_format=torch.channels_last)).numpy())
    return np.concatenate(rows)


# A plain loop with timm


def fit_timm(job: Job) -> dict[str, Any]:
    """Fit by a plain training loop."""
    import torch
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    classes = len({name for _, name in images_of(job.train)})

    def start(name: str) -> Any:
        torch.manual_seed(0)
        return create_network(name, job.weights, classes).to(memory_format=torch.channels_last)

    def loader(network: Any) -> DataLoader[Any]:
        config = resolve_model_data_config(network)
        transform = create_transform(
            SIDE,
            is_training=True,
            scale=(0.35, 1.0),
            color_jitter=None,
            interpolation="bicubic",
            mean=config["mean"],
            std=config["std"],
        )
        return DataLoader(ImageFolder(str(job.train), transform), 32, shuffle=True, drop_last=True)

    def loss(network: Any, x: Any, y: Any) -> Any:
        logits = network(x.to(memory_format=torch.channels_last))
        return torch.nn.functional.cross_entropy(logits, y)

    def time_epoch(network: Any) -> EpochTimes:
        batches = loader(network)
        began = time.perf_counter()
        x, y = next(iter(batches))
        load = (time.perf_counter() - began) / len(x)
        batch = x[:TIMED_IMAGES], y[:TIMED_IMAGES]
        whole = _time_step(lambda: loss(network, *batch).backward())
        with torch.no_grad():
            forward = _time_step(lambda: loss(network, *batch))
        rows = len(batches) * 32
        return EpochTimes(rows * (load + 1.1 * forward), rows * (load + whole))

    def train_phase(network: Any, parameters: list[Any], lr: float, epochs: int) -> None:
        batches = loader(network)
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(batches))
        for _ in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                loss(network, x, y).backward()
                optimizer.step()
                cycle.step()
                if time.time() > job.deadline:
                    return

    def train(network: Any, planned: Schedule) -> None:
        network.train().requires_grad_(False)
        head = list(network.get_classifier().requires_grad_(True).parameters())
        train_phase(network, head, 3e-3, planned.head)
        if planned.whole:
            network.requires_grad_(True)
            train_phase(network, list(network.parameters()), 5e-4, planned.whole)

    return train_networks(job, start, time_epoch, train, torch.save)


def predict_timm(model: Path, paths: list[Path]) -> np.ndarray:
    """Mean of the networks' answers (n, k)."""
    import torch
    from timm.data import create_transform, resolve_model_data_config

    # The fit has written these files itself.
    files = sorted(model.glob("*.model"))
    networks = [torch.load(path, weights_only=False).eval() for path in files]
    config = resolve_model_data_config(networks[0]) | {"input_size": (3, SIDE, SIDE)}
    transform = create_transform(**config)
    rows = []
    for start in range(0, len(paths), 32):
        batch = torch.stack([transform(open_image(path)) for path in paths[start : start + 32]])
        with torch.inference_mode():
            probs = torch.stack([network(batch).softmax(1) for network in networks])
        rows.append(probs.mean(0).numpy())
    return np.concatenate(rows)


# threefold


def predict_threefold(model: Path, paths: list[Path]) -> np.ndarray:
    """Answers (n, k) of the exported file, in the order of the sorted class names."""
    import threefold

    exported = threefold.load(model / "model.onnx")
    order = np.argsort(exported.classes)
    return exported.predict_proba(paths)[:, order]


FITS = {"fastai": fit_fastai, "probe": fit_probe, "timm": fit_timm}
PREDICTIONS = {
    "fastai": predict_fastai,
    "probe": predict_probe,
    "timm": predict_timm,
    "threefold": predict_threefold,
}


def main() -> None:
    """Fit a system, or let it answer images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("fit", "predict"))
    parser.add_argument("system", choices=PREDICTIONS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--answers", type=Path)
    args = parser.parse_args()
    if args.step == "fit":
        args.model.mkdir(parents=True)
        job = Job(args.train, args.model, args.weights, args.deadline)
        done = FITS[args.system](job)
        (args.model / "done.json").write_text(json.dumps(done))
        return
    images = images_of(args.images)
    probs = PREDICTIONS[args.system](args.model, [path for path, _ in images])
    classes = sorted({name for _, name in images})
    labels = np.array([classes.index(name) for _, name in images])
    names = np.array([path.name for path, _ in images])
    np.savez_compressed(args.answers, probs=probs, labels=labels, names=names)


if __name__ == "__main__":
    main()
