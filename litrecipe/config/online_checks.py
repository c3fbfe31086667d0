"""What types cannot say about recipes that sample from the model they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from litrecipe.config.groups import Train, TrainingRecipe
from litrecipe.config.online import Grpo, Online, OnlineRecipe, Ppo, Rewards, Rloo, Sampling, method_of

Mistake = tuple[str, Any, str]
"""Key, value, cure."""
Range = tuple[Callable[[Any], bool], str]

AT_LEAST_0: Range = (lambda value: value >= 0, "0 or more")
AT_LEAST_1: Range = (lambda value: value >= 1, "1 or more")
ABOVE_0: Range = (lambda value: value > 0, "a number above 0")
FROM_0_TO_1: Range = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_1: Range = (lambda value: 0 <= value < 1, "0 or more, and less than 1")

OF_ALL: dict[str, Range] = {
    "rollout_batch_size": AT_LEAST_1,
    "completions_per_prompt": AT_LEAST_1,
    "minibatches": AT_LEAST_1,
    "epochs": AT_LEAST_1,
    "max_new_tokens": AT_LEAST_1,
    "temperature": (lambda value: value > 0, "a number above 0: what is not drawn teaches nothing"),
    "top_k": AT_LEAST_0,
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, and at most 1"),
    "missing_eos": AT_LEAST_0,
    "soft_limit": AT_LEAST_0,
    "cache_tokens": AT_LEAST_1,
    "importance_cap": ABOVE_0,
    "kl_coef": AT_LEAST_0,
    "kl_target": ABOVE_0,
    "kl_horizon": AT_LEAST_1,
    "max_kl": ABOVE_0,
    "max_ratio": (lambda value: value > 1, "a number above 1"),
    "clip": ABOVE_0,
    "clip_high": ABOVE_0,
    "dual_clip": (lambda value: value > 1, "a number above 1"),
    "entropy_coef": AT_LEAST_0,
    "min_pass_rate": FROM_0_TO_1,
    "max_pass_rate": FROM_0_TO_1,
    "ref_ema": FROM_0_TO_1,
    "policy_ema": BELOW_1,
    "ptx_coef": AT_LEAST_0,
    "gamma": FROM_0_TO_1,
    "lam": FROM_0_TO_1,
    "value_clip": ABOVE_0,
    "value_coef": AT_LEAST_0,
    "value_lr": ABOVE_0,
    "value_warmup_steps": AT_LEAST_0,
    "value_grad_clip": ABOVE_0,
    "critic_warmup": AT_LEAST_0,
    "mirror_coef": AT_LEAST_0,
}
KINDS = {"ppo": Ppo, "grpo": Grpo, "rloo": Rloo}
ONLINE_RANGES: dict[str, Range] = {
    "rewards.clip": ABOVE_0,
    "eval.prompts": AT_LEAST_1,
    "eval.samples": AT_LEAST_0,
    **{f"{group}.{key}": found for group, kind in KINDS.items() for key, found in OF_ALL.items() if hasattr(kind, key)},
}
"""As `checks.RANGES`."""


def check_sampling(
    recipe: TrainingRecipe, rewards: Rewards, *, judged: bool = False, hydra: bool = False
) -> Iterator[Mistake]:
    """Keys that all recipes that sample have; where completions are `judged`, or by the policy's own base (`hydra`),
    nothing else need score them."""
    if "hydra" in rewards.sources and not hydra:
        cure = "the score beside the language model that a policy is an adapter on: use align ppo with ppo.layout hydra"
        yield "rewards.sources", "hydra", cure
    if not rewards.sources and not (judged or hydra):
        yield (
            "rewards.sources",
            "missing",
            "say what scores completions: `{model:runs/reward: 1.0}` or `{numeric: 1.0}`",
        )
    if isinstance(recipe, OnlineRecipe) and recipe.eval.sources and not (recipe.data.val or recipe.data.val_fraction):
        cure = "judge held-out answers: give data.val or data.val_fraction"
        yield "eval.sources", ", ".join(recipe.eval.sources), cure
    for key, value, default in (
        ("data.format", recipe.data.format, "auto"),
        ("data.mask", recipe.data.mask, "assistant"),
    ):
        if value != default:
            yield key, value, "prompts are recognised by their columns, and what is sampled is learnt: remove it"


def check_portions(train: Train, portion: str) -> Iterator[Mistake]:
    """Keys that mean nothing where a step is a `portion` of what was sampled."""
    if train.global_batch_size != Train.global_batch_size:
        yield "train.global_batch_size", train.global_batch_size, f"a step takes {portion}: set those, and remove it"
    if train.max_tokens is not None:
        yield "train.max_tokens", train.max_tokens, "nobody knows how long completions will be: use max_steps"


def check_online(recipe: OnlineRecipe) -> Iterator[Mistake]:
    """Keys of a policy-gradient method that do not go together."""
    name, online = method_of(recipe)
    if online.filters and recipe.eval.success is None:
        key = "min_pass_rate" if online.min_pass_rate else "max_pass_rate"
        yield f"{name}.{key}", getattr(online, key), "needs the score that is a pass: set eval.success"
    for key in ("combine", "scale"):
        value = getattr(recipe.rewards, key)
        if online.filters and value != getattr(Rewards, key):
            cure = (
                f"makes eval.success another score in each rollout: remove it, or {name}.min_pass_rate, max_pass_rate"
            )
            yield f"rewards.{key}", value, cure
    yield from check_sampling(recipe, recipe.rewards, hydra=isinstance(online, Ppo) and online.layout == "hydra")
    yield from check_portions(recipe.train, f"{name}.rollout_batch_size / {name}.minibatches completions")
    if online.sampler is not None and recipe.fabric.tensor_parallel > 1:
        cure = "another engine cannot read a policy of which a rank has a part: remove it, or share it by fsdp"
        yield f"{name}.sampler", online.sampler, cure
    for key, value, cure in _of_method(online):
        yield f"{name}.{key}", value, cure
    if isinstance(online, Ppo):
        yield from _of_layout(recipe, online)


def _of_method(online: Online) -> Iterator[Mistake]:
    n, size = online.completions_per_prompt, online.rollout_batch_size
    if size % n:
        yield "rollout_batch_size", size, f"must be divisible by completions_per_prompt {n}"
    elif size // n < online.minibatches:
        yield (
            "minibatches",
            online.minibatches,
            f"a rollout has {size // n} prompts, which are not divided: at most that",
        )
    alone = "a completion by itself has no others to compare with"
    if n == 1 and isinstance(online, Grpo) and online.advantage != "batch":
        yield "completions_per_prompt", 1, f"{alone}: give 2 or more, or advantage batch"
    if n == 1 and online.zero_variance != "keep":
        yield "zero_variance", online.zero_variance, f"{alone}: give completions_per_prompt 2 or more, or remove it"
    if online.min_pass_rate > online.max_pass_rate:
        yield "min_pass_rate", online.min_pass_rate, f"must be at most max_pass_rate {online.max_pass_rate:g}"
    for key in ("top_k", "top_p"):
        value = getattr(online, key)
        if value != getattr(Online, key) and not online.biased_sampling:
            cure = "cuts off what the log-probabilities know of: remove it, or allow it by biased_sampling true"
            yield key, value, cure
    for key, needed, is_there in (
        ("kl_target", "kl_coef", online.kl_coef > 0),
        ("ptx_coef", "ptx_data", online.ptx_data is not None),
        ("ptx_data", "ptx_coef", online.ptx_coef > 0),
        ("ref_ema", "kl_coef", online.kl_coef > 0),
        ("importance_cap", "sampler", online.sampler is not None),
    ):
        value = getattr(online, key)
        if value != getattr(Online, key) and not is_there:
            yield key, value, f"does nothing without {needed}: set that too, or remove it"
    if online.kl_target is not None and online.kl_in == "loss":
        yield "kl_target", online.kl_target, "steers the KL in the reward: use kl_in reward, or remove it"
    yield from check_penalties(online)
    if online.kl_in == "loss" and online.kl_coef and online.kl_estimator == "k1":
        yield "kl_estimator", "k1", "on its own samples k1 teaches a policy nothing: as a loss use k2 or k3"
    if online.kl_in == "reward" and online.kl_estimator != "k1":
        yield "kl_estimator", online.kl_estimator, "in the reward only k1 is unbiased: remove it, or use kl_in loss"


def check_penalties(config: Sampling) -> Iterator[Mistake]:
    """Penalties without effect, or beyond their room; keys without their group."""
    if config.missing_eos is None and config.missing_eos_mode != Sampling.missing_eos_mode:
        cure = "does nothing without missing_eos: set that too, or remove it"
        yield "missing_eos_mode", config.missing_eos_mode, cure
    if config.soft_limit >= config.max_new_tokens:
        yield "soft_limit", config.soft_limit, f"must be less than max_new_tokens {config.max_new_tokens}"


def _of_layout(recipe: OnlineRecipe, ppo: Ppo) -> Iterator[Mistake]:
    adapted = recipe.adapter.method != "none"
    if ppo.layout == "separate" and adapted:
        cure = "ppo.layout separate trains all weights: use ppo.layout lora, or adapter.method none"
        yield "adapter.method", recipe.adapter.method, cure
    if ppo.layout == "joined":
        for key in ("value_lr", "value_schedule", "value_warmup_steps", "value_grad_clip", "critic", "critic_warmup"):
            value = getattr(ppo, key)
            if value != getattr(Ppo, key):
                yield f"ppo.{key}", value, "a joined critic is a head on the policy: remove it, or use layout lora"
    if ppo.layout == "hydra" and ppo.critic != Ppo.critic:
        yield "ppo.critic", ppo.critic, "a hydra's critic starts from its score: remove it, or use layout lora"
    if ppo.layout == "hydra" and not adapted:
        cure = "a hydra's policy and critic are adapters: use adapter.method lora, or ppo.layout separate"
        yield "adapter.method", recipe.adapter.method, cure
