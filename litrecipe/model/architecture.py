"""What a decoder is made of: shapes and constants, whatever family it comes from. `families` reads them.

Shapes: d hidden size, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

SCORE = "score.weight"
"""The tensor (1, hidden size) that makes a reward model of a transformer, as Hugging Face names it."""

EXPERTS = "mlp.experts"
"""Where in a layer its experts are, as Hugging Face names it."""
PROJECTIONS = ("gate_up_proj", "down_proj")
"""The weights of experts; gate and up are one."""

Activation = Literal["silu", "gelu", "gelu_tanh"]
Norm = Literal["rms", "rms_wide", "rms_plus_one", "layer"]
"""RMSNorm (1910.07467) times w; times w before it goes back from fp32 (OLMo 2); times 1 + w, as wide (Gemma); or
LayerNorm (1607.06450) with its bias."""
Norms = Literal["before", "after", "around"]
"""Where a layer's norms are: before attention and MLP, behind both (OLMo 2), or before and behind (Gemma 2)."""
QkNorm = Literal["none", "head", "whole"]
"""A norm of queries and keys before their rotation: each head on its own (Qwen 3), or all heads as one (OLMo 2)."""


class Rope(NamedTuple):
    """A rotary embedding (2104.09864)."""

    theta: float
    scaling: dict[str, Any] | None = None
    """None, or `{"rope_type": "linear" | "llama3" | "yarn" | "longrope", …}` with the numbers of that type."""
    share: float = 1.0
    """What part of each head turns, its first; the rest knows no positions."""


def turning_dimensions(rope: Rope, head_dim: int) -> int:
    """Of each head."""
    return int(head_dim * rope.share)


class LayerKind(NamedTuple):
    """In what layers of one model may differ."""

    window: int | None = None
    """Keys that a query sees: its own and those right before it; None: all before it."""
    rope: int | None = 0
    """Which of the model's rotary embeddings; None: no positions at all (NoPE)."""


class LayerShape(NamedTuple):
    """Widths of a layer, see the fields of `Architecture`."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int


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
    norm_eps: float
    ropes: tuple[Rope, ...]
    """None where positions are learnt."""
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
    shapes: tuple[LayerShape, ...] = ()
    """One a layer where their widths differ (OpenELM); the three numbers above are then the largest."""
    activation: Activation = "silu"
    norm: Norm = "rms"
    norms: Norms = "before"
    qk_norm: QkNorm = "none"
    fused: bool = False
    """Whether q, k and v are one projection, and gate and up another (Phi-3)."""
    gated: bool = True
    """Whether the MLP is a gated linear unit; otherwise it is down(act(up x))."""
    parallel: bool = False
    """Whether attention and MLP read the same x, each through its norm, and are added to it together (GPT-NeoX)."""
    learned_positions: bool = False
    """Whether positions are vectors that are added to the embedded tokens (GPT-2)."""
    longest: int | None = None
    """Tokens of the longest sequence of this run, where that decides by which frequencies heads turn; None:
    `max_positions`. See `for_length`."""
    query_scalar: float | None = None
    """Scores are q k / √ of it (default: of D)."""
    attention_softcap: float | None = None
    """Scores s become c tanh(s / c) (Gemma 2)."""
    final_softcap: float | None = None
    """The same of logits."""
    embedding_scale: float = 1.0
    """By what embedded tokens are multiplied."""
    residual_scale: float = 1.0
    """By what attention and MLP are multiplied before they are added to x (Granite, MiniCPM)."""
    logit_divisor: float = 1.0
    """By what logits are divided (the same)."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    inner_init: float = 1.0
    """Share of it that those of the layers' matrices have (muP)."""
    scaled_init: bool = False
    """Whether those that write into the residual stream start smaller, by 1/√(2 layers) (GPT-2)."""
    experts: Experts | None = None
    """Of the MLPs; None: they are plain ones of `intermediate_size`."""

    def kind(self, layer: int) -> LayerKind:
        """That of a layer."""
        return self.kinds[layer] if self.kinds else LayerKind()

    def experts_of(self, layer: int) -> Experts | None:
        """Those of a layer; None where its MLP is a plain one."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def shape(self, layer: int) -> LayerShape:
        """That of a layer."""
        widest = LayerShape(self.num_heads, self.num_kv_heads, self.intermediate_size)
        return self.shapes[layer] if self.shapes else widest

    @property
    def cached_numbers(self) -> int:
        """Keys and values that are kept of a token, over all layers."""
        return sum(2 * self.shape(layer).num_kv_heads * self.head_dim for layer in range(self.num_layers))

    def for_length(self, tokens: int) -> Architecture:
        """The same for a run whose longest sequence has so many tokens.

        LongRoPE has frequencies for short and for long sequences. One choice holds for a whole run: a choice for each
        sample would compare an answer with another that was read under other positions.
        """
        return replace(self, longest=min(tokens, self.max_positions)) if self._longrope else self

    @property
    def positions_note(self) -> str | None:
        """For people: which of LongRoPE's factors a run goes by; None where there is no choice."""
        if (scaling := self._longrope) is None:
            return None
        longest, original = self.longest or self.max_positions, scaling["original_max_position_embeddings"]
        which, than = ("long", "more than") if longest > original else ("short", "no more than")
        return f"LongRoPE: {which} factors, as texts may have up to {longest:,} tokens, {than} {original:,}"

    @property
    def _longrope(self) -> dict[str, Any] | None:
        scalings = (rope.scaling for rope in self.ropes)
        return next((one for one in scalings if one and one["rope_type"] == "longrope"), None)

    def first_layers(self, count: int) -> Architecture:
        """The same of a model that ends behind so many of its layers."""
        shapes = self.shapes[:count]
        largest = zip(LayerShape._fields, map(max, zip(*shapes, strict=True)), strict=True) if shapes else ()
        return replace(self, num_layers=count, kinds=self.kinds[:count], shapes=shapes, **dict(largest))

    def trained_on(self, tokens: int, theta: float | None = None) -> Architecture:
        """The same for a model that is trained on sequences of so many tokens: its context is at least that long, and
        heads turn by the base `theta`, if that is given (those of layers without a window, where there are two)."""
        ropes = self.ropes if theta is None else (self.ropes[0]._replace(theta=theta), *self.ropes[1:])
        return replace(self, ropes=ropes, max_positions=max(self.max_positions, tokens)).for_length(tokens)


def count_parameters(architecture: Architecture, *, is_reward_model: bool = False, active: bool = False) -> int:
    """Number of weights, a tied head counted once; `active`: of those that work on a token."""
    a = architecture
    shapes = [a.shape(layer) for layer in range(a.num_layers)]
    attentions = sum(_attention_size(a, shape) for shape in shapes)
    mlps = sum(_mlp_size(a, layer, active) for layer in range(a.num_layers))
    norms = ({"before": 2, "after": 2, "around": 4}[a.norms] * a.num_layers + 1) * a.hidden_size
    norms *= 2 if a.norm == "layer" else 1
    embedding = a.vocab_size * a.hidden_size
    positions = a.learned_positions * a.max_positions * a.hidden_size
    head = a.hidden_size if is_reward_model else (1 - a.tie_embeddings) * embedding
    return embedding + positions + head + attentions + mlps + norms


def _attention_size(a: Architecture, shape: LayerShape) -> int:
    queries, keys = shape.num_heads * a.head_dim, shape.num_kv_heads * a.head_dim
    size = a.hidden_size * (2 * queries + 2 * keys)
    size += a.qkv_bias * (queries + 2 * keys) + a.o_bias * a.hidden_size
    return size + {"none": 0, "head": 2 * a.head_dim, "whole": queries + keys}[a.qk_norm]


def _mlp_size(a: Architecture, layer: int, active: bool) -> int:
    if (experts := a.experts_of(layer)) is not None:
        at_work = experts.chosen if active else experts.count
        return a.hidden_size * (experts.count + 3 * at_work * experts.size)
    inner = a.shape(layer).intermediate_size
    inward = (2 if a.gated else 1) * inner
    return a.hidden_size * (inward + inner) + a.mlp_bias * (inward + a.hidden_size)
