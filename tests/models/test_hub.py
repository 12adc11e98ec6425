"""Where weights come from: this machine's cache, or a hub that answers in time."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from support.http_server import running
from torch import nn

from threefold.errors import RecipeError
from threefold.models import hub, member
from threefold.models.backbones import resolve_backbone
from threefold.models.hub import has_local_weights, hub_problem, weights_licence
from threefold.models.member import create_backbone
from threefold.recipe.schema import MemberSpec

NAME = "test_resnet.r160_in1k"


@contextmanager
def serve(status: int, headers: dict[str, str]) -> Iterator[str]:
    """A server that answers every HEAD request alike; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with running(Handler) as address:
        yield address


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow requests, all of which go to this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_offline_by_choice_asks_nobody() -> None:
    assert hub_problem(NAME) == "HF_HUB_OFFLINE is set"


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {"X-Repo-Commit": "0" * 40, "ETag": '"1"', "Content-Length": "0"}),
        (404, {"X-Error-Code": "RepoNotFound"}),
        (404, {"X-Error-Code": "EntryNotFound"}),
        (403, {"X-Error-Code": "GatedRepo"}),
    ],
)
def test_a_hub_that_answers_is_in_reach(status: int, headers: dict[str, str]) -> None:
    with serve(status, headers) as endpoint:
        assert hub_problem(NAME, endpoint=endpoint) == ""


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("status", [200, 407, 502])
def test_what_is_no_hub_is_told(status: int) -> None:
    with serve(status, {"Content-Length": "0"}) as endpoint:
        assert hub_problem(NAME, endpoint=endpoint)


@pytest.mark.usefixtures("online")
def test_silence_counts_as_no_hub_in_time() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()

        problem = hub_problem(NAME, 0.3, f"http://127.0.0.1:{listener.getsockname()[1]}")

    assert problem
    assert time.monotonic() - began < 2.0


def test_weights_in_the_cache_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as at hand can be loaded without a hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    state = timm.create_model("test_resnet").state_dict()
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)

    before = has_local_weights(NAME)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(state, snapshot / "model.safetensors")

    assert not before
    assert has_local_weights(NAME)
    backbone = create_backbone(MemberSpec(name="m", backbone=NAME, img_size=32))
    loaded = backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    del state["conv1.0.weight"]
    save_file(state, snapshot / "model.safetensors")
    with pytest.raises(RecipeError, match=r"weights: member m.*file has no conv1\.0\.weight; fix"):
        create_backbone(MemberSpec(name="m", backbone=NAME, img_size=32))


def test_weights_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: object, **__: object) -> nn.Module:
        network = nn.Linear(2, 2)
        network.weight.data[1, 0] = torch.nan
        return network

    monkeypatch.setattr(member, "check_hub", lambda _: None)
    monkeypatch.setattr(timm, "create_model", create)

    with pytest.raises(RecipeError, match=r"pretrained weights: member m.*NaN or infinity in wei"):
        create_backbone(MemberSpec(name="m", backbone=NAME, img_size=32))


def test_packages_are_at_hand() -> None:
    assert has_local_weights("tf_efficientnet_lite0.in1k")
    assert not has_local_weights("test_resnet.no_such_tag")


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("convnextv2_nano.fcmae_ft_in1k", "cc-by-nc-4.0"),
        ("vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        ("test_resnet.no_such_tag", "unknown"),
    ],
)
def test_licences_are_those_of_the_weights(name: str, licence: str) -> None:
    assert weights_licence(name) == licence


@pytest.mark.usefixtures("online")
def test_a_silent_hub_is_asked_once_and_quietly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(timm, "create_model", None)

    with pytest.raises(
        RecipeError, match=r"pretrained weights: member m.*no model hub: Connection"
    ):
        create_backbone(MemberSpec(name="m", backbone=NAME, img_size=32))

    assert len(asked) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("prefix", ["timm/", "hf-hub:timm/", "hf_hub:timm/", " "])
def test_a_name_of_the_hub_is_the_name_of_timm(prefix: str) -> None:
    spec = MemberSpec(name="m", backbone=f"{prefix}test_resnet.r160_in1k ", weights="none")

    assert spec.backbone == NAME
    assert resolve_backbone(f"{prefix}ResNet50") == "resnet50.tv_in1k"
