"""What a run must find as it was when it goes on."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import file_digest, sha256
from typing import Any

from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config.groups import TrainingRecipe
from litrecipe.config.online import Online, OnlineRecipe, Ppo, sampling_of
from litrecipe.config.rounds import RejectionSamplingRecipe
from litrecipe.data.cache import key_of
from litrecipe.data.prompts import PromptSet
from litrecipe.data.samples import SampleSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.recipes.critics import AUTO, POLICY
from litrecipe.rollout.sources import MODEL


def identity(
    recipe: TrainingRecipe,
    files: ModelFiles,
    tokenizer: Tokenizer,
    train: SampleSet | PromptSet | None,
    **groups: Any,
) -> dict[str, str]:
    """What must be the same when a run goes on; `groups` are the recipe's own, all of whose keys count. None for the
    data where the source of steps knows itself again."""
    return {
        "base weights": files.weights_hash(),
        "tokenizer": tokenizer.fingerprint,
        **({} if train is None else {"data": train.fingerprint}),
        "fabric.precision": recipe.fabric.precision,
        **_settings("adapter", files.adapter.settings if files.adapter else recipe.adapter),
        **_settings("quantize", recipe.quantize),
        **{name: value for group, values in groups.items() for name, value in _settings(group, values).items()},
    }


def _settings(group: str, values: Any) -> dict[str, str]:
    """Every key of a group with its value, for people to read; only `method` where that is `none`."""
    keys = {"method": "none"} if getattr(values, "method", None) == "none" else asdict(values)
    return {f"{group}.{key}": str(value) for key, value in keys.items()}


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


def head_of(files: ModelFiles) -> dict[str, str]:
    """What must be the same of a hydra's score when a run goes on."""
    if files.head is None:
        return {}
    return {"score": key_of(sha256(files.head.path.read_bytes()).hexdigest(), files.reward_statistics)}
