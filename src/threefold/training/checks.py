"""What a recipe asks for and cannot be trained here, said before any work begins."""

from __future__ import annotations

from threefold.errors import RecipeError
from threefold.models.backbones import resolve_backbone
from threefold.models.member import IMG_SIZE_PREFIXES
from threefold.models.pipeline import pick_device
from threefold.recipe import Recipe
from threefold.recipe_schema import AugmentSpec, FeatureSpec, MemberSpec
from threefold.training.precision import check_precision


def check_trainable(recipe: Recipe) -> None:
    """Refuse a recipe whose settings have no effect, or that cannot be trained here.

    Raises:
        RecipeError: a setting of heads has no effect; there is no such device or precision; or a
            backbone with a fixed grid of tokens would need two image sizes.
    """
    _check_features(recipe)
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
