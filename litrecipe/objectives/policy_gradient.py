"""Losses of policy gradients and critics: log-probabilities and advantages of tokens in, one loss a token out.

Shapes: P tokens that were sampled, those of A completions end to end.

With π the policy, π_old the one that sampled, ρ = π / π_old and A the advantage. `log_ratio` (P,) is log ρ of each
token, or that of its completion at each of its tokens (`log_ratios`). Nothing here averages: see `online.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from litrecipe.objectives.advantages import LARGEST_LOG_RATIO

Ratio = Literal["token", "sequence_mean", "sequence"]


def log_ratios(logps: Tensor, old_logps: Tensor, lengths: Tensor, kind: Ratio = "token") -> Tensor:
    """log ρ (P,), held at ±20, of log-probabilities (P,) of completions of `lengths` (A,) tokens.

    token: of each token by itself. sequence_mean: the mean over the completion, log of the geometric mean of its
    tokens' ratios (GSPO, 2507.18071). sequence: their sum, log of the ratio of the completion (2402.14740).
    """
    differences = logps - old_logps
    if kind != "token":
        sums = torch.segment_reduce(differences, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
        whole = sums / lengths.clamp(min=1) if kind == "sequence_mean" else sums
        differences = whole.repeat_interleave(lengths)
    return differences.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def clipped(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float | None = None, dual: float | None = None
) -> Tensor:
    """-min(ρA, clip(ρ, 1 - low, 1 + high) A) (PPO, 1707.06347, equation 7; high apart from low: DAPO, 2503.14476).

    With `dual` c the loss is at most c |A| for A < 0, however large ρ (dual-clip PPO, 1912.09729).
    """
    ratio = log_ratio.exp()
    gains = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + (low if high is None else high)) * advantages)
    if dual is not None:
        gains = torch.where(advantages < 0, torch.maximum(gains, dual * advantages), gains)
    return -gains


def beyond_clip(log_ratio: Tensor, advantages: Tensor, low: float, high: float | None = None) -> tuple[Tensor, Tensor]:
    """Where (P,) clipping stops the policy: below, worse than expected and rarer already; above, better and likelier.

    There `clipped` has no gradient, and above `cispo` weighs less than ρ.
    """
    ratio = log_ratio.detach().exp()
    above = 1 + (low if high is None else high)
    return (ratio < 1 - low) & (advantages < 0), (ratio > above) & (advantages > 0)


def cispo(logps: Tensor, log_ratio: Tensor, advantages: Tensor, high: float) -> Tensor:
    """-min(ρ, 1 + high) A log π, the weight without gradient: no token is ever left out (MiniMax-M1,
    2506.13585; like there, the weight has no lower bound)."""
    return -log_ratio.detach().exp().clamp(max=1 + high) * advantages * logps


def mirror(log_ratio: Tensor, advantages: Tensor, coef: float) -> Tensor:
    """-ρA + coef · (ρ log ρ - ρ + 1): no clipping, but the KL to the policy that sampled (mirror descent, 2005.09814;
    MDLOO, 2407.21075).

    The KL's estimate is unbiased in value and gradient for samples of π_old, and never negative.
    """
    ratio = log_ratio.exp()
    return -ratio * advantages + coef * (ratio * log_ratio - ratio + 1)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """½ max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²) of values, values when sampled, and returns (P,).

    Worse of the two (2009.01325): nothing is gained by moving further than `clip`. Without it ½ (V - R)².
    """
    errors = (values - returns).square()
    if clip is not None:
        errors = torch.maximum(errors, (held_values(values, old_values, clip) - returns).square())
    return 0.5 * errors


def held_values(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    """Values (P,), no further than `clip` from those when sampled."""
    return old_values + (values - old_values).clamp(-clip, clip)
