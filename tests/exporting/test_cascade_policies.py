"""An exported cascade under policies and time budgets, in `predict`, and in the server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.exports import copy_with_card, dimmed_images, save_images
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.errors import ExportError
from threefold.runtime.model import FAST, FULL, CascadePolicy, Model
from threefold.runtime.predict import describe_policy, write_predictions
from threefold.serving.app import make_app


def test_a_policy_limits_the_stages(model: Model) -> None:
    fast = model.infer(dimmed_images(), FAST)

    two = model.infer(dimmed_images(), CascadePolicy("fast", max_stages=2))
    one = model.infer(dimmed_images(), CascadePolicy("full", max_stages=1))

    assert (two.stages_used == np.minimum(fast.stages_used, 2)).all()
    assert (one.stages_used == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cascade": None}, "inputs or outputs are not those of a pipeline"),
        ({"cascade": {}}, "the model card has a cascade without stages"),
        ({"cascade": "yes"}, "got the model card's cascade is not an object"),
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
    cascade = model.card["cascade"]
    if "caps" in change:
        change = {"cascade": {**cascade, **change}}
    elif "cascade" not in change:
        change = {"cascade": {**cascade, "state": {**cascade["state"], **change}}}
    path = copy_with_card(model, tmp_path / "m.onnx", **change)

    with pytest.raises(ExportError, match=message) as error:
        threefold.load(path)

    assert "\n" not in str(error.value)


def test_a_file_without_a_cascade_refuses_other_policies(flat: Model) -> None:
    image = dimmed_images(1)[0]
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
    image = dimmed_images(1)[0]

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
        model.infer(dimmed_images(1), CascadePolicy(budget_ms=5))


def test_latency_is_measured_for_every_stage(model: Model) -> None:
    measured = model.measure_latency(dimmed_images(2), 1)

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
def test_a_budget_resolves_to_the_stages_it_has_time_for(
    model: Model, monkeypatch: pytest.MonkeyPatch, budget: float, policy: CascadePolicy
) -> None:
    latency = {"full": 9.0, "stages": [2.0, 5.0, 9.0]}
    monkeypatch.setattr(model, "measure_latency", lambda *_, **__: latency)

    resolved = model.resolve_budget(CascadePolicy(budget_ms=budget), dimmed_images(1)[0])

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
        model.resolve_budget(CascadePolicy(budget_ms=1.5), dimmed_images(1)[0])


def predict_folder(
    model: Model, folder: Path, form: str, policy: CascadePolicy = FULL
) -> tuple[list[str], str]:
    """The lines that `predict` writes, and its notices."""
    out, notices = io.StringIO(), io.StringIO()
    failed = write_predictions(
        out, lambda text: print(text, file=notices), model.path, [str(folder)], 1, form, policy
    )
    assert failed == 0
    return out.getvalue().splitlines(), notices.getvalue()


def test_predict_names_the_members_that_ran(model: Model, tmp_path: Path) -> None:
    save_images(dimmed_images(20), tmp_path)
    stages = model.infer(dimmed_images(20), FAST).stages_used
    assert stages is not None
    order = ("cheap", "other", "wide")

    fast = [json.loads(line) for line in predict_folder(model, tmp_path, "json", FAST)[0]]
    full = [json.loads(line) for line in predict_folder(model, tmp_path, "json")[0]]

    assert [entry["members_used"] for entry in fast] == stages.tolist()
    assert [set(entry["members"]) for entry in fast] == [set(order[:count]) for count in stages]
    assert {entry["members_used"] for entry in full} == {3}


def test_predict_prints_what_a_budget_affords(model: Model, tmp_path: Path) -> None:
    save_images(dimmed_images(20), tmp_path)
    cap = model.caps[0]

    lines, notice = predict_folder(model, tmp_path, "text", CascadePolicy(budget_ms=1e9))

    assert notice == "budget 1e+09 ms: every member for every image\n"
    assert len(lines) == 20
    assert describe_policy(model, CascadePolicy("fast", max_stages=1)) == (
        f"at most 1 of 3 members for an image; accuracy {cap.accuracy:.1%} "
        f"instead of {cap.full_accuracy:.1%} ({cap.rows} rows)"
    )


def test_the_command_line_takes_a_mode_or_a_budget(
    model: Model, flat: Model, tmp_path: Path
) -> None:
    Image.fromarray(dimmed_images(1)[0]).save(tmp_path / "a.png")

    def predict(path: Path, *flags: str) -> Any:
        return CliRunner().invoke(app, ["predict", str(path), str(tmp_path / "a.png"), *flags])

    fast = json.loads(predict(model.path, "--mode", "fast", "--json").stdout)
    stages = model.infer(dimmed_images(1), FAST).stages_used
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
    with TestClient(make_app(model, policy=FAST)) as running:
        yield running


def post_images(client: TestClient, query: str = "") -> list[dict[str, Any]]:
    files = []
    for i, image in enumerate(dimmed_images(20, side=9)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(("files", (f"{i}.png", buffer.getvalue(), "image/png")))
    entries: list[dict[str, Any]] = client.post(f"/predict{query}", files=files).json()["answers"]
    return entries


def test_a_request_can_name_another_mode(client: TestClient, model: Model) -> None:
    images = dimmed_images(20, side=9)
    fast, full = model.infer(images, FAST), model.infer(images)

    for query, expected in (("", fast), ("?mode=fast", fast), ("?mode=full", full)):
        entries = post_images(client, query)
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
    with TestClient(make_app(model, policy=policy)) as client:
        assert {entry["members_used"] for entry in post_images(client)} == {1}
        assert {entry["members_used"] for entry in post_images(client, "?mode=full")} == {3}


def test_a_server_without_a_cascade_has_one_mode(flat: Model) -> None:
    with TestClient(make_app(flat)) as client:
        assert "members_used" not in post_images(client)[0]
        refused = client.post("/predict?mode=fast")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "mode")
    with pytest.raises(ExportError, match="the model file has no cascade"):
        make_app(flat, policy=FAST)


def test_the_cascade_needs_no_torch_and_no_scipy(model: Model, tmp_path: Path) -> None:
    Image.fromarray(dimmed_images(1)[0]).save(tmp_path / "a.png")
    code = (
        "import sys, threefold\n"
        f"model = threefold.load({str(model.path)!r})\n"
        f"image = {str(tmp_path / 'a.png')!r}\n"
        "print(model.infer([image], threefold.runtime.FAST).stages_used)\n"
        "bad = {'torch', 'timm', 'sklearn', 'scipy', 'onnx', 'pydantic'} & set(sys.modules)\n"
        "assert not bad, bad"
    )

    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
