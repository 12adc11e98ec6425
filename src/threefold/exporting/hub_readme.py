"""The README.md of a model on the Hugging Face hub: what it is, how sure, how to use it.

The hub calls this file a model card. Here that name belongs to the JSON inside an exported file.
Its metadata and sections follow Mitchell et al., "Model Cards for Model Reporting" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCardData

from threefold.exporting.hub_readme_labels import (
    introduce_labels,
    label_headline,
    tabulate_label_scores,
    tabulate_labels,
)
from threefold.exporting.markdown import cell, share
from threefold.models.backbones import resolve_backbone
from threefold.models.hub import weights_licence
from threefold.predictions.multilabel_results import MultilabelResults, MultilabelScore
from threefold.predictions.results_schema import ClassScore, Results, Score
from threefold.predictions.run_folder import RunFolder
from threefold.predictions.run_results import AnyResults

CLASSES_SHOWN = 200
"""Most classes that the table of classes lists."""

_ROWS = {"test": "test images, opened once", "oof": "out-of-fold rows of the training images"}


def write_readme(folder: RunFolder, repository: str = "", licence: str = "") -> str:
    """Write the text of README.md for a finished run.

    Args:
        folder: the run.
        repository: `user/name`, for the commands; empty if it is not on a hub.
        licence: the licence that the model is published under, as the hub names it.

    Raises:
        RunError: the run is not complete.
    """
    folder.check_finished()
    results = folder.any_results
    title = repository.rpartition("/")[2] or results.name
    if isinstance(results, MultilabelResults):
        about = [introduce_labels(results), _usage(repository), tabulate_label_scores(results)]
        classes, alpha = tabulate_labels(results, CLASSES_SHOWN), None
    else:
        about = [_introduction(results), _usage(repository), _scores(results)]
        classes = _classes(results.per_class)
        sets = results.conformal
        alpha = sets.alpha if sets is not None and sets.sets else None
    sections = [
        f"# {title}",
        *about,
        classes,
        _training(folder, results.hardware),
        _limits(alpha),
    ]
    if licence:
        sections.append(f"## Licence\n\n{licence}")
    head = _metadata(folder, results, title, licence).to_yaml()
    return f"---\n{head}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(folder: RunFolder, results: AnyResults, title: str, licence: str) -> ModelCardData:
    """The hub's metadata, with the scores of the chosen ensemble."""
    score: Score | MultilabelScore | None
    tags = ["image-classification", "onnx", "ensemble"]
    if isinstance(results, MultilabelResults):
        score = label_headline(results)
        tags.append("multi-label")
    else:
        score = _headline(results)
    figures: dict[str, float] = {}
    if isinstance(score, MultilabelScore):
        figures = {
            "mean_average_precision": score.mean_average_precision,
            "f1": score.macro_f1,
            "log_loss": score.log_loss,
        }
    elif score is not None:
        figures = {"accuracy": score.accuracy, "log_loss": score.log_loss}
    evaluations = None
    if score is not None:
        evaluations = [
            EvalResult(
                task_type="image-classification",
                dataset_type="custom",
                dataset_name=f"{score.n} {_ROWS.get(score.rows, score.rows)}",
                metric_type=kind,
                metric_value=round(value, 4),
            )
            for kind, value in figures.items()
        ]
    return ModelCardData(
        license=licence or None,
        library_name="threefold",
        pipeline_tag="image-classification",
        tags=tags,
        base_model=[f"timm/{name}" for name in _backbones(folder)] or None,
        metrics=[*figures] or None,
        model_name=title if evaluations else None,
        eval_results=evaluations,
    )


def _headline(results: Results) -> Score | None:
    """The score of the chosen ensemble, on test rows where there are any."""
    return results.score(results.chosen, "ensemble", "test") or results.score(
        results.chosen, "ensemble", "oof"
    )


def _backbones(folder: RunFolder) -> list[str]:
    """timm names of the backbones that began with published weights."""
    names = [m.backbone for m in folder.recipe.members if m.weights == "pretrained"]
    return list(dict.fromkeys(resolve_backbone(name) for name in names if name))


def _introduction(results: Results) -> str:
    count = f"{len(results.members)} networks" if len(results.members) > 1 else "one network"
    text = f"An image classifier for {len(results.classes)} classes, made of {count}."
    if results.expected is not None:
        low, high = results.expected.interval
        text += (
            f" Expect **{results.expected.accuracy:.1%}** of new images to be right "
            f"(95 % interval {low:.1%} to {high:.1%}, from {results.expected.n:,} "
            f"{results.expected.basis})."
        )
    return text


def _usage(repository: str) -> str:
    source = f"hf://{repository}" if repository else "model.onnx"
    return f"""## Use

With threefold installed:

```
threefold predict {source} photo.jpg
```

```python
import threefold

model = threefold.load("{source}")
model.predict("photo.jpg")
```

`model.onnx` takes `images`, uint8 (batch, height, width, 3), of any size, and returns `probs`; any
ONNX runtime opens it."""


def _scores(results: Results) -> str:
    rows = [
        f"| {cell(s.name)}{' (chosen)' if s.name == results.chosen else ''} | {s.rows} | {s.n:,} "
        f"| {s.accuracy:.4f} [{s.interval[0]:.4f}, {s.interval[1]:.4f}] | {s.log_loss:.4f} "
        f"| {s.ece:.4f} |"
        for s in results.scores
    ]
    head = [
        "| | rows | n | accuracy, 95 % interval | log loss | ECE |",
        "|---|---|---|---|---|---|",
    ]
    text = "\n".join(["## Metrics", "", *head, *rows, ""])
    return (
        f"{text}\nProtocol `{results.protocol}`. oof = out of fold: each training image is "
        "answered by networks that did not learn from it. Probabilities are calibrated "
        f"(temperature {results.temperature:.3f})."
    )


def _classes(classes: Sequence[ClassScore]) -> str:
    lines = ["## Classes", "", "| class | images | recall | precision |", "|---|---|---|---|"]
    for row in classes[:CLASSES_SHOWN]:
        lines.append(
            f"| {cell(row.name)} | {row.n:,} | {share(row.recall)} | {share(row.precision)} |"
        )
    if len(classes) > CLASSES_SHOWN:
        lines.append(f"| and {len(classes) - CLASSES_SHOWN:,} more | | | |")
    return "\n".join(lines)


def _training(folder: RunFolder, hardware: str) -> str:
    recipe, info = folder.recipe, folder.info
    members = "\n".join(
        f"| {cell(m.name)} | {cell(m.backbone or ' + '.join(m.joins))} | {m.img_size} px "
        f"| {m.head.kind} | {_licence_of(m.backbone)} |"
        for m in recipe.members
    )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(info.versions.items()))
    folds = recipe.folds.scheme if recipe.folds.ignores_k else f"{recipe.folds.k} folds"
    return f"""## Training

Images: {len(info.classes)} classes, SHA-256 of the data set {info.data[:16]}; the images are not
part of this repository. Split: {folds}, seed {recipe.seed}. `recipe.toml` has every setting.

| member | backbone | size | head | licence of its pretrained weights |
|---|---|---|---|---|
{members}

{versions}; {hardware}."""


def _licence_of(backbone: str) -> str:
    return weights_licence(backbone) if backbone else ""


def _limits(alpha: float | None) -> str:
    """What the figures hold for; `alpha` is that of the prediction sets, or None."""
    text = """## Intended use and limits

For images like those that it was trained on, taken in the same way. The figures above hold for new
images of that kind, and for no others. How it treats groups of people or places that the data set
does not tell apart has not been measured."""
    if alpha is not None:
        text += (
            f" Prediction sets contain the right class for about {1 - alpha:.0%} of such images, "
            "and images that look like no class can be flagged (`model.predict_sets`, "
            "`model.is_unknown`)."
        )
    return text
