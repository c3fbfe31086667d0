"""What completions were worth: from scores to the advantages of tokens, and what is told of samples and scores.

Shapes: A completions, each of at least one token, P tokens of all of them end to end, L tokens of the longest.

`lengths` (A,) int64 says how many tokens each completion has. Nothing here has a gradient to carry but `kl_estimate`,
which is a loss too. What takes means over "all" takes them over what it is given, which must therefore be the rollout
of all ranks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from litrecipe.config.online import KLEstimator
from litrecipe.model.head import widen

Advantage = Literal["group", "centered", "leave_one_out", "batch", "group_batch"]

LARGEST_LOG_RATIO = 20.0
"""Beyond it, exp(log-ratio) says no more than that something went wrong."""
VARIANCE_EPS = 1e-8
GROUP_EPS = 1e-4
"""Added to a group's standard deviation, as in TRL (verl adds 1e-6, OpenRLHF 1e-9)."""


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """(P,) estimates of KL(π ‖ π_ref) from the log-probabilities (P,) of tokens that π chose, in nats.

    k1 = log π - log π_ref is unbiased and may be negative; k2 = ½ k1² is biased; k3 = exp(-k1) - 1 + k1 is unbiased and
    never negative (Schulman, "Approximating KL divergence"), its k1 held at ±20. In a reward use k1. As a loss,
    on the policy's own samples, k1 has no gradient in expectation, k2 that of KL(π ‖ π_ref), k3 that of KL(π_ref ‖ π).
    """
    k1 = logps - ref_logps
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1.square()
    # Held as a whole: of a held exponential beside k1 the gradient would point away from the reference.
    held = k1.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.exp(-held) - 1 + held


def token_rewards(kl: Tensor, scores: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """Rewards (P,): -kl_coef · kl (P,) of each token, and at each completion's last one its score (A,) besides.

    The last token is the last that was sampled, the end of turn where there is one, as in 1909.08593 and TRL's first
    PPO. TRL's second puts the score one place later, where the critic has read that token: there it has one more value
    a completion.
    """
    rewards = -kl_coef * kl
    return rewards.index_add(0, lengths.cumsum(0) - 1, scores.to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns (P,) of rewards and values (P,) (1506.02438, equation 16); fp32 inside.

    δ_t = r_t + γ V_{t+1} - V_t; A_t = δ_t + γλ A_{t+1}; returns = A + V, before anything is normalised. A completion's
    end is final, cut or not: nothing is expected after it.
    """
    place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    inside = place < lengths[:, None]

    def laid_out(x: Tensor) -> Tensor:
        wide = widen(x)
        return wide.new_zeros(inside.shape).masked_scatter_(inside, wide)

    padded = laid_out(values)
    following = torch.cat((padded[:, 1:], padded.new_zeros(len(lengths), 1)), 1)[:, : len(place)]
    deltas = laid_out(rewards) + gamma * following - padded
    # Behind a completion's end there are zeros only, so what comes from there is 0.
    advantages, later = torch.zeros_like(deltas), deltas.new_zeros(len(lengths))
    for t in reversed(range(len(place))):
        later = deltas[:, t] + gamma * lam * later
        advantages[:, t] = later
    flat = advantages[inside]
    return flat, flat + widen(values)


def whiten(values: Tensor, *, shift_mean: bool) -> Tensor:
    """(x - μ) / √(σ² + 1e-8), σ² without Bessel's correction (2009.01325); + μ unless the mean is shifted to 0.

    Advantages are shifted; rewards keep their mean, or a bonus for every token would cancel.
    """
    if not len(values):
        return values
    mean = values.mean()
    whitened = (values - mean) * torch.rsqrt(values.var(correction=0) + VARIANCE_EPS)
    return whitened if shift_mean else whitened + mean


def group_advantages(scores: Tensor, groups: Tensor, kind: Advantage) -> Tensor:
    """Advantages (A,) of scores R (A,) of completions, those to one prompt in one of the `groups` (A,).

    group: (R - mean) / (std + 1e-4), std with n - 1 (GRPO, 2402.03300). centered: R - mean (Dr. GRPO, 2503.20783).
    leave_one_out: R - mean of the others = n / (n - 1) · (R - mean) (RLOO, 2402.14740). batch: R whitened over all
    (REINFORCE++, 2501.03262). group_batch: R - mean, whitened over all (its variant with a baseline).

    Scores that a whole group shares, or that are alone in it, have advantage 0, save with `batch`, which looks at no
    group.
    """
    if kind == "batch":
        return whiten(scores, shift_mean=True)
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=scores.dtype, device=scores.device)
    centered = scores - (sums.index_add(0, group, scores) / sizes)[group]
    n = sizes[group]
    if kind == "group":
        variance = sums.index_add(0, group, centered.square()) / (sizes - 1).clamp(min=1)
        found = centered / (variance.sqrt()[group] + GROUP_EPS)
    elif kind == "leave_one_out":
        found = centered * n / (n - 1).clamp(min=1)
    elif kind == "group_batch":
        found = whiten(centered, shift_mean=True)
    else:
        found = centered
    # The mean of equal numbers may miss them by a rounding, which a deviation of 1e-4 would make something of.
    return found.masked_fill(zero_variance(scores, groups), 0.0)


def zero_variance(scores: Tensor, groups: Tensor) -> Tensor:
    """(A,) bool: whether all of a completion's group score alike, as a group of one does: nothing to learn there."""
    _, group = groups.unique(return_inverse=True)
    lowest, highest = (
        scores.new_zeros(len(scores)).scatter_reduce(0, group, scores, x, include_self=False) for x in ("amin", "amax")
    )
    return (lowest == highest)[group]


def steered(kl_coef: float, kl: float, target: float | None, horizon: int, completions: int) -> float:
    """The next `kl_coef`, steered so that `kl` comes to `target`; as it is where target is None.

    kl_coef · (1 + clip(kl / target - 1, ±0.2) · completions / horizon) (1909.08593). `kl` is the mean over
    completions of the sum over their tokens, so a target belongs to a length: 6 nats there went with 24 tokens.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def length_penalty(lengths: Tensor, max_new_tokens: int, soft_limit: int) -> Tensor:
    """(A,) from 0 down to -1, to be added to scores: falls over the last `soft_limit` tokens before `max_new_tokens`
    (soft overlong punishment, DAPO, 2503.14476, equation 13). A limit of 0 gives 0 up to `max_new_tokens`."""
    return ((max_new_tokens - soft_limit - lengths) / max(soft_limit, 1)).clamp(-1, 0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples is right, of n samples with c right ones: 1 - C(n - c, k) / C(n, k), unbiased
    (2107.03374, equation 1). Raises ValueError unless c ≤ n and 1 ≤ k ≤ n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right: there is no such thing")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def best_of(scores: Tensor, n: int) -> Tensor:
    """() expected best of n samples, unbiased, from the scores (M,) of M ≥ n samples of one prompt.

    Σ_i C(i - 1, n - 1) / C(M, n) · r_(i), ascending: of all n out of M, those in which the i-th is the best. Raises
    ValueError unless 1 ≤ n ≤ M.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"the best of {n} cannot be told from {len(scores)} samples")
    total = math.comb(len(scores), n)
    chances = [math.comb(i, n - 1) / total for i in range(len(scores))]
    return (scores.sort().values * scores.new_tensor(chances)).sum()


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n: what the KL of best-of-n to what it samples from is at most, in nats (2401.01879)."""
    return math.log(n) - (n - 1) / n


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) of a rollout (P,): 1 foreseen, 0 no better than a constant; None where
    returns do not differ."""
    if not len(returns) or returns.min() == returns.max():
        return None
    return 1 - float((returns - values).var(correction=0) / returns.var(correction=0))
