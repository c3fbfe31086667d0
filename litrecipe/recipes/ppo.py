"""`litrecipe align ppo`: a policy and its critic learn from what the policy samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.errors import InputError
from litrecipe.config.online import PpoRecipe
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import Ranks
from litrecipe.engine.optim import Role
from litrecipe.model.adapters import has_adapter
from litrecipe.model.critic import ActorAndCritic
from litrecipe.model.decoder import Decoder
from litrecipe.model.hydra import BaseJudge
from litrecipe.model.reference import PolicyAndReference
from litrecipe.objectives.online import ActorCritic
from litrecipe.recipes.critics import check_hydra, make_critic, start_of_critic
from litrecipe.recipes.online import Course, practise
from litrecipe.recipes.training import make_ready, save_trained
from litrecipe.rollout.lessons import ppo_lesson
from litrecipe.rollout.rewards import Moments
from litrecipe.rollout.sources import HYDRA, ModelSource, RewardSource

POLICY, CRITIC = "policy", "critic"


def main(recipe: PpoRecipe, *, dry_run: bool = False) -> int:
    """Build a policy beside its critic, as `ppo.layout` has it, and train both on rollouts."""
    ppo = recipe.ppo
    if ppo.layout == "hydra" and not recipe.rewards.sources:
        recipe.rewards.sources = {HYDRA: 1.0}

    def course(files: ModelFiles) -> Course:
        if ppo.layout == "hydra":
            check_hydra(files)
        start = start_of_critic(recipe, files)

        def build(policy: Decoder, reference: Decoder | None) -> ActorAndCritic:
            if ppo.layout in ("lora", "hydra") and not has_adapter(policy):
                cure = "its policy and critic are adapters: use adapter.method lora, or ppo.layout separate"
                raise InputError(f"ppo.layout: {ppo.layout}: {cure}")
            critic = make_critic(policy, start, files, recipe)
            make_ready(critic, recipe)
            return ActorAndCritic(policy, critic, reference, ppo.temperature)

        def roles(module: PolicyAndReference) -> list[Role]:
            if ppo.layout == "joined":
                return []
            value_lr = recipe.optim.lr if ppo.value_lr is None else ppo.value_lr
            asked: dict[str, Any] = {"name": ppo.value_schedule, "warmup_steps": ppo.value_warmup_steps}
            schedule = replace(recipe.schedule, **{key: value for key, value in asked.items() if value is not None})
            policy = Role(POLICY, recipe.optim.lr, recipe.train.grad_clip)
            return [policy, Role(CRITIC, value_lr, ppo.value_grad_clip, schedule)]

        def save_critic(folder: Path, module: PolicyAndReference, returns: Moments) -> None:
            assert isinstance(module, ActorAndCritic)
            statistics = module.critic.statistics
            if ppo.normalise_values:
                statistics = undone(statistics or (0.0, 1.0), returns)
            save_trained(folder / "critic", module.critic, files, recipe, statistics)

        def base_judge(policy: Decoder, tokenizer: Tokenizer, ranks: Ranks) -> RewardSource | None:
            if ppo.layout != "hydra":
                return None
            score = files.score().to(ranks.fabric.device, torch.float32)
            judge = BaseJudge(policy, score, files.reward_statistics)
            return ModelSource(HYDRA, judge, tokenizer, tokenizer, budget=recipe.train.micro_batch_tokens, ranks=ranks)

        return Course(
            build=build,
            draw=ppo_lesson,
            objective=ActorCritic(ppo),
            roles=roles,
            rests=lambda step: [POLICY] if step < ppo.critic_warmup else [],
            save_beside=save_critic,
            own_source=base_judge,
        )

    return practise(recipe, course, dry_run=dry_run)


def undone(statistics: tuple[float, float], returns: Moments) -> tuple[float, float]:
    """Mean and spread by which a critic's rewards become values in units of the score, where with `statistics` they are
    normalised returns: V = S (r - m) / s + M is (r - (m - M s / S)) / (s / S)."""
    mean, std = statistics
    return mean - returns.mean * std / returns.scale, std / returns.scale
