"""`litrecipe align grpo` and `align rloo`: policy gradients on groups of completions, without a critic."""

from __future__ import annotations

from litrecipe.config.online import GrpoRecipe, RlooRecipe
from litrecipe.model.critic import OnlinePolicy
from litrecipe.objectives.online import PolicyGradient
from litrecipe.recipes.online import Course, practise
from litrecipe.rollout.lessons import group_lesson


def main(recipe: GrpoRecipe | RlooRecipe, *, dry_run: bool = False) -> int:
    """Build a policy and train it on rollouts."""
    config = recipe.grpo if isinstance(recipe, GrpoRecipe) else recipe.rloo
    course = Course(
        build=lambda policy, reference: OnlinePolicy(policy, reference, config.temperature),
        draw=group_lesson,
        objective=PolicyGradient(config),
    )
    return practise(recipe, lambda _: course, dry_run=dry_run)
