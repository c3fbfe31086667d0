"""Losses of preference learning: log-probabilities of a better and a worse answer in, one loss a pair out.

Shapes: N pairs (or N rated answers, for KTO).

Unless said otherwise `a` (N,) is log π(y) - log π_ref(y) of the chosen answer and `b` (N,) the same of the rejected
one, both summed over the answer's tokens; h = a - b and ℓ(x) = -log σ(x). Without a reference `a` and `b` are log π
alone. Nothing here averages over the pairs: what a step divides by is the engine's business. `aot` and `aot_unpaired`
sort over the pairs they are given, which must therefore be those of a whole step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from litrecipe.config.groups import Divergence

LARGEST_EXPONENT = 80.0
"""exp of more overflows fp32."""


def nls(x: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
    """ℓ(x) = -log σ(x), or (1 - ε) ℓ(x) + ε ℓ(-x) with label smoothing ε, one for all or one each."""
    if not isinstance(smoothing, Tensor) and smoothing == 0.0:
        return -F.logsigmoid(x)
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def through(ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f'(u) of log u = `ratio` (N,): what stands for a log-ratio when the policy is held by another divergence
    (f-DPO, 2309.16240). Constants, which cancel between chosen and rejected, are left out.

    reverse_kl: log u. forward_kl: -1/u. js: log(2u / (1 + u)). alpha, in (0, 1): (1 - u^-α) / α, which goes to
    reverse_kl as α goes to 0 and to forward_kl (up to a constant) as it goes to 1.
    """
    if divergence == "reverse_kl":
        return ratio
    if divergence == "forward_kl":
        return -_exp(-ratio)
    if divergence == "js":
        return F.logsigmoid(ratio) + math.log(2)
    return (1 - _exp(-alpha * ratio)) / alpha


def sigmoid(a: Tensor, b: Tensor, beta: float, smoothing: float | Tensor = 0.0) -> Tensor:
    """DPO: ℓ(βh) (2305.18290, equation 7). With `smoothing` ε cDPO: (1 - ε) ℓ(βh) + ε ℓ(-βh). With one each, how likely
    the worse answer is to be the better one, DNO's regression (2404.03715), whose best βh is log (1 - ε) / ε.

    Of log-probabilities per token, it is the length-normalised DPO of Tülu 3 (2411.15124), where β is
    some 5 instead of 0.1; without a reference, the preference term of CPO (2401.08417).
    """
    return nls(beta * (a - b), smoothing)


def robust(a: Tensor, b: Tensor, beta: float, smoothing: float) -> Tensor:
    """((1 - ε) ℓ(βh) - ε ℓ(-βh)) / (1 - 2ε): unbiased where a share ε < ½ of the labels is flipped (2403.00409)."""
    x = beta * (a - b)
    return ((1 - smoothing) * nls(x) - smoothing * nls(-x)) / (1 - 2 * smoothing)


def hinge(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """max(0, 1 - βh) (SLiC, 2305.10425, on DPO's ratio as in RSO, 2309.06657)."""
    return F.relu(1 - beta * (a - b))


def ipo(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """(h - 1 / 2β)² (2310.12036, equation 17, β there is τ)."""
    return (a - b - 1 / (2 * beta)).square()


def exo(a: Tensor, b: Tensor, beta: float, smoothing: float) -> Tensor:
    """KL(σ(±βh) ‖ (1 - ε, ε)): the reverse KL to the smoothed label, ε > 0 (EXO for pairs, 2402.00856)."""
    x = beta * (a - b)
    better = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-smoothing))
    return better + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(smoothing))


def nca(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """ℓ(βa) + ½ ℓ(-βa) + ½ ℓ(-βb): holds the chosen answer up by itself (NCA with two answers, 2402.05369)."""
    return nls(beta * a) + 0.5 * nls(-beta * a) + 0.5 * nls(-beta * b)


def sppo(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """(a - 1 / 2β)² + (b + 1 / 2β)²: SPPO with a win rate of 1 (2405.00675; β there is 1 / η)."""
    half = 1 / (2 * beta)
    return (a - half).square() + (b + half).square()


def bco(a: Tensor, b: Tensor, beta: float, shift: float | Tensor = 0.0) -> Tensor:
    """ℓ(βa - δ) + ℓ(-(βb - δ)): a classifier of good and bad, δ the mean of βa and βb (BCO, 2404.04656)."""
    return nls(beta * a - shift) + nls(shift - beta * b)


def apo_zero(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """σ(-βa) + σ(βb): chosen up, rejected down; for chosen answers better than the model's (2408.06266)."""
    return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)


def apo_down(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """σ(βa) + σ(-βh): both down, rejected more; for a model better than the chosen answers (2408.06266)."""
    return torch.sigmoid(beta * a) + torch.sigmoid(-beta * (a - b))


def aot(policy: Tensor, reference: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """ℓ(β(sort(policy) - sort(reference))): the policy's margins log π(y_w) - log π(y_l) (N,) shall lie above those of
    the reference quantile by quantile, as distributions (AOT, 2406.05882)."""
    return nls(beta * (policy.sort().values - reference.sort().values), smoothing)


def aot_unpaired(a: Tensor, b: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """ℓ(β(sort(a) - sort(b))): the same for good and bad answers to whatever prompts (2406.05882)."""
    return nls(beta * (a.sort().values - b.sort().values), smoothing)


def discopop(a: Tensor, b: Tensor, beta: float, temperature: float = 0.05) -> Tensor:
    """(1 - m) ℓ(βh) + m exp(-βh) with m = σ(βh / τ): the loss that a search found (2406.08414)."""
    x = beta * (a - b)
    share = (x / temperature).sigmoid()
    return (1 - share) * nls(x) + share * _exp(-x)


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """ℓ(β(chosen - rejected) - γ) of log π per token, without a reference (2405.14734, equation 6)."""
    return nls(beta * (chosen - rejected) - gamma, smoothing)


def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ℓ(log odds(chosen) - log odds(rejected)) of log π per token, log odds(p) = log p - log(1 - p) (2403.07691).

    The whole loss is NLL(chosen) + λ times this.
    """
    return nls(_log_odds(chosen) - _log_odds(rejected))


def wpo_weight(mean_logps: Tensor) -> Tensor:
    """w_w · w_l (N,) with w = exp(mean_t(log π_t - log Σ_v π_t(v)²)), of these means (N, 2); without gradient.

    How likely the policy is to write such answers, relative to what it would write, whose expected probability at a
    place is Σ_v π(v)² (WPO with sampled alignment, 2406.11827, equation 2). It multiplies a pair's loss.
    """
    return mean_logps.detach().sum(1).exp()


def kto(ratio: Tensor, desirable: Tensor, kl: Tensor | float, beta: float, weights: tuple[float, float]) -> Tensor:
    """λ_D (1 - σ(β(r - z))) of desirable answers, λ_U (1 - σ(β(z - r))) of others (2402.01306).

    `ratio` r (N,) is log π - log π_ref of rated answers, `desirable` (N,) bool, z = `kl` the step's estimate of
    KL(π ‖ π_ref), not negative and without gradient, `weights` (λ_D, λ_U).
    """
    signed = torch.where(desirable, ratio - kl, kl - ratio)
    weight = torch.where(desirable, signed.new_tensor(weights[0]), signed.new_tensor(weights[1]))
    return weight * torch.sigmoid(-beta * signed)


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, smoothing: Tensor | float = 0.0
) -> Tensor:
    """ℓ(r_w - r_l - m) of rewards (N,) (Llama 2, 2307.09288, equation 2); with a `smoothing` ε a pair, or one for all,
    the soft label 1 - ε."""
    x = chosen - rejected - margin
    return (1 - smoothing) * nls(x) + smoothing * nls(-x)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)²: keeps rewards, which the pairs tell up to a constant only, near 0 (2312.09244)."""
    return (chosen + rejected).square()


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=LARGEST_EXPONENT).exp()


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p) of log p < 0."""
    return logp - torch.log(-torch.expm1(logp))
