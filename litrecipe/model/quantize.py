"""Linear layers whose frozen weight is stored in 4 or 8 bits and restored for each product.

bitsandbytes stores and restores. The products are our own, the same on every device: y = x Ŵᵀ + b with the restored
weight Ŵ, which the backward pass restores again instead of keeping it. bitsandbytes' own forward passes would repack
NF4 weights on some CPUs once they ran without gradients, after which they cannot be trained through, and round the
activations of int8 layers on GPUs, so that merging would change what the model computes.

Shapes: i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litrecipe.config.groups import Quantize
from litrecipe.model.architecture import PROJECTIONS
from litrecipe.model.experts import ExpertMLPs
from litrecipe.model.head import product_dtype

BLOCK = 64
"""Weights that share a scale."""


class NF4Linear(bnb.nn.Linear4bit):
    """NormalFloat4 in blocks of 64 weights (QLoRA, 2305.14314, section 3)."""

    scales: nn.Parameter | None
    """Of a model that processes share: the scales of the blocks, which are cut as the weight is. Bytes, whatever they
    stand for: numbers would be rounded where weights are gathered in bf16."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_parameter("scales", None)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The restored weight (o, i)."""
        if self.scales is not None:
            state: Any = self.quant_state
            state.absmax = self.scales.data if state.nested else self.scales.data.view(torch.float32)
            state.to(self.weight.device)  # the weight may lie in main memory and be brought to a GPU for its work
        # The module's state, not the weight's: a sharded weight comes back as a plain tensor.
        return bnb.functional.dequantize_4bit(self.weight.data, self.quant_state).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, i) → (…, o)."""
        return _FrozenProduct.apply(x.to(product_dtype(x)), self)

    @classmethod
    def like(cls, weight: Tensor, double_quant: bool) -> NF4Linear:
        """A layer without values for a weight (o, i)."""
        o, i = weight.shape
        return cls(
            i,
            o,
            bias=False,
            compute_dtype=weight.dtype,
            compress_statistics=double_quant,
            quant_type="nf4",
            device="meta",
        )

    def cut_later(self, double_quant: bool) -> NF4Linear:
        """The same with its parameters on the meta device, for a model that is cut before it has values."""
        count, self.double_quant = self.in_features * self.out_features, double_quant
        self.weight = _bytes(-(-count // 2), 1)
        self.scales = _bytes(-(-count // BLOCK) * (1 if double_quant else 4))
        return self

    def pack(self, weight: Tensor, put: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Quantise a weight (o, i) and `put` the pieces of that where they belong; returns what will be restored."""
        assert self.scales is not None
        packed, self.quant_state = quantised(weight, self.double_quant)
        restored = bnb.functional.dequantize_4bit(packed, self.quant_state)
        put(self.weight, packed)
        put(self.scales, self.quant_state.absmax.view(torch.uint8))
        return restored


def _bytes(*shape: int) -> nn.Parameter:
    """Frozen ones, without values."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.uint8, device="meta"), requires_grad=False)


class Int8Linear(bnb.nn.Linear8bitLt):
    """Whole numbers up to 127, one scale an output: the weights of LLM.int8 (2208.07339, section 2.1)."""

    weight: Any

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The restored weight (o, i)."""
        return (self.weight.data * (self.weight.SCB[:, None] / 127)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, i) → (…, o)."""
        return _FrozenProduct.apply(x.to(product_dtype(x)), self)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Move or cast; the scales are an attribute of the weight, which torch would leave where they were."""
        scales = self.weight.SCB
        super()._apply(fn, recurse)
        self.weight.SCB = scales.to(self.weight.device)
        return self


QuantizedLinear = NF4Linear | Int8Linear


def dense_weight(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight (o, i) of a plain or quantised layer in `dtype`."""
    if isinstance(linear, QuantizedLinear):
        return linear.dense_weight(dtype)
    return linear.weight.to(dtype)


def dense_experts(experts: ExpertMLPs, projection: str, dtype: torch.dtype) -> Tensor:
    """The weights (E, o, i) of one of `PROJECTIONS`, plain or quantised, in `dtype`."""
    weights = getattr(experts, projection)
    if isinstance(weights, Tensor):
        return weights.detach().to(dtype)
    return torch.stack([dense_weight(layer, dtype) for layer in weights])


class _FrozenProduct(torch.autograd.Function):
    """x Ŵᵀ + b for a frozen layer: keeps nothing at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, linear.dense_weight(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.dense_weight(grad.dtype), None


def quantize_linears(model: nn.Module, config: Quantize) -> None:
    """Swap every linear layer but `lm_head`, and every expert's, for a quantised, frozen one, on the device it is on.

    The old weights are freed one by one. Routers stay as they are: they are small, and what they say is a choice.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] != "lm_head":
            model.set_submodule(name, quantize_linear(module, config))
        if isinstance(module, ExpertMLPs):
            _quantize_experts(module, config)


def _quantize_experts(experts: ExpertMLPs, config: Quantize) -> None:
    """Each expert has blocks and scales of its own, so that only those with tokens are restored."""
    for name in PROJECTIONS:
        weights = getattr(experts, name).detach()
        delattr(experts, name)
        layers = (quantize_linear(plain_linear(weight.clone(), None), config) for weight in weights)
        setattr(experts, name, nn.ModuleList(layers))


def quantize_linear(linear: nn.Linear, config: Quantize) -> QuantizedLinear:
    """The quantised twin of a linear layer, which loses its weight."""
    weight = linear.weight.detach()
    del linear.weight
    layer = _nf4(weight, config.double_quant) if config.method == "nf4" else _int8(weight)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(weight.dtype), requires_grad=False)
    return layer


def quantised(weight: Tensor, double_quant: bool) -> tuple[Tensor, Any]:
    """A weight (o, i) in NF4, two in a byte, and what restores it."""
    found: tuple[Tensor, Any] = bnb.functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    return found


def _nf4(weight: Tensor, double_quant: bool) -> NF4Linear:
    layer = NF4Linear.like(weight, double_quant)
    if weight.is_meta:
        return layer.cut_later(double_quant)
    packed, layer.quant_state = quantised(weight, double_quant)
    layer.weight = bnb.nn.Params4bit(
        packed,
        quant_state=layer.quant_state,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    return layer


def _int8(weight: Tensor) -> Int8Linear:
    o, i = weight.shape
    layer = Int8Linear(i, o, bias=False, has_fp16_weights=False, device="meta")
    whole, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    layer.weight = bnb.nn.Int8Params(whole, requires_grad=False, has_fp16_weights=False, SCB=scales)
    return layer


def dequantize(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
    """Turn quantised layers back into plain ones of their restored weights."""
    for module in model.modules():
        if isinstance(module, ExpertMLPs):
            for projection in PROJECTIONS:
                weights = nn.Parameter(dense_experts(module, projection, dtype), requires_grad=False)
                delattr(module, projection)
                setattr(module, projection, weights)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, plain_linear(module.dense_weight(dtype), module.bias))


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these values (o, i) and (o,), in the dtype of the weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear
