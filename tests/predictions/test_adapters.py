"""Outputs saved by other tools are read as the same Predictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.predictions import assert_refused

from threefold.predictions.formats import read_predictions
from threefold.predictions.join import join_predictions
from threefold.predictions.predictions import Predictions

CLASSES = ("0", "1", "10", "2")  # folders as text sorts them; as numbers they are 0, 1, 2, 10
FILES = [f"{name}/{i}.png" for name in CLASSES for i in range(3)]
LABELS = np.repeat(np.arange(4), 3)
PROBS = np.random.default_rng(0).dirichlet(np.ones(4), 12).astype(np.float32)


def assert_read(
    predictions: Predictions, close: bool = False, classes: tuple[str, ...] = CLASSES
) -> None:
    """The same rows, labels and probabilities, whatever the order of the classes."""
    order = [predictions.classes.index(name) for name in classes]
    probs = predictions.probs[0][:, order]
    assert np.allclose(probs, PROBS, atol=1e-6, rtol=0) if close else (probs == PROBS).all()
    assert [predictions.classes[i] for i in predictions.labels] == [CLASSES[i] for i in LABELS]
    assert predictions.ids == tuple(FILES)
    assert (predictions.kind, predictions.members) == ("foreign", ("net",))


# Keras


def keras(**changes: Any) -> dict[str, Any]:
    """What a generator of flow_from_directory has: 12 images, one folder per class."""
    generator = {
        "predictions": PROBS,
        "filenames": FILES,
        "classes": LABELS.astype(np.int32),
        "class_indices": list({"0": 0, "1": 1, "10": 2, "2": 3}),
    }
    return {name: value for name, value in {**generator, **changes}.items() if value is not None}


def test_keras_generator(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", **keras())

    assert_read(read_predictions(tmp_path / "net.npz"))

    np.savez(
        tmp_path / "net.npz", **keras(class_indices=json.dumps({"2": 3, "1": 1, "10": 2, "0": 0}))
    )

    assert_read(read_predictions(tmp_path / "net.npz"))

    np.savez(tmp_path / "net.npz", **keras(classes=None))  # the folders of filenames say the same

    assert_read(read_predictions(tmp_path / "net.npz"))


def test_keras_dataset(tmp_path: Path) -> None:
    paths = [f"photos/test/{name}" for name in FILES]
    np.savez(tmp_path / "net.npz", probs=PROBS, paths=paths, classes=list(CLASSES))

    assert_read(read_predictions(tmp_path / "net.npz"))


def test_keras_npy_with_a_table_of_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "net.npy", PROBS)
    rows = [f"{name},{name.partition('/')[0]}" for name in FILES]

    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows]))

    assert_read(
        read_predictions(tmp_path / "net.npy", labels=tmp_path / "labels.csv", classes=CLASSES)
    )
    assert_refused(tmp_path / "net.npy", "there are no labels")
    assert_refused(
        tmp_path / "net.npy",
        "misfit|do not fit|names",
        labels=tmp_path / "labels.csv",
        classes=["0", "1"],
    )


def test_the_numbers_of_keras_are_columns_and_not_names(tmp_path: Path) -> None:
    """Label 2 is the folder 10. Read as a name, it would make 6 of 12 rows wrong."""
    np.savez(tmp_path / "net.npz", **keras())

    predictions = read_predictions(tmp_path / "net.npz")

    assert [predictions.classes[predictions.labels[i]] for i in (6, 9)] == ["10", "2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_indices": {"0": 0, "1": 1}}, "never unpickled.*a dict as list"),
        (
            {"class_indices": "0, 1, 10, 2"},
            r"class_indices is not usable.*list\(data.class_indices\)",
        ),
        (
            {"class_indices": json.dumps({"0": 0, "1": 1, "10": 2, "2": 9})},
            "class_indices is not usable",
        ),
        ({"class_indices": json.dumps(["0"])}, "class_indices is not usable"),
        ({"class_indices": None}, "probabilities are missing.*save class_indices"),
        ({"classes": LABELS[::-1]}, "a row has two labels.*0/0.png"),
        ({"predictions": PROBS[:, :1]}, "one number per row.*sigmoid"),
        (
            {"filenames": [f"{i}.png" for i in range(12)], "classes": None},
            "class of a path is not clear",
        ),
        (
            {"filenames": FILES[:3]},
            "paths do not fit the probabilities.*expected 12, one per row, got 3",
        ),
        (
            {"filenames": [f"10/{name}" for name in FILES]},
            "class of a path is not clear.*folders 0 and 10",
        ),
    ],
)
def test_keras_files_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "net.npz", **keras(**changes))

    assert_refused(tmp_path / "net.npz", message)


# scikit-learn


def test_scikit_learn(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    features = np.random.default_rng(1).normal(size=(30, 3))

    for values in (
        np.array([3, 5, 2])[np.arange(30) % 3],
        np.array(["no", "yes", "maybe"])[np.arange(30) % 3],
    ):
        model = LogisticRegression().fit(features, values)
        np.savez(
            tmp_path / "net.npz",
            probs=model.predict_proba(features),
            labels=values,
            classes_=model.classes_,
        )
        predictions = read_predictions(tmp_path / "net.npz")
        assert [predictions.classes[i] for i in predictions.labels] == [
            str(value) for value in values
        ]
        accuracy = (predictions.probs[0].argmax(-1) == predictions.labels).mean()
        assert accuracy == model.score(features, values)

    # the same under the plain name: 2 may be the class 2 or column 2
    values = np.array([3, 5, 2])[np.arange(30) % 3]
    np.savez(
        tmp_path / "net.npz",
        probs=np.eye(3)[np.arange(30) % 3],
        labels=np.minimum(values, 2),
        classes=[2, 3, 5],
    )

    assert_refused(tmp_path / "net.npz", "numbers of columns or of classes.*classes_")


# fastai


def test_fastai(tmp_path: Path) -> None:
    import torch

    probs, targets, items = (
        torch.tensor(PROBS),
        torch.tensor(LABELS),
        [Path("/data/valid") / name for name in FILES],
    )
    np.savez(
        tmp_path / "net.npz",
        probs=probs.numpy(),
        labels=targets.numpy(),
        classes=list(CLASSES),
        paths=[str(item) for item in items],
    )

    assert_read(read_predictions(tmp_path / "net.npz"))

    tree = {
        "probs": probs,
        "labels": targets,
        "classes": list(CLASSES),
        "paths": [str(item) for item in items],
    }
    torch.save(tree, tmp_path / "net.pt")

    assert_read(read_predictions(tmp_path / "net.pt"))

    torch.save((probs, targets), tmp_path / "pair.pt")  # what get_preds returns

    pair = read_predictions(tmp_path / "pair.pt", classes=CLASSES)

    assert (pair.ids[0], pair.members, pair.labels.tolist()) == (
        "row0000",
        ("pair",),
        LABELS.tolist(),
    )


class TensorBase:
    """Stands for a tensor of fastai's own type; torch's safe unpickler does not know it."""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pt_file_is_never_unpickled(tmp_path: Path, legacy: bool) -> None:
    import torch

    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save(
        {"probs": torch.tensor(PROBS), "labels": TensorBase()}, tmp_path / "net.pt", **options
    )

    assert_refused(tmp_path / "net.pt", "more than tensors.*numpy.savez")

    torch.save(
        {"probs": torch.tensor(PROBS), "labels": torch.tensor(LABELS)},
        tmp_path / "net.pt",
        **options,
    )

    assert read_predictions(tmp_path / "net.pt").labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1, 2, 3], r"neither a dict nor a pair \(probs, labels\)"),
        ({"probs": 3}, "a value cannot be used.*probs; expected tensors"),
        ({"state": ["a"]}, "probabilities are missing"),
    ],
)
def test_other_pt_files_are_refused(tmp_path: Path, tree: Any, message: str) -> None:
    import torch

    torch.save(tree, tmp_path / "net.pt")

    assert_refused(tmp_path / "net.pt", message)


def test_a_pt_file_cannot_claim_memory(tmp_path: Path) -> None:
    import torch

    torch.save(
        {"probs": torch.ones(1).expand(10**7, 10**5), "labels": torch.zeros(2)}, tmp_path / "net.pt"
    )

    assert (tmp_path / "net.pt").stat().st_size < 10_000
    assert_refused(tmp_path / "net.pt", "too large.*at most 4096 MiB")


# Ultralytics


def test_ultralytics(tmp_path: Path) -> None:
    names = dict(enumerate(CLASSES))
    np.savez(
        tmp_path / "net.npz",
        probs=list(PROBS),
        paths=[f"/data/test/{name}" for name in FILES],
        classes=list(names.values()),
    )

    assert_read(read_predictions(tmp_path / "net.npz"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", "name,class,confidence\n10,2,0.54066\n0,0,0.26054\n1,1,0.10118\n2,3,0.09762\n"),
        (
            "r.json",
            '[{"name":"10","class":2,"confidence":0.54066},'
            '{"name":"0","class":0,"confidence":0.26054}]',
        ),
    ],
)
def test_five_best_classes_of_ultralytics_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    assert_refused(tmp_path / name, "Ultralytics' best five.*numpy.savez.*r.probs.data.*r.path")


# timm

NATURAL = ("0", "1", "2", "10")  # how timm numbers these folders
COLUMNS = [CLASSES.index(name) for name in NATURAL]


def timm(
    path: Path,
    fmt: str,
    topk: int = 0,
    *,
    separate: bool = False,
    index: bool = False,
    label: str = "",
    fullname: bool = True,
    column: str = "prob",
    classes: tuple[str, ...] = NATURAL,
) -> None:
    """Write a file as timm's inference.py does with its options of similar names."""
    pandas = pytest.importorskip("pandas")
    outputs = PROBS[:, COLUMNS]
    ranks = np.argsort(-outputs, axis=1, kind="stable")[:, : topk or 4]
    if topk:
        outputs = np.take_along_axis(outputs, ranks, axis=1)
    data: dict[str, Any] = {
        "filename": FILES if fullname else [name.replace("/", "_") for name in FILES]
    }
    parts = {
        "index": ranks if index and topk else None,
        "label": np.array(classes, object)[ranks] if label and topk else None,
        column: outputs,
    }
    for name, values in parts.items():
        if values is not None:
            many = values.shape[1] > 1
            if separate and many:
                data |= {f"{name}_{i}": values[:, i] for i in range(values.shape[1])}
            else:
                data[name] = list(values) if many else list(values[:, 0])
    frame = pandas.DataFrame(data)
    with np.printoptions(threshold=sys.maxsize):
        if fmt == "csv":
            frame.to_csv(path, index=False)
        elif fmt == "parquet":
            pytest.importorskip("pyarrow")
            frame.set_index("filename").to_parquet(path)
        elif fmt == "json":
            frame.set_index("filename").to_json(path, indent=4, orient="index")
        else:
            frame.to_json(path, indent=4, orient="split", index=False)


FORMATS = ["csv", "parquet", "json", "json-split"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("separate", [False, True])
def test_timm_with_every_class(tmp_path: Path, fmt: str, separate: bool) -> None:
    path = tmp_path / f"net.{fmt.partition('-')[0]}"
    timm(path, fmt, separate=separate)

    assert_read(read_predictions(path), close=True)

    timm(path, fmt, topk=4, separate=separate, index=True)

    assert_read(read_predictions(path), close=True)

    timm(path, fmt, topk=4, separate=separate, label="name")

    assert_read(read_predictions(path), close=True)

    timm(path, fmt, topk=4, separate=separate, label="name", index=True)

    predictions = read_predictions(path)

    assert_read(predictions, close=True)
    assert predictions.classes == NATURAL


def test_separate_columns_of_timm_in_parquet_are_exact(tmp_path: Path) -> None:
    timm(tmp_path / "net.parquet", "parquet", separate=True)

    assert_read(read_predictions(tmp_path / "net.parquet"))


def test_timm_without_folders_takes_labels_from_a_table(tmp_path: Path) -> None:
    timm(tmp_path / "net.csv", "csv", fullname=False)

    assert_refused(
        tmp_path / "net.csv",
        "class names are not known.*expected 4 class folders.*got 0.*--fullname",
    )

    rows = [f"{name.replace('/', '_')},{name.partition('/')[0]}" for name in FILES]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows[::-1]]))

    predictions = read_predictions(
        tmp_path / "net.csv", labels=tmp_path / "labels.csv", classes=NATURAL
    )

    assert [predictions.classes[i] for i in predictions.labels] == [CLASSES[i] for i in LABELS]
    assert predictions.ids[0] == "0_0.png"


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 1}, "best class of each row.*--topk 0"),
        ({"topk": 1, "index": True, "label": "name"}, "best class of each row"),
        ({"topk": 3, "index": True}, "best 3 classes.*--topk 0"),
        ({"topk": 3, "label": "name"}, "best 3 classes"),
        ({"topk": 4}, "sorted, so their classes"),
        ({"topk": 0, "column": "logit"}, "these are logits.*output-type"),
        (
            {"topk": 4, "index": True, "label": "name", "classes": ("a", "a", "b", "c")},
            "same name.*--label-type name",
        ),
    ],
)
def test_timm_files_that_cannot_make_an_ensemble(
    tmp_path: Path, separate: bool, options: dict[str, Any], message: str
) -> None:
    for fmt in FORMATS:
        path = tmp_path / f"net.{fmt.partition('-')[0]}"
        timm(path, fmt, separate=separate, **options)
        assert_refused(path, message)


def test_scores_of_timm_are_no_predictions(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(
        "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation\n"
        "resnet18,71.5,28.5,90.1,9.9,11.69,224,0.95,bicubic\n"
    )

    assert_refused(tmp_path / "results.csv", "scores of timm's validate.py.*inference.py")


# together


def test_one_ensemble_of_five_tools(tmp_path: Path) -> None:
    """Files with different orders of classes and forms of paths are joined by ids and names."""
    import torch

    np.savez(tmp_path / "keras.npz", **keras())
    timm(tmp_path / "timm.csv", "csv")
    paths = [f"D:\\test\\{name}".replace("/", "\\") for name in FILES]
    order = np.random.default_rng(0).permutation(12)
    np.savez(
        tmp_path / "yolo.npz", probs=PROBS[order], paths=np.array(paths)[order], classes=CLASSES
    )
    torch.save(
        {"probs": torch.tensor(PROBS), "paths": FILES, "classes": list(CLASSES)},
        tmp_path / "fastai.pt",
    )
    names = np.array(CLASSES)[LABELS]
    np.savez(
        tmp_path / "forest.npz", probs=PROBS, labels=names, classes_=np.array(CLASSES), ids=FILES
    )

    joined = join_predictions(
        [
            read_predictions(tmp_path / name)
            for name in ("keras.npz", "timm.csv", "yolo.npz", "fastai.pt", "forest.npz")
        ]
    )

    assert joined.members == ("keras", "timm", "yolo", "fastai", "forest")
    assert joined.classes == CLASSES
    assert np.allclose(joined.probs, PROBS, atol=1e-6, rtol=0)


def test_misspelt_arrays_are_refused(tmp_path: Path) -> None:
    arrays = {"probs": PROBS, "labels": LABELS}
    np.savez(tmp_path / "net.npz", group=np.array(FILES), **arrays)

    assert_refused(tmp_path / "net.npz", "misspelt.*expected groups, got group")

    np.savez(tmp_path / "net.npz", features=np.zeros((12, 5)), **arrays)

    assert len(read_predictions(tmp_path / "net.npz")) == 12
