"""A file with a cascade: the default answer is the full one; "fast" stops as the arrays say."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.ensembles.cascade import Cascade, margins
from threefold.ensembles.stacked import StackedEnsemble
from threefold.errors import ExportError
from threefold.evaluation.cascade_savings import cascade_card, fit_savings
from threefold.exporting import onnx_files, onnx_graph, quantization, targets
from threefold.exporting.export import chosen_ensemble
from threefold.exporting.onnx_cascade import add_cascade
from threefold.exporting.parity import check, compare
from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
from threefold.runtime import predict as answers
from threefold.runtime.model import FAST, FULL, CascadePolicy, Model
from threefold.serving import app as serve
from threefold.training.run import Run

CLASSES, NAMES = ("oak", "elm", "ash"), ("wide", "cheap", "other")


def tiny(seed: int) -> nn.Module:
    """A convolution, mean colours and a linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    net[4].weight.data.mul_(6.0)
    return net.requires_grad_(False)


def pictures(count: int = 60, side: int | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sides = rng.integers(3, 20, count) if side is None else np.full(count, side)
    return [
        rng.integers(0, 256, (int(s), int(s) + 2, 3), dtype=np.uint8)
        // np.uint8(rng.integers(1, 9))
        for s in sides
    ]


def middles(cascade: Cascade, probs: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Thresholds at which half of the remaining rows stop; none is near a row."""
    left, found = np.ones(len(full), bool), []
    for most in (1, 2):
        sure = margins(cascade.predict(probs, full, cascade.stops("full", most)).probs)
        ordered = np.sort(sure[left])
        found.append(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())
        left &= sure < found[-1]
    return np.array(found)


def write(
    graph: Any, path: Path, pipeline: Pipeline, images: list[np.ndarray], card: dict[str, Any]
) -> dict[str, Any]:
    """A graph as a file, if it answers as the pipeline."""
    expected, told = pipeline.predict_proba(images), onnx_graph.card_of(pipeline, "float32", card)
    return onnx_graph.write_onnx(
        graph, path, told, images, lambda found: check(compare(expected, found), path)
    )


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """Three members of two networks, a stacked ensemble, and a cascade that uses every stage."""
    canvases = (8, 8, 12)
    members = {
        name: MemberPipeline([Predictor(tiny(2 * i)), Predictor(tiny(2 * i + 1))], canvas, "squash")
        for i, (name, canvas) in enumerate(zip(NAMES, canvases, strict=True))
    }
    blank = Pipeline(members, Combiner(nn.Flatten(2)), CLASSES)
    images = [torch.from_numpy(image[None]) for image in pictures()]
    with torch.inference_mode():
        probs = torch.cat(
            [torch.stack([member(image) for member in blank.members], 1) for image in images]
        )  # type: ignore[operator]
    probs = probs.numpy().transpose(1, 0, 2).astype(np.float64)
    labels = probs.mean(0).argmax(1)
    ensemble = StackedEnsemble(16, epochs=20).fit(probs, labels)
    pipeline = Pipeline(members, Combiner(ensemble.to_module()), CLASSES)
    full = pipeline.predict_proba(pictures())
    found = fit_savings(
        probs, labels, full, [[1], [2], [0]], costs=[3, 1, 2], members=NAMES, disagreement=0.4
    )
    cascade = found.cascade
    cascade.thresholds_ = middles(cascade, probs, full)
    graph = onnx_graph.build_graph(pipeline)
    card = {"cascade": {**cascade_card(found.as_dict())["cascade"], "state": cascade.state()}}
    return {
        "pipeline": pipeline,
        "cascade": cascade,
        "probs": probs,
        "full": full,
        "graph": graph,
        "card": card,
    }


@pytest.fixture(scope="module")
def model(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    graph = add_cascade(
        world["graph"], world["cascade"], onnx_graph.network_names(world["pipeline"])
    )
    report = write(graph, path, world["pipeline"], pictures(20), world["card"])
    assert report["max_difference"] < 1e-5
    return threefold.load(path)


@pytest.fixture(scope="module")
def flat(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same without a cascade."""
    path, graph = tmp_path_factory.mktemp("flat") / "model.onnx", onnx.ModelProto()
    graph.CopyFrom(world["graph"])
    write(graph, path, world["pipeline"], pictures(4), {})
    return threefold.load(path)


def test_weights_of_later_members_go_into_a_bundle(
    world: dict[str, Any], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LIMIT", 50), ("SMALLEST", 40)):
        monkeypatch.setattr(onnx_files, name, value)
    graph = add_cascade(
        world["graph"], world["cascade"], onnx_graph.network_names(world["pipeline"])
    )
    write(graph, tmp_path / "m.onnx", world["pipeline"], pictures(4), world["card"])
    tensors = onnx_files.weights(onnx.load(tmp_path / "m.onnx", load_external_data=False).graph)
    assert len([tensor for tensor in tensors if tensor.external_data]) > 6  # of all three members
    found = threefold.load(tmp_path / "m.onnx")
    for image in pictures(20, side=9):
        mine, theirs = (each.run(image[None], FAST) for each in (found, model))
        assert (mine.probs == theirs.probs).all()
        assert mine.stages_used == theirs.stages_used


@pytest.mark.slow
def test_later_members_in_half_precision(
    world: dict[str, Any], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "SMALLEST", 4)
    pipeline, card, path = world["pipeline"], world["card"], tmp_path / "m.onnx"
    targets.export(
        pipeline, path, pictures(20), card, precision="float16", cascade=world["cascade"]
    )
    found, same = threefold.load(path), 0
    for image in pictures(side=9):
        mine, theirs = (each.run(image[None], FAST) for each in (found, model))
        if mine.stages_used == theirs.stages_used:  # the others lie beside a threshold
            assert mine.probs == pytest.approx(theirs.probs, abs=0.02)
            same += 1
    assert same > 50


def test_the_default_answer_is_that_of_a_file_without_cascade(model: Model, flat: Model) -> None:
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    for image in pictures():
        plain = flat.session.run(["probs", "member_probs"], {"images": image[None]})
        for a, b in zip(
            session.run(["probs", "member_probs"], {"images": image[None]}), plain, strict=True
        ):
            np.testing.assert_array_equal(a, b)
    output = model.infer(pictures())
    np.testing.assert_array_equal(output.probs, flat.predict_proba(pictures()))
    np.testing.assert_array_equal(output.stages_used, 3)
    assert flat.infer(pictures(2)).stages_used is None


def test_fast_is_what_the_arrays_say(model: Model, world: dict[str, Any]) -> None:
    expected = world["cascade"].predict(world["probs"], world["full"])

    fast, full = model.infer(pictures(), FAST), model.infer(pictures())

    np.testing.assert_array_equal(fast.stages_used, expected.stages)
    assert set(expected.stages) == {1, 2, 3}
    np.testing.assert_allclose(fast.probs, expected.probs, atol=1e-5)
    late = fast.stages_used == 3
    np.testing.assert_array_equal(fast.probs[late], full.probs[late])
    order = [stage[0] for stage in world["cascade"].stages]
    for row, stages in enumerate(fast.stages_used):
        for place, member in enumerate(order):
            probs = full.member_probs[row, member] if place < stages else np.zeros(3)
            np.testing.assert_array_equal(fast.member_probs[row, member], probs)
    np.testing.assert_array_equal(model.predict_proba(pictures(), FAST), fast.probs)
    assert model.predict(pictures(), FAST) == [CLASSES[i] for i in fast.probs.argmax(1)]


def test_a_policy_limits_the_stages(model: Model) -> None:
    fast = model.infer(pictures(), FAST)

    two = model.infer(pictures(), CascadePolicy("fast", max_stages=2))
    one = model.infer(pictures(), CascadePolicy("full", max_stages=1))

    assert (two.stages_used == np.minimum(fast.stages_used, 2)).all()
    assert (one.stages_used == 1).all()


@pytest.mark.parametrize("policy", [FULL, FAST])
def test_a_batch_answers_each_image_as_alone(model: Model, policy: CascadePolicy) -> None:
    images = pictures(30, side=9)

    alone, together = model.infer(images, policy), model.run(np.stack(images), policy)

    np.testing.assert_array_equal(alone.stages_used, together.stages_used)
    np.testing.assert_allclose(alone.probs, together.probs, atol=1e-6)
    np.testing.assert_allclose(alone.member_probs, together.member_probs, atol=1e-6)


def test_members_that_are_not_asked_are_not_computed(model: Model) -> None:
    """onnxruntime's own profile has no convolution of them."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 4
    options.profile_file_prefix = str(model.path.parent / "profile")
    session = onnxruntime.InferenceSession(
        str(model.path), options, providers=["CPUExecutionProvider"]
    )
    image = pictures(1)[0][None]
    session.run(None, {"images": image, "stop": np.zeros(2, np.float32)})
    profile = Path(session.end_profiling())
    done = [
        e
        for e in json.loads(profile.read_text())
        if e.get("args", {}).get("op_name") in ("Conv", "FusedConv")
    ]
    os.unlink(profile)
    assert len([event for event in done if event["name"].endswith("kernel_time")]) == 2


def test_the_graph_is_onnx_and_the_flat_one_is_left_as_it_was(
    world: dict[str, Any], model: Model
) -> None:
    before = world["graph"]
    copy = onnx.ModelProto()
    copy.CopyFrom(before)
    made = add_cascade(before, world["cascade"], onnx_graph.network_names(world["pipeline"]))
    assert before == copy
    onnx.checker.check_model(made, full_check=True)
    assert [node.name for node in made.graph.node if node.op_type == "If"] == ["stage1", "stage2"]
    inside = {t.name for node in made.graph.node for a in node.attribute for t in a.g.initializer}
    assert inside
    assert not inside & {t.name for t in made.graph.initializer}
    with pytest.raises(ExportError, match="the cascade is of other members"):
        add_cascade(before, world["cascade"], [["a"], ["b"]])


def with_card(model: Model, path: Path, **changes: Any) -> Path:
    """A copy of the file with another card."""
    copy = onnx.load(model.path)
    onnx_files.set_card(copy, {**model.card, **changes})
    onnx.save(copy, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cascade": None}, "inputs or outputs are not those of a pipeline"),
        ({"cascade": {}}, "the model card has a cascade without stages"),
        ({"cascade": "yes"}, "the model card has a cascade without stages"),
        (
            {"cascade": {"state": {"stages": [[0], [1]]}}},
            "inputs or outputs are not those of a pipeline",
        ),
        (
            {"cascade": {"state": {"stages": [[0], [1], [2]]}}},
            "the model card is damaged: .*; got cascade: not the state of a cascade",
        ),
        (
            {"thresholds": [float("nan"), 1]},
            "the model card is damaged: .*; got cascade: not the state of a cascade",
        ),
        (
            {"stages": [[0], [1], [2, 3]]},
            "the model card is damaged: .*; got cascade: a cascade of other members",
        ),
        ({"caps": [{}]}, "the model card is damaged: .*; got cascade: 'accuracy'"),
        ({"caps": 3}, "the model card is damaged: .*; got cascade"),
    ],
)
def test_a_hostile_card_is_one_line(
    model: Model, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    told = model.card["cascade"]
    if "caps" in change:
        change = {"cascade": {**told, **change}}
    elif "cascade" not in change:
        change = {"cascade": {**told, "state": {**told["state"], **change}}}
    with pytest.raises(ExportError, match=message) as error:
        threefold.load(with_card(model, tmp_path / "m.onnx", **change))
    assert "\n" not in str(error.value)


def test_a_file_without_a_cascade_says_so(flat: Model) -> None:
    image = pictures(1)[0]
    calls = (
        lambda: flat.infer([image], FAST),
        lambda: flat.run(image[None], CascadePolicy("full", max_stages=1)),
        lambda: flat.stop_thresholds(FAST),
    )

    for call in calls:
        with pytest.raises(
            ExportError, match=r"the model file has no cascade: .*model\.onnx; fix: export it again"
        ):
            call()

    assert set(flat.measure_latency([image], 1)) == {"full", "n", "threads"}


def test_a_budget_without_a_cascade_is_all_or_nothing(flat: Model) -> None:
    image = pictures(1)[0]

    assert flat.resolve_budget(CascadePolicy(budget_ms=1e6), image) == FULL
    with pytest.raises(
        ExportError,
        match=r"no cascade to save time with: .*; expected at most 1e-06 ms, got .* whole model",
    ):
        flat.resolve_budget(CascadePolicy(budget_ms=1e-6), image)


def test_policies_that_cannot_run_are_refused(model: Model) -> None:
    with pytest.raises(ExportError, match="unknown mode; expected full or fast, got quick"):
        CascadePolicy("quick")
    with pytest.raises(ExportError, match="the time budget is not resolved"):
        model.infer(pictures(1), CascadePolicy(budget_ms=5))


def test_latency_is_measured_for_every_stage(model: Model) -> None:
    measured = model.measure_latency(pictures(2), 1)

    assert len(measured["stages"]) == 3
    assert measured["stages"][2] == measured["full"] > 0
    assert measured["fast"] > 0


@pytest.mark.parametrize(
    ("budget", "policy"),
    [
        (100, FULL),
        (9, FULL),
        (8.9, CascadePolicy("fast", max_stages=2)),
        (2, CascadePolicy("fast", max_stages=1)),
    ],
)
def test_a_budget_buys_the_stages_it_has_time_for(
    model: Model, monkeypatch: pytest.MonkeyPatch, budget: float, policy: CascadePolicy
) -> None:
    latency = {"full": 9.0, "stages": [2.0, 5.0, 9.0]}
    monkeypatch.setattr(model, "measure_latency", lambda *_, **__: latency)

    resolved = model.resolve_budget(CascadePolicy(budget_ms=budget), pictures(1)[0])

    assert resolved == policy


def test_a_budget_below_the_first_stage_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = {"full": 9.0, "stages": [2.0, 5.0, 9.0]}
    monkeypatch.setattr(model, "measure_latency", lambda *_, **__: latency)

    with pytest.raises(
        ExportError,
        match=r"no answer within the budget: .*; expected at most 1.5 ms, got 2.0 ms for the first",
    ):
        model.resolve_budget(CascadePolicy(budget_ms=1.5), pictures(1)[0])


def save_pictures(folder: Path, count: int) -> None:
    for i, image in enumerate(pictures(count)):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def predict_folder(
    model: Model, folder: Path, form: str, policy: CascadePolicy = FULL
) -> tuple[list[str], str]:
    """The lines that `predict` writes, and its notices."""
    out, notices = io.StringIO(), io.StringIO()
    failed = answers.write_predictions(
        out, lambda text: print(text, file=notices), model.path, [str(folder)], 1, form, policy
    )
    assert failed == 0
    return out.getvalue().splitlines(), notices.getvalue()


def test_predict_says_which_members_ran(model: Model, tmp_path: Path) -> None:
    save_pictures(tmp_path, 20)
    stages = model.infer(pictures(20), FAST).stages_used
    assert stages is not None
    order = ("cheap", "other", "wide")

    fast = [json.loads(line) for line in predict_folder(model, tmp_path, "json", FAST)[0]]
    full = [json.loads(line) for line in predict_folder(model, tmp_path, "json")[0]]

    assert [entry["members_used"] for entry in fast] == stages.tolist()
    assert [set(entry["members"]) for entry in fast] == [set(order[:count]) for count in stages]
    assert {entry["members_used"] for entry in full} == {3}


def test_predict_says_what_a_budget_affords(model: Model, tmp_path: Path) -> None:
    save_pictures(tmp_path, 20)
    cap = model.caps[0]

    lines, notice = predict_folder(model, tmp_path, "text", CascadePolicy(budget_ms=1e9))

    assert notice == "budget 1e+09 ms: every member for every image\n"
    assert len(lines) == 20
    assert answers.describe_policy(model, CascadePolicy("fast", max_stages=1)) == (
        f"at most 1 of 3 members for an image; accuracy {cap.accuracy:.1%} "
        f"instead of {cap.full_accuracy:.1%} ({cap.rows} rows)"
    )


def test_the_command_line_takes_a_mode_or_a_budget(
    model: Model, flat: Model, tmp_path: Path
) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")

    def predict(path: Path, *flags: str) -> Any:
        return CliRunner().invoke(app, ["predict", str(path), str(tmp_path / "a.png"), *flags])

    fast = json.loads(predict(model.path, "--mode", "fast", "--json").stdout)
    stages = model.infer(pictures(1), FAST).stages_used
    assert stages is not None
    assert fast["members_used"] == stages[0]
    assert predict(model.path, "--budget", "1000s").exit_code == 0
    for path, flags, message in (
        (model.path, ("--mode", "quick"), "unknown mode"),
        (model.path, ("--mode", "fast", "--budget", "9ms"), "a budget chooses the mode"),
        (model.path, ("--budget", "9"), "not a time for an image"),
        (flat.path, ("--mode", "fast"), "the model file has no cascade"),
    ):
        assert message in str(predict(path, *flags).exception)


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    with TestClient(serve.make_app(model, policy=FAST)) as running:
        yield running


def post_pictures(client: TestClient, query: str = "") -> list[dict[str, Any]]:
    files = []
    for i, image in enumerate(pictures(20, side=9)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(("files", (f"{i}.png", buffer.getvalue(), "image/png")))
    entries: list[dict[str, Any]] = client.post(f"/predict{query}", files=files).json()["answers"]
    return entries


def test_a_request_can_name_another_mode(client: TestClient, model: Model) -> None:
    images = pictures(20, side=9)
    fast, full = model.infer(images, FAST), model.infer(images)

    for query, expected in (("", fast), ("?mode=fast", fast), ("?mode=full", full)):
        entries = post_pictures(client, query)
        counts = [entry["members_used"] for entry in entries]
        assert expected.stages_used is not None
        assert counts == [len(entry["members"]) for entry in entries]
        assert counts == expected.stages_used.tolist()
        np.testing.assert_allclose(
            [entry["probability"] for entry in entries], expected.probs.max(1), atol=1e-6
        )

    card = client.get("/card").json()
    assert (card["mode"], card["max_stages"]) == ("fast", 0)
    assert client.post("/predict?mode=quick").json()["error"]["code"] == "bad_request"


def test_a_server_with_a_limit_runs_no_more_stages(model: Model) -> None:
    policy = CascadePolicy("fast", max_stages=1)
    with TestClient(serve.make_app(model, policy=policy)) as client:
        assert {entry["members_used"] for entry in post_pictures(client)} == {1}
        assert {entry["members_used"] for entry in post_pictures(client, "?mode=full")} == {3}


def test_a_server_without_a_cascade_has_one_mode(flat: Model) -> None:
    with TestClient(serve.make_app(flat)) as client:
        assert "members_used" not in post_pictures(client)[0]
        refused = client.post("/predict?mode=fast")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "mode")
    with pytest.raises(ExportError, match="the model file has no cascade"):
        serve.make_app(flat, policy=FAST)


def test_the_cascade_needs_no_torch_and_no_scipy(model: Model, tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    code = (
        "import sys, threefold\n"
        f"model = threefold.load({str(model.path)!r})\n"
        f"image = {str(tmp_path / 'a.png')!r}\n"
        "print(model.infer([image], threefold.runtime.FAST).stages_used)\n"
        "bad = {'torch', 'timm', 'sklearn', 'scipy', 'onnx', 'pydantic'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_has_a_cascade_and_carries_it_into_the_file(finished: Run) -> None:
    cascade = finished.results.cascade
    assert cascade is not None
    assert cascade.state is not None
    model = threefold.load(finished.dir / "model.onnx")
    assert model.cascade is not None
    assert model.cascade.state() == cascade.state == Cascade.from_state(cascade.state).state()
    assert [m.rows for m in cascade.measured] == ["oof, cross-fitted", "test"]
    assert cascade.members == tuple(model.members)
    costs = [row.macs * 2 for row in finished.results.members]
    assert cascade.costs == tuple(costs)
    assert cascade.state["stages"] == [[int(i)] for i in np.argsort(costs)]
    assert finished.results.export is not None
    latency = finished.results.export["latency"]
    assert len(latency["stages"]) == 2
    assert latency["n"] > 0


def test_another_method_or_an_old_run_is_exported_without(finished: Run, tmp_path: Path) -> None:
    assert "cascade" in chosen_ensemble(finished).card
    old = Run.open(finished.dir)
    old.folder.results = finished.results.replace(cascade=None)
    assert "cascade" not in chosen_ensemble(old).card
