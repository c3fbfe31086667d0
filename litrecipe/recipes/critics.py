"""What a critic starts from: the policy with a head of zeros, a reward model, or the score of a hydra."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from litrecipe.checkpoint.fill import Filling, merge_when_filled
from litrecipe.checkpoint.load import load_reward_model, same_settings
from litrecipe.checkpoint.reward import vocabulary
from litrecipe.checkpoint.source import ModelFiles, open_model_as
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter
from litrecipe.config.online import PpoRecipe, longest_of
from litrecipe.config.progress import say
from litrecipe.model.architecture import SCORE, Architecture
from litrecipe.model.critic import Critic, critic_as, critic_beside
from litrecipe.model.decoder import Decoder
from litrecipe.model.tensor_plan import check_divides
from litrecipe.recipes.training import adapter_of, precision_of
from litrecipe.rollout.sources import MODEL

AUTO, POLICY = "auto", "policy"
"""Values of `ppo.critic` that are no models."""


def check_hydra(files: ModelFiles) -> None:
    """Raise InputError for a model that policy, critic, reference and reward model cannot be made of."""
    if files.adapter is not None:
        cure = "fold it into its base first with `litrecipe model merge`"
        raise InputError(f"model.source: {files.source}: an adapter, and the base of a hydra is frozen: {cure}")
    if not files.is_hydra:
        cure = "train one with `litrecipe align reward --reward.sft_coef 1`, or use ppo.layout lora"
        raise InputError(f"model.source: {files.source}: has no score beside its language model: {cure}")


def start_of_critic(recipe: PpoRecipe, files: ModelFiles) -> ModelFiles | None:
    """The reward model that the critic starts from; None where that is the policy, or what `ppo.layout` says.

    With `auto` it is the first of `rewards.sources` if that fits, which is said. Raises InputError for a model that was
    asked for and does not fit.
    """
    ppo = recipe.ppo
    if ppo.layout in ("joined", "hydra") or ppo.critic == POLICY:
        return None
    if ppo.critic != AUTO:
        return _asked_for(recipe, files)
    policy = "critic: starts as the policy with a head of zeros: "
    first = next((spec for spec in recipe.rewards.sources if spec.startswith(MODEL)), None)
    if first is None:
        say(f"{policy}rewards.sources has no reward model")
        return None
    judge = open_model_as(first.removeprefix(MODEL), f"rewards.sources: {MODEL}")
    if why := misfit(judge, files, adapter_of(recipe, files)):
        say(f"{policy}{judge.source} {why}")
        return None
    say(f"critic: starts as {judge.source}, the first reward model of rewards.sources")
    return judge


def _asked_for(recipe: PpoRecipe, files: ModelFiles) -> ModelFiles:
    judge = open_model_as(recipe.ppo.critic, "ppo.critic: ")
    if why := misfit(judge, files, adapter_of(recipe, files)):
        raise InputError(f"ppo.critic: {recipe.ppo.critic}: {why}: give one that fits, or {POLICY}")
    return judge


def misfit(judge: ModelFiles, files: ModelFiles, adapter: Adapter | None) -> str | None:
    """Why a model cannot be what the critic beside a policy with this adapter, or none, starts from.

    A whole critic takes any reward model of the same architecture. One that is an adapter on the policy's base takes
    adapters that were trained on the same base with the same settings.
    """
    if not (judge.is_reward_model or judge.is_hydra):
        return "is a language model and has no score"
    if vocabulary(judge.tokenizer_dir) != vocabulary(files.tokenizer_dir):
        return "reads other tokens than the policy"
    if _shapes(judge.architecture) != _shapes(files.architecture):
        return "is of another architecture than the policy"
    if adapter is None:
        return None
    if judge.adapter is None:
        return "is a whole model, and the critic an adapter on the policy's base"
    if not same_settings(judge.adapter.settings, adapter, files.architecture):
        return "is an adapter of other settings than the policy's"
    if judge.weights_hash() != files.weights_hash():
        return "is an adapter on another base than the policy's"
    return None


def make_critic(policy: Decoder, start: ModelFiles | None, files: ModelFiles, recipe: PpoRecipe) -> Critic:
    """The critic of a policy, see `start_of_critic`. From a reward model it keeps the units of its rewards."""
    if start is not None and adapter_of(recipe, files) is None:
        shared = recipe.fabric.is_sharded
        check_divides(start.architecture, recipe.fabric.tensor_parallel, "the critic")
        model = load_reward_model(start.for_length(longest_of(recipe)), dtype=precision_of(recipe), shared=shared)
        if shared and start.adapter is not None:
            merge_when_filled(model, start.source)
        return critic_as(model)
    critic = critic_beside(policy, joined=recipe.ppo.layout == "joined")
    if recipe.ppo.layout == "hydra":
        _put(critic, files.score())
        critic.statistics = files.reward_statistics
    elif start is not None and start.adapter is not None:
        from litrecipe.model.adapters import PEFT_PREFIX, load_adapter_state  # peft takes seconds to import

        score = {f"{PEFT_PREFIX}{SCORE}": start.score()} if start.is_hydra else {}
        load_adapter_state(critic, start.adapter.state() | score)
        if isinstance(critic.fill, Filling):
            critic.fill = replace(critic.fill, fresh_adapter=False)
        critic.statistics = start.reward_statistics
    return critic


def _put(critic: Critic, score: torch.Tensor) -> None:
    critic.score.weight = nn.Parameter(score.to(critic.score.weight))


def _shapes(architecture: Architecture) -> Architecture:
    """What two models must have in common to compute alike: not which tokens end a text, nor how long it may be."""
    return replace(
        architecture,
        max_positions=0,
        longest=None,
        tie_embeddings=False,
        bos_id=None,
        eos_ids=(),
        pad_id=None,
        initializer_range=0.0,
    )
