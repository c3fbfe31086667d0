"""A decoder's layers for the time of one sampling: their weights as products of few tokens want them.

A product of 32 tokens with a weight as it is stored spends a good part of its time on turning the weight round. So each
is copied once, turned round, with those that read the same input side by side; what an adapter adds is in the copy,
which nobody has to take out again. The copies are made anew for each sampling: a weight that was trained meanwhile is
never missed, and nothing of the model is touched.

Shapes: T tokens, P places, d hidden size, i inputs, o outputs of linear layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litrecipe.model.architecture import Architecture
from litrecipe.model.cache import CacheStep
from litrecipe.model.decoder import Attention, Decoder, Layer, RMSNorm, at, normalise
from litrecipe.model.rotary import Turn, rotate

if TYPE_CHECKING:
    from litrecipe.model.lora_linear import LoraLinear

LARGEST = 2**31
"""Bytes of copies that are worth their time."""
COMPLETIONS, TOKENS = 8, 1024
"""From which on they are: what they save in about 16 forward passes pays for making them, and those of a few rows gain
nothing."""


def pays(completions: int, tokens: int) -> bool:
    """Whether copies are worth their time where so many completions may have so many tokens in all."""
    return completions >= COMPLETIONS and tokens >= TOKENS


class LaidOut:
    """Computes what `Decoder.decode` does, without gradients."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.layers = [_Layer(cast(Layer, layer)) for layer in model.model.layers]
        self.head = _Product(model.lm_head)

    def decode(self, tokens: Tensor, step: CacheStep) -> Tensor:
        """Read tokens (T,) into the step's cache; returns the logits (B + P, V) after each sequence and prompt."""
        backbone = self.model.model
        turns = self.model.turns(step.positions)
        x, last = backbone.embed_tokens(tokens), len(self.layers) - 1
        for index, (layer, turn, attention) in enumerate(zip(self.layers, turns, step.layers, strict=True)):
            x = layer(x, turn, attention, step.places if index == last else None)
        norm = cast(RMSNorm, backbone.norm)
        return self.head(normalise(x, norm.weight, norm.eps)[0])


@torch.no_grad()
def lay_out(model: Decoder) -> LaidOut | None:
    """None where it would not help, or could not compute the same: elsewhere than on a CPU, in other dtypes than fp32,
    with layers that are quantised, sharded or compiled, or not made as Llama's, with dropout, above `LARGEST`, and
    where ranks split the model."""
    layers = [cast(Layer, layer) for layer in model.model.layers]
    helps = (
        is_like_llama(model.architecture)
        and model.group is None
        and not torch.is_autocast_enabled("cpu")
        and size(model.architecture) <= LARGEST
    )
    return LaidOut(model) if helps and _is_dense(model.lm_head) and all(map(_is_plain, layers)) else None


def is_like_llama(a: Architecture) -> bool:
    """Whether layers are made of the parts that `_Layer` knows; windows and missing positions are the attention's."""
    parts = a.norm, a.norms, a.qk_norm, a.activation, a.query_scalar, a.final_softcap, a.embedding_scale
    ways = a.gated, a.parallel, a.learned_positions, a.experts is None, a.residual_scale, a.logit_divisor
    return (parts, ways) == (("rms", "before", "none", "silu", None, None, 1.0), (True, False, False, True, 1.0, 1.0))


def size(architecture: Architecture) -> int:
    """Bytes of the copies."""
    a = architecture
    shapes = [a.shape(layer) for layer in range(a.num_layers)]
    layers = sum(2 * (one.num_heads + one.num_kv_heads) * a.head_dim + 3 * one.intermediate_size for one in shapes)
    return 4 * a.hidden_size * (layers + a.vocab_size)


class _Product:
    """x Wᵀ + b of layers that read the same x, as one."""

    def __init__(self, *layers: nn.Module) -> None:
        weights = [_weight(layer) for layer in layers]
        widths = [len(weight) for weight in weights]
        self.weight = weights[0].new_empty(weights[0].shape[1], sum(widths))
        """(i, o)"""
        for part, weight in zip(self.weight.split(widths, 1), weights, strict=True):
            part.copy_(weight.T)
        biases: list[Tensor] = [_base(layer).bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat(biases)
        """(o,)"""

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, i) → (T, o)."""
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class _Layer:
    """A `Layer`'s arithmetic; x is overwritten."""

    def __init__(self, layer: Layer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
        self.qkv = _Product(*(getattr(attention, name) for name in names))
        self.o = _Product(attention.o_proj)
        names = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]
        self.gate_up = _Product(*(getattr(mlp, name) for name in names))
        self.down = _Product(cast(nn.Linear, mlp.down_proj))
        norms = (cast(RMSNorm, norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        self.norms = [(norm.weight, norm.eps) for norm in norms]
        self.head_dim = attention.head_dim
        self.q_heads, self.kv_heads = (width // self.head_dim for width in attention.widths[:2])

    def __call__(self, x: Tensor, turn: Turn | None, attention: Attention, places: Tensor | None = None) -> Tensor:
        """x (T, d) → (T, d), or (P, d) at `places` (P,)."""
        before, after = self.norms
        heads = self.qkv(normalise(x, *before)[0]).view(len(x), -1, self.head_dim)
        turned = heads[:, : -self.kv_heads]
        turned = turned if turn is None else rotate(turned, *turn)
        q, k, v = turned[:, : self.q_heads], turned[:, self.q_heads :], heads[:, -self.kv_heads :]
        attended = self.o(at(attention.attend(q, k, v).flatten(1), places))
        x = at(x, places).add_(attended)
        gate, up = self.gate_up(normalise(x, *after)[0]).chunk(2, 1)
        return x.add_(self.down(F.silu(gate, inplace=True).mul_(up)))


def _is_plain(layer: Layer) -> bool:
    """Whether the layer is the products of dense weights that `_Layer` takes it for."""
    linears = [module for name, module in layer.named_modules() if name.endswith("_proj")]
    is_compiled = "forward" in vars(layer)
    return not is_compiled and all(map(_is_dense, linears))


def _is_dense(linear: nn.Module) -> bool:
    drops = hasattr(linear, "lora_A") and linear.training and cast("LoraLinear", linear).drops
    base, weight = _base(linear), _base(linear).weight
    # A sharded weight is a Parameter of another type.
    return (
        not drops
        and type(base) is nn.Linear
        and type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def _base(linear: nn.Module) -> nn.Linear:
    """The layer, or that below its adapter."""
    return cast("LoraLinear", linear).base if hasattr(linear, "lora_A") else cast(nn.Linear, linear)


def _weight(linear: nn.Module) -> Tensor:
    """(o, i) with what the adapter adds, where it is on."""
    if hasattr(linear, "lora_A") and not (adapted := cast("LoraLinear", linear)).disable_adapters:
        return adapted.merged_weight()
    return _base(linear).weight
