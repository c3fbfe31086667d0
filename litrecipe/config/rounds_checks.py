"""What types cannot say about recipes that learn from what they chose among their own samples."""

from __future__ import annotations

from collections.abc import Iterator

from litrecipe.config.groups import REFERENCE_FREE, Dpo
from litrecipe.config.online import Rewards
from litrecipe.config.online_checks import (
    AT_LEAST_0,
    AT_LEAST_1,
    FROM_0_TO_1,
    OF_ALL,
    Mistake,
    Range,
    check_penalties,
    check_portions,
    check_sampling,
)
from litrecipe.config.rounds import IterativeDpo, IterativeDpoRecipe, RejectionSampling, RejectionSamplingRecipe

OF_ROUNDS: dict[str, Range] = OF_ALL | {
    "prompts_per_round": AT_LEAST_1,
    "prompts_per_batch": AT_LEAST_1,
    "margin": AT_LEAST_0,
    "gold_margin": AT_LEAST_0,
    "max_repetition": FROM_0_TO_1,
    "history": FROM_0_TO_1,
    "keep": AT_LEAST_1,
}
KINDS = {"iterative_dpo": IterativeDpo, "rejection_sampling": RejectionSampling}
ROUNDS_RANGES: dict[str, Range] = {
    f"{group}.{key}": found for group, kind in KINDS.items() for key, found in OF_ROUNDS.items() if hasattr(kind, key)
}
"""As `checks.RANGES`."""
FUNCTION = "function:"
SOFT = {"sigmoid", "sigmoid_norm"}
"""Losses that learn with which probability an answer is the better one."""


def check_iterative_dpo(recipe: IterativeDpoRecipe) -> Iterator[Mistake]:
    """Keys of rounds of preference learning that do not go together."""
    config, dpo = recipe.iterative_dpo, recipe.dpo
    yield from check_sampling(recipe, recipe.rewards, judged=config.judge is not None)
    yield from check_portions(recipe.train, "the pairs of iterative_dpo.prompts_per_round / iterative_dpo.minibatches")
    if dpo.reference != Dpo.reference:
        yield "dpo.reference", dpo.reference, "rounds have their own: remove it, and set iterative_dpo.reference"
    if dpo.loss == "kto" and not dpo.mix:
        yield "dpo.loss", "kto", "rounds make pairs: use another loss"
    losses = list(dpo.mix or [dpo.loss])
    if config.reference != IterativeDpo.reference and all(loss in REFERENCE_FREE for loss in losses):
        yield "iterative_dpo.reference", config.reference, f"{losses[0]} has no reference: remove it"
    if config.soft_labels and (not set(losses) <= SOFT or dpo.label_smoothing):
        cure = f"{', '.join(losses)} learns no probabilities: use dpo.loss {' or '.join(sorted(SOFT))}"
        cure = "the scores say how sure they are: remove dpo.label_smoothing" if set(losses) <= SOFT else cure
        yield "iterative_dpo.soft_labels", True, cure
    for key, value, cure in _of_rounds(config):
        yield f"iterative_dpo.{key}", value, cure
    if config.judge is not None:
        if recipe.rewards.sources:
            cure = "iterative_dpo.judge compares instead: remove one of them"
            yield "rewards.sources", ", ".join(recipe.rewards.sources), cure
        for key, held_out in (("val", recipe.data.val), ("val_fraction", recipe.data.val_fraction)):
            if held_out:
                cure = "a judge compares completions of one prompt and gives none a score: remove it, or use eval.tasks"
                yield f"data.{key}", held_out, cure


def _of_rounds(config: IterativeDpo) -> Iterator[Mistake]:
    if config.candidates < 2:
        yield "completions_per_prompt", 1, "a pair has two: give 2 or more, or the data's own answer by gold"
    if config.gold_margin is not None and config.gold is None:
        yield "gold_margin", config.gold_margin, "does nothing without gold: set that too, or remove it"
    if config.judge is not None and not config.judge.startswith(FUNCTION):
        cure = f"give {FUNCTION}MODULE:NAME; what scores completions goes into rewards.sources"
        yield "judge", config.judge, cure
    if config.online:
        for key in ("minibatches", "epochs", "history"):
            if getattr(config, key) != getattr(IterativeDpo, key):
                yield key, getattr(config, key), "online makes a round one step: remove it, or online"
    elif config.minibatches > config.prompts_per_round:
        cure = f"a round has at most {config.prompts_per_round} pairs (prompts_per_round): at most that"
        yield "minibatches", config.minibatches, cure
    yield from check_penalties(config)


def check_rejection_sampling(recipe: RejectionSamplingRecipe) -> Iterator[Mistake]:
    """Keys of rejection sampling that do not go together."""
    config = recipe.rejection_sampling
    yield from check_sampling(recipe, recipe.rewards)
    if recipe.rewards.scale != Rewards.scale:
        yield "rewards.scale", recipe.rewards.scale, "the best completion is the same at any scale: remove it"
    if config.keep > config.completions_per_prompt:
        cure = f"a prompt has completions_per_prompt {config.completions_per_prompt}: at most that"
        yield "rejection_sampling.keep", config.keep, cure
    for key, value, cure in check_penalties(config):
        yield f"rejection_sampling.{key}", value, cure
