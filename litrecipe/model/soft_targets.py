"""What a teacher says of the places that a student predicts, and how far the student is from it.

Shapes: P predictions, d and e hidden sizes of student and teacher, V vocabulary, v of its tokens at a time, k tokens of
it that a place names.

With q the teacher's distribution, p = softmax(z / τ) the student's and t the teacher's logits / τ,

    KL(q ‖ p) = Σ_v q_v (t_v - z_v / τ) - logsumexp(t) + logsumexp(z / τ),

whose gradient towards z / τ is p - q. Its sums are taken block by block of the vocabulary, so that no more than a block
of either's logits is ever there. The cross-entropy -Σ_v q_v log p_v is KL plus the entropy of q, which the student
cannot change: to learn one is to learn the other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litrecipe.model.group import Group, logsumexp
from litrecipe.model.head import OwnTokens, block_size, capped, in_autocast, widen


class WholeVocabulary(NamedTuple):
    """q = softmax(t) over all tokens (Gemma 2, 2408.00118, section 3), from what the teacher's head reads.

    The teacher may know fewer tokens than the student, who learns that the others are never said, or more, which are
    left out of q: tables of embeddings are padded to different sizes.
    """

    hidden: Tensor
    """(P, e)"""
    weight: Tensor
    """(V, e), or the rows of a rank's own tokens."""
    softcap: float | None = None
    temperature: float = 1.0
    start: int = 0
    """The token of the weight's first row."""

    @classmethod
    def read(
        cls, hidden: Tensor, weight: Tensor, softcap: float | None = None, temperature: float = 1.0, start: int = 0
    ) -> WholeVocabulary:
        """The same in the precision of autocast, where that is on: there is none in a backward pass."""
        return cls(*in_autocast(hidden, weight), softcap, temperature, start)

    def logits(self, tokens: slice) -> Tensor:
        """t (P, v) of some tokens, fewer where the teacher knows no more."""
        weight = self.weight[tokens.start - self.start : tokens.stop - self.start]
        return capped(widen(F.linear(self.hidden, weight)), self.softcap) / self.temperature

    def comparison(self) -> WholeComparison:
        """See `Comparison`."""
        return WholeComparison(self)


class WholeComparison:
    """KL(q ‖ p) over the whole vocabulary."""

    def __init__(self, teacher: WholeVocabulary) -> None:
        self.teacher = teacher
        hidden = teacher.hidden
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.total = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)
        """(P,) logsumexp of t."""
        self.other_total = self.total.clone()
        """(P,) logsumexp of z / τ."""
        self.mean = torch.zeros_like(self.total)
        """(P,) Σ q t."""
        self.apart = torch.zeros_like(self.total)
        """(P,) Σ q (t - z / τ)."""

    def add(self, tokens: slice, logits: Tensor) -> None:
        """See `Comparison`."""
        z = logits / self.teacher.temperature
        self.other_total = torch.logaddexp(self.other_total, z.logsumexp(1))
        t = self.teacher.logits(tokens)
        if not t.shape[1]:
            return
        of_block = t.logsumexp(1)
        higher = torch.logaddexp(self.total, of_block)
        q = (t - higher[:, None]).exp_()
        shrink = (self.total - higher).exp_()
        self.mean = self.mean * shrink + (q * t).sum(1)
        self.apart = self.apart * shrink + q.mul_(t.sub_(z[:, : t.shape[1]])).sum(1)
        self.total = higher

    def add_up(self, group: Group) -> None:
        """See `Comparison`."""
        total = logsumexp(self.total, group)
        share = (self.total - total).exp()
        self.mean, self.apart = group.add_up(torch.stack((self.mean * share, self.apart * share)))
        self.total, self.other_total = total, logsumexp(self.other_total, group)

    def results(self) -> tuple[Tensor, Tensor]:
        """See `Comparison`."""
        return self.apart - self.total + self.other_total, self.total - self.mean

    def slope(self, tokens: slice, logits: Tensor) -> Tensor:
        """(p - q) / τ."""
        p = (logits / self.teacher.temperature).sub_(self.other_total[:, None]).exp_()
        q = self.teacher.logits(tokens).sub_(self.total[:, None]).exp_()
        p[:, : q.shape[1]] -= q
        return p.div_(self.teacher.temperature)


class Likeliest(NamedTuple):
    """q of the k likeliest tokens, and one bucket for all others, on which p is compared as one number too.

    So KL(q ‖ p) is that of the coarser distributions: never more than over the whole vocabulary, equal to it at k = V,
    and least where p is right about the k tokens; how p spreads the rest is left to it. To renormalise q over the k
    instead would teach that nothing else is ever said, a biased target and an overconfident student (2503.16870).
    """

    ids: Tensor
    """(P, k) int64, none twice in a place."""
    logps: Tensor
    """(P, k) log q of them."""
    temperature: float = 1.0

    def comparison(self) -> LikeliestComparison:
        """See `Comparison`."""
        return LikeliestComparison(self)


class LikeliestComparison:
    """KL(q ‖ p) of k tokens and the rest."""

    def __init__(self, teacher: Likeliest) -> None:
        self.teacher = teacher
        self.logps = widen(teacher.logps)
        self.q = self.logps.exp()
        self.rest = (1 - self.q.sum(1)).clamp(min=0)
        """(P,) q of all other tokens."""
        self.named = torch.zeros_like(self.q)
        """(P, k) z / τ of the k tokens."""
        self.total = torch.full_like(self.rest, -torch.inf)
        """(P,) logsumexp of z / τ."""
        self.rest_total = self.total.clone()
        """(P,) the same over all tokens but the k."""

    def add(self, tokens: slice, logits: Tensor) -> None:
        """See `Comparison`."""
        z = logits / self.teacher.temperature
        places, inside = self._in(tokens)
        self.named = torch.where(inside, z.gather(1, places), self.named)
        self.total = torch.logaddexp(self.total, z.logsumexp(1))
        self.rest_total = torch.logaddexp(self.rest_total, self._without_named(z, places, inside).logsumexp(1))

    def add_up(self, group: Group) -> None:
        """See `Comparison`."""
        group.add_up(self.named)  # each of the k is another rank's 0
        self.total, self.rest_total = logsumexp(self.total, group), logsumexp(self.rest_total, group)

    def results(self) -> tuple[Tensor, Tensor]:
        """See `Comparison`."""
        of_rest = torch.xlogy(self.rest, self.rest)
        entropy = -(self.q * self.logps).sum(1) - of_rest
        apart = (self.q * (self.logps - (self.named - self.total[:, None]))).sum(1)
        others = torch.where(self.rest_total > -torch.inf, of_rest - self.rest * (self.rest_total - self.total), 0)
        return apart + others, entropy

    def slope(self, tokens: slice, logits: Tensor) -> Tensor:
        """(p - q) / τ, where q spreads what is left as p does."""
        z = logits / self.teacher.temperature
        places, inside = self._in(tokens)
        total = self.rest_total.clamp(min=torch.finfo(z.dtype).min)  # of no tokens it is -inf
        rest = self._without_named(z, places, inside).sub_(total[:, None]).exp_().mul_(self.rest[:, None])
        rest.scatter_add_(1, places, self.q * inside)
        return z.sub_(self.total[:, None]).exp_().sub_(rest).div_(self.teacher.temperature)

    def _in(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Places (P, k) of the k tokens in a block, any for those that are in another, and which are `inside`."""
        places = (self.teacher.ids - tokens.start).clamp(0, tokens.stop - tokens.start - 1)
        return places, places + tokens.start == self.teacher.ids

    @staticmethod
    def _without_named(z: Tensor, places: Tensor, inside: Tensor) -> Tensor:
        """A copy of z (P, v) in which the k tokens are -inf."""
        lowered = torch.where(inside, -torch.inf, 0).to(z.dtype)
        return z.scatter_add(1, places, lowered)


@torch.no_grad()
def likeliest(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    own: OwnTokens | None = None,
) -> Likeliest:
    """The k likeliest tokens (all, if there are fewer) under softmax(hidden weightᵀ / temperature), likeliest first.

    hidden is (P, e), weight (V, e), or that of a rank's `own` tokens; all logits are never there at once.
    """
    start = 0 if own is None else own.start
    teacher = WholeVocabulary(hidden, weight, softcap, temperature)
    total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
    best, ids = total.new_empty(len(hidden), 0), torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    size = max(block_size(len(hidden), hidden.device), k)
    for first in range(0, len(weight), size):
        t = teacher.logits(slice(first, first + size))
        total = torch.logaddexp(total, t.logsumexp(1))
        values, places = t.topk(min(k, t.shape[1]), 1)
        best, ids = _best(torch.cat((best, values), 1), torch.cat((ids, places + (start + first)), 1), k)
    if own is not None:
        widths = [min(k, stop - start) for start, stop in pairwise(own.bounds)]
        best, ids = _best(own.group.joined(best, widths), own.group.joined(ids, widths), k)
        total = logsumexp(total, own.group)
    return Likeliest(ids, best - total[:, None], temperature)


def _best(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of some values, fewer where there are no more, and their tokens."""
    best, order = values.topk(min(k, values.shape[1]), 1)
    return best, ids.gather(1, order)


@torch.no_grad()
def divergence(
    hidden: Tensor,
    weight: Tensor,
    other: Tensor,
    other_weight: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    own: OwnTokens | None = None,
) -> Tensor:
    """KL(p ‖ q) (P,) in nats, over the whole vocabulary: p = softmax(hidden weightᵀ / temperature), q the same of
    `other` (P, d) and `other_weight` (V, d); of both weights a rank has the rows of its `own` tokens.

    Its mean over what p sampled is that of k1, log p - log q of the samples, with far less noise.
    """
    comparison = WholeVocabulary(hidden, weight, softcap, temperature).comparison()
    size = block_size(len(hidden), hidden.device)
    for start in range(0, len(other_weight), size):
        tokens = slice(start, start + size)
        comparison.add(tokens, capped(widen(F.linear(other, other_weight[tokens])), softcap))
    if own is not None:
        comparison.add_up(own.group)
    return comparison.results()[0]
