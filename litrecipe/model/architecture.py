"""What a decoder is made of: shapes and constants, whatever family it comes from. `families` reads them.

Shapes: d hidden size, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SCORE = "score.weight"
"""The tensor (1, hidden size) that makes a reward model of a transformer, as Hugging Face names it."""

EXPERTS = "mlp.experts"
"""Where in a layer its experts are, as Hugging Face names it."""
PROJECTIONS = ("gate_up_proj", "down_proj")
"""The weights of experts; gate and up are one."""

Activation = Literal["silu", "gelu_tanh"]
Norm = Literal["rms", "rms_wide", "rms_plus_one"]
"""RMSNorm (1910.07467) times w; times w before it goes back from fp32 (OLMo 2); times 1 + w, as wide (Gemma)."""
Norms = Literal["before", "after", "around"]
"""Where a layer's norms are: before attention and MLP, behind both (OLMo 2), or before and behind (Gemma 2)."""
QkNorm = Literal["none", "head", "whole"]
"""A norm of queries and keys before their rotation: each head on its own (Qwen 3), or all heads as one (OLMo 2)."""


class Rope(NamedTuple):
    """A rotary embedding (2104.09864)."""

    theta: float
    scaling: dict[str, Any] | None = None
    """None, or `{"rope_type": "linear" | "llama3" | "yarn", …}` with the numbers of that type."""


class LayerKind(NamedTuple):
    """In what layers of one model may differ."""

    window: int | None = None
    """Keys that a query sees: its own and those right before it; None: all before it."""
    rope: int | None = 0
    """Which of the model's rotary embeddings; None: no positions at all (NoPE)."""


@dataclass(frozen=True)
class Experts:
    """MLPs that are mixtures of experts (1701.06538), of which a router chooses some for each token."""

    count: int
    chosen: int
    """Experts that work on a token."""
    size: int
    """Inner size of one."""
    renormalise: bool = True
    """Whether the weights of the chosen add up to 1 (Mixtral), or are what they are among all (Qwen 3's switch)."""
    dense_layers: tuple[int, ...] = ()
    """Layers with one plain MLP instead."""
    jitter: float = 0.0
    """In training the input is multiplied by draws from U(1 - jitter, 1 + jitter)."""
    balance_coef: float = 0.001
    """Weight of the balance loss that the model was made with."""


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a decoder; everything `Decoder` needs beside its weights."""

    vocab_size: int
    """Rows of the embedding; may be padded beyond the tokenizer's tokens."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values; a divisor of `num_heads` (grouped-query attention, 2305.13245)."""
    head_dim: int
    rms_norm_eps: float
    ropes: tuple[Rope, ...]
    max_positions: int
    """Longest sequence the model was made for."""
    tie_embeddings: bool
    """Whether the head's weight is the embedding's."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    family: str
    """`model_type` of the config."""
    kinds: tuple[LayerKind, ...] = ()
    """One a layer; none: all layers are `LayerKind()`."""
    activation: Activation = "silu"
    norm: Norm = "rms"
    norms: Norms = "before"
    qk_norm: QkNorm = "none"
    fused: bool = False
    """Whether q, k and v are one projection, and gate and up another (Phi-3)."""
    query_scalar: float | None = None
    """Scores are q k / √ of it (default: of D)."""
    attention_softcap: float | None = None
    """Scores s become c tanh(s / c) (Gemma 2)."""
    final_softcap: float | None = None
    """The same of logits."""
    embedding_scale: float = 1.0
    """By what embedded tokens are multiplied."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    experts: Experts | None = None
    """Of the MLPs; None: they are plain ones of `intermediate_size`."""

    def kind(self, layer: int) -> LayerKind:
        """That of a layer."""
        return self.kinds[layer] if self.kinds else LayerKind()

    def experts_of(self, layer: int) -> Experts | None:
        """Those of a layer; None where its MLP is a plain one."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts


def count_parameters(architecture: Architecture, *, is_reward_model: bool = False, active: bool = False) -> int:
    """Number of weights, a tied head counted once; `active`: of those that work on a token."""
    a = architecture
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = a.hidden_size * (2 * queries + 2 * keys)
    attention += a.qkv_bias * (queries + 2 * keys) + a.o_bias * a.hidden_size
    attention += {"none": 0, "head": 2 * a.head_dim, "whole": queries + keys}[a.qk_norm]
    mlp = 3 * a.hidden_size * a.intermediate_size
    mlp += a.mlp_bias * (2 * a.intermediate_size + a.hidden_size)
    mlps = a.num_layers * mlp
    if a.experts is not None:
        router, expert = a.experts.count * a.hidden_size, 3 * a.hidden_size * a.experts.size
        mixture = router + (a.experts.chosen if active else a.experts.count) * expert
        mlps = sum(mixture if a.experts_of(layer) else mlp for layer in range(a.num_layers))
    norms = {"before": 2, "after": 2, "around": 4}[a.norms] * a.hidden_size
    embedding = a.vocab_size * a.hidden_size
    head = a.hidden_size if is_reward_model else (1 - a.tie_embeddings) * embedding
    return embedding + head + a.num_layers * (attention + norms) + mlps + a.hidden_size
