"""One file that answers as the pipeline does: export to ONNX behind a parity gate, and load without torch.

The exporting half imports torch and onnx when it is called; loading needs numpy, pillow and onnxruntime.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from threefold.errors import ExportError
from threefold.files import write_bytes
from threefold.images import decode

if TYPE_CHECKING:
    from threefold.pipeline import Pipeline

FORMAT = 1
KEY = "threefold"
TOLERANCE = 1e-4
"""Largest difference of a probability between the file and the pipeline in eager PyTorch (float32)."""
TOO_LARGE = 2**31 - 2**20


def export(
    pipeline: Pipeline, path: str | Path, images: Sequence[np.ndarray], metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the pipeline as one ONNX file; nothing is written if its answers differ from the pipeline's.

    Args:
        pipeline: what to export, in eval mode on the CPU.
        path: file to write, `.onnx`.
        images: real images uint8 (h, w, 3), any sizes, on which the answers are compared.
        metadata: model card to store with the file (plain values).

    Returns:
        The parity report: images, max_difference, top1_agreement, tolerance.

    Raises:
        ExportError: the answers differ, the model is above 2 GB, or the file cannot be written.
    """
    from threefold.graph import build_graph

    target = Path(path)
    if target.suffix != ".onnx":
        raise ExportError("cannot export to this kind of file", where=target, expected="a name that ends in .onnx")
    model = build_graph(pipeline)
    return _gate(model, target, pipeline, images, dict(metadata or {}))


def _gate(
    model: Any, target: Path, pipeline: Pipeline, images: Sequence[np.ndarray], metadata: dict[str, Any]
) -> dict[str, Any]:
    """Compare the file's answers with the pipeline's, then write it with the comparison inside."""
    card = {"format": FORMAT, "classes": list(pipeline.classes), "members": list(pipeline.names), **metadata}
    _set_card(model, card)
    if model.ByteSize() > TOO_LARGE:
        raise ExportError(
            "the model is too large for one file",
            where=target,
            expected="at most 2 GB",
            got=f"{model.ByteSize() / 2**30:.1f} GB",
            fix='use folds.final = "refit", or fewer members',
        )
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "model.onnx"
        trial.write_bytes(model.SerializeToString())
        answers = load(trial).predict_proba(images)
    expected = pipeline.predict_proba(list(images))
    report = {
        "images": len(images),
        "max_difference": float(np.abs(answers - expected).max()),
        "top1_agreement": float((answers.argmax(1) == expected.argmax(1)).mean()),
        "tolerance": TOLERANCE,
    }
    if not report["max_difference"] <= TOLERANCE:
        raise ExportError(
            "the exported file would answer differently, so it was not written",
            where=target,
            expected=f"difference <= {TOLERANCE}",
            got=f"{report['max_difference']:.2e} over {len(images)} images",
        )
    _set_card(model, {**card, "parity": report})
    try:
        write_bytes(target, model.SerializeToString())
    except Exception as error:
        raise ExportError(str(error)) from None
    return report


def _set_card(model: Any, card: dict[str, Any]) -> None:
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: json.dumps(card, ensure_ascii=False, default=float)})


class Model:
    """An exported file: images in, probabilities out. Needs numpy, pillow and onnxruntime only.

    Attributes:
        card: the stored model card (score, protocol, parity, ...).
        classes: class names, in the order of the probabilities.
        members: names of the members, in the order of `explain`'s second axis.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        self.path, self.threads = Path(path), threads
        raw = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if raw is None:
            raise ExportError(
                "not a threefold model",
                where=path,
                got="an ONNX file without threefold's metadata",
                fix="export one with `threefold export RUN --out model.onnx`",
            )
        self.card: dict[str, Any] = json.loads(raw)
        if self.card.get("format") != FORMAT:
            raise ExportError(
                "the model file has another format",
                where=path,
                expected=FORMAT,
                got=self.card.get("format"),
                fix="export it again with this version",
            )
        self.classes: tuple[str, ...] = tuple(self.card["classes"])
        self.members: tuple[str, ...] = tuple(self.card["members"])

    @cached_property
    def session(self) -> Any:
        """The onnxruntime session."""
        import onnxruntime

        if not self.path.is_file():
            raise ExportError("no such model file", where=self.path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                "cannot read the model file",
                where=self.path,
                got=" ".join(str(error).split())[:160],
                fix="give a .onnx file that threefold exported",
            ) from None

    def explain(self, images: Iterable[str | Path | bytes | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 (n, k) and each member's (n, m, k) of files, encoded bytes or uint8 arrays (h, w, 3).

        Raises:
            DataError: an image cannot be read (its path and the reason).
        """
        answers = [self.session.run(["probs", "member_probs"], {"images": as_image(image)[None]}) for image in images]
        if not answers:
            return np.zeros((0, len(self.classes)), np.float32), np.zeros(
                (0, len(self.members), len(self.classes)), np.float32
            )
        return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])

    def predict_proba(self, images: Iterable[str | Path | bytes | np.ndarray]) -> np.ndarray:
        """Probabilities float32 (n, k)."""
        return self.explain(images)[0]

    def predict(self, images: Iterable[str | Path | bytes | np.ndarray]) -> list[str]:
        """The most probable class name of each image."""
        return [self.classes[i] for i in self.predict_proba(images).argmax(1)]


def as_image(image: str | Path | bytes | np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) of a file, encoded bytes, or an array that already is one.

    Raises:
        ExportError: an array of another shape or type.
        DataError: the file cannot be read.
    """
    if not isinstance(image, np.ndarray):
        return decode(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ExportError("not an image array", expected="uint8 (h, w, 3)", got=f"{image.dtype} {image.shape}")
    return image


def load(path: str | Path, threads: int = 0) -> Model:
    """Open an exported file; imports neither torch nor timm.

    Raises:
        ExportError: missing, damaged, or not a threefold model.
    """
    return Model(path, threads)
