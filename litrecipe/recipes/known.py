"""What a run must find as it was when it goes on, besides what all runs must."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import file_digest
from typing import Any

from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config.online import Online, OnlineRecipe, Ppo, sampling_of
from litrecipe.config.rounds import RejectionSamplingRecipe
from litrecipe.data.cache import key_of
from litrecipe.data.prompts import PromptSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.recipes.critics import AUTO, POLICY
from litrecipe.recipes.training import head_of, identity
from litrecipe.rollout.sources import MODEL


def known_by(
    recipe: OnlineRecipe | RejectionSamplingRecipe,
    files: ModelFiles,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    **others: Any,
) -> dict[str, str]:
    """Of a run that samples; `others` are groups of the recipe's own."""
    name, config = sampling_of(recipe)
    judges = [spec.removeprefix(MODEL) for spec in recipe.rewards.sources if spec.startswith(MODEL)]
    if isinstance(config, Ppo) and config.critic not in (AUTO, POLICY):
        judges.append(config.critic)
    hashes = {f"reward model {judge}": hash_of(open_model(judge)) for judge in judges} | head_of(files)
    groups = {name: config, "rewards": recipe.rewards, **others}
    seed = {"train.seed": str(recipe.train.seed)}
    if isinstance(recipe, OnlineRecipe) and isinstance(config, Online) and config.filters:
        seed["eval.success"] = str(recipe.eval.success)
    return identity(recipe, files, tokenizer, prompts, **groups) | start(files) | hashes | seed


def hash_of(judge: ModelFiles) -> str:
    """Of all that a reward model computes with."""
    return key_of(judge.weights_hash(), start(judge), head_of(judge), judge.reward_statistics)


def start(files: ModelFiles) -> dict[str, str]:
    """Hashes of all that the model which training starts from, its reference, computes with besides base weights."""
    hashes = {"config": key_of(asdict(files.architecture))}
    if files.adapter:
        with files.adapter.weights.path.open("rb") as file:
            weights = file_digest(file, "sha256").hexdigest()
        hashes["starting adapter"] = key_of(weights, asdict(files.adapter.settings))
    return hashes
