"""What methods make of a scored rollout: rewards of tokens, advantages, and what is told of both.

Shapes: A completions of a rollout; P tokens of all of them, completion after completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from litrecipe.config.online import Grpo, Online, Ppo
from litrecipe.model.row import Sample
from litrecipe.objectives.advantages import (
    LARGEST_LOG_RATIO,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    token_rewards,
    whiten,
)
from litrecipe.objectives.answers import REF_LOGPS
from litrecipe.objectives.online import ADVANTAGES, COUNTED, IMPORTANCE, OLD_LOGPS, OLD_VALUES, RETURNS
from litrecipe.rollout.experience import Scored
from litrecipe.rollout.rewards import Moments

LOGPS, VALUES, ENTROPY = "logps", "values", "entropy"
"""Names of what policy and critic say of each token; the reference says `ref_logps`."""


@dataclass(frozen=True)
class Lesson:
    """What a method makes of a rollout."""

    extras: dict[str, Tensor]
    """name → (P,), what its objective asks for beside each token."""
    metrics: dict[str, float]
    """About the rollout, by the field's names."""
    kl: Tensor | None
    """(A,) nats of each whole completion from the reference; None where there is none."""
    samples: list[Sample] | None = None
    """What is learnt, where it is not the rollout's own samples (pairs of its completions); then the P above are the
    predictions of these, each of which is a group by itself. Empty: there is nothing in it to learn."""
    said: str = ""
    """For people: what became of the rollout."""


def ppo_lesson(
    scored: Scored, said: dict[str, Tensor], config: Ppo, kl_coef: float, so_far: Moments | None = None
) -> Lesson:
    """Advantages and returns by generalised advantage estimation over token rewards: the KL at every token, the score
    at a completion's last (1909.08593).

    With `normalise_values` the critic says returns less their mean over their spread, as they were `so_far`, to which
    those of this rollout are added. Advantages are made of values in the score's units, and the returns that the critic
    learns are normalised by what is known now (as by the authors of 2404.10719).
    """
    lengths, values = scored.lengths, said[VALUES]
    so_far = so_far if config.normalise_values and so_far is not None else None
    if so_far is not None:
        values = values * so_far.scale + so_far.mean
    rewards = token_rewards(_kl(said), scored.scores.total, lengths, _in_reward(config, kl_coef))
    if config.whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages, returns = gae(rewards, values, lengths, config.gamma, config.lam)
    foreseen = explained_variance(values, returns)
    lesson = _lesson(scored, said, config, kl_coef)
    if config.normalise_advantages:
        advantages = _whitened(advantages, lesson.extras.get(COUNTED))
    if so_far is not None:
        counted = lesson.extras.get(COUNTED, torch.ones_like(returns)) > 0
        so_far.add(returns[counted].tolist())
        returns = (returns - so_far.mean) / so_far.scale
    lesson.extras.update({ADVANTAGES: advantages, RETURNS: returns, OLD_VALUES: said[VALUES]})
    lesson.metrics["value/explained_variance"] = 0.0 if foreseen is None else foreseen
    return lesson


def group_lesson(
    scored: Scored, said: dict[str, Tensor], config: Grpo, kl_coef: float, _so_far: Moments | None = None
) -> Lesson:
    """Advantages without a critic: a completion's score beside those of its group, the same for all its tokens.

    A KL in the reward is taken off whole before the comparison (RLOO, 2402.14740). `batch` has no groups: each token's
    return, what is still to come of KL and score, is whitened over the rollout (REINFORCE++, 2501.03262).
    """
    lengths, scores = scored.lengths, scored.scores.total
    coef = _in_reward(config, kl_coef)
    lesson = _lesson(scored, said, config, kl_coef)
    if config.advantage == "batch":
        rewards = token_rewards(_kl(said), scores, lengths, coef)
        returns, _ = gae(rewards, torch.zeros_like(rewards), lengths, 1.0, 1.0)
        advantages = _whitened(returns, lesson.extras.get(COUNTED))
    else:
        taken_off = coef * lesson.kl if coef and lesson.kl is not None else torch.zeros_like(scores)
        of_completions = group_advantages(scores - taken_off, scored.groups, config.advantage)
        advantages = of_completions.repeat_interleave(lengths)
    lesson.extras[ADVANTAGES] = advantages
    return lesson


def _lesson(scored: Scored, said: dict[str, Tensor], config: Online, kl_coef: float) -> Lesson:
    """What all methods keep and tell."""
    extras, metrics = {OLD_LOGPS: said[LOGPS]}, {"objective/entropy": float(said[ENTROPY].mean())}
    kl = None
    if REF_LOGPS in said:
        kl = torch.segment_reduce(_kl(said), "sum", lengths=scored.lengths, initial=0.0)
        metrics |= {"kl": float(kl.mean()), "kl_coef": kl_coef}
        metrics["objective/rlhf_reward"] = float((scored.scores.total - kl_coef * kl).mean())
        if config.kl_in == "loss":
            extras[REF_LOGPS] = said[REF_LOGPS]
    if scored.completions.logps is not None:
        extras[IMPORTANCE], told = importance(said[LOGPS], scored.completions.logps, config.importance_cap)
        metrics |= told
    if config.truncated == "mask":
        extras[COUNTED] = (~scored.truncated).float().repeat_interleave(scored.lengths)
    return Lesson(extras, metrics, kl)


def importance(logps: Tensor, drawn: list[list[float]], cap: float) -> tuple[Tensor, dict[str, float]]:
    """Weights (P,) min(π / π_sampler, cap) of tokens with log-probabilities (P,) that another engine drew with others,
    and how far apart the two are, by TRL's names.

    With them the policy's loss is that of tokens that the policy drew, but for what the cap cuts off (truncated
    importance sampling: Ionides, 2008).
    """
    off = logps - torch.tensor(list(chain.from_iterable(drawn)), dtype=logps.dtype)
    weights = off.clamp(max=LARGEST_LOG_RATIO).exp().clamp(max=cap)
    told = {f"sampling_logp_difference/{kind}": getattr(off.abs(), kind)() for kind in ("mean", "max")}
    told |= {f"importance_sampling_ratio/{kind}": getattr(weights, kind)() for kind in ("min", "mean", "max")}
    return weights, {f"sampling/{name}": float(value) for name, value in told.items()}


def _kl(said: dict[str, Tensor]) -> Tensor:
    """(P,) k1, whose mean is the divergence; 0 without a reference."""
    return kl_estimate(said[LOGPS], said.get(REF_LOGPS, said[LOGPS]), "k1")


def _in_reward(config: Online, kl_coef: float) -> float:
    return kl_coef if config.kl_in == "reward" else 0.0


def _whitened(values: Tensor, counted: Tensor | None) -> Tensor:
    """(P,) with mean 0 and variance 1 over those that count."""
    if counted is None:
        return whiten(values, shift_mean=True)
    found, counts = torch.zeros_like(values), counted > 0
    found[counts] = whiten(values[counts], shift_mean=True)
    return found
