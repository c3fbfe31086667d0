"""From hidden states to log-probabilities of their targets, without ever holding all logits.

Shapes: P predictions, C predictions of a chunk, d hidden size, V vocabulary.

With z = W h / τ, log p(t) = z_t - logsumexp(z), whose gradient towards h is (W_t - Σ_v p_v W_v) / τ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits held at a time: 64 MiB in fp32."""


class Predictions(NamedTuple):
    """What a row's targets got."""

    logps: Tensor
    """(P,) float32 log-probabilities, in nats."""
    correct: Tensor
    """(P,) bool: whether the target was the likeliest token."""


def predict(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0) -> Predictions:
    """Log-probabilities of `target` (P,) under softmax(hidden weightᵀ / temperature).

    hidden is (P, d) and weight (V, d). A weight that is trained costs a second product of all logits in the backward
    pass; a frozen one (LoRA) none. P may be 0; the result still hangs on the graph.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    head = _TrainedHead if weight.requires_grad and torch.is_grad_enabled() else _FrozenHead
    return Predictions(*head.apply(hidden, weight, target, temperature))


def predict_through(
    head: nn.Module, vocab_size: int, hidden: Tensor, target: Tensor, temperature: float = 1.0
) -> Predictions:
    """The same for a head that is more than a weight (adapted, quantised): each chunk is computed again backward."""

    def one_chunk(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = widen(head(hidden)) / temperature
        chosen = logits.gather(1, target[:, None])[:, 0]
        return chosen - logits.logsumexp(1), chosen == logits.amax(1)

    size = _chunk_size(vocab_size)
    parts = [
        checkpoint(one_chunk, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(size), target.split(size), strict=True)
    ]
    logps, correct = zip(*parts, strict=True)
    return Predictions(torch.cat(logps), torch.cat(correct))


def widen(x: Tensor) -> Tensor:
    """x in fp32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunk_size(vocab_size: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab_size)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(C, V)"""
    logits = widen(F.linear(hidden, weight))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _score(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (C,), hits (C,), and the probabilities (C, V), which take the place of the logits."""
    highest = logits.amax(1)
    chosen = logits.gather(1, target[:, None])[:, 0]
    unnormalised = logits.sub_(highest[:, None]).exp_()
    total = unnormalised.sum(1)
    return chosen - highest - total.log(), chosen == highest, unnormalised.div_(total[:, None])


class _FrozenHead(torch.autograd.Function):
    """Keeps the Jacobian towards the hidden states (P, d) instead of anything of size V: the forward pass has the
    probabilities at hand, so one product there spares the backward pass both the logits and their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        size = _chunk_size(len(weight))
        logps, correct, jacobians = [], [], []
        for h, t in zip(hidden.split(size), target.split(size), strict=True):
            logps_, correct_, probabilities = _score(_logits(h, weight, temperature), t)
            logps.append(logps_)
            correct.append(correct_)
            if ctx.needs_input_grad[0]:
                jacobians.append((weight[t] - probabilities.to(weight.dtype) @ weight).div_(temperature))
        if jacobians:
            ctx.save_for_backward(torch.cat(jacobians))
        hits = torch.cat(correct)
        ctx.mark_non_differentiable(hits)
        return torch.cat(logps), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return (grad_logps[:, None] * jacobian).to(jacobian.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    """Computes each chunk's logits again in the backward pass, where their gradient is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        size = _chunk_size(len(weight))
        parts = [
            _score(_logits(h, weight, temperature), t)[:2]
            for h, t in zip(hidden.split(size), target.split(size), strict=True)
        ]
        logps, correct = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(correct)
        return logps, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        size = _chunk_size(len(weight))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grad_logps.dtype)
        chunked = (tensor.split(size) for tensor in (hidden, target, grad_logps, grad_hidden))
        for h, t, grad, grad_h in zip(*chunked, strict=True):
            _, _, probabilities = _score(_logits(h, weight, ctx.temperature), t)
            scale = (grad / ctx.temperature)[:, None]
            grad_logits = probabilities.mul_(-scale).scatter_add_(1, t[:, None], scale).to(weight.dtype)
            torch.mm(grad_logits, weight, out=grad_h)
            grad_weight += grad_logits.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None
