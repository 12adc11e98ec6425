"""A scikit-learn classifier of images, for cross_val_score, GridSearchCV and pipelines.

The fitted estimator holds the exported file itself. So it can be pickled, moved and unpickled where
the run does not exist, and its answers are those of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from threefold.api import fit as fit_run
from threefold.data.in_memory import store_in_new_run
from threefold.errors import DataError, shorten
from threefold.files import TemporaryFolder
from threefold.runtime.inputs import as_pixels
from threefold.runtime.model import Model, load
from threefold.training.planning.basis import Quality
from threefold.training.run import Run

_ENCODED = (str, os.PathLike, bytes, bytearray, memoryview)


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """An ensemble of fine-tuned networks as a scikit-learn estimator.

    X is a list of paths, of the bytes of image files, of Pillow images or of arrays; an array
    (n, h, w, 3), or (n, h, w) of grey images, uint8 in 0..255 or floats in 0..1; or a column of
    paths of a DataFrame. `fit` does what `threefold.fit` does: it cross-validates within the images
    that it is given, and exports one file.

    Args:
        members: timm names; by default three EfficientNet-Lite.
        budget: limit of the wall time of each fit: 90s, 20m, 2h, or a number of minutes; 0 = none.
        quality: fast = heads on frozen features only; good; best = larger images, more epochs.
        overrides: `a.b=c` changes to the planned recipe.
        out: a folder in which each fit keeps its run, in a folder named after images, labels and
            parameters; the same fit resumes it. By default runs are deleted once the file is read.
        random_state: the seed of the recipe; None keeps the recipe's own, which is fixed.
        verbose: show notes and a progress bar.

    Attributes:
        classes_: (k,) the labels, sorted, as they were given.
        accuracy_: the accuracy to expect on new images, measured on images held out within `fit`.
        interval_: its 95 % confidence interval.
        run_folder_: folder of the run; None if it was deleted.
        model_files_: content of the exported file, and of its data file if it has one, by name.
    """

    def __init__(
        self,
        members: str | Sequence[str] = (),
        *,
        budget: str | float = "20m",
        quality: Quality = "good",
        overrides: str | Sequence[str] = (),
        out: str | Path | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.members = members
        self.budget = budget
        self.quality = quality
        self.overrides = overrides
        self.out = out
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: npt.ArrayLike, **fit_params: Any) -> Self:
        """Train, ensemble and export on labelled images.

        Args:
            X: n images.
            y: (n,) labels: texts, whole numbers or booleans.
            fit_params: none is supported; sample weights are refused.

        Raises:
            ThreefoldError: images, labels or parameters cannot be used; the message says what to
                do.
        """
        refused = sorted(name for name, value in fit_params.items() if value is not None)
        if refused:
            raise DataError(
                "fit takes images and labels only",
                got=shorten(refused),
                fix="leave it out; images cannot be weighted",
            )
        images = _read_images(X)
        labels = column_or_1d(y)
        check_classification_targets(labels)
        if len(images) != len(labels):
            raise DataError(
                "each image needs one label", expected=f"{len(images)} labels", got=len(labels)
            )
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        names = [str(label) for label in self.classes_.tolist()]
        if len(names) < 2:
            raise DataError("there is one class only", got=names[0], expected="two or more")
        overrides = (self.overrides,) if isinstance(self.overrides, str) else tuple(self.overrides)
        # A label with separators in it is still one label.
        overrides += () if any("data." in text for text in overrides) else ("data.task=multiclass",)
        if self.random_state is not None:
            overrides += (f"seed={self._seed()}",)
        with self._stored(images, [names[number] for number in numbers]) as (folder, data):
            run = fit_run(
                data,
                folder,
                budget=self.budget,
                members=self.members,
                overrides=overrides,
                quality=self.quality,
                progress=self.verbose,
            )
            self._read_run(run, names)
        self.run_folder_ = None if self.out is None else folder
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities (n, k) of the classes, in the order of `classes_`.

        Raises:
            DataError: an image cannot be read.
            NotFittedError: `fit` was not called.
        """
        check_is_fitted(self)
        model = self._open_model()
        return model.predict_proba(_read_images(X))[:, self._columns]

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each image, (n,); errors as `predict_proba`."""
        answers = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[answers])

    def _seed(self) -> int:
        """Return the seed of the recipe; a RandomState draws one."""
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    @contextmanager
    def _stored(self, images: Sequence[Any], labels: Sequence[str]) -> Iterator[tuple[Path, Path]]:
        """Store the images in a run folder, which is deleted at the end if nobody asked for it.

        Yields:
            The run folder, and the file of the images and labels.
        """
        if self.out is not None:
            parameters = {k: v for k, v in self.get_params().items() if k not in ("out", "verbose")}
            key = str(sorted(parameters.items()))
            yield store_in_new_run(images, labels, Path(self.out), key)
            return
        with TemporaryFolder() as parent:
            yield store_in_new_run(images, labels, Path(parent))

    def _read_run(self, run: Run, names: Sequence[str]) -> None:
        """Keep the exported file and the scores of a run."""
        model = run.model()
        if set(model.classes) != set(names):
            raise DataError(
                "the labels cannot be names of classes as they are",
                expected=shorten(sorted(set(model.classes) - set(names))),
                got=shorten(sorted(set(names) - set(model.classes))),
            )
        self._columns = [model.classes.index(name) for name in names]
        files = [model.path]
        if model.card.get("bundle"):
            files.append(model.path.with_name(model.card["bundle"]["file"]))
        self.model_files_ = {path.name: path.read_bytes() for path in files}
        self._model: Model | None = None
        self.accuracy_, self.interval_ = run.accuracy, run.interval

    def _open_model(self) -> Model:
        """Open the exported file, once."""
        model = getattr(self, "_model", None)
        if model is None:
            with TemporaryFolder() as folder:
                for name, content in self.model_files_.items():
                    (Path(folder) / name).write_bytes(content)
                model = load(Path(folder) / "model.onnx")
            self._model = model
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the opened file."""
        return {k: v for k, v in super().__getstate__().items() if k != "_model"}

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there is a file to answer with."""
        return hasattr(self, "model_files_")

    def __sklearn_tags__(self) -> Any:
        """Say to scikit-learn that X is images, not a table of numbers."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.no_validation = True
        return tags


def _read_images(images: Any) -> list[Any]:
    """Return n images as paths or bytes, which are left as they are, or as pixels.

    Raises:
        DataError: it is one image or a table of numbers.
        ExportError: something is not an image.
    """
    if isinstance(images, (*_ENCODED, Image.Image)):
        raise DataError("X is a single image", got=type(images).__name__, fix="give a list: [X]")
    if getattr(images, "ndim", 1) == 2:  # a column of a table of paths
        array = np.asarray(images)
        if array.shape[1] != 1 or array.dtype.kind not in "OU":
            raise DataError(
                "X is a table, not images",
                expected="paths, images, or an array (n, h, w, 3) or (n, h, w)",
                got=f"{array.dtype} {array.shape}",
                fix="reshape flattened pixels to (n, h, w)",
            )
        images = array[:, 0]
    return [image if isinstance(image, _ENCODED) else _pixels(image) for image in images]


def _pixels(image: Any) -> np.ndarray:
    """Return the pixels of an image, uint8 (h, w, 3); an array (h, w) is grey."""
    shape = tuple(getattr(image, "shape", ()))
    if isinstance(image, np.ndarray) and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)):
        image = np.repeat(image.reshape(*shape[:2], 1), 3, axis=2)
    return as_pixels(image)
