"""One pass over images: each is decoded once, and every backbone answers what it lacks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import nn

from threefold.data.dataset import ImageDataset
from threefold.files import real_path
from threefold.machine import decoding_threads
from threefold.recipe.schema import MemberSpec
from threefold.training.distributed.portable import portable
from threefold.training.distributed.ranks import RankGroup, Ranks, current_ranks
from threefold.training.distributed.sharing import share_rows
from threefold.training.features.engines import BATCH, Engine, compute, make_engine
from threefold.training.provenance import stable_seed
from threefold.training.squares import SquareForm, Squares, form_of
from threefold.training.steps.augment import Augment

PART: Final = 16 * BATCH
"""Images in a part of a store: what a killed process loses at most."""


class Backbone(NamedTuple):
    """A frozen backbone, and what computes its features."""

    spec: MemberSpec
    extractor: nn.Module
    engine: str
    """Name of the engine."""
    missing: frozenset[str]
    """Names of the images that it has not answered yet."""


class Answered(NamedTuple):
    """The features of some images by one backbone."""

    key: str
    names: list[str]
    features: np.ndarray
    """float16 (n, ...)."""


@dataclass(frozen=True)
class FeaturePass:
    """What is to be computed, in whatever process.

    Attributes:
        dataset: the images.
        backbones: by the hash of all that their features depend on.
        place: row and number of the copy of each image, by name.
        augment: makes the copies.
        squares: reads the images.
    """

    dataset: ImageDataset
    backbones: Mapping[str, Backbone]
    place: Mapping[str, tuple[int, int]]
    augment: Augment
    squares: Squares

    @property
    def names(self) -> list[str]:
        """The images that any backbone lacks."""
        missing: set[str] = set().union(*(b.missing for b in self.backbones.values()))
        return [name for name in self.place if name in missing]

    def parts(self, engine: Callable[[str], Engine]) -> Iterator[list[Answered]]:
        """Yield what a few images are answered, on rank 0; other ranks yield empty lists.

        Several ranks divide the images: each has its share of `PART` images for each rank.

        Args:
            engine: returns what computes a backbone's features, by its key.
        """
        ranks, names = current_ranks(), self.names
        if not self._can_travel:
            ranks = Ranks()
        elif isinstance(ranks, RankGroup) and ranks.rank == 0:
            ranks.send("features", self._portable())
        size = PART * ranks.world_size if ranks.world_size > 1 else BATCH
        with ThreadPoolExecutor(decoding_threads()) as pool:
            for begin in range(0, len(names), size):
                part = names[begin : begin + size]
                own = part[share_rows(len(part), ranks.rank, ranks.world_size)]
                answers = [
                    answer
                    for start in range(0, len(own), BATCH)
                    for answer in self._answer(own[start : start + BATCH], engine, pool)
                ]
                yield [answer for rank in ranks.collect(answers) for answer in rank]

    @property
    def _can_travel(self) -> bool:
        """Whether other processes can read the images; those of a table are read by rank 0."""
        images = self.dataset.images
        return isinstance(images, np.ndarray | tuple | list)

    def _portable(self) -> FeaturePass:
        """The same pass over the images that are needed, for another process."""
        rows = sorted({self.place[name][0] for name in self.names})
        number = {row: i for i, row in enumerate(rows)}
        dataset = self.dataset.subset(rows)
        if not isinstance(dataset.images, np.ndarray):
            paths = tuple(
                real_path(Path(path)) for path in dataset.images if isinstance(path, Path)
            )
            dataset = replace(dataset, images=paths)
        place = {name: (number[self.place[name][0]], self.place[name][1]) for name in self.names}
        backbones = {
            key: backbone._replace(extractor=portable(backbone.extractor))
            for key, backbone in self.backbones.items()
        }
        return replace(self, dataset=dataset, place=place, backbones=backbones, squares=Squares())

    def _answer(
        self, batch: Sequence[str], engine: Callable[[str], Engine], pool: ThreadPoolExecutor
    ) -> Iterator[Answered]:
        """Read a batch once, and let every backbone answer what it lacks of it."""
        rows = sorted({self.place[name][0] for name in batch})
        wanted = {
            key: [i for i, name in enumerate(batch) if name in backbone.missing]
            for key, backbone in self.backbones.items()
        }
        forms = {
            key: form_of(self.backbones[key].spec) for key, missing in wanted.items() if missing
        }
        squares = self.squares.read(self.dataset, rows, set(forms.values()), pool)
        prepared: dict[SquareForm, np.ndarray] = {}
        for key, form in forms.items():
            if form not in prepared:
                prepared[form] = self._pixels(squares[form], rows, batch)
            missing, pixels = wanted[key], prepared[form]
            if len(missing) < len(batch):
                pixels = pixels[missing]
            yield Answered(key, [batch[i] for i in missing], compute(engine(key), pixels))

    def _pixels(self, squares: np.ndarray, rows: Sequence[int], batch: Sequence[str]) -> np.ndarray:
        """Augment the copies of a batch: float32 (b, 3, s, s) in 0..255.

        Args:
            squares: uint8 (r, s, s, 3).
            rows: (r,) the row of each.
            batch: names of the images, which are these or copies of them.
        """
        number = {row: i for i, row in enumerate(rows)}
        pixels = to_float(squares[[number[self.place[name][0]] for name in batch]])
        copies = [i for i, name in enumerate(batch) if self.place[name][1]]
        if copies:
            generators = [torch.Generator().manual_seed(stable_seed(batch[i])) for i in copies]
            draws = self.augment.draw_each(generators)
            augmented = self.augment.apply(torch.from_numpy(pixels[copies]), draws)
            pixels[copies] = augmented.numpy()
        return pixels


def follow_pass(device: torch.device, work: FeaturePass) -> None:
    """Compute this rank's share of a pass, which rank 0 collects.

    Args:
        device: of this rank.
        work: what rank 0 has sent.
    """
    engines: dict[str, Engine] = {}

    def engine(key: str) -> Engine:
        if key not in engines:
            backbone = work.backbones[key]
            size = backbone.spec.img_size
            engines[key] = make_engine(backbone.engine, backbone.extractor, size, device, key)
        return engines[key]

    for _ in work.parts(engine):
        pass


def to_float(squares: np.ndarray) -> np.ndarray:
    """Convert uint8 (n, s, s, 3) to float32 (n, 3, s, s)."""
    return np.ascontiguousarray(squares.transpose(0, 3, 1, 2), dtype=np.float32)
