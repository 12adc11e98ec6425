"""Write what to look at in a data set as files that Label Studio and FiftyOne import.

Neither library is needed to write them.

Sources: labelstud.io/guide/predictions (tasks with predictions) and docs.voxel51.com
user_guide/import_datasets.html (FiftyOneImageClassificationDataset).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from threefold.errors import DataError, shorten
from threefold.evaluation.review import Review, ReviewItem

ReviewFormat = Literal["labelstudio", "fiftyone"]

LOCAL_FILES: Final = "/data/local-files/?d="
"""Where Label Studio serves the files below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT."""


def media_root(review: Review) -> Path:
    """Return the folder that all images of a data set lie in, which both programs ask for.

    Label Studio calls it a local storage, and wants it below its document root: addresses are
    relative to the parent.

    Raises:
        DataError: there is none.
    """
    folders = {path.parent for path in _all_paths(review)}
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on different drives of Windows
        raise DataError("the images have no common folder", where=review.root) from None


def to_label_studio(review: Review) -> list[dict[str, Any]]:
    """Make the tasks: the prediction of each is the suggested class, or else the present one."""
    root = media_root(review).parent
    return [
        {
            "data": {
                "image": LOCAL_FILES + quote(_path(review, item).relative_to(root).as_posix()),
                "id": item.id,
                "label": item.label,
                "part": item.part,
                "kinds": ", ".join(item.kinds),
                "reasons": "; ".join(item.reasons),
            },
            "predictions": [
                {
                    "model_version": "threefold",
                    "result": [
                        {
                            "from_name": "label",
                            "to_name": "image",
                            "type": "choices",
                            "value": {"choices": [item.suggested or item.label]},
                        }
                    ],
                }
            ],
        }
        for item in review.items
    ]


def label_studio_config(review: Review) -> str:
    """Return the labelling interface (XML) of a project for these tasks."""
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in review.sources.train.classes)
    return (
        '<View><Image name="image" value="$image"/><Text name="why" value="$reasons"/>'
        f'<Choices name="label" toName="image" choice="single">{choices}</Choices></View>'
    )


def to_fiftyone(review: Review) -> dict[str, Any]:
    """Make the labels.json of a FiftyOneImageClassificationDataset.

    Images are named by their path below `media_root`, without the suffix. What was found stands in
    the attributes of each label.

    Raises:
        DataError: two images differ in their suffix only, which this format cannot tell apart.
    """
    root = media_root(review)
    counts = Counter(path.relative_to(root).with_suffix("") for path in _all_paths(review))
    labels: dict[str, Any] = {}
    for item in review.items:
        name = _path(review, item).relative_to(root).with_suffix("")
        if counts[name] > 1:
            raise DataError(
                "FiftyOne cannot tell images apart that differ in their suffix only",
                got=shorten([item.id]),
                fix="rename one, or use --format labelstudio",
            )
        labels[name.as_posix()] = {
            "label": review.sources.train.classes.index(item.label),
            "attributes": {
                "part": item.part,
                "kinds": ", ".join(item.kinds),
                "reasons": "; ".join(item.reasons),
                "suggested": item.suggested,
                "copy_of": item.copy_of,
            },
        }
    return {"classes": list(review.sources.train.classes), "labels": labels}


def _path(review: Review, item: ReviewItem) -> Path:
    """Return the file of an image."""
    return Path(str(review.sources.part(item.part).images[item.row])).absolute()


def _all_paths(review: Review) -> list[Path]:
    parts = [part for part in (review.sources.train, review.sources.test) if part is not None]
    return [Path(str(path)).absolute() for part in parts for path in part.images]
