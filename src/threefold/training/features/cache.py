"""Features of frozen backbones, computed once for all folds, heads, seeds and runs.

One pass over the images serves all backbones: an image is decoded once, resized to each size in use
and answered by each backbone that has not answered it yet. What is computed lies on disk
(`feature_store`), by what it depends on: weights, form, size, resize, normalisation, engine, and
the content of the image. So another run, another seed, more images or other names read it again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from threefold.data.dataset import Sources
from threefold.data.splits import Roles
from threefold.errors import RunError
from threefold.files import cache_folder
from threefold.machine import decoding_threads
from threefold.models.features import FeatureExtractor
from threefold.models.heads import input_form
from threefold.models.member import create_backbone
from threefold.models.pipeline import pick_device
from threefold.models.split import EarlyBlocks
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec
from threefold.training.checkpoints import fingerprint
from threefold.training.choice_record import ChoiceRecord
from threefold.training.features.compute import PART, Backbone, FeaturePass, to_float
from threefold.training.features.engines import (
    BATCH,
    Engine,
    choose_engine,
    compute,
    make_engine,
)
from threefold.training.features.store import (
    FeatureStore,
    cache_limit,
    check_memory,
    make_room,
)
from threefold.training.pixel_cache import select_rows
from threefold.training.progress.watcher import Watcher
from threefold.training.provenance import hardware, stable_seed
from threefold.training.squares import Squares, form_of
from threefold.training.steps.augment import AUGMENT_VERSION, Augment

VERSION = 1
"""Version of decoding, resize and storage; another one makes cached features unknown."""

TIMED_PASSES = 2
"""How often a batch is timed: a first pass is slower than those after it."""


class ImageSeconds(NamedTuple):
    """What the features of an image take, in seconds."""

    read: float
    """To decode and resize it; all backbones share that."""
    answer: float
    """By one backbone."""


class FeatureRows(NamedTuple):
    """Some rows of a data set, as a frozen backbone answers them."""

    features: np.ndarray
    """float16 (n, d), or (n, c, h, w) where the head takes a map; of `n` rows the images
    themselves, then their first copies, then their second ones ..."""
    labels: np.ndarray
    """(n,) int64, or (n, k) zeros and ones where images have any number of labels."""


@dataclass(eq=False)
class _Source:
    """A frozen backbone at one size, with what computes its features and what keeps them."""

    spec: MemberSpec
    form: str
    extractor: nn.Module
    key: str
    """Hash of all that the features depend on but the engine and the image."""
    engine_name: str = ""
    engine: Engine | None = None
    opened: FeatureStore | None = None
    in_memory: bool = False
    pending: list[tuple[str, np.ndarray]] = field(default_factory=list)

    @property
    def store(self) -> FeatureStore:
        """The features on disk, once the engine is chosen."""
        assert self.opened is not None
        return self.opened


class FeatureCache:
    """Features of the images of a run.

    Args:
        sources: the images.
        recipe: engine, augmentation of copies, device and seed.
        watcher: receives the choices made.
        folder: of cached features; None = the user's cache folder.
        record: a JSON file that keeps the choice of engines, so that a resumed run repeats it.
        load: returns a member's frozen backbone; None = the pretrained one.
        squares: reads the images; None = with squares stored in the folder.
    """

    def __init__(
        self,
        sources: Sources,
        recipe: Recipe,
        watcher: Watcher | None = None,
        *,
        folder: Path | None = None,
        record: Path | None = None,
        load: Callable[[MemberSpec], nn.Module] | None = None,
        squares: Squares | None = None,
    ) -> None:
        self.sources, self.recipe = sources, recipe
        self.watcher = watcher or Watcher()
        self.folder = cache_folder("features") if folder is None else folder
        self.record = ChoiceRecord(record)
        self._machine = ChoiceRecord(self.folder / "engines.json")
        self.load = load or partial(pretrained_backbone, recipe)
        self.device = pick_device(recipe.train.device)
        self._sources: dict[tuple[object, ...], _Source] = {}
        self._hashes: dict[str, dict[int, str]] = {"train": {}, "test": {}, "unlabelled": {}}
        self._answered = self._to_answer = 0
        self._augment, self._squares = Augment(recipe.augment), squares or Squares(self.folder)
        copies = [AUGMENT_VERSION, recipe.seed, recipe.augment.model_dump_json()]
        self._copies = hashlib.sha256(json.dumps(copies).encode()).hexdigest()[:16]

    def blocks(
        self,
        split: str,
        spec: MemberSpec,
        rows: np.ndarray,
        count: int,
        copy: int = 0,
        expected: int = 0,
    ) -> np.ndarray:
        """Return what the first blocks of a backbone answer, float16 (n, c, h, w).

        For a head on levels, float16 (n, l + c * h * w): see `models.split`.

        Args:
            split: train, test or unlabelled.
            spec: the member.
            rows: (n,) row numbers.
            count: how many blocks follow the stem, see `models.split`.
            copy: number of the augmented copy of each image; 0 = the image itself.
            expected: how many activations will be needed in all, which decides the engine.

        Raises:
            RunError: the activations do not fit into memory.
            RecipeError: the weights are not available, or the engine cannot run the backbone.
        """
        source = self._source(spec, count)
        wanted = [(int(row), copy) for row in rows]
        self._prepare(split, [source], wanted, expected)
        return source.store.read([self._name(split, *item) for item in wanted])

    def rows(
        self,
        split: str,
        spec: MemberSpec,
        rows: np.ndarray,
        copies: int = 0,
        expected: int = 0,
    ) -> FeatureRows:
        """Return the features of some rows, computing those that are missing.

        Args:
            split: train, test or unlabelled.
            spec: the member whose head reads them.
            rows: (n,) row numbers.
            copies: augmented copies of each image, which follow the images themselves.
            expected: how many images will be needed in all, which decides the engine.

        Raises:
            RunError: the features do not fit into memory.
            RecipeError: the weights are not available, or the engine cannot run the backbone.
        """
        self.prepare(split, [spec], rows, copies, expected)
        source = self._source(spec)
        names = [self._name(split, int(row), copy) for copy in range(copies + 1) for row in rows]
        labels = np.concatenate([self.sources.part(split).truth[rows]] * (copies + 1))
        return FeatureRows(source.store.read(names), labels)

    def seconds_per_image(
        self, split: str, spec: MemberSpec, rows: np.ndarray, expected: int
    ) -> ImageSeconds:
        """Measure what the features of an image take.

        Nothing is cached, and nothing cached is used.

        Args:
            split: train, test or unlabelled.
            spec: the member.
            rows: (n,) row numbers of a sample, of which one batch is answered.
            expected: how many images will be answered later, which decides the engine.
        """
        source = self._source(spec)
        items = [(int(row), 0) for row in rows[:BATCH]]
        place = {self._name(split, *item): item for item in items}
        self._choose_engine(source, split, place, expected)
        reading, answering = [], []
        for _ in range(TIMED_PASSES):
            began = time.perf_counter()
            pixels = self._sample(source, split, items, Squares())
            read = time.perf_counter()
            compute(self._engine(source), pixels)
            reading.append(read - began)
            answering.append(time.perf_counter() - read)
        return ImageSeconds(min(reading) / len(items), min(answering) / len(items))

    def prepare(
        self,
        split: str,
        specs: Sequence[MemberSpec],
        rows: np.ndarray,
        copies: int = 0,
        expected: int = 0,
    ) -> None:
        """Compute the missing features of several members in one pass over the images.

        Args:
            split: train, test or unlabelled.
            specs: the members whose heads read them.
            rows: (n,) row numbers.
            copies: augmented copies of each image.
            expected: how many images will be needed in all, which decides the engine.

        Raises:
            RunError: the features do not fit into memory.
            RecipeError: the weights are not available, or the engine cannot run a backbone.
        """
        wanted = [(int(row), copy) for row in rows for copy in range(copies + 1)]
        sources = {id(source): source for source in map(self._source, specs)}
        self._prepare(split, list(sources.values()), wanted, expected)

    def _prepare(
        self,
        split: str,
        sources: Sequence[_Source],
        wanted: Sequence[tuple[int, int]],
        expected: int = 0,
    ) -> None:
        """Compute what is missing of some images, given as rows and numbers of copies."""
        if not wanted:
            return
        names = [self._name(split, *item) for item in wanted]
        place = dict(zip(names, wanted, strict=True))
        self._choose_engines(sources, split, place, expected)
        with ExitStack() as locks:
            for source in sorted(sources, key=lambda source: source.key):  # else two may deadlock
                if source.store.missing(names):
                    locks.enter_context(source.store.locked())
            missing = {source.key: set(source.store.missing(names)) for source in sources}
            if any(missing.values()):
                self._reserve(sources, missing)
                self._compute(split, sources, missing, place)
        for source in sources:
            source.store.touch()

    def select(self, spec: MemberSpec, roles: Roles) -> FeatureRows:
        """Return the rows that heads are chosen on, as `PixelCache.select` does."""
        split, rows = select_rows(self.sources, roles)
        return self.rows(split, spec, rows)

    def free_engines(self) -> None:
        """Give back the memory of a pass that was cut short; its unsaved answers are lost."""
        for source in self._sources.values():
            source.engine, source.pending = None, []
            source.extractor.cpu()

    def bytes_per_image(self, spec: MemberSpec) -> int:
        """Return the bytes of one image's features."""
        return self._bytes(self._source(spec))

    def backbone(self, spec: MemberSpec) -> Any:
        """Return a member's frozen backbone, which must stay as it is."""
        return self._source(spec).extractor.backbone

    def _name(self, split: str, row: int, copy: int) -> str:
        """Name an image by its content, and a copy also by what it was made with."""
        hashes = self._hashes[split]
        if row not in hashes:
            hashes[row] = self.sources.part(split).content_hash(row)[:32]
        return f"{hashes[row]}-{self._copies}-{copy}" if copy else hashes[row]

    def _source(self, spec: MemberSpec, blocks: int = 0) -> _Source:
        head_form = input_form(spec.head.sequence)
        form = f"blocks{blocks}" if blocks else spec.head.sequence
        if blocks and head_form == "levels":
            form += "-levels"
        place = (spec.backbone, spec.weights, spec.img_size, spec.resize, form)
        if place not in self._sources:
            backbone = self.load(spec)
            extractor: nn.Module
            if blocks:
                extractor = EarlyBlocks(backbone, blocks, head_form)
            else:
                extractor = FeatureExtractor(backbone, spec.head.sequence)
            inputs = (VERSION, type(backbone).__name__, spec.img_size, spec.resize, form)
            key = fingerprint(inputs, extractor.state_dict())
            self._sources[place] = _Source(spec, form, extractor, key)
        return self._sources[place]

    # Engines

    def _choose_engines(self, sources: Sequence[_Source], split: str, *others: Any) -> None:
        """Choose what computes the features; the processes of a run choose the same."""
        unknown = [source for source in sources if source.opened is None]
        with self.record.locked() if unknown else nullcontext():
            for source in unknown:
                self._choose_engine(source, split, *others)

    def _choose_engine(
        self,
        source: _Source,
        split: str,
        place: dict[str, tuple[int, int]],
        expected: int = 0,
    ) -> None:
        """Choose what computes the features, unless it is chosen already.

        Args:
            source: what to compute.
            split: train, test or unlabelled.
            place: row and number of the copy of each image that is needed now, by name.
            expected: how many images will be needed in all, if that is known.
        """
        if source.opened is not None:
            return
        wanted = self.recipe.features.engine
        if wanted == "auto":
            name = self.record.get(source.key) or self._machine.get(self._here(source))
        else:
            name = "torch-float32" if wanted == "torch" else wanted
        if name:
            self._open(source, name)
            return
        names = list(place)
        for known in ("onnxruntime", "torch-float16", "torch-bfloat16", "torch-float32"):
            store = FeatureStore(self.folder, _store_key(source, known))
            if not store.missing(names):
                self._open(source, known)
                return
        items = [place[name] for name in names[:BATCH]]
        sample = self._sample(source, split, items, self._squares)
        count = max(len(names), expected)
        engine, reason, measured = choose_engine(
            source.extractor,
            sample,
            count,
            self.device,
            key=source.key,
            usual=self._machine.get(self._here()),
        )
        spec = source.spec
        self.watcher.note(
            f"features of {spec.backbone} at {spec.img_size} px: {engine.name} ({reason})"
        )
        self._open(source, engine.name, engine)
        if measured:
            self._machine.put(self._here(source), engine.name)
            self._machine.put(self._here(), engine.name)

    def _here(self, source: _Source | None = None) -> str:
        """Key of a choice that was measured here: for a backbone, or for the last one of all."""
        what = source.key[:24] if source else "last"
        return f"{what} on {hardware()}, {torch.get_num_threads()} threads, {self.device}"

    def _open(self, source: _Source, name: str, engine: Engine | None = None) -> None:
        source.engine_name, source.engine = name, engine
        source.opened = FeatureStore(self.folder, _store_key(source, name))
        self.record.put(source.key, name)

    def _engine(self, source: _Source) -> Engine:
        if source.engine is None:
            size = source.spec.img_size
            source.engine = make_engine(
                source.engine_name, source.extractor, size, self.device, source.key
            )
        return source.engine

    def _sample(
        self, source: _Source, split: str, items: Sequence[tuple[int, int]], squares: Squares
    ) -> np.ndarray:
        """Return some images, float32 (n, 3, s, s) in 0..255."""
        form, rows = form_of(source.spec), [row for row, _ in items]
        with ThreadPoolExecutor(decoding_threads()) as pool:
            return to_float(squares.read(self.sources.part(split), rows, [form], pool)[form])

    # The pass over the images

    def _reserve(self, sources: Sequence[_Source], missing: dict[str, set[str]]) -> None:
        """Make room for what will be computed, on disk or else in memory."""
        needed = 0
        for source in sources:
            needed += len(missing[source.key]) * self._bytes(source)
        used = [source.store.folder.name for source in self._sources.values() if source.opened]
        if make_room(self.folder, needed, cache_limit(), used):
            return
        what = f"{needed / 1e9:.2f} GB of features"
        check_memory(2 * needed, what)
        self.watcher.note(
            f"{what} do not fit into the cache ({self.folder}, limit "
            f"{cache_limit() / 1e9:.0f} GB): they stay in memory and are computed anew next time"
        )
        for source in sources:
            source.in_memory = True

    def _bytes(self, source: _Source) -> int:
        """Bytes of one image's features."""
        size = source.spec.img_size
        device = next(source.extractor.parameters()).device
        with torch.inference_mode():
            features = source.extractor(torch.zeros(1, 3, size, size, device=device))
        return int(2 * features.numel())

    def _compute(
        self,
        split: str,
        sources: Sequence[_Source],
        missing: dict[str, set[str]],
        place: dict[str, tuple[int, int]],
    ) -> None:
        """Answer every missing image; every part of a store is written as soon as it is whole."""
        self._answered, self._to_answer = 0, sum(map(len, missing.values()))
        by_key = {source.key: source for source in sources}
        backbones = {
            key: Backbone(
                source.spec, source.extractor, source.engine_name, frozenset(missing[key])
            )
            for key, source in by_key.items()
        }
        dataset = self.sources.part(split)
        work = FeaturePass(dataset, backbones, place, self._augment, self._squares)
        for answers in work.parts(lambda key: self._engine(by_key[key])):
            for key, names, features in answers:
                by_key[key].pending += zip(names, features, strict=True)
                self._answered += len(names)
                self.watcher.features(self._answered, self._to_answer)
            for source in sources:
                if len(source.pending) >= PART:
                    self._save(source)
        self._squares.save()
        for source in sources:
            self._save(source)

    def _save(self, source: _Source) -> None:
        """Write the pending features as a part, or keep them in memory if that fails."""
        if not source.pending:
            return
        names = [name for name, _ in source.pending]
        features = np.stack([features for _, features in source.pending])
        source.pending = []
        if not source.in_memory:
            try:
                source.store.write(names, features)
                return
            except RunError as error:
                self.watcher.note(f"{error}; the features stay in memory")
                source.in_memory = True
        source.store.keep(names, features)


def pretrained_backbone(recipe: Recipe, spec: MemberSpec) -> Any:
    """Create a backbone; random weights depend on the recipe's seed and its name only."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(stable_seed(recipe.seed, "backbone", spec.backbone))
        return create_backbone(spec)


def _store_key(source: _Source, engine: str) -> str:
    return f"{source.key[:24]}-{engine}"
