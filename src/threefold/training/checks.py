"""What a recipe asks for and cannot be trained here, said before any work begins."""

from __future__ import annotations

from threefold.errors import RecipeError
from threefold.models.backbones import resolve_backbone
from threefold.models.member import IMG_SIZE_PREFIXES
from threefold.models.pipeline import pick_device
from threefold.recipe import Recipe
from threefold.training.precision import check_precision


def check_trainable(recipe: Recipe) -> None:
    """Refuse a recipe whose device, precision or image sizes cannot be trained here.

    Raises:
        RecipeError: there is no such device, it has no such precision, or a stage has another
            image size than a backbone with a fixed grid of tokens.
    """
    check_precision(recipe.train.precision, pick_device(recipe.train.device))
    for member in recipe.members:
        names = [recipe.member(name).backbone for name in member.joins] or [member.backbone]
        fixed = [n for n in names if resolve_backbone(n).startswith(IMG_SIZE_PREFIXES)]
        for stage in recipe.stages_of(member.name):
            if fixed and stage.img_size not in (0, member.img_size):
                raise RecipeError(
                    "the backbone has a fixed grid of tokens, so all stages need its image size",
                    where=f"stage {stage.name}, member {member.name}, backbone {fixed[0]}",
                    expected=f"img_size = {member.img_size}",
                    got=stage.img_size,
                    fix="remove img_size from the stage",
                )
