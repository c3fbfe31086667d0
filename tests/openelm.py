"""OpenELM as its report has it (2404.14619, section 2.1), which transformers lacks: plain, and without a cache.

Modules have the names of its authors' files. Shapes: B sequences, T tokens, d hidden size, D head dimension.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPENELM: dict[str, Any] = {
    "model_type": "openelm",
    "vocab_size": 97,
    "model_dim": 32,
    "head_dim": 8,
    "num_transformer_layers": 4,
    "num_query_heads": [2, 2, 4, 6],
    "num_kv_heads": [1, 1, 2, 3],
    "num_gqa_groups": 2,
    "ffn_multipliers": [0.5, 1.0, 1.75, 3.0],
    "ffn_dim_divisor": 8,
    "ffn_with_glu": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "rope_freq_constant": 10000,
    "max_context_length": 128,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A shrunken one whose layers differ."""


class OpenElm(nn.Module):
    """Called as a model of transformers: ids (B, T), and of padded ones mask and positions (B, T)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: dict(config))
        self.transformer = nn.Module()
        self.transformer.token_embeddings = nn.Embedding(config["vocab_size"], config["model_dim"])
        self.transformer.layers = nn.ModuleList(Block(config, layer) for layer in range(len(config["num_kv_heads"])))
        self.transformer.norm = Norm(config["model_dim"])
        self.theta, self.D = config["rope_freq_constant"], config["head_dim"]

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        T = ids.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None] | torch.eye(T, dtype=torch.bool)
        positions = torch.arange(T)[None] if position_ids is None else position_ids
        angles = positions[..., None] * self.theta ** (-torch.arange(0, self.D, 2) / self.D)
        x = self.transformer.token_embeddings(ids)
        for layer in self.transformer.layers:
            x = x + layer.attn(layer.attn_norm(x), angles[:, None], seen)
            x = x + layer.ffn(layer.ffn_norm(x))
        return SimpleNamespace(logits=self.transformer.norm(x) @ self.transformer.token_embeddings.weight.T)


class Block(nn.Module):
    def __init__(self, config: dict[str, Any], layer: int) -> None:
        super().__init__()
        d, D = config["model_dim"], config["head_dim"]
        heads, kv_heads = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        self.attn, self.ffn = Attention(d, D, heads, kv_heads), Ffn(d, int(config["ffn_multipliers"][layer] * d))
        self.attn_norm, self.ffn_norm = Norm(d), Norm(d)


class Attention(nn.Module):
    """Each head's queries and keys are normalised before they turn; groups of heads share keys and values."""

    def __init__(self, d: int, D: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.D, self.heads = D, [heads, kv_heads, kv_heads]
        self.qkv_proj = nn.Linear(d, sum(self.heads) * D, bias=False)
        self.out_proj = nn.Linear(heads * D, d, bias=False)
        self.q_norm, self.k_norm = Norm(D), Norm(D)

    def forward(self, x: Tensor, angles: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.D)).transpose(1, 2).split(self.heads, 1)
        q, k = turned(self.q_norm(q), angles), turned(self.k_norm(k), angles)
        k, v = (one.repeat_interleave(self.heads[0] // self.heads[1], 1) for one in (k, v))
        scores = (q @ k.transpose(-1, -2) / self.D**0.5).masked_fill(~seen, -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Ffn(nn.Module):
    """SwiGLU, whose gate is the first half."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.proj_1, self.proj_2 = nn.Linear(d, 2 * inner, bias=False), nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, -1)
        return self.proj_2(F.silu(gate) * up)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight
