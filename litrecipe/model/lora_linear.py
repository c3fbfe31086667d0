"""Linear layers with a low-rank update, with a forward and a backward pass of their own.

peft makes, names and stores the layers; only the computation is ours. peft's passes over (T, o) tensors (the update,
its scaled copy, the sum, for DoRA the products with the magnitudes) take more time and memory than the update itself.

Shapes: T tokens, i inputs, o outputs, r rank.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litrecipe.model.head import product_dtype
from litrecipe.model.quantize import dense_weight
from litrecipe.model.split_layers import RowLinear

NAME = "default"
"""peft's name of the adapter."""


class LoraLinear(PeftLinear):
    """LoRA (2106.09685) or DoRA (2402.09353) on a frozen linear layer, plain or quantised.

    LoRA is y = x Wᵀ + s · x Aᵀ Bᵀ + b; DoRA is y = m / ‖W + s B A‖ ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + b, where the norms of the
    rows are constants in the backward pass (section 4.3). Products are computed in the dtype of x, or autocast's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (…, i) → (…, o)."""
        if self.disable_adapters:
            return self.base(x)
        x = x.to(product_dtype(x))
        z = self.lora_dropout[NAME](x) if self.training and self.drops else None
        magnitude, norms = (self.magnitude, self.row_norms()) if self.is_dora else (None, None)
        bias = None if isinstance(self.base, RowLinear) else self.base.bias
        y = _LowRank.apply(x, z, self.a, self.b, magnitude, norms, self.base, bias, self.scale)
        return self.base.completed(y) if isinstance(self.base, RowLinear) else y

    @property
    def base(self) -> nn.Linear:
        """The frozen layer below."""
        return cast(nn.Linear, self.base_layer)

    @property
    def a(self) -> nn.Parameter:
        """A (r, i)."""
        return cast(nn.Parameter, self.lora_A[NAME].weight)

    @property
    def b(self) -> nn.Parameter:
        """B (o, r)."""
        return cast(nn.Parameter, self.lora_B[NAME].weight)

    @property
    def scale(self) -> float:
        """s, which is alpha / r, or alpha / √r."""
        return self.scaling[NAME]

    @property
    def drops(self) -> bool:
        """Whether training drops inputs of A."""
        return isinstance(self.lora_dropout[NAME], nn.Dropout)

    @property
    def is_dora(self) -> bool:
        """Whether there is a magnitude."""
        return NAME in self.lora_magnitude_vector

    @property
    def magnitude(self) -> nn.Parameter:
        """DoRA's m (o,)."""
        return cast(nn.Parameter, self.lora_magnitude_vector[NAME].weight)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under the names of peft's files."""
        parameters = {"lora_A.weight": self.a, "lora_B.weight": self.b}
        return parameters | {"lora_magnitude_vector": self.magnitude} if self.is_dora else parameters

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """peft's making of the parameters, without memory or random numbers; `init_weights` gives them values. It looks
        at the weight below, which may be packed, and needs no more of it than its shape."""
        base, weight = self.base, self.base.weight
        with torch.device("meta"):
            base.weight = nn.Parameter(torch.empty(base.out_features, base.in_features), requires_grad=False)
            super().update_layer(*args, **kwargs)
        base.weight = weight

    def init_weights(self, generator: torch.Generator, device: torch.device | str | None = None) -> None:
        """A from U(-1/√i, 1/√i) and B zero, in fp32 on a device or that of the base; m the row norms, zeros where the
        base has no values. `generator` is a CPU one, so that every device starts with the same adapter."""
        device, bound = device or self.base.weight.device, 1 / math.sqrt(self.base.in_features)
        a = torch.empty(self.a.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        self.lora_A[NAME].weight = nn.Parameter(a.to(device))
        self.lora_B[NAME].weight = nn.Parameter(torch.zeros(self.b.shape, dtype=torch.float32, device=device))
        if self.is_dora:
            norms = torch.zeros(self.base.out_features, device=device)
            if not self.base.weight.is_meta:
                norms = torch.linalg.vector_norm(dense_weight(self.base, torch.float32).detach(), dim=1)  # B A is zero
            self.lora_magnitude_vector[NAME].weight = nn.Parameter(norms)

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W + s B A (o, i), without DoRA's magnitudes, in the adapter's dtype."""
        with torch.autocast(self.a.device.type, enabled=False):
            return torch.addmm(dense_weight(self.base, self.a.dtype), self.b, self.a, alpha=self.scale)

    def row_norms(self) -> Tensor:
        """‖W + s B A‖ of each row (o,)."""
        norms = torch.linalg.vector_norm(self.adapted_weight(), dim=1)
        return self.base.group.add_up(norms.square_()).sqrt_() if isinstance(self.base, RowLinear) else norms

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one weight (o, i) that computes the same, in the adapter's dtype."""
        weight = self.adapted_weight()
        if self.is_dora:
            weight *= (self.magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
        return weight


class _LowRank(torch.autograd.Function):
    """u = x Wᵀ + s · z Aᵀ Bᵀ with z = x, or x after dropout; y = u + b, or m / n ⊙ u + b with the row norms n.

    Keeps x, z, z Aᵀ (and y for the gradient of m), nothing else of size T. The backward pass reads W from its layer
    again: a quantised one is restored anew, a sharded one has been gathered anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
        norms: Tensor | None,
        base: nn.Linear,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows = x.flatten(0, -2)
        reduced = (rows if z is None else z.flatten(0, -2)) @ a.to(x.dtype).T
        y = rows @ dense_weight(base, x.dtype).T
        y.addmm_(reduced, b.to(x.dtype).T, alpha=scale)
        if magnitude is not None and norms is not None:
            y.mul_(magnitude / norms)
        if bias is not None:
            y.add_(bias)
        y = y.view(*x.shape[:-1], y.shape[-1])  # -1 is ambiguous where there are no rows
        ctx.save_for_backward(x, z, reduced, a, b, magnitude, norms, None if magnitude is None else y)
        ctx.base, ctx.has_bias, ctx.scale = base, bias is not None, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, reduced, a, b, magnitude, norms, y = ctx.saved_tensors
        dtype, shape = x.dtype, x.shape
        grad = grad.flatten(0, -2)
        grad_magnitude = grad_x = grad_z = None
        if magnitude is not None:
            scaled = y.flatten(0, -2) - ctx.base.bias if ctx.has_bias else y.flatten(0, -2)
            grad_magnitude = (grad * scaled).sum(0, dtype=magnitude.dtype) / magnitude
            grad = (grad * (magnitude / norms)).to(dtype)
        grad_reduced = (grad @ b.to(dtype)).mul_(ctx.scale)
        grad_a = grad_reduced.T @ (x if z is None else z).flatten(0, -2)
        grad_b = (reduced.T @ grad).mul_(ctx.scale).T  # (r, T) by (T, o): a third faster than the other way round
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.base, dtype)
            if z is None:
                grad_x.addmm_(grad_reduced, a.to(dtype))
            grad_x = grad_x.view(shape)
        if ctx.needs_input_grad[1]:
            grad_z = (grad_reduced @ a.to(dtype)).view(shape)
        return grad_x, grad_z, grad_a.to(a.dtype), grad_b.to(b.dtype), grad_magnitude, None, None, None, None
