"""Pooled features of any images by frozen backbones, read from the cache where they are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.same_content import content_hash
from threefold.data.unchanged import DIGEST
from threefold.errors import DataError, RecipeError, shorten
from threefold.files import write_bytes
from threefold.models.hub import native_size
from threefold.npz_files import write_arrays
from threefold.predictions.tables import import_pyarrow
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.training.features.cache import FeatureCache, pretrained_backbone
from threefold.training.features.frozen import frozen_backbone
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run


class Embedding(NamedTuple):
    """Features of images."""

    paths: tuple[str, ...]
    features: np.ndarray
    """float16 (n, d): those of all backbones side by side."""
    backbones: tuple[str, ...]
    widths: tuple[int, ...]
    """Features of each backbone."""


def embed(
    source: str | Path,
    paths: Sequence[Path],
    watcher: Watcher | None = None,
    *,
    members: Sequence[str] = (),
    size: int = 0,
) -> Embedding:
    """Compute the pooled features of images, float16 as they are cached.

    Args:
        source: a run folder, whose backbones are used as they were before any training on its
            images; or a timm name, whose pretrained weights are used.
        paths: image files that can be read, each once.
        watcher: receives the choice of engine and the progress.
        members: of a run, whose backbones are used; empty = those that ensembles combine.
        size: side in pixels to which images are resized for a timm name; 0 = timm's.

    Raises:
        DataError: there are no images, or one cannot be read.
        RecipeError: there is no such backbone or member, or its weights are not available.
        RunError: the run is incomplete, or the features do not fit into memory.
    """
    if not paths:
        raise DataError("no images to embed", where=source)
    sources = Sources(train=images_to_embed(paths), test=None, notes=(), skipped=())
    if Path(source).is_dir():
        if size:
            raise RecipeError("a run has its own sizes", where=source, fix="leave --size out")
        run = Run.open(source)
        if watcher is not None:
            run.watcher = watcher
        cache, specs = open_run_features(run, sources), pooled_members(run.recipe, members)
    else:
        if members:
            raise RecipeError("only a run has members", where=source, fix="leave --members out")
        recipe = backbone_recipe(str(source), size)
        cache, specs = FeatureCache(sources, recipe, watcher), list(recipe.members)
    parts = pooled_features(cache, specs)
    return Embedding(
        paths=tuple(map(str, paths)),
        features=np.concatenate(parts, axis=1),
        backbones=tuple(f"{spec.backbone} at {spec.img_size} px" for spec in specs),
        widths=tuple(part.shape[1] for part in parts),
    )


def write_embedding(path: Path, embedding: Embedding) -> None:
    """Write features as float32 with their paths, as .npz or .parquet.

    An .npz file has `paths` (n,), `features` (n, d), `backbones` and `widths`. A parquet file has
    the columns path and features, a list; the backbones are in its metadata.

    Raises:
        DataError: the suffix is another, or pyarrow is missing.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    features = embedding.features.astype(np.float32)
    if path.suffix.lower() == ".npz":
        names = [np.array(part, dtype=np.str_) for part in (embedding.paths, embedding.backbones)]
        widths = np.array(embedding.widths)
        write_arrays(path, paths=names[0], features=features, backbones=names[1], widths=widths)
        return
    arrow, parquet = import_pyarrow(), import_pyarrow(".parquet")
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(features.ravel()), features.shape[1])
    # What is not Unicode in a path is escaped.
    paths = [name.encode("utf-8", "backslashreplace").decode() for name in embedding.paths]
    table = arrow.table({"path": paths, "features": lists}).replace_schema_metadata(
        {
            "threefold.backbones": ", ".join(embedding.backbones),
            "threefold.widths": ", ".join(map(str, embedding.widths)),
        }
    )
    sink = arrow.BufferOutputStream()
    parquet.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def check_suffix(path: Path) -> None:
    """Refuse a file of features that is neither .npz nor .parquet, or for which pyarrow is missing.

    Raises:
        DataError: one line about it.
    """
    if path.suffix.lower() not in (".npz", ".parquet"):
        raise DataError(
            "unknown kind of file for features",
            where=path,
            expected="a name that ends in .npz or .parquet",
        )
    if path.suffix.lower() == ".parquet":
        import_pyarrow()


def images_to_embed(paths: Sequence[Path]) -> ImageDataset:
    """Make a data set of image files without labels; their ids are their paths.

    Raises:
        DataError: a file cannot be read.
    """
    return ImageDataset(
        images=tuple(paths),
        labels=np.full(len(paths), -1),
        ids=tuple(map(str, paths)),
        classes=(),
        digests=np.array([bytes.fromhex(content_hash(p))[:DIGEST] for p in paths], f"S{DIGEST}"),
    )


def pooled_members(recipe: Recipe, names: Sequence[str] = ()) -> list[MemberSpec]:
    """Return one member for each different backbone, size and resize, with pooled features.

    Args:
        recipe: of a run.
        names: members; empty = those that ensembles combine.

    Raises:
        RecipeError: there is no such member.
    """
    known = {spec.name: spec for spec in recipe.members}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError("no such member", expected=shorten(known), got=shorten(unknown))
    pending = [known[name] for name in names or recipe.combined]
    found: dict[tuple[object, ...], MemberSpec] = {}
    while pending:
        spec = pending.pop(0)
        pending += [known[name] for name in spec.joins]
        if not spec.joins:
            place = (spec.backbone, spec.weights, spec.img_size, spec.resize)
            found.setdefault(place, spec.model_copy(update={"head": HeadSpec()}))
    return list(found.values())


def open_run_features(run: Run, sources: Sources) -> FeatureCache:
    """Return the features of images by a run's backbones as they were before any training.

    Those that the run has computed of the same images are read from the cache.
    """

    def load(spec: MemberSpec) -> Any:
        if run.recipe.is_frozen(spec.name):
            return frozen_backbone(run.folder, spec)
        return pretrained_backbone(run.recipe, spec)

    return FeatureCache(sources, run.recipe, run.watcher, load=load)


def pooled_features(
    cache: FeatureCache, specs: Sequence[MemberSpec], split: str = "train"
) -> list[np.ndarray]:
    """Return the features of all images of a split, float16 (n, d) for each member."""
    rows = np.arange(len(cache.sources.part(split)))
    cache.prepare(split, specs, rows)  # one pass over the images
    return [cache.rows(split, spec, rows).features for spec in specs]


def backbone_recipe(backbone: str, size: int = 0) -> Recipe:
    """Make the recipe with which a pretrained backbone embeds images.

    Args:
        backbone: a timm name.
        size: side in pixels to which images are resized; 0 = as timm evaluates it.

    Raises:
        RecipeError: there is no such backbone.
    """
    member = {
        "name": "backbone",
        "backbone": backbone,
        "img_size": size or native_size(backbone),
        "resize": "crop",
    }
    stage = {"name": "head", "kind": "head"}
    return Recipe.parse({"members": [member], "stages": [stage], "augment": {}})
