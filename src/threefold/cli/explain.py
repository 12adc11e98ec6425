"""Verbs that look into a model: explain and embed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from threefold.arguments import split_names
from threefold.cli.console import out, plain, print_error, print_json
from threefold.cli.options import Json
from threefold.cli.progress import progress_bar
from threefold.errors import DataError, ThreefoldError, shorten
from threefold.lazy import importing_for_good
from threefold.machine import decoding_threads
from threefold.names import count_of

if TYPE_CHECKING:
    import numpy as np

    from threefold.training.progress.watcher import Watcher


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(explain)
    app.command()(embed)


def explain(
    model: Annotated[
        Path, typer.Argument(help="A finished run folder, or an exported .onnx file.")
    ],
    image: Annotated[Path, typer.Argument(help="The image.")],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="The picture to write (default IMAGE-heat.png, here)."),
    ] = None,
    class_name: Annotated[
        str, typer.Option("--class", help="The class to explain (default: the answer).")
    ] = "",
    similar: Annotated[
        int,
        typer.Option(
            "--similar", min=0, help="How many similar training images to name; of a run only."
        ),
    ] = 5,
    as_json: Json = False,
) -> None:
    """Show what an answer rests on: a heat map, and similar training images.

    Of a run the heat is Grad-CAM of its networks. An exported file has no gradients: there squares
    of the image are hidden, and the heat is what that costs the class.
    """
    target = target or Path(f"{image.stem}-heat.png")
    describe = _explain_run if model.is_dir() else _explain_file
    explained = describe(model, image, target, class_name, similar)
    if as_json:
        print_json(explained)
        return
    top = ", ".join(f"{plain(name)} {share:.1%}" for name, share in explained["top"])
    out.print(f"{plain(str(image))}: {top}")
    heats = explained["heat"]
    for path in heats.values() if isinstance(heats, dict) else [heats]:
        out.print(f"heat   {plain(path)}: {plain(explained['method'])}")
    for note in explained["notes"]:
        out.print(f"       {plain(note)}")
    if explained["similar"]:
        out.print(f"similar training images, by the features of {plain(explained['features'])}")
    for neighbour in explained["similar"]:
        line = f"{neighbour['label']}  {neighbour['id']}"
        out.print(f"  {neighbour['similarity']:.3f}  {plain(line)}")


def _explain_file(
    model: Path, image: Path, target: Path, class_name: str, similar: int
) -> dict[str, Any]:
    """Explain an answer of an exported file by occlusion."""
    from threefold.data.images import decode
    from threefold.runtime.heat import check_picture, occlusion_heats
    from threefold.runtime.model import load

    check_picture(target)
    loaded, pixels = load(model), decode(str(image))
    probs = loaded.answer(loaded.fit_canvas(pixels)[None])[0]
    answer = _Answer(image, loaded.classes, probs, loaded.thresholds)
    numbers = answer.explained(class_name)
    heats = occlusion_heats(loaded, pixels, numbers)
    notes = []
    for number, heat in zip(numbers, heats, strict=True):
        name = loaded.classes[number]
        notes.append(
            f"{name} has {heat.probability:.1%}, and {heat.lowest:.1%} without the square that "
            "matters most"
        )
        if not heat.map.any():
            notes.append(f"no square speaks for {name}: the picture has no heat")
    if similar:
        notes.append("a run folder also names similar training images")
    return {
        **answer.describe(target, numbers, pixels, [heat.map for heat in heats]),
        "method": "occlusion, 64 squares two sevenths of the side wide",
        "notes": notes,
        "features": "",
        "similar": [],
    }


def _explain_run(
    model: Path, image: Path, target: Path, class_name: str, similar: int
) -> dict[str, Any]:
    """Explain an answer of a run by Grad-CAM, and find similar training images."""
    with importing_for_good():
        from threefold.data.images import decode
        from threefold.exporting.export import chosen_ensemble
        from threefold.runtime.heat import check_picture
        from threefold.training.embedding import pooled_members
        from threefold.training.explain import run_heat, similar_images
        from threefold.training.run import Run

    check_picture(target)
    run, pixels = Run.open(model), decode(str(image))
    chosen = chosen_ensemble(run)
    classes = run.folder.info.classes
    probs = run.pipeline(chosen.combiner, chosen.members).predict_proba([pixels])[0]
    answer = _Answer(image, classes, probs, chosen.thresholds)
    numbers = answer.explained(class_name)
    heats = [run_heat(run, chosen.members, pixels, number) for number in numbers]
    notes, neighbours = [], []
    for number, heat in zip(numbers, heats, strict=True):
        if not heat.any():
            notes.append(f"nothing speaks for {classes[number]}, or no backbone has a feature map")
    if similar:
        try:
            with _watching() as watcher:
                run.watcher = watcher
                neighbours = similar_images(run, image, similar, chosen.members)
        except ThreefoldError as error:  # such as images that were moved; the heat needs none
            notes.append(f"no similar images: {error}")
    names = shorten(spec.backbone for spec in pooled_members(run.recipe, chosen.members))
    explained = ", ".join(classes[number] for number in numbers)
    return {
        **answer.describe(target, numbers, pixels, heats),
        "method": f"Grad-CAM for {explained}, mean of {', '.join(chosen.members)}",
        "notes": notes,
        "features": names if neighbours else "",
        "similar": [neighbour._asdict() for neighbour in neighbours],
    }


class _Answer(NamedTuple):
    """The answer to an image; `thresholds` (k,) are those of a multilabel model, or None."""

    image: Path
    classes: Sequence[str]
    probs: np.ndarray
    thresholds: np.ndarray | None

    def explained(self, name: str) -> list[int]:
        """Return the classes to explain: the one named, else the answer, which may be several."""
        if name and name not in self.classes:
            raise DataError(
                "no such class", where="--class", expected=shorten(self.classes), got=name
            )
        if name:
            return [[*self.classes].index(name)]
        order = [int(i) for i in (-self.probs).argsort(kind="stable")]
        if self.thresholds is None:
            return order[:1]
        numbers = [i for i in order if self.probs[i] >= self.thresholds[i]]
        if not numbers:
            best = order[0]
            raise DataError(
                "no label reaches its threshold, so there is none to explain",
                where=self.image,
                got=f"{self.classes[best]} {self.probs[best]:.1%} at most",
                fix="name a label with --class",
            )
        return numbers

    def describe(
        self,
        target: Path,
        numbers: Sequence[int],
        pixels: np.ndarray,
        heats: Sequence[np.ndarray],
    ) -> dict[str, Any]:
        """Write a picture for each class that is explained, and say what they are of.

        The answer of a multilabel model has pictures by label, in files named after the labels.
        """
        from threefold.runtime.heat import HeatFolder, save_overlay

        top = [
            (self.classes[i], float(self.probs[i])) for i in (-self.probs).argsort(kind="stable")
        ]
        common = {"image": str(self.image), "top": top[:3]}
        if self.thresholds is None:
            save_overlay(target, pixels, heats[0])
            return {**common, "class": self.classes[numbers[0]], "heat": str(target)}
        folder, labels = HeatFolder(target.parent), [self.classes[number] for number in numbers]
        pictures = {
            label: str(folder.save(target.name, pixels, heat, label))
            for label, heat in zip(labels, heats, strict=True)
        }
        return {**common, "labels": labels, "heat": pictures}


@contextmanager
def _watching() -> Iterator[Watcher]:
    """Show how far the features are, and the notes about them."""
    from threefold.training.progress.watcher import Watcher

    with progress_bar("features") as progress:

        class FeatureWatcher(Watcher):
            """Shows features and notes."""

            def features(self, done: int, total: int) -> None:
                progress(done, total)

            def note(self, text: str) -> None:
                print_error(text)

        yield FeatureWatcher()


def embed(
    source: Annotated[
        str, typer.Argument(help="A run folder, or the timm name of a pretrained backbone.")
    ],
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, or - for a list on standard input.")
    ],
    target: Annotated[
        Path, typer.Option("--out", help="The file to write: .npz or .parquet.")
    ] = Path("features.npz"),
    members: Annotated[
        str,
        typer.Option(
            "--members", help="Only the backbones of these members of a run, separated by commas."
        ),
    ] = "",
    size: Annotated[
        int,
        typer.Option(
            "--size",
            min=0,
            max=2048,
            help="Side in pixels to which images are resized for a timm name; 0 = as timm does.",
        ),
    ] = 0,
) -> None:
    """Write the pooled features of images, through the cache of features."""
    with importing_for_good():
        from threefold.data.image_rows import ImageRow
        from threefold.data.images import check_all
        from threefold.runtime.predict import each_image
        from threefold.training.embedding import check_suffix, write_embedding
        from threefold.training.embedding import embed as embed_images

    check_suffix(target)
    failed = 0
    paths: dict[Path, None] = {}
    for found in each_image(images, print_error):
        if isinstance(found, DataError):
            failed += 1
            print_error(found)
        elif isinstance(found, ImageRow):
            failed += 1
            fix = "download or unpack it, and give the folder"
            what = "features are written of files only"
            print_error(DataError(what, where=found.name, fix=fix))
        else:
            paths[found] = None
    for bad in check_all(list(paths), decoding_threads()):
        if not bad.readable:
            failed += 1
            print_error(DataError("cannot read the image", where=bad.path, got=bad.reason))
            del paths[Path(bad.path)]
    with _watching() as watcher:
        embedding = embed_images(
            source, list(paths), watcher, members=split_names(members), size=size
        )
    write_embedding(target, embedding)
    parts = zip(embedding.backbones, embedding.widths, strict=True)
    described = ", ".join(f"{width} of {name}" for name, width in parts)
    out.print(
        f"{target}: {count_of(len(embedding.paths), 'image')}, features {described}", markup=False
    )
    if failed:
        raise SystemExit(1)
