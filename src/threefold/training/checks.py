"""What a recipe asks for and cannot be trained here: said before work begins, or at once."""

from __future__ import annotations

import torch

from threefold.errors import OutOfMemoryError, RecipeError, RunError
from threefold.models.backbones import resolve_backbone
from threefold.models.flops import count_macs
from threefold.models.member import IMG_SIZE_PREFIXES, create_backbone
from threefold.models.pipeline import pick_device
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import AugmentSpec, FeatureSpec, MemberSpec, StageSpec
from threefold.training.steps.precision import check_precision


def check_trainable(recipe: Recipe) -> None:
    """Refuse a recipe whose settings have no effect, or that cannot be trained here.

    Raises:
        RecipeError: a setting of heads has no effect; there is no such device or precision; a
            backbone cannot take images of its size; or one with a fixed grid of tokens would need
            two image sizes.
    """
    _check_features(recipe)
    check_sizes(recipe)
    check_precision(recipe.train.precision, pick_device(recipe.train.device))
    for member in recipe.members:
        names = [recipe.member(name).backbone for name in member.joins] or [member.backbone]
        fixed = [n for n in names if resolve_backbone(n).startswith(IMG_SIZE_PREFIXES)]
        if fixed and member.starts_from:
            _check_size_of_start(recipe, member)
        for stage in recipe.stages_of(member.name):
            if fixed and stage.img_size not in (0, member.img_size):
                raise RecipeError(
                    "the backbone has a fixed grid of tokens, so all stages need its image size",
                    where=f"stage {stage.name}, member {member.name}, backbone {fixed[0]}",
                    expected=f"img_size = {member.img_size}",
                    got=stage.img_size,
                    fix="remove img_size from the stage",
                )


def check_sizes(recipe: Recipe) -> None:
    """Refuse image sizes that a backbone cannot take: each is tried without computing anything.

    Raises:
        RecipeError: the backbone is unknown or cannot take the images; the message has a size that
            it takes.
    """
    known: set[tuple[str, int]] = set()
    for member in recipe.members:
        for name in member.joins or (member.name,):
            base = recipe.member(name)
            sizes = {f"members.{name}.img_size": member.img_size}
            for stage in recipe.stages_of(member.name):
                if stage.img_size:
                    sizes[f"stages.{stage.name}.img_size"] = stage.img_size
            for key, size in sizes.items():
                if (base.backbone, size) not in known:
                    _check_size(base, key, size)
                    known.add((base.backbone, size))


def _check_size(member: MemberSpec, key: str, size: int) -> None:
    """Try a size; `key` is the recipe's key that sets it."""
    spec = member.model_copy(update={"weights": "none", "img_size": size})
    with torch.device("meta"):
        backbone = create_backbone(spec, pretrained=False)
    try:
        count_macs(backbone, size)
    except RecipeError as error:
        suitable = backbone.pretrained_cfg["input_size"][-1]
        raise RecipeError(
            "the backbone cannot take images of this size",
            where=f"member {member.name}, backbone {member.backbone}",
            expected=f"for example {suitable} px, for which it was made",
            got=f"{size} px ({error.got.partition(': ')[2]:.80})",
            fix=f"set {key} = {suitable}",
        ) from None


def _check_size_of_start(recipe: Recipe, member: MemberSpec) -> None:
    size = recipe.member(member.starts_from).img_size
    if size != member.img_size:
        raise RecipeError(
            "the backbone has a fixed grid of tokens, so both members need its image size",
            where=f"member {member.name}, which starts from {member.starts_from}",
            expected=f"img_size = {size}",
            got=member.img_size,
        )


def _check_features(recipe: Recipe) -> None:
    """Refuse settings of heads that would have no effect."""
    kinds = {stage.kind for member in recipe.members for stage in recipe.stages_of(member.name)}
    copies = recipe.features.copies
    if recipe.features != FeatureSpec() and "head" not in kinds:
        raise RecipeError(
            "only stages of kind head read features",
            where="features",
            got="no such stage",
            fix='remove the features table, or set kind = "head" in a first stage',
        )
    if copies and recipe.augment == AugmentSpec():
        raise RecipeError(
            "copies that are not augmented are equal to their images",
            where="features.copies",
            got=copies,
            fix="set hflip, crop or another key of augment, or features.copies = 0",
        )
    if kinds == {"head"} and not copies and recipe.augment != AugmentSpec():
        raise RecipeError(
            "heads see augmented images only as copies",
            where="augment",
            got="features.copies = 0, and no stage of kind tune",
            fix="set features.copies, add a stage of kind tune, or remove the augment table",
        )
    mixing = [key for key in ("erasing", "mixup", "cutmix") if getattr(recipe.augment, key)]
    if kinds == {"head"} and mixing:
        raise RecipeError(
            "copies of images are neither mixed nor erased",
            where="augment",
            got=", ".join(mixing),
            fix="remove them, or add a stage of kind tune",
        )


class DivergedError(RunError):
    """The numbers of a training are not finite any more."""


def diverged(stage: StageSpec, epoch: int, what: str, got: object) -> DivergedError:
    """Make the error of a training whose numbers have gone beyond all bounds."""
    return DivergedError(
        what,
        where=f"stage {stage.name}, epoch {epoch}",
        got=got,
        fix=f"lower the stage's lr ({stage.lr}) or set train.clip_grad = 1.0",
    )


def short_of_memory(stage: StageSpec, device: torch.device, images: int) -> OutOfMemoryError:
    """Make the error of a step that does not fit into the memory of its device, even in parts.

    Args:
        stage: what is trained.
        device: where.
        images: of the smallest part that was tried.
    """
    whose = "" if device.type == "cpu" else "the accelerator has "
    return OutOfMemoryError(
        f"{whose}not enough memory",
        where=f"stage {stage.name}",
        got=f"not even for {images} images at once",
        fix="set a smaller img_size, or freeze the first blocks of the network (stages.*.frozen)",
    )
