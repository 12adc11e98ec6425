"""An exported ONNX file passes onnx's full checker, and other readers answer as the pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.cascades import CascadeCase
from support.exports import dimmed_images

from threefold.exporting import quantization
from threefold.exporting.onnx_files import serialize, set_card
from threefold.exporting.onnx_graph import build_graph, card_of
from threefold.runtime.tolerances import TOLERANCES

KINDS = (
    "float32",
    "cascade",
    "float16",
    "bfloat16",
    pytest.param("int8", marks=pytest.mark.slow),
)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 33, 21, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(cascade_case: CascadeCase, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(cascade_case, tmp_path_factory.mktemp("files"))


class Files:
    """Files of one pipeline, each written when it is asked for first.

    Args:
        case: the pipeline.
        folder: where they go.
    """

    def __init__(self, case: CascadeCase, folder: Path) -> None:
        self.case, self.folder = case, folder

    def __getitem__(self, kind: str) -> Path:
        path = self.folder / f"{kind}.onnx"
        if not path.exists():
            graph = self.graph(kind)
            precision = "float32" if kind == "cascade" else kind
            set_card(graph, card_of(self.case.pipeline, precision, {}))
            path.write_bytes(serialize(graph))
        return path

    def graph(self, kind: str) -> onnx.ModelProto:
        """The pipeline's graph in a precision, or with a cascade."""
        if kind == "cascade":
            return self.case.graph_with_cascade()
        if kind == "int8":
            return build_graph(self.case.pipeline, kind, dimmed_images(20))
        graph = onnx.ModelProto()
        graph.CopyFrom(self.case.graph)
        if kind == "float32":
            return graph
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantization, "SMALLEST", 100)  # these networks are small
            return quantization.halve(graph, kind)


def check_answers(
    case: CascadeCase, kind: str, probs: np.ndarray, member_probs: np.ndarray
) -> None:
    """Compare a reader's answers to `IMAGES` with the pipeline's."""
    precision = "float32" if kind == "cascade" else kind
    with torch.inference_mode():
        expected = [value.numpy() for value in case.pipeline(torch.from_numpy(IMAGES))]
    tolerance = TOLERANCES[precision].difference
    np.testing.assert_allclose(probs, expected[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(member_probs, expected[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_checker_finds_nothing(files: Files, kind: str) -> None:
    onnx.checker.check_model(str(files[kind]), full_check=True)
    onnx.checker.check_model(onnx.load(files[kind]), full_check=True, check_custom_domain=True)


@pytest.mark.parametrize("kind", KINDS)
def test_strict_inference_finds_every_type(files: Files, kind: str) -> None:
    """Types and ranks of all values follow from the input, and outputs are as declared."""
    model = onnx.load(files[kind])
    declared = {value.name: value.type for value in model.graph.output}

    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )

    typed = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    produced = {name for node in model.graph.node for name in node.output if name}
    assert produced <= typed
    assert {node.domain for node in model.graph.node} == {""}
    assert {value.name: value.type for value in inferred.graph.output} == declared


@pytest.mark.parametrize("kind", KINDS)
def test_plain_onnxruntime_answers(cascade_case: CascadeCase, files: Files, kind: str) -> None:
    """Nothing of threefold is needed, and only the images are."""
    session = onnxruntime.InferenceSession(files[kind], providers=["CPUExecutionProvider"])

    probs, member_probs = session.run(["probs", "member_probs"], {"images": IMAGES})

    check_answers(cascade_case, kind, probs, member_probs)


@pytest.mark.filterwarnings("ignore")  # OpenVINO warns of its own modules
@pytest.mark.parametrize("kind", KINDS)
def test_openvino_answers(cascade_case: CascadeCase, files: Files, kind: str) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(files[kind], "CPU", options)

    answers = compiled({"images": IMAGES})

    check_answers(cascade_case, kind, answers["probs"], answers["member_probs"])
