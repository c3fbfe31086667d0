"""The decoder: one config-driven transformer whose module names are those of Hugging Face's Llama.

Shapes: T tokens of a row, P predictions, d hidden size, H query heads, G key/value heads, D head dimension,
B sequences of a decoding batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from litrecipe.model.architecture import Architecture
from litrecipe.model.attention import Forest
from litrecipe.model.cache import CacheStep
from litrecipe.model.head import Entropy, Predictions, predict, widen
from litrecipe.model.row import Row, Span


class Attention(Protocol):
    """What tokens look at: the forest of a packed row, or a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, G, D) → (T, H, D)."""


class Trunk(nn.Module):
    """The transformer under a head: what language models and reward models share."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.activation_checkpointing = False
        """Compute each layer again in the backward pass instead of keeping its insides."""
        self.model = Backbone(architecture)
        # Neither a parameter nor a buffer: it must stay in fp32 whatever the weights are cast to.
        self.inverse_frequencies = inverse_frequencies(architecture)

    def init_weights(self, seed: int) -> None:
        """Fresh weights: N(0, `initializer_range`²) for matrices, 0 for biases, 1 for norms."""
        generator = torch.Generator(self.model.embed_tokens.weight.device).manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, self.architecture.initializer_range, generator=generator)
            for module in self.modules():
                if isinstance(module, RMSNorm):
                    module.weight.fill_(1)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()

    def compile_blocks(self) -> None:
        """torch.compile each layer's forward, for any number of tokens."""
        for layer in self.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def hidden(self, row: Row, places: Tensor) -> Tensor:
        """What heads read: the normalised output (P, d) of the last layer at some places (P,) of a row."""
        forest = Forest(row.spans, row.tokens.device)
        return self.model.norm(self._hidden(row.tokens, row.positions, [forest], places))

    def _hidden(
        self, tokens: Tensor, positions: Tensor, attention: Sequence[Attention], places: Tensor | None = None
    ) -> Tensor:
        """Output of the last layer, not normalised, at some places (P,), or at all (T, d).

        `attention` is one for all layers, or one a layer.
        """
        cos, sin = rotary_tables(positions, self.inverse_frequencies)
        x = self.model.embed_tokens(tokens)
        last = len(self.model.layers) - 1
        for index, layer in enumerate(self.model.layers):
            inputs = x, cos, sin, attention[index % len(attention)], places if index == last else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, *inputs, use_reentrant=False))
            else:
                x = layer(*inputs)
        return x


class Decoder(Trunk):
    """A causal language model that returns log-probabilities, never logits of a whole row."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.with_collisions = False
        """Whether predictions bring `log_collisions`."""
        self.with_entropy: Entropy = "none"
        """Whether predictions bring their `entropy`, and with gradient."""
        self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one Parameter if the architecture says so; call it after replacing parameters."""
        if self.architecture.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, seed: int) -> None:
        """Fresh weights, see `Trunk`; the head's are a matrix as others."""
        self.tie_weights()
        super().init_weights(seed)

    def forward(self, row: Row, temperature: float = 1.0) -> Predictions:
        """Log-probabilities (P,) of the row's targets under logits / temperature."""
        return self.said(self.hidden(row, row.predict_from), row, temperature)

    def said(self, hidden: Tensor, row: Row, temperature: float = 1.0) -> Predictions:
        """Log-probabilities (P,) of the row's targets, by the hidden states (P, d) that predict them."""
        wanted = self.with_collisions, self.with_entropy
        return predict(hidden, self.lm_head.weight, row.target, temperature, *wanted)

    def logits(self, tokens: Tensor) -> Tensor:
        """All logits (T, V) of one sequence of tokens (T,); for short sequences."""
        forest = Forest([Span(0, len(tokens), -1)], tokens.device)
        positions = torch.arange(len(tokens), device=tokens.device)
        return self.lm_head(self.model.norm(self._hidden(tokens, positions, [forest])))

    def decode(self, tokens: Tensor, step: CacheStep) -> Tensor:
        """Read tokens (T,) into the step's cache; returns the logits (B + P, V) after each sequence and prompt."""
        hidden = self._hidden(tokens, step.positions, step.layers, step.places)
        return self.lm_head(self.model.norm(hidden))


class Backbone(nn.Module):
    """Holds the weights that Hugging Face names `model.…`; `Trunk` runs them."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(Layer(architecture) for _ in range(architecture.num_layers))
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x).

    The last layer's output is needed at some places only: there it leaves out all that no place depends on.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.self_attn = SelfAttention(architecture)
        self.mlp = MLP(architecture)
        self.input_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, places: Tensor | None = None
    ) -> Tensor:
        """x (T, d) → (T, d), or (P, d) at `places` (P,)."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attention, places)
        x = at(x, places) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.head_dim = a.head_dim
        self.q_proj = nn.Linear(a.hidden_size, a.num_heads * a.head_dim, bias=a.attention_bias)
        self.k_proj = nn.Linear(a.hidden_size, a.num_kv_heads * a.head_dim, bias=a.attention_bias)
        self.v_proj = nn.Linear(a.hidden_size, a.num_kv_heads * a.head_dim, bias=a.attention_bias)
        self.o_proj = nn.Linear(a.num_heads * a.head_dim, a.hidden_size, bias=a.attention_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, places: Tensor | None = None
    ) -> Tensor:
        """x (T, d) → (T, d), or (P, d) at `places` (P,)."""
        heads = (len(x), -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin)
        k = rotate(self.k_proj(x).view(heads), cos, sin)
        v = self.v_proj(x).view(heads)
        return self.o_proj(at(attention.attend(q, k, v).flatten(1), places))


def at(x: Tensor, places: Tensor | None) -> Tensor:
    """x (T, d) at `places` (P,), or all of it."""
    return x if places is None else x.index_select(0, places)


class MLP(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate x) · up x)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        d, inner, bias = architecture.hidden_size, architecture.intermediate_size, architecture.mlp_bias
        self.gate_proj = nn.Linear(d, inner, bias=bias)
        self.up_proj = nn.Linear(d, inner, bias=bias)
        self.down_proj = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, d) → (T, d)."""
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) · up that keeps its two inputs only: a third less memory than autograd's silu and product, in the
    same time (4.5 MB less a layer for 744 tokens of an inner size of 1536)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight (1910.07467), in fp32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d) → (…, d)."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a token. Forward and backward take half the time of autograd on the same formula and of
    `F.rms_norm` (0.63 ms for 1.6 and 1.2 ms; 744 × 576, fp32, one CPU thread), and half the memory of either when the
    weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = widen(x) * scale
        grad_weight = (grad * normalised).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        inner = widen(grad) * weight
        along = (inner * normalised).mean(-1, keepdim=True)
        return inner.sub_(normalised.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`RMSNorm`'s output (…, d) without its gradient, and 1 / √(mean x² + eps) (…, 1)."""
    wide = widen(x)
    # Not vecdot: autocast would take it for a matrix product and compute it in bf16.
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """Angle a position of each of the D / 2 rotated pairs, fp32 on the CPU (RoPE, 2104.09864).

    `linear` stretches all wavelengths by `factor` (2306.15595). `llama3` (Llama 3.1) stretches those longer than
    original / low_freq_factor, keeps those shorter than original / high_freq_factor, and goes over in between.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, device="cpu").float() / architecture.head_dim
    frequencies = 1.0 / architecture.rope_theta**exponents
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return stretched
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * stretched + kept * frequencies


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and ± sin of every position's angles, (T, 1, D) fp32; the sine is negative in the first half."""
    angles = positions.float()[:, None, None] * frequencies.to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of x (T, H, D) by their positions' angles; in fp32 inside."""
    wide = widen(x)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
