"""The frozen backbones of a run: pretrained, never trained, kept once for all folds and members.

A stage of kind `head` trains only the head, so its job stores only the head's tensors. The backbone
below it is in `backbones/<key>.safetensors` of the run folder. The key is made of the backbone's
name and weights, so every fold and every member with the same backbone reads one file, and a run
folder answers without the hub or a weights package. `backbones/<key>.json` is written last and
holds the file's SHA-256, as `done.json` does for a job.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from threefold.errors import DamagedFileError, RunError
from threefold.files import sha256, unreadable, write_bytes
from threefold.json_files import read_json, write_json
from threefold.models.backbones import resolve_backbone
from threefold.models.member import create_backbone, has_token_grid, load_weights
from threefold.predictions.records import BackboneRecord
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.schema import MemberSpec
from threefold.training.provenance import stable_seed


def frozen_backbone_path(folder: RunFolder, spec: MemberSpec) -> Path:
    """Return where a member's frozen backbone is kept: `backbones/<key>.safetensors`.

    The key is the same for every member with the same backbone and weights, and for those whose
    weights depend on it (vision transformers) with the same `img_size`.
    """
    return folder.path / "backbones" / f"{_key(spec)}.safetensors"


def save_frozen_backbone(folder: RunFolder, spec: MemberSpec, backbone: nn.Module) -> Path:
    """Keep a frozen backbone in the run folder; a second time does nothing.

    Args:
        folder: of the run.
        spec: the member, which gives the key.
        backbone: the untrained timm network without classifier.

    Returns:
        Path of the file.

    Raises:
        RunError: the run keeps another backbone under that key, because the weights have changed
            since it began; or the folder cannot be written.
    """
    path = frozen_backbone_path(folder, spec)
    state = {name: tensor.cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    content = save(state)
    digest = hashlib.sha256(content).hexdigest()
    record = _record(folder, path)
    if record is not None and record.sha256 != digest:
        raise RunError(
            "the weights of a frozen backbone have changed since the run began",
            where=f"member {spec.name}, {path}",
            got=f"SHA-256 {digest[:12]}",
            expected=f"SHA-256 {record.sha256[:12]}",
            fix="restore the weights, or choose another --out",
        )
    if record is None or not _is_intact(path, record):
        write_bytes(path, content)
        record = BackboneRecord(backbone=spec.backbone, weights=spec.weights, sha256=digest)
        write_json(path.with_suffix(".json"), record.as_json())
    return path


def load_frozen_backbone(folder: RunFolder, spec: MemberSpec) -> Any:
    """Load a member's frozen backbone from the run folder.

    Returns:
        The timm network without classifier, in eval mode on the CPU; its parameters need no
        gradient.

    Raises:
        RunError: it is missing or damaged.
    """
    path = check_frozen_backbone(folder, spec)
    backbone = create_backbone(spec, pretrained=False)
    load_weights(backbone, path)
    return backbone.eval().requires_grad_(False)


def frozen_backbone(folder: RunFolder, spec: MemberSpec) -> Any:
    """Return a member's frozen backbone, kept in the run folder from the first call on.

    If the file was deleted, it is made again and must be the same as before. Random weights
    (`weights = "none"`) depend on the recipe's seed and the key alone, so all folds have the same
    ones. The network is in the state that `load_frozen_backbone` returns.

    Raises:
        RecipeError: the pretrained weights are not available.
        RunError: the file is damaged or cannot be written, or the weights have changed.
    """
    path = frozen_backbone_path(folder, spec)
    if _record(folder, path) is None or not path.exists():
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(stable_seed(folder.recipe.seed, "backbone", _key(spec)))
            save_frozen_backbone(folder, spec, create_backbone(spec))
    return load_frozen_backbone(folder, spec)


def frozen_digest(folder: RunFolder, spec: MemberSpec) -> str:
    """Return the SHA-256 of a member's frozen backbone; equal for equal weights.

    Raises:
        RunError: the run has no such backbone.
    """
    path = frozen_backbone_path(folder, spec)
    record = _record(folder, path)
    if record is None:
        raise DamagedFileError(
            "the record of a frozen backbone is missing",
            where=path.with_suffix(".json"),
            fix=_refitting(folder, spec),
        )
    return record.sha256


def _refitting(folder: RunFolder, spec: MemberSpec) -> str:
    """Return how a lost record is made anew: with the heads, which fit one backbone only."""
    record = frozen_backbone_path(folder, spec).with_suffix(".json")
    heads = folder.path / "jobs" / spec.name
    return f"delete {record} and {heads} and run `{folder.train_command()}`"


def check_frozen_backbone(folder: RunFolder, spec: MemberSpec) -> Path:
    """Check a member's frozen backbone against its SHA-256, and return the path of the file.

    Raises:
        RunError: the file is missing or was changed.
    """
    path = frozen_backbone_path(folder, spec)
    record = _record(folder, path)
    if record is None or not _is_intact(path, record):
        raise DamagedFileError(
            "a frozen backbone is missing or damaged",
            where=path,
            fix=f"delete {path} and run `{folder.train_command()}`, which makes it again from the "
            "pretrained weights",
        )
    return path


def _key(spec: MemberSpec) -> str:
    """Name a backbone by its timm name and a short hash of all that its weights depend on."""
    name = resolve_backbone(spec.backbone)
    parts = [name, spec.weights, spec.img_size if has_token_grid(name) else 0]
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-")
    return f"{slug}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def _record(folder: RunFolder, path: Path) -> BackboneRecord | None:
    """Read the record of a backbone's file; None if the file was never complete."""
    record = path.with_suffix(".json")
    if not os.path.lexists(record):
        return None
    try:
        folder.verify(record.relative_to(folder.path).as_posix())
        return BackboneRecord.parse(read_json(record), record)
    except DamagedFileError as error:
        heads = f"{path.parent.parent / 'jobs'}/MEMBER of each member with this backbone"
        fix = f"delete {record} and {heads}, and train again with the same --out"
        raise error.with_fix(fix) from None


def _is_intact(path: Path, record: BackboneRecord) -> bool:
    try:
        return sha256(path) == record.sha256
    except OSError as error:
        if isinstance(unreadable("cannot read", path, error), DamagedFileError):
            return False
        raise RunError("cannot read the frozen backbone", where=path, got=error) from None
