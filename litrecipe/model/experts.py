"""Mixtures of experts: a router that chooses for each token, and experts that work on their own tokens only.

Tokens are put in order of the experts that were chosen for them, so that each expert's are one run and its work is one
product without padding.

Shapes: T tokens, P of them that are worked on, d hidden size, E experts, k of them for each token, S = k P pairs of a
token and its expert, I inner size of an expert, i inputs, o outputs, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from litrecipe.model.architecture import PROJECTIONS, Architecture, Experts
from litrecipe.model.head import product_dtype, widen


class Mixture(nn.Module):
    """The MLP of a layer with experts: Σ over the chosen of share · expert(x) (Mixtral, 2401.04088, section 2.1)."""

    def __init__(self, architecture: Architecture, kind: Experts) -> None:
        super().__init__()
        self.kind = kind
        self.gate = Router(architecture.hidden_size, kind.count)
        self.experts = ExpertMLPs(architecture.hidden_size, kind)

    def forward(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (T, d) → (T, d), or (P, d) at `places` (P,), and what the router says of all tokens (T, E).

        Jitter draws from the global stream, so with it a step depends on how it is cut into rows.
        """
        if self.training and self.kind.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.kind.jitter, 1 + self.kind.jitter)
        logits = self.gate(x)
        if places is not None:
            x, wanted = x.index_select(0, places), logits.index_select(0, places)
        else:
            wanted = logits
        choice, share = route(wanted, self.kind)
        return self.experts(x, choice, share), logits


class Router(nn.Module):
    """One linear layer in fp32, whatever the model is in: what is chosen hangs on small differences (Switch,
    2101.03961, section 2.4)."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, d) → logits (T, E), fp32 or wider."""
        wide = widen(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(wide, self.weight.to(wide.dtype))


def route(logits: Tensor, kind: Experts) -> tuple[Tensor, Tensor]:
    """Which experts work on a token, and how much each counts: (T, k) of logits (T, E)."""
    values, choice = logits.topk(kind.chosen, -1)
    return choice, values.softmax(-1) if kind.renormalise else logits.softmax(-1).gather(-1, choice)


class ExpertMLPs(nn.Module):
    """All experts of a layer, each down(silu(gate x) · up x).

    A projection is one parameter (E, o, i), or, quantised, a list of E linear layers.
    """

    def __init__(self, hidden_size: int, kind: Experts) -> None:
        super().__init__()
        self.gate_up_proj: nn.Parameter | nn.ModuleList
        self.down_proj: nn.Parameter | nn.ModuleList
        self.gate_up_proj = nn.Parameter(torch.zeros(kind.count, 2 * kind.size, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(kind.count, hidden_size, kind.size))
        self.count = kind.count
        self.shapes = {name: tuple(getattr(self, name).shape[1:]) for name in PROJECTIONS}
        """Of one expert's (o, i)."""

    def forward(self, x: Tensor, choice: Tensor, share: Tensor) -> Tensor:
        """x (P, d), with experts and their shares (P, k) → (P, d)."""
        return self.work(x, choice, share, {})

    @torch.compiler.disable
    def work(self, x: Tensor, choice: Tensor, share: Tensor, updates: dict[str, Update]) -> Tensor:
        """The same, with `updates` to some of the projections."""
        bases = [getattr(self, name) for name in PROJECTIONS]
        tensors = [base if isinstance(base, Tensor) else None for base in bases]
        low_rank = [factor for name in PROJECTIONS for factor in updates.get(name, Update(None, None, 0.0))[:2]]
        scales = [updates[name].scale if name in updates else 0.0 for name in PROJECTIONS]
        groups = Groups.of(choice, self.count)
        return _Work.apply(x.to(product_dtype(x)), share, groups, bases, scales, *tensors, *low_rank)


class Update(NamedTuple):
    """What an adapter adds to a projection: scale · B A, one of each for every expert."""

    a: Tensor | None
    """(E, r, i)"""
    b: Tensor | None
    """(E, o, r)"""
    scale: float


class Restorable(Protocol):
    """A quantised linear layer."""

    in_features: int
    out_features: int

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The restored weight (o, i)."""


class Groups(NamedTuple):
    """Pairs of a token and its expert, in order of the experts."""

    tokens: Tensor
    """(S,) the token of each."""
    places: Tensor
    """(P, k) where in that order each token's are."""
    ends: Tensor
    """(E,) int32: where each expert's end."""

    @classmethod
    def of(cls, choice: Tensor, experts: int) -> Groups:
        """Those of a choice (P, k)."""
        ordered, order = choice.flatten().sort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        names = torch.arange(experts, device=order.device)
        ends = torch.searchsorted(ordered, names, right=True, out_int32=True)
        return cls(order // choice.shape[1], places.view(choice.shape), ends)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has tokens, and where they are."""
        if isinstance(self.ends, FakeTensor):  # a dry run's tensors have no values, and no size depends on these
            ends = [len(self.tokens) * (expert + 1) // len(self.ends) for expert in range(len(self.ends))]
        else:
            ends = self.ends.tolist()
        for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            if stop > start:
                yield expert, slice(start, stop)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (S, i) times each expert's weight (E, i, o) → (S, o)."""
        if _can_group(x, weight):
            return F.grouped_mm(x, weight, offs=self.ends)
        out = x.new_empty(len(x), weight.shape[2])
        for expert, run in self.runs():
            torch.mm(x[run], weight[expert], out=out[run])
        return out

    def restored_product(self, x: Tensor, layers: Sequence[Restorable], *, turned: bool) -> Tensor:
        """The same with restored weights W (o, i): x (S, i) Wᵀ, or where it is `turned` x (S, o) W."""
        out = x.new_empty(len(x), layers[0].in_features if turned else layers[0].out_features)
        for expert, run in self.runs():
            weight = layers[expert].dense_weight(x.dtype)
            torch.mm(x[run], weight if turned else weight.T, out=out[run])
        return out

    def outer(self, grad: Tensor, x: Tensor) -> Tensor:
        """Σ over an expert's rows of grad (S, o) xᵀ (S, i) → (E, o, i); zeros for experts without tokens."""
        if _can_group(x, grad):
            out = F.grouped_mm(grad.T, x, offs=self.ends)
            if out.device.type != "cpu":  # nothing is promised of groups without rows there
                empty = self.ends.diff(prepend=self.ends.new_zeros(1)) == 0
                out.masked_fill_(empty[:, None, None], 0)
            return out
        out = x.new_zeros(len(self.ends), grad.shape[1], x.shape[1])
        for expert, run in self.runs():
            torch.mm(grad[run].T, x[run], out=out[expert])
        return out


def _can_group(x: Tensor, other: Tensor) -> bool:
    """torch's grouped product reads 16 bytes at a time, and something; on GPUs it is for bf16, and it has no fakes."""
    dtypes = [torch.bfloat16, torch.float32] if x.device.type == "cpu" else [torch.bfloat16]
    strides = [stride for tensor in (x, other) for stride in tensor.stride() if stride != 1]
    fits = len(x) > 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)
    return fits and x.dtype in dtypes and not isinstance(x, FakeTensor)


class _Projection(NamedTuple):
    """One of the experts' two weights with its update, in the dtype of the products."""

    weight: Tensor | Sequence[Restorable]
    """(E, o, i)"""
    a: Tensor | None
    """(E, r, i)"""
    b: Tensor | None
    """(E, o, r)"""
    scale: float

    @classmethod
    def of(
        cls, base: Any, tensor: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, like: Tensor
    ) -> _Projection:
        """`tensor` is the base's where that is no list of layers."""
        cast = [None if one is None else one.to(like.dtype).contiguous() for one in (tensor, a, b)]
        return cls(base if cast[0] is None else cast[0], cast[1], cast[2], scale)

    def forward(self, groups: Groups, x: Tensor) -> Tensor:
        """x (S, i) → (S, o)."""
        if isinstance(self.weight, Tensor):
            y = groups.product(x, self.weight.mT)
        else:
            y = groups.restored_product(x, self.weight, turned=False)
        if self.a is not None and self.b is not None:
            y.add_(groups.product(groups.product(x, self.a.mT), self.b.mT), alpha=self.scale)
        return y

    def backward(self, groups: Groups, grad: Tensor) -> Tensor:
        """grad (S, o) → (S, i)."""
        if isinstance(self.weight, Tensor):
            y = groups.product(grad, self.weight)
        else:
            y = groups.restored_product(grad, self.weight, turned=True)
        if self.a is not None and self.b is not None:
            y.add_(groups.product(groups.product(grad, self.b), self.a), alpha=self.scale)
        return y

    def update_grads(self, groups: Groups, grad: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of A and B."""
        if self.a is None or self.b is None:
            return None, None
        grad_a = groups.outer(groups.product(grad, self.b), x)
        grad_b = groups.outer(grad, groups.product(x, self.a.mT))
        return grad_a.mul_(self.scale), grad_b.mul_(self.scale)


class _Work(torch.autograd.Function):
    """Keeps x, the shares, and gate and up (S, 2 I); the rest is computed again.

    The gradient of a share is that of its expert's output times this output, which needs not be kept: with a what goes
    into the last product, ⟨g, W a⟩ = ⟨Wᵀ g, a⟩, and Wᵀ g is wanted anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        groups: Groups,
        bases: list[Any],
        scales: list[float],
        *tensors: Tensor | None,
    ) -> Tensor:
        gate_up, down, a1, b1, a2, b2 = tensors
        inwards = _Projection.of(bases[0], gate_up, a1, b1, scales[0], x)
        outwards = _Projection.of(bases[1], down, a2, b2, scales[1], x)
        h = inwards.forward(groups, x.index_select(0, groups.tokens))
        gate, up = h.chunk(2, -1)
        y = outwards.forward(groups, F.silu(gate).mul_(up))
        ctx.save_for_backward(x, share, h, *tensors)
        ctx.groups, ctx.bases, ctx.scales = groups, bases, scales
        return _gathered(y, groups, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, share, h, gate_up, down, a1, b1, a2, b2 = ctx.saved_tensors
        groups, needed = ctx.groups, ctx.needs_input_grad
        inwards = _Projection.of(ctx.bases[0], gate_up, a1, b1, ctx.scales[0], x)
        outwards = _Projection.of(ctx.bases[1], down, a2, b2, ctx.scales[1], x)
        gate, up = h.chunk(2, -1)
        a = F.silu(gate).mul_(up)
        shares = torch.empty_like(share).flatten().scatter_(0, groups.places.flatten(), share.flatten())[:, None]
        grad_y = grad.to(x.dtype).index_select(0, groups.tokens)
        grad_a = outwards.backward(groups, grad_y)
        grad_share = (widen(grad_a) * a).sum(-1)[groups.places].to(share.dtype)
        a.mul_(shares)
        grad_down = groups.outer(grad_y, a).to(down.dtype) if needed[6] else None
        grad_a2, grad_b2 = outwards.update_grads(groups, grad_y, a)
        del grad_y  # of S rows there are to be as few at a time as can be
        grad_a.mul_(shares)
        grad_h = torch.empty_like(h)
        torch.mul(F.silu(gate), grad_a, out=grad_h[:, gate.shape[1] :])
        grad_h[:, : gate.shape[1]] = torch.ops.aten.silu_backward(torch.mul(grad_a, up, out=a), gate)
        del a, grad_a
        read = x.index_select(0, groups.tokens)
        grad_gate_up = groups.outer(grad_h, read).to(gate_up.dtype) if needed[5] else None
        grad_a1, grad_b1 = inwards.update_grads(groups, grad_h, read)
        grad_x = _gathered(inwards.backward(groups, grad_h), groups) if needed[0] else None
        factors = (
            None if one is None else one.to(factor.dtype)
            for one, factor in zip((grad_a1, grad_b1, grad_a2, grad_b2), (a1, b1, a2, b2), strict=True)
        )
        return grad_x, grad_share, None, None, None, grad_gate_up, grad_down, *factors


def _gathered(y: Tensor, groups: Groups, share: Tensor | None = None) -> Tensor:
    """Σ over a token's experts of y (S, d), by their shares (P, k): (P, d). In an order of its own on every device,
    unlike an `index_add`."""
    of_tokens = y[groups.places]
    if share is not None:
        of_tokens.mul_(share[..., None].to(y.dtype))
    return of_tokens.sum(1)
