"""Export a pipeline to the format of the name's suffix, behind the parity gate.

- `.onnx` is read by `threefold.load`, `predict` and `serve`. With a fixed size, TensorRT reads it,
  too: images come resized, and `tensorrt` has checked the operators of the graph.
- `.pt2` is torch's own format: `torch.export.load(PATH).module()` maps uint8 images (b, h, w, 3) to
  probs and member_probs. torch unpickles parts of it, so load only your own files; threefold loads
  only the file that it has just written. The model card is its extra file `threefold.json`.
- `.xml` is OpenVINO's, with the weights in a `.bin` beside it; loading it runs no code of the file.
  The model card is its rt_info `threefold`.
- `.mlpackage` is Core ML's, a folder, see `coreml`; `.tflite` is LiteRT's, see `litert`, with the
  model card in `NAME.json`. Both take images of one size.

All but the first have their checksums beside them (`checksums`), which `load` compares.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from threefold.ensembles.cascade import Cascade
from threefold.errors import ExportError
from threefold.exporting import coreml, litert, onnx_graph, tensorrt
from threefold.exporting.checksums import check_checksums, write_checksums
from threefold.exporting.fixed_size import common_size, describe_input
from threefold.exporting.onnx_cascade import add_cascade
from threefold.exporting.onnx_files import staged, write_file
from threefold.exporting.parity import check, compare
from threefold.exporting.quantization import check_precision
from threefold.extras import install_command
from threefold.files import TemporaryFolder, flush_files, replace_all, sha256
from threefold.machine import free_disk
from threefold.models.pipeline import Pipeline
from threefold.predictions.export_schema import ExportReport
from threefold.runtime.model import KEY

SUFFIXES: Final = (".onnx", ".pt2", ".xml", ".mlpackage", ".tflite")
CARD_FILE: Final = f"{KEY}.json"
"""Name of the model card inside a .pt2 file (torch.export's extra_files)."""
Measure = Callable[[np.ndarray], ExportReport]


def export(
    pipeline: Pipeline,
    path: str | Path,
    images: Sequence[np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    *,
    labels: npt.ArrayLike | None = None,
    rows: str = "",
    precision: str = "float32",
    calibration: Sequence[np.ndarray] = (),
    cascade: Cascade | None = None,
    fixed_size: bool = False,
) -> ExportReport:
    """Write the pipeline as a file, unless the file's answers differ from the pipeline's.

    Only `.onnx` files contain the cascade; in the others every member runs.

    Args:
        pipeline: in eval mode on the CPU.
        path: file to write, with one of SUFFIXES.
        images: real images uint8 (h, w, 3), any sizes, on which the answers are compared.
        metadata: model card to store (plain values); with a cascade it has the key "cascade", for
            any number of labels per image the keys "task" and "thresholds".
        labels: class indices of the images, or targets (n, k), if known, to count correct answers
            lost and gained.
        rows: name of the images' rows, for the card.
        precision: of the members' weights, one of `quantization.PRECISIONS`.
        calibration: training images uint8 (h, w, 3) that int8 takes its ranges from.
        cascade: fitted on the pipeline's members, see `onnx_cascade`.
        fixed_size: write an .onnx file for images that are resized before, which TensorRT reads.

    Returns:
        The report of `parity.compare`, with the bytes written.

    Raises:
        ExportError: unknown kind of file, or not in this precision; OpenVINO is not installed; the
            answers differ; the file cannot be written; or with `fixed_size` there is a cascade, the
            members have several sizes, or TensorRT does not read the graph.
    """
    target, metadata = Path(path), dict(metadata or {})
    check_kind(target, precision, fixed_size)
    if target.suffix != ".onnx":
        metadata.pop("cascade", None)
    card = onnx_graph.card_of(pipeline, precision, metadata)
    expected = pipeline.predict_proba(list(images))

    def measure(answers: np.ndarray) -> ExportReport:
        thresholds = card.get("thresholds")
        return check(compare(expected, answers, precision, labels, rows, thresholds), target)

    if target.suffix in _WRITERS:
        card["opset"] = None
        return _WRITERS[target.suffix](pipeline, target, images, card, measure)
    if fixed_size:
        return _to_fixed_size(pipeline, target, images, card, measure, cascade)
    stages = cascade.stages if cascade is not None and target.suffix == ".onnx" else ()
    graph = onnx_graph.build_graph(pipeline, precision, calibration, stages)
    if target.suffix == ".xml":
        return _to_openvino(graph, target, images, card, measure)
    if cascade is not None:
        graph = add_cascade(graph, cascade, onnx_graph.network_names(pipeline))
    return onnx_graph.write_onnx(graph, target, card, images, measure)


def _to_fixed_size(
    pipeline: Pipeline,
    target: Path,
    images: Sequence[np.ndarray],
    card: dict[str, Any],
    measure: Measure,
    cascade: Cascade | None,
) -> ExportReport:
    if cascade is not None:
        raise ExportError(
            "a file of a fixed size cannot hold the run's cascade",
            where=target,
            fix="add --no-cascade: every member then answers every image",
        )
    size = common_size(pipeline, target)
    graph = onnx_graph.build_graph(pipeline, fixed_size=size)
    tensorrt.check_graph(graph, target)
    card = {**describe_input(card, size), "tensorrt": tensorrt.CHECKED}
    return onnx_graph.write_onnx(graph, target, card, images, measure)


def check_kind(target: Path, precision: str, fixed_size: bool = False) -> None:
    """Refuse a kind of file that cannot be written, before any slow step.

    Raises:
        ExportError: see `export`.
    """
    check_precision(precision)
    if target.suffix not in SUFFIXES:
        raise ExportError(
            "cannot export to this kind of file",
            where=target,
            expected="a name that ends in .onnx, .pt2, .xml, .mlpackage or .tflite",
        )
    if fixed_size and target.suffix != ".onnx":
        raise ExportError(
            "--fixed-size is for ONNX", where=target, expected="a name that ends in .onnx"
        )
    if fixed_size and precision != "float32":
        raise ExportError(
            "a file of a fixed size holds float32 only",
            where=target,
            got=precision,
            fix="leave --precision out: TensorRT and its tools reduce the precision themselves",
        )
    if target.suffix in _WRITERS and precision != "float32":
        raise ExportError(
            f"a {target.suffix} file holds float32 only",
            where=target,
            got=precision,
            fix="use a name that ends in .onnx or .xml",
        )
    if target.suffix == ".xml":
        _openvino(target)
    elif target.suffix == ".mlpackage":
        coreml.import_coremltools(target)
    elif target.suffix == ".tflite":
        litert.import_litert(target)


def _openvino(target: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OpenVINO warns about its renamed modules
            import openvino
    except ImportError:
        raise ExportError(
            "OpenVINO is not installed",
            where=target,
            fix=install_command("openvino"),
        ) from None
    return openvino


def load(path: str | Path) -> Any:
    """Load an exported .pt2, .xml or .tflite file after comparing it with the checksums beside it.

    An .onnx file is loaded by `threefold.load`.

    Args:
        path: a file that `export` wrote. torch unpickles parts of a .pt2 file, so load only your
            own: a checksum finds damage, and no forgery.

    Returns:
        Of a .pt2 file, a torch module that maps uint8 images (b, h, w, 3) to probs (b, k) and
        member_probs (b, m, k). Of an .xml file, OpenVINO's compiled model for the CPU, with the
        input `images` and the outputs `probs` and `member_probs`. Of a .tflite file, see
        `litert.open_litert`.

    Raises:
        ExportError: another kind of file, missing, damaged or without its checksums; or OpenVINO
            or ai-edge-litert is not installed.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".xml", ".tflite"):
        raise ExportError(
            "cannot load this kind of file",
            where=path,
            expected="a name that ends in .pt2, .xml or .tflite",
            fix="threefold.load reads .onnx files" if path.suffix == ".onnx" else "",
        )
    check_checksums(path)
    if path.suffix == ".tflite":
        return litert.open_litert(path)
    return _load_pt2(path) if path.suffix == ".pt2" else _compile(_openvino(path), path)


def _load_pt2(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its internals
        return torch.export.load(path).module()


def _compile(openvino: Any, path: Path) -> Any:
    # Without the hint, OpenVINO computes in bfloat16 on processors that can.
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def predict_each(
    call: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]
) -> np.ndarray:
    """Return probabilities (n, k) from calls on one image uint8 (1, h, w, 3) at a time."""
    return np.concatenate([call(np.ascontiguousarray(image[None])) for image in images])


def _to_pt2(
    pipeline: Pipeline,
    target: Path,
    images: Sequence[np.ndarray],
    card: dict[str, Any],
    measure: Measure,
) -> ExportReport:
    dynamic = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    with _stage(target) as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns about its internals
        example = torch.zeros(2, 30, 40, 3, dtype=torch.uint8)
        program = torch.export.export(pipeline, (example,), dynamic_shapes=(dynamic,))
        trial = Path(folder) / target.name
        _save(program, trial, card)
        loaded = _load_pt2(trial)
        report = measure(
            predict_each(lambda image: loaded(torch.from_numpy(image))[0].numpy(), images)
        )
        _save(program, trial, {**card, "parity": report.as_json()})
        _place(target, [trial])
    return report.replace(bytes=target.stat().st_size)


def _save(program: Any, path: Path, card: dict[str, Any]) -> None:
    content = io.BytesIO()  # torch does not say why it cannot write a file
    card_text = json.dumps(card, ensure_ascii=False, default=float)
    torch.export.save(program, content, extra_files={CARD_FILE: card_text})
    write_file(path, content.getvalue())


def _to_coreml(
    pipeline: Pipeline,
    target: Path,
    images: Sequence[np.ndarray],
    card: dict[str, Any],
    measure: Measure,
) -> ExportReport:
    with _stage(target) as folder:
        model = coreml.convert(pipeline, target)
        card = describe_input(card, common_size(pipeline, target))
        trial = Path(folder) / target.name
        coreml.save(model, trial, card)
        report = measure(coreml.predict_coreml(trial, pipeline, images))
        shutil.rmtree(trial)
        coreml.save(model, trial, {**card, "parity": report.as_json()})
        files = [path for path in sorted(trial.rglob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        _place(target, [trial])
    return report.replace(bytes=size)


def _to_litert(
    pipeline: Pipeline,
    target: Path,
    images: Sequence[np.ndarray],
    card: dict[str, Any],
    measure: Measure,
) -> ExportReport:
    with _stage(target) as folder:
        trial = Path(folder) / target.name
        litert.write_litert(pipeline, trial, target)
        card = describe_input(card, common_size(pipeline, target))
        report = measure(litert.predict_litert(trial, pipeline, images))
        text = json.dumps({**card, "parity": report.as_json()}, ensure_ascii=False, default=float)
        card_trial = trial.with_name(f"{target.name}.json")
        write_file(card_trial, text.encode())
        _place(target, [card_trial, trial])
    return report.replace(bytes=target.stat().st_size)


_WRITERS: Final = {".pt2": _to_pt2, ".mlpackage": _to_coreml, ".tflite": _to_litert}
"""Those that hold float32 only and are written from the pipeline itself."""


def _to_openvino(
    model: Any, target: Path, images: Sequence[np.ndarray], card: dict[str, Any], measure: Measure
) -> ExportReport:
    openvino = _openvino(target)
    with (
        _stage(target) as folder,
        staged(model, Path(folder) / "model.onnx") as onnx_file,
    ):
        converted = openvino.convert_model(onnx_file.model)
        trial = Path(folder) / target.name
        weights = trial.with_suffix(".bin")
        _save_openvino(openvino, converted, trial, target)
        tried = sha256(weights)
        report = measure(_predict_openvino(openvino, trial, images))
        converted.set_rt_info(
            json.dumps({**card, "parity": report.as_json()}, ensure_ascii=False, default=float),
            [KEY],
        )
        _save_openvino(openvino, converted, trial, target)
        if sha256(weights) != tried:
            raise _cut_short(target)
        _place(target, [weights, trial])
    weights = target.with_suffix(".bin")
    return report.replace(bytes=target.stat().st_size + weights.stat().st_size)


def _save_openvino(openvino: Any, model: Any, path: Path, target: Path) -> None:
    """Write the two files of a model, and read them back: on a full disk OpenVINO says nothing.

    Raises:
        ExportError: they cannot be written.
    """
    try:
        # The graph has its precision already, so nothing is compressed here.
        openvino.save_model(model, path, compress_to_fp16=False)
        openvino.Core().read_model(path)
    except RuntimeError:  # the library's own, without the system's reason
        raise _cut_short(target) from None


def _cut_short(target: Path) -> ExportError:
    return ExportError(
        "cannot write",
        where=target,
        got=f"{free_disk(target.parent) / 1e6:,.0f} MB free on the disk",
        fix="free disk space or choose a writable folder, then run the same command again",
    )


def _predict_openvino(openvino: Any, model: Path, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return the file's answers on OpenVINO's CPU runtime."""
    compiled = _compile(openvino, model)
    return predict_each(lambda image: np.array(compiled({"images": image})["probs"]), images)


def _place(target: Path, trials: Sequence[Path]) -> None:
    """Move finished files and their checksums to their places, which else stay as they are.

    Args:
        target: the file; what belongs to it goes beside it.
        trials: files or folders in one temporary folder beside it, the target's own last.

    Raises:
        ExportError: a file cannot be written.
    """
    folder = trials[0].parent
    try:
        flush_files(folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        digests = {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in paths
            if path.relative_to(folder).parts[0] in {trial.name for trial in trials}
        }
        trials = [*trials, write_checksums(trials[-1], digests)]
        spare = folder / "replaced"
        spare.mkdir()
        replace_all({trial: target.with_name(trial.name) for trial in trials}, spare)
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error) from None


def _stage(target: Path) -> TemporaryFolder:
    """Make a temporary folder beside the target, in which a file is written and tried."""
    try:
        return TemporaryFolder(target)
    except OSError as error:
        raise ExportError("cannot write", where=target, got=error) from None
