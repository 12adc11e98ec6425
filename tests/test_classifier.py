"""The scikit-learn estimator: its contract, its labels and images, pickling, cross-validation."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks as checks
from support.server import encode

import threefold
from threefold import Classifier
from threefold.errors import DataError, ThreefoldError

COLOURS = {"b9": (200, 40, 40), "b10": (40, 180, 60), "a": (40, 60, 200)}
"""In natural order b9 comes before b10, in that of scikit-learn after it."""
TINY: dict[str, Any] = {
    "members": ("test_resnet",),
    "quality": "fast",
    "budget": 0,
    "overrides": (
        "members.0.weights=none",
        "members.0.img_size=32",
        "train.device=cpu",
        "train.precision=float32",
        "features.engine=torch",
        "folds.k=2",
    ),
}
DATALESS = [
    checks.check_do_not_raise_errors_in_init_or_set_params,
    checks.check_estimator_cloneable,
    checks.check_estimator_repr,
    checks.check_estimator_tags_renamed,
    checks.check_estimators_unfitted,
    checks.check_get_params_invariance,
    checks.check_mixin_order,
    checks.check_no_attributes_set_in_init,
    checks.check_parameters_default_constructible,
    checks.check_set_params,
    checks.check_valid_tag_types,
]
"""The checks that fit nothing. The others fit a table of numbers (n, features), which is no image:
`check_estimator` leaves them out by the tag `two_d_array`."""


def paint(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images of one colour each, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.array(list(COLOURS) * count)
    images = [np.array(COLOURS[label]) + rng.normal(0, 40, (24, 28, 3)) for label in labels]
    return np.clip(np.stack(images), 0, 255).astype(np.uint8), labels


IMAGES, LABELS = paint()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifier") / "runs"


@pytest.fixture(scope="module")
def fitted(runs: Path) -> Classifier:
    """Fitted with the seed 5; its run is kept. Only to be read."""
    return Classifier(**TINY, out=runs, random_state=5).fit(IMAGES, LABELS)


@pytest.mark.parametrize("check", DATALESS, ids=lambda check: check.__name__)
def test_the_contract_of_scikit_learn(check: Callable[[str, Any], None]) -> None:
    check("Classifier", Classifier())


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_check_estimator_accepts_it() -> None:
    results = checks.check_estimator(Classifier())

    assert {result["status"] for result in results} == {"passed"}


def test_probabilities_are_in_the_order_of_the_classes(fitted: Classifier) -> None:
    probs = fitted.predict_proba(IMAGES)

    assert fitted.classes_.tolist() == ["a", "b10", "b9"]
    assert probs.shape == (36, 3)
    assert np.array_equal(fitted.predict(IMAGES), fitted.classes_[probs.argmax(1)])
    assert fitted.score(IMAGES, LABELS) > 0.9


def test_a_kept_run_is_a_run_like_any_other(fitted: Classifier, runs: Path) -> None:
    run = threefold.open(fitted.run_folder_)

    assert list(runs.iterdir()) == [fitted.run_folder_]
    assert run.recipe.seed == 5
    assert (run.accuracy, run.interval) == (fitted.accuracy_, fitted.interval_)
    assert run.report().is_file()
    answers = [run.model().predict(image)[0] for image in IMAGES[:4]]
    assert answers == fitted.predict(IMAGES[:4]).tolist()
    assert run.score(IMAGES, labels=LABELS).accuracy == fitted.score(IMAGES, LABELS)


def test_a_pickle_needs_no_run(fitted: Classifier, runs: Path, tmp_path: Path) -> None:
    fitted.predict(IMAGES[:1])  # opens the file, which is not pickled
    content = pickle.dumps(fitted)

    shutil.move(runs, tmp_path / "elsewhere")
    try:
        moved = pickle.loads(content)
        probs = moved.predict_proba(IMAGES)
    finally:
        shutil.move(tmp_path / "elsewhere", runs)

    assert np.array_equal(probs, fitted.predict_proba(IMAGES))
    assert moved.get_params() == fitted.get_params()
    assert len(content) < 2 * sum(map(len, fitted.model_files_.values()))


def test_a_clone_is_not_fitted(fitted: Classifier) -> None:
    copy = clone(fitted)

    assert copy.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(IMAGES)


def test_every_form_of_images_has_the_same_answer(fitted: Classifier, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{row}.png") for row in range(3)]
    for path, image in zip(paths, IMAGES, strict=False):
        Image.fromarray(image).save(path)
    forms: list[Any] = [
        paths,
        np.array(paths),
        pd.Series(paths),
        pd.DataFrame({"path": paths}),
        list(IMAGES[:3]),
        [Image.fromarray(image) for image in IMAGES[:3]],
        [encode(image, "PNG") for image in IMAGES[:3]],
        IMAGES[:3] / 255,
    ]
    expected = fitted.predict_proba(IMAGES[:3])

    for form in forms:
        assert np.array_equal(fitted.predict_proba(form), expected), type(form)


def test_grey_arrays_are_repeated(fitted: Classifier) -> None:
    grey = IMAGES[:2, ..., 0]
    expected = fitted.predict_proba(np.stack([grey] * 3, -1))

    assert np.array_equal(fitted.predict_proba(grey), expected)
    assert np.array_equal(fitted.predict_proba(grey[..., None]), expected)


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (IMAGES[:, 0, :, 0], LABELS, r"X is a table, not images; .*uint8 \(36, 28\)"),
        ("a.png", ["a"], "X is a single image"),
        (IMAGES[:2], LABELS, "each image needs one label; expected 2 labels, got 36"),
        (IMAGES, ["a"] * 36, "there is one class only"),
        ([3] * 36, LABELS, "not an image"),
    ],
)
def test_unusable_images_are_refused(images: Any, labels: Any, reason: str) -> None:
    with pytest.raises(ThreefoldError, match=reason) as error:
        Classifier(**TINY).fit(images, labels)
    assert "\n" not in str(error.value)


def test_sample_weights_are_refused() -> None:
    with pytest.raises(DataError, match="images and labels only; got sample_weight; fix: leave"):
        Classifier(**TINY).fit(IMAGES, LABELS, sample_weight=np.ones(36))
    with pytest.raises(ValueError, match="continuous"):
        Classifier(**TINY).fit(IMAGES, np.linspace(0.1, 1.3, 36))


@pytest.mark.long
def test_cross_validation_and_search() -> None:
    classifier = Classifier(**TINY)
    numbers = np.unique(LABELS, return_inverse=True)[1] - 1

    scores = cross_val_score(classifier, IMAGES, numbers, cv=2, error_score="raise")
    search = GridSearchCV(classifier, {"random_state": [0, 1]}, cv=2, error_score="raise")
    search.fit(list(IMAGES), LABELS)

    assert scores.shape == (2,)
    assert scores.min() > 0.8
    assert search.best_estimator_.run_folder_ is None
    assert search.score(IMAGES, LABELS) > 0.9


@pytest.mark.slow
def test_each_fit_has_its_own_run_and_the_same_fit_resumes(tmp_path: Path) -> None:
    classifier = Classifier(**TINY, out=tmp_path)

    first = classifier.fit(IMAGES, LABELS).run_folder_
    again = classifier.fit(IMAGES, LABELS).run_folder_
    other = classifier.fit(IMAGES[:30], LABELS[:30]).run_folder_

    assert first == again != other
    assert sorted(tmp_path.iterdir()) == sorted([first, other])
