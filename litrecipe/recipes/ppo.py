"""`litrecipe align ppo`: a policy and its critic learn from what the policy samples."""

from __future__ import annotations

from pathlib import Path

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.errors import InputError
from litrecipe.config.online import PpoRecipe
from litrecipe.engine.optim import Role
from litrecipe.model.adapters import has_adapter
from litrecipe.model.critic import ActorAndCritic, critic_beside
from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import PolicyAndReference
from litrecipe.objectives.online import ActorCritic
from litrecipe.recipes.online import Course, practise
from litrecipe.recipes.training import make_ready, save_trained
from litrecipe.rollout.lessons import ppo_lesson

POLICY, CRITIC = "policy", "critic"


def main(recipe: PpoRecipe, *, dry_run: bool = False) -> int:
    """Build a policy beside its critic, as `ppo.layout` has it, and train both on rollouts."""
    ppo = recipe.ppo

    def course(files: ModelFiles) -> Course:
        def build(policy: Decoder, reference: Decoder | None) -> ActorAndCritic:
            if ppo.layout in ("lora", "hydra") and not has_adapter(policy):
                cure = "its policy and critic are adapters: use adapter.method lora, or ppo.layout separate"
                raise InputError(f"ppo.layout: {ppo.layout}: {cure}")
            critic = critic_beside(policy, joined=ppo.layout == "joined")
            make_ready(critic, recipe)
            return ActorAndCritic(policy, critic, reference, ppo.temperature)

        def roles(module: PolicyAndReference) -> list[Role]:
            if ppo.layout == "joined":
                return []
            value_lr = recipe.optim.lr if ppo.value_lr is None else ppo.value_lr
            policy = Role(POLICY, recipe.optim.lr, recipe.train.grad_clip)
            return [policy, Role(CRITIC, value_lr, ppo.value_grad_clip)]

        def save_critic(folder: Path, module: PolicyAndReference) -> None:
            assert isinstance(module, ActorAndCritic)
            save_trained(folder / "critic", module.critic, files, recipe, module.critic.statistics)

        return Course(
            build=build,
            draw=ppo_lesson,
            objective=ActorCritic(ppo),
            roles=roles,
            rests=lambda step: [POLICY] if step < ppo.critic_warmup else [],
            save_beside=save_critic,
        )

    return practise(recipe, course, dry_run=dry_run)
