"""What speed_peers.py times: one system, one network and one size, each in its own process.

    python bench/speed_systems.py train SYSTEM --images FOLDER --network N --size 96 --scratch DIR
    python bench/speed_systems.py features SYSTEM --images FOLDER --network N --size 96

FOLDER has one folder per class. Prints one line of JSON with `images_per_second`. All layers train,
from random weights, with AdamW in batches of `--batch`, the images flipped and shifted or cropped
at random; the last of `--epochs` epochs counts, without validation. Every system reads the files
itself, and keeps what it would keep by default.

train:
- `threefold`: `threefold train` with one member and one stage; the epoch's time is the run's own.
- `timm`: a plain loop: ImageFolder, timm's training transform, a DataLoader with one worker per
  core, float32, contiguous memory.
- `fastai`: `vision_learner`, all layers, `fit_one_cycle` with its default augmentation.
- `keras-torch`, `keras-tensorflow`: `image_dataset_from_directory` and `fit`; Keras has no
  EfficientNet-Lite.

features:
- `threefold`: the engine that a run would choose, on decoded images.
- `timm`: the network without its classifier in eager PyTorch, on the same decoded images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEATURE_IMAGES = 128
"""Images whose features are computed; they repeat if there are fewer."""

KERAS_NETWORKS = {"mobilenetv1_100": "MobileNet", "resnet50": "ResNet50"}
"""timm's names and those of keras.applications."""

RECIPE = """\
name = "speed"
[data]
source = "folder"
root = {images}
[folds]
scheme = "holdout"
holdout = 0.05
select = 0.05
[augment]
hflip = true
shift = 0.1
zoom = 0.1
[train]
batch_size = {batch}
optimizer = "adamw"
[ensemble]
methods = ["mean"]
[[stages]]
name = "tune"
epochs = {epochs}
lr = 1e-3
schedule = "one-cycle"
[[members]]
name = "network"
backbone = {network}
weights = "none"
img_size = {size}
head = {{ kind = "linear", noise = 0 }}
"""


def train_threefold(job: argparse.Namespace) -> float:
    """Train by the command line; returns images a second of the last epoch."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    recipe, run = job.scratch / "recipe.toml", job.scratch / "run"
    text = RECIPE.format(
        images=json.dumps(str(job.images.resolve())),
        batch=job.batch,
        epochs=job.epochs,
        network=json.dumps(job.network),
        size=job.size,
    )
    recipe.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "threefold", "train", str(recipe), "--out", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    history = json.loads((run / "jobs/network/fold0/tune/history.json").read_text("utf-8"))
    return float(history["epochs"][-1]["images_per_second"])


def train_timm(job: argparse.Namespace) -> float:
    """Train in a plain loop; returns images a second of the last epoch."""
    import timm
    import torch
    from timm.data import create_transform
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    transform = create_transform(job.size, is_training=True, scale=(0.35, 1.0), color_jitter=None)
    images = ImageFolder(str(job.images), transform)
    network = timm.create_model(job.network, num_classes=len(images.classes)).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    loader = DataLoader(
        images,
        job.batch,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
    )
    began = time.perf_counter()
    for _ in range(job.epochs):
        began = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    return float(len(loader) * job.batch / (time.perf_counter() - began))


def train_fastai(job: argparse.Namespace) -> float:
    """Train by fastai's `fit_one_cycle`; returns images a second of the last epoch."""
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Resize,
        aug_transforms,
        vision_learner,
    )

    class TrainingTime(Callback):  # type: ignore[misc]
        """Times the training part of each epoch."""

        def before_train(self) -> None:
            self.began = time.perf_counter()

        def after_train(self) -> None:
            self.seconds = time.perf_counter() - self.began

    loaders = ImageDataLoaders.from_folder(
        job.images,
        valid_pct=0.05,
        seed=0,
        bs=job.batch,
        item_tfms=Resize(job.size),
        batch_tfms=aug_transforms(),
    )
    timer = TrainingTime()
    learner = vision_learner(loaders, job.network, pretrained=False, cbs=timer)
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(job.epochs, 1e-3)
    return float(len(loaders.train) * job.batch / timer.seconds)


def train_keras(job: argparse.Namespace, backend: str) -> float:
    """Train by Keras' `fit`; returns images a second of the last epoch."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    data = keras.utils.image_dataset_from_directory(
        str(job.images), image_size=(job.size, job.size), batch_size=job.batch, seed=0
    )
    classes = len(data.class_names)
    make = getattr(keras.applications, KERAS_NETWORKS[job.network])
    network = make(weights=None, classes=classes, input_shape=(job.size, job.size, 3))
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((job.size, job.size, 3)),
            layers.Rescaling(1 / 127.5, offset=-1),
            layers.RandomFlip("horizontal"),
            layers.RandomTranslation(0.1, 0.1),
            network,
        ]
    )
    model.compile(keras.optimizers.AdamW(1e-3), "sparse_categorical_crossentropy")
    times: list[float] = []

    class EpochTime(keras.callbacks.Callback):  # type: ignore[misc]
        """Times each epoch."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            times.append(time.perf_counter())

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            times[-1] = time.perf_counter() - times[-1]

    model.fit(data, epochs=job.epochs, verbose=0, callbacks=[EpochTime()])
    count = sum(len(files) for _, _, files in os.walk(job.images))
    return count / times[-1]


def decoded_images(job: argparse.Namespace) -> Any:
    """Return float32 images (n, 3, s, s) in 0..255."""
    import numpy as np
    from PIL import Image

    paths = [path for path in sorted(job.images.rglob("*")) if path.is_file()][:FEATURE_IMAGES]
    rows = [
        np.asarray(Image.open(path).convert("RGB").resize((job.size, job.size)), np.float32)
        for path in paths
    ]
    return np.resize(np.stack(rows).transpose(0, 3, 1, 2), (FEATURE_IMAGES, 3, job.size, job.size))


def features_threefold(job: argparse.Namespace) -> float:
    """Compute features by the engine that a run would choose; returns images a second."""
    import timm
    import torch

    from threefold.models.features import FeatureExtractor
    from threefold.training.features.engines import choose_engine, compute

    extractor = FeatureExtractor(timm.create_model(job.network, num_classes=0), "pooled")
    images = decoded_images(job)
    engine = choose_engine(extractor, images, 100_000, torch.device("cpu")).engine
    return _images_per_second(lambda: compute(engine, images), len(images))


def features_timm(job: argparse.Namespace) -> float:
    """Compute features in eager PyTorch; returns images a second."""
    import timm
    import torch

    network = timm.create_model(job.network, num_classes=0).eval()
    images = torch.from_numpy(decoded_images(job)) / 255

    def answer() -> None:
        with torch.inference_mode():
            for batch in images.split(job.batch):
                network(batch)

    return _images_per_second(answer, len(images))


def _images_per_second(answer: Callable[[], object], count: int) -> float:
    """Images a second of the second call."""
    answer()
    began = time.perf_counter()
    answer()
    return count / (time.perf_counter() - began)


SYSTEMS: dict[str, dict[str, Callable[[argparse.Namespace], float]]] = {
    "train": {
        "threefold": train_threefold,
        "timm": train_timm,
        "fastai": train_fastai,
        "keras-torch": lambda job: train_keras(job, "torch"),
        "keras-tensorflow": lambda job: train_keras(job, "tensorflow"),
    },
    "features": {"threefold": features_threefold, "timm": features_timm},
}


def main() -> None:
    """Time one system and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=SYSTEMS)
    parser.add_argument("system")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("speed"))
    job = parser.parse_args()
    if job.system not in SYSTEMS[job.task]:
        parser.error(f"{job.task} knows {', '.join(SYSTEMS[job.task])}, not {job.system}")
    speed = SYSTEMS[job.task][job.system](job)
    print(json.dumps({"images_per_second": round(speed, 2)}))


if __name__ == "__main__":
    main()
