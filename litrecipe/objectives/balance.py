"""What keeps a router from sending all tokens to few experts: losses of its logits.

Shapes: L layers with a router, T tokens of a row, E experts, k of them chosen for each token.

The losses are products of means over the whole step, so what a row adds are sums. In the load-balancing loss the
chosen experts' counts have no gradient: once those of the step are known, rows give shares of the loss that add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litrecipe.model.head import widen


@dataclass(frozen=True)
class RouterSums:
    """Sums over tokens; those of a step are the sums of its rows'."""

    tokens: Tensor
    """() how many tokens were counted."""
    chosen: Tensor
    """(L, E) to how many of them each expert was among the chosen; Σ over E is k · tokens. Without gradient."""
    probability: Tensor
    """(L, E) Σ softmax(logits)."""
    squared_logsumexp: Tensor
    """(L,) Σ logsumexp(logits)²."""

    def __add__(self, other: RouterSums) -> RouterSums:
        return RouterSums(
            self.tokens + other.tokens,
            self.chosen + other.chosen,
            self.probability + other.probability,
            self.squared_logsumexp + other.squared_logsumexp,
        )


def router_sums(logits: Tensor, top_k: int, mask: Tensor | None = None) -> RouterSums:
    """Sums over the tokens that `mask` (T,) bool names, or all, of router logits (L, T, E); in fp32 or wider."""
    wide = widen(logits)
    counted = wide.new_ones(wide.shape[1]) if mask is None else mask.to(wide.dtype)
    places = wide.detach().topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(wide).scatter_(-1, places, 1.0)
    return RouterSums(
        tokens=counted.sum(),
        chosen=counted @ chosen,
        probability=counted @ wide.softmax(-1),
        squared_logsumexp=wide.logsumexp(-1).square() @ counted,
    )


def load_balancing(row: RouterSums, step: RouterSums, pooled: bool = True) -> Tensor:
    """E · Σ_e f_e P_e, or a row's share of it; f_e is the share of tokens for which expert e was chosen, P_e its mean
    probability (Switch, 2101.03961, equation 4; Mixtral with k of them).

    f and P are means over the tokens of the `step`, which may be `row` itself; only the row's probabilities have a
    gradient, and the values of a step's rows add up to the step's. `pooled` takes the means over the layers too, as
    transformers does, so that layers unbalanced in opposite ways cancel; else the loss is the mean over the layers.
    Either way it is k when all experts are used alike.
    """
    experts = row.chosen.shape[1]
    chosen, probability = step.chosen.detach() / step.tokens, row.probability / step.tokens
    if pooled:
        chosen, probability = chosen.mean(0, keepdim=True), probability.mean(0, keepdim=True)
    return experts * (chosen * probability).sum(1).mean()


def router_z(row: RouterSums, step: RouterSums) -> Tensor:
    """Mean over the step's tokens and the layers of logsumexp(logits)², or a row's share of it: keeps logits small
    (ST-MoE, 2202.08906, equation 5)."""
    return (row.squared_logsumexp / step.tokens).mean()
