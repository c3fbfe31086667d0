"""Linear layers with a low-rank update, with a forward and a backward pass of their own.

peft makes, names and stores the layers; only the computation is ours. peft's own passes over (T, o) tensors — the
update, its scaled copy, the sum, and for DoRA the products with the magnitudes — cost more than the update's arithmetic.

Shapes: T tokens, i inputs, o outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litrecipe.model.quantize import dense_weight, product_dtype

NAME = "default"
"""peft's name of the adapter."""


class LoraLinear(PeftLinear):
    """LoRA (2106.09685) and DoRA (2402.09353) on a frozen linear layer, plain or quantised.

    LoRA: y = x Wᵀ + s · x Aᵀ Bᵀ + b. DoRA: y = (m / ‖W + s B A‖) ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + b, with the norm of each output's
    row taken as a constant in the backward pass (section 4.3). A and B are cast to the dtype of the products.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (…, i) → (…, o)."""
        if self.disable_adapters:
            return self.base_layer(x)
        x = x.to(product_dtype(x))
        dropout = self.lora_dropout[NAME]
        z = dropout(x) if self.training and isinstance(dropout, nn.Dropout) else None
        bias = None if self.base_layer.bias is None else self.base_layer.bias.to(x.dtype)
        if not self.is_dora:
            return _LowRank.apply(x, z, self.a, self.b, bias, self.base_layer, self.scale)
        product = _LowRank.apply(x, z, self.a, self.b, None, self.base_layer, self.scale)
        y = product * (self.magnitude / self.row_norms()).to(x.dtype)
        return y if bias is None else y + bias

    @property
    def a(self) -> nn.Parameter:
        """A (r, i)."""
        return self.lora_A[NAME].weight

    @property
    def b(self) -> nn.Parameter:
        """B (o, r)."""
        return self.lora_B[NAME].weight

    @property
    def scale(self) -> float:
        """s, alpha / r or alpha / √r."""
        return self.scaling[NAME]

    @property
    def is_dora(self) -> bool:
        """Whether there is a magnitude."""
        return NAME in self.lora_magnitude_vector

    @property
    def magnitude(self) -> nn.Parameter:
        """DoRA's m (o,)."""
        return self.lora_magnitude_vector[NAME].weight

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under the names of peft's files."""
        parameters = {"lora_A.weight": self.a, "lora_B.weight": self.b}
        return parameters | {"lora_magnitude_vector": self.magnitude} if self.is_dora else parameters

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W + s B A (o, i) in the adapter's dtype, before DoRA's magnitudes."""
        with torch.autocast(self.a.device.type, enabled=False):
            return torch.addmm(dense_weight(self.base_layer, self.a.dtype), self.b, self.a, alpha=self.scale)

    def row_norms(self) -> Tensor:
        """‖W + s B A‖ of each output's row (o,)."""
        return torch.linalg.vector_norm(self.adapted_weight(), dim=1)

    def merged_weight(self) -> Tensor:
        """The one weight (o, i) that computes the same, in the adapter's dtype."""
        weight = self.adapted_weight()
        if self.is_dora:
            weight *= (self.magnitude.detach() / torch.linalg.vector_norm(weight, dim=1))[:, None]
        return weight


class _LowRank(torch.autograd.Function):
    """x Wᵀ + s · z Aᵀ Bᵀ + b, where z is x, or x after dropout. Keeps x, z and z Aᵀ; W is read, or restored, again.

    The layer, not its weight, is handed over: the weight of a sharded model is another tensor's storage between the
    passes, and that of a quantised one is not to be kept in full.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None, base: nn.Linear, scale: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        reduced = (rows if z is None else z.flatten(0, -2)) @ a.to(x.dtype).T
        y = F.linear(rows, dense_weight(base, x.dtype), bias)
        y.addmm_(reduced, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, z, reduced, a, b)
        ctx.base, ctx.scale = base, scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, reduced, a, b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_reduced = (rows @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_a = grad_reduced.T @ (x if z is None else z).flatten(0, -2)
        grad_b = (rows.T @ reduced).mul_(ctx.scale)
        grad_x = grad_z = None
        if ctx.needs_input_grad[0]:
            grad_x = rows @ dense_weight(ctx.base, grad.dtype)
            if z is None:
                grad_x.addmm_(grad_reduced, a.to(grad.dtype))
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_z = (grad_reduced @ a.to(grad.dtype)).view(x.shape)
        return grad_x, grad_z, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None
