"""From hidden states to log-probabilities of their targets, without ever holding all logits.

Shapes: P predictions, d hidden size, V vocabulary, v of its tokens at a time; T tokens, L layers with a router of E
experts.

With z = W h / τ, log p(t) = z_t - logsumexp(z), whose gradient towards h is (W_t - Σ_v p_v W_v) / τ. The sums over the
vocabulary are taken block by block, scaled by the highest logit so far (1805.02867): a block's logits are used up while
they are in the processor's cache, and a trained weight's gradient is written once.

The entropy H = -Σ_v p_v log p_v = logsumexp(z) - Σ_v p_v z_v falls out of the same pass. Its gradient towards h is
-(Σ_v p_v z_v W_v - Σ_v p_v z_v · Σ_v p_v W_v) / τ: minus the covariance under p of logits and rows of the weight.

Ranks may share the vocabulary: each goes through its own tokens, and what they add up to, a few numbers a prediction,
is combined. Gradients towards h are added up on their way back. Nobody sends logits.

logsumexp(z), of which a z-loss takes the square, has the gradient Σ_v p_v W_v / τ. What a teacher says of a place is
held against p block by block too: `soft_targets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litrecipe.model.group import Group, entered

SMALLEST_BLOCK = 256
"""Tokens of the vocabulary in a product, however many predictions there are."""

Entropy = Literal["none", "measured", "learnt"]
"""Whether predictions bring their entropy. A frozen head takes a tenth longer to measure it, two fifths to learn it; a
trained one hardly at all (400 predictions of 49,152 tokens, forward and backward, one CPU thread)."""


class Predictions(NamedTuple):
    """What a row's targets got."""

    logps: Tensor
    """(P,) float32 log-probabilities, in nats."""
    correct: Tensor
    """(P,) bool: whether the target was the likeliest token, the first of equally likely ones."""
    ref_logps: Tensor | None = None
    """(P,) float32 log-probabilities under a reference, without gradient; None where the model has none."""
    log_collisions: Tensor | None = None
    """(P,) float32 log Σ_v p(v)², how likely two draws are to agree, without gradient; None unless asked for."""
    entropy: Tensor | None = None
    """(P,) float32 Shannon entropy of p in nats, with or without gradient as asked for; None unless asked for."""
    log_z: Tensor | None = None
    """(P,) float32 logsumexp of the logits, with gradient; None unless asked for."""
    kl: Tensor | None = None
    """(P,) float32 KL(q ‖ p) in nats of what a teacher says, with gradient; None without a teacher."""
    teacher_entropy: Tensor | None = None
    """(P,) float32 entropy of q in nats, without gradient. With `kl` it makes the cross-entropy -Σ_v q_v log p_v."""
    router_logits: Tensor | None = None
    """(L, T, E) float32, what the router of each layer that has one says of every token of the row, targets or not;
    None unless asked for."""


class Comparison(Protocol):
    """Of the logits z with what a teacher says of the same places, block by block of the vocabulary."""

    def add(self, tokens: slice, logits: Tensor) -> None:
        """Take in a block's logits (P, v), which stay as they are."""
        ...

    def add_up(self, group: Group) -> None:
        """Take in what the other ranks' blocks add up to, when all of this one's are in."""
        ...

    def results(self) -> tuple[Tensor, Tensor]:
        """KL(q ‖ p) and the entropy of q (P,) when all blocks are in."""
        ...

    def slope(self, tokens: slice, logits: Tensor) -> Tensor:
        """Gradient (P, v) of the KL towards a block's logits, when all blocks are in."""
        ...


class SoftTargets(Protocol):
    """A distribution q over the vocabulary for each of P places."""

    def comparison(self) -> Comparison:
        """A new one, for one pass over the vocabulary."""
        ...


class OwnTokens(NamedTuple):
    """The rows of the weight that a rank has, where a group shares the vocabulary."""

    group: Group
    bounds: tuple[int, ...]
    """The first token of each rank, and behind the last."""

    @property
    def start(self) -> int:
        """This rank's first token."""
        return self.bounds[self.group.rank]

    def first(self, tokens: int) -> OwnTokens:
        """Those of the vocabulary's first so many tokens."""
        return self._replace(bounds=tuple(min(bound, tokens) for bound in self.bounds))

    def joined(self, logits: Tensor) -> Tensor:
        """Logits (…, V) of all tokens, from each rank's of its own; without gradient."""
        return self.group.joined(logits, [stop - start for start, stop in pairwise(self.bounds)])


class _Wanted(NamedTuple):
    """What predictions shall bring, and of which logits."""

    temperature: float
    collisions: bool
    entropy: Entropy
    softcap: float | None
    log_z: bool
    soft: SoftTargets | None
    own: OwnTokens | None

    @property
    def start(self) -> int:
        """The token of the weight's first row."""
        return 0 if self.own is None else self.own.start


def predict(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    collisions: bool = False,
    entropy: Entropy = "none",
    softcap: float | None = None,
    log_z: bool = False,
    soft: SoftTargets | None = None,
    own: OwnTokens | None = None,
) -> Predictions:
    """Log-probabilities of `target` (P,) under p = softmax(hidden weightᵀ / temperature); and, if wanted,
    `log_collisions`, `entropy` and `log_z` of p. With a `softcap` c logits z are c tanh(z / c) before they are divided.
    `soft` targets bring `kl` and `teacher_entropy`.

    hidden is (P, d) and weight (V, d). A weight that is trained costs a second product of all logits in the backward
    pass; a frozen one (LoRA) none, but for an entropy that is learnt another one in the forward pass. With soft targets
    the one is as the other, and the teacher's logits are computed twice too. P may be 0; the result still hangs on the
    graph. With tokens of its `own` a rank's weight has their rows only; all ranks of the group get the same results.
    """
    hidden = hidden if own is None else entered(hidden, own.group)
    hidden, weight = in_autocast(hidden, weight)
    again = soft is not None or (weight.requires_grad and torch.is_grad_enabled())
    head = _TrainedHead if again else _FrozenHead
    wanted = _Wanted(temperature, collisions, entropy, softcap, log_z, soft, own)
    logps, correct, *others = head.apply(hidden, weight, target, wanted)
    return Predictions(logps, correct, None, *others)


def in_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the precision of autocast, where that is on."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight
    return hidden.to(product_dtype(hidden)), weight.to(product_dtype(hidden))


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """c tanh(z / c) (Gemma 2, 2408.00118): about z where that is small, never beyond c."""
    return (logits / cap).tanh() * cap


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else soft_cap(logits, cap)


def block_size(predictions: int, device: torch.device | str) -> int:
    """Tokens of the vocabulary whose logits `predict` holds at a time.

    On a CPU a block's logits should stay in the cache, 4 MiB in fp32 (378 predictions of 49,152 tokens on two cores:
    2**18 to 2**20 logits are alike, 2**24 take a fifth longer); on a GPU they should fill it.
    """
    logits = 2**20 if torch.device(device).type == "cpu" else 2**25
    return max(SMALLEST_BLOCK, logits // max(predictions, 1))


def widen(x: Tensor) -> Tensor:
    """x in fp32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """What the products with `x` are computed in: autocast's dtype where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Block(NamedTuple):
    """Some tokens of the vocabulary and the logits they get."""

    tokens: slice
    rows: slice
    """Of the weight."""
    weight: Tensor
    """(v, d)"""
    logits: Tensor
    """(P, v), fp32 or wider."""
    place: Tensor
    """(P, 1) where in the block each target is; anywhere if it is in another."""
    inside: Tensor
    """(P,) bool: whether the target is in this block."""
    slope: Tensor | None
    """(P, v) by what a gradient towards a logit is multiplied on its way through the soft cap, 1 - (c tanh / c)²."""


def _blocks(hidden: Tensor, weight: Tensor, target: Tensor, wanted: _Wanted) -> Iterator[_Block]:
    size, softcap = block_size(len(hidden), hidden.device), wanted.softcap
    for first in range(0, len(weight), size):
        part = weight[first : first + size]
        logits = capped(widen(F.linear(hidden, part)), softcap)
        slope = None if softcap is None else _slope(logits, softcap)
        start, rows = wanted.start + first, slice(first, first + len(part))
        place = (target - start).clamp(0, len(part) - 1)
        inside = place + start == target
        scaled = logits if wanted.temperature == 1.0 else logits.div_(wanted.temperature)
        yield _Block(slice(start, start + len(part)), rows, part, scaled, place[:, None], inside, slope)


def _slope(capped: Tensor, cap: float) -> Tensor:
    return 1 - (capped / cap).square()


def _sloped(terms: Tensor, slope: Tensor | None) -> Tensor:
    return terms if slope is None else terms * slope


_Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""logps, correct, log_collisions, entropy, log_z, kl and teacher_entropy (P,)."""


class _Sums:
    """What the blocks seen so far add up to."""

    def __init__(self, hidden: Tensor, with_mean: bool, wanted: _Wanted) -> None:
        self.wanted = wanted
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.highest = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)
        """(P,) the highest logit m."""
        self.total = torch.zeros_like(self.highest)
        """(P,) Σ exp(z - m)."""
        self.likeliest = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        """(P,) the token of the highest logit, the first of equals."""
        self.chosen = torch.zeros_like(self.highest)
        """(P,) the target's logit."""
        self.rows = torch.zeros_like(hidden, dtype=dtype) if with_mean else None
        """(P, d) Σ exp(z - m) W, and with a soft cap times the slope there."""
        self.squares = torch.zeros_like(self.highest) if wanted.collisions else None
        """(P,) Σ exp(z - m)²."""
        self.learns_entropy = wanted.entropy == "learnt"
        self.moment = torch.zeros_like(self.highest) if wanted.entropy != "none" else None
        """(P,) Σ exp(z - m) (z - m)."""
        self.moment_rows = torch.zeros_like(hidden, dtype=dtype) if with_mean and self.learns_entropy else None
        """(P, d) Σ exp(z - m) (z - m) W."""

    def add(self, block: _Block) -> None:
        """Uses up the block's logits."""
        self.chosen = torch.where(block.inside, block.logits.gather(1, block.place)[:, 0], self.chosen)
        values, places = block.logits.max(1)
        self.likeliest = torch.where(values > self.highest, places + block.tokens.start, self.likeliest)
        self._raise(torch.maximum(self.highest, values))
        below = block.logits.sub_(self.highest[:, None])
        # The entropy needs z - m once more; otherwise there is no second tensor of the block's size.
        unnormalised = below.exp_() if self.moment is None else below.exp()
        self.total.add_(unnormalised.sum(1))
        if self.moment is not None:
            terms = below.mul_(unnormalised)
            self.moment.add_(terms.sum(1))
            if self.moment_rows is not None:
                self.moment_rows.add_(_sloped(terms, block.slope).to(block.weight.dtype) @ block.weight)
        if self.squares is not None:
            # The norm makes no second tensor of the block's size.
            self.squares.add_(torch.linalg.vector_norm(unnormalised, dim=1).square_())
        if self.rows is not None:
            self.rows.add_(_sloped(unnormalised, block.slope).to(block.weight.dtype) @ block.weight)

    def _raise(self, highest: Tensor) -> None:
        """Let `highest` (P,) be the highest logit: what is there already moves with it."""
        drop = self.highest - highest
        self.highest, shrink = highest, drop.exp()
        drop = drop.clamp(min=torch.finfo(drop.dtype).min)  # of nothing yet, where m is -inf and the sums are 0
        if self.moment is not None:
            if self.moment_rows is not None and self.rows is not None:
                self.moment_rows.addcmul_(drop[:, None], self.rows).mul_(shrink[:, None])
            self.moment.addcmul_(drop, self.total).mul_(shrink)
        self.total.mul_(shrink)
        if self.squares is not None:
            self.squares.mul_(shrink.square())
        if self.rows is not None:
            self.rows.mul_(shrink[:, None])

    def add_up(self, group: Group) -> None:
        """Take in what other ranks' tokens add up to. The sums of rows stay this rank's: so are its gradients."""
        highest = group.largest(self.highest.clone())
        first = torch.where(self.highest == highest, self.likeliest, torch.iinfo(self.likeliest.dtype).max)
        self.likeliest = group.smallest(first)
        self._raise(highest)
        sums = [one for one in (self.total, self.chosen, self.squares, self.moment) if one is not None]
        for one, of_all in zip(sums, group.add_up(torch.stack(sums)), strict=True):
            one.copy_(of_all)

    @property
    def logsumexp(self) -> Tensor:
        """(P,)"""
        return self.highest + self.total.log()

    @property
    def log_collisions(self) -> Tensor | None:
        """(P,) log Σ p² = log Σ exp(z - m)² - 2 log Σ exp(z - m)."""
        return None if self.squares is None else self.squares.log() - 2 * self.total.log()

    @property
    def entropy(self) -> Tensor | None:
        """(P,) log Σ exp(z - m) - Σ p (z - m): of two parts that are not negative."""
        return None if self.moment is None else self.total.log() - self.moment / self.total

    def entropy_jacobian(self, mean: Tensor) -> Tensor | None:
        """(P, d) of the entropy towards hidden, from the mean row of the weight (P, d); uses up `moment_rows`."""
        if self.moment is None or self.moment_rows is None:
            return None
        scale = -self.wanted.temperature * self.total[:, None]
        return self.moment_rows.addcmul_(self.moment[:, None], mean, value=-1).div_(scale)

    def results(self, ctx: Any, target: Tensor, comparison: Comparison | None = None) -> _Results:
        """What was wanted. logps, log_z and kl have a gradient, the entropy if it is learnt."""
        correct, log_collisions, entropy = self.likeliest == target, self.log_collisions, self.entropy
        kl, teacher_entropy = (None, None) if comparison is None else comparison.results()
        fixed = correct, log_collisions, None if self.learns_entropy else entropy, teacher_entropy
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        log_z = self.logsumexp if self.wanted.log_z else None
        return self.chosen - self.logsumexp, correct, log_collisions, entropy, log_z, kl, teacher_entropy


def _rows_of(target: Tensor, weight: Tensor, wanted: _Wanted) -> Tensor:
    """The targets' rows (P, d) of the weight; zeros for those of other ranks."""
    if wanted.own is None:
        return weight[target]
    places = (target - wanted.start).clamp(0, len(weight) - 1)
    return weight[places] * (places + wanted.start == target)[:, None]


class _FrozenHead(torch.autograd.Function):
    """Keeps the Jacobian towards the hidden states (P, d) instead of anything of size V: the forward pass has the
    probabilities at hand, so one product there spares the backward pass both the logits and their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, wanted: _Wanted) -> _Results:
        temperature, softcap = wanted.temperature, wanted.softcap
        sums = _Sums(hidden, with_mean=ctx.needs_input_grad[0], wanted=wanted)
        for block in _blocks(hidden, weight, target, wanted):
            sums.add(block)
        if wanted.own is not None:
            sums.add_up(wanted.own.group)
        if sums.rows is not None:
            mean = sums.rows.div_(sums.total[:, None])
            chosen = _rows_of(target, weight, wanted)
            if softcap is not None:
                chosen = chosen * _slope(sums.chosen * temperature, softcap)[:, None]
            of_entropy = sums.entropy_jacobian(mean)
            jacobian = (chosen - mean).div_(temperature)
            ctx.save_for_backward(jacobian, of_entropy, mean.div_(temperature) if wanted.log_z else None)
            ctx.dtype = hidden.dtype
        return sums.results(ctx, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, of_entropy, of_log_z = ctx.saved_tensors
        _, _, grad_entropy, grad_log_z, *_ = others
        grad = grad_logps[:, None] * jacobian
        if of_entropy is not None:
            grad.addcmul_(grad_entropy[:, None], of_entropy)
        if of_log_z is not None:
            grad.addcmul_(grad_log_z[:, None], of_log_z)
        return grad.to(ctx.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    """Computes each block's logits again in the backward pass, where their gradient is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, wanted: _Wanted) -> _Results:
        sums = _Sums(hidden, with_mean=False, wanted=wanted)
        comparison = None if wanted.soft is None else wanted.soft.comparison()
        for block in _blocks(hidden, weight, target, wanted):
            if comparison is not None:
                comparison.add(block.tokens, block.logits)
            sums.add(block)
        if wanted.own is not None:
            sums.add_up(wanted.own.group)
            if comparison is not None:
                comparison.add_up(wanted.own.group)
        learnt = sums.entropy if sums.learns_entropy else None
        ctx.save_for_backward(hidden, weight, target, sums.logsumexp, learnt)
        ctx.wanted, ctx.comparison = wanted, comparison
        return sums.results(ctx, target, comparison)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        wanted, comparison = ctx.wanted, ctx.comparison
        _, _, grad_entropy, grad_log_z, grad_kl, _ = others
        scale = (grad_logps / wanted.temperature)[:, None]
        of_all = scale - (grad_log_z / wanted.temperature)[:, None] if wanted.log_z else scale
        grad_hidden = torch.zeros_like(hidden, dtype=logsumexp.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for block in _blocks(hidden, weight, target, wanted):
            of_kl = None if comparison is None else comparison.slope(block.tokens, block.logits)
            logps = block.logits.sub_(logsumexp[:, None])
            if entropy is None:
                grad_logits = logps.exp_().mul_(-of_all)
            else:  # ∂H/∂z_v = -p_v (log p_v + H)
                probabilities = logps.exp()
                of_entropy = (grad_entropy / wanted.temperature)[:, None]
                grad_logits = logps.add_(entropy[:, None]).mul_(of_entropy).add_(of_all).mul_(probabilities).neg_()
            grad_logits.scatter_add_(1, block.place, scale * block.inside[:, None])
            if of_kl is not None:
                grad_logits.addcmul_((grad_kl / wanted.temperature)[:, None], of_kl)
            grad_logits = _sloped(grad_logits, block.slope).to(weight.dtype)
            grad_hidden += grad_logits @ block.weight
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden, out=grad_weight[block.rows])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None
