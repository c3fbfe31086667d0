"""Families whose files call the parts of a model otherwise than Llama's: GPT-NeoX (Pythia), GPT-2, OpenELM.

Shapes: L layers, d hidden size, H query heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Activation, Architecture, LayerKind, LayerShape
from litrecipe.model.hf_config import ACTIVATIONS, Config, Family, read_common, read_rope, shortened
from litrecipe.model.names import Names, Stored

GELU: dict[str, Activation] = {"gelu": "gelu"}
GELU |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
"""GELU and names of its approximation."""


def _gpt(config: Config) -> dict[str, Any]:
    """What GPT-2 and GPT-NeoX have in common. Keys of grouped queries mean nothing to them."""
    heads = config["num_attention_heads"]
    return {
        "norm": "layer",
        "fused": True,
        "gated": False,
        "mlp_bias": True,
        "num_kv_heads": heads,
        "head_dim": config["hidden_size"] // heads,
    }


# -- GPT-NeoX ---------------------------------------------------------------------------------------------------------


def _gpt_neox(config: Config) -> dict[str, Any]:
    return {
        **_gpt(config),
        "parallel": config["use_parallel_residual"],
        "ropes": (read_rope(config, share=0.25),),
    }


def _gpt_neox_keys(a: Architecture) -> Config:
    return {"rotary_pct": a.ropes[0].share, "use_parallel_residual": a.parallel, "attention_bias": a.o_bias}


NEOX_KEYS = {
    "rms_norm_eps": "layer_norm_eps",
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}
GPT_NEOX = Family(
    lambda c: read_common(c, _gpt_neox, GELU, keys=NEOX_KEYS, attention_bias=True, use_parallel_residual=True),
    "GPTNeoXForCausalLM",
    _gpt_neox_keys,
    keys=NEOX_KEYS,
    omits=("num_key_value_heads", "head_dim"),
    names=Names(
        {
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "self_attn.qkv_proj": Stored("attention.query_key_value", "interleaved"),
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        prefix="gpt_neox.",
        derived=(".attention.bias", ".attention.masked_bias"),
    ),
)
"""2204.06745; Pythia, 2304.01373."""


# -- GPT-2 ------------------------------------------------------------------------------------------------------------


def _read_gpt2(config: Config) -> Architecture:
    if config.get("n_inner") is None and type(config.get("n_embd")) is int:
        config = {**config, "n_inner": 4 * config["n_embd"]}
    return read_common(config, _gpt2, GELU_NEW, keys=GPT2_KEYS, tie_word_embeddings=True, scale_attn_weights=True)


def _gpt2(config: Config) -> dict[str, Any]:
    refused = [key for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention") if config.get(key)]
    if refused:
        raise InputError(*(f"config.json: {key}: true: only models without it are read" for key in refused))
    return {
        **_gpt(config),
        "qkv_bias": True,
        "o_bias": True,
        "learned_positions": True,
        "ropes": (),
        "kinds": (LayerKind(rope=None),) * config["num_hidden_layers"],
        "query_scalar": None if config["scale_attn_weights"] else 1.0,
        "scaled_init": True,
    }


def _gpt2_keys(a: Architecture) -> Config:
    name = "gelu_new" if a.activation == "gelu_tanh" else ACTIVATIONS[a.activation]
    return {"activation_function": name, "scale_attn_weights": a.query_scalar is None}


GELU_NEW: dict[str, Activation] = {"gelu_new": "gelu_tanh", **GELU}
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
GPT2 = Family(
    _read_gpt2,
    "GPT2LMHeadModel",
    _gpt2_keys,
    classifier="GPT2ForSequenceClassification",
    keys=GPT2_KEYS,
    omits=("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"),
    names=Names(
        {
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.qkv_proj": Stored("attn.c_attn", "transposed"),
            "self_attn.o_proj": Stored("attn.c_proj", "transposed"),
            "mlp.up_proj": Stored("mlp.c_fc", "transposed"),
            "mlp.down_proj": Stored("mlp.c_proj", "transposed"),
        },
        prefix="transformer.",
        derived=(".attn.bias", ".attn.masked_bias"),
    ),
)


# -- OpenELM ----------------------------------------------------------------------------------------------------------


def _read_openelm(config: Config) -> Architecture:
    """Layers differ in their widths; the config says them, or how they grow from the first layer to the last."""
    shapes = _openelm_shapes(config)
    heads, kv_heads, inner = (max(widths) for widths in zip(*shapes, strict=True))
    widest = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner}

    def own(config: Config) -> dict[str, Any]:
        qk_norm = "head" if config.get("normalize_qk_projections") else "none"
        return {"shapes": shapes, "fused": True, "mlp_bias": False, "qk_norm": qk_norm}

    return read_common({**config, **widest}, own, SWISH, keys=OPENELM_KEYS, rms_norm_eps=1e-6)


def _openelm_shapes(config: Config) -> tuple[LayerShape, ...]:
    """2404.14619, section 2.1: H grows with α and the MLP with β, both linearly with the layer, and rounded to
    hundredths before they are used, as in the authors' code. Raises InputError."""
    config = {"num_gqa_groups": 1, "ffn_dim_divisor": 256, "ffn_with_glu": True, **config}
    wrong = [
        f"config.json: {key}: {config.get(key, 'missing')}: must be a whole number above 0"
        for key in ("num_transformer_layers", "model_dim", "head_dim", "num_gqa_groups", "ffn_dim_divisor")
        if type(config.get(key)) is not int or config[key] < 1
    ]
    wrong += [
        f"config.json: {key}: {config[key]}: only {known} is known for this family"
        for key, known in (("ffn_with_glu", True), ("normalization_layer_name", "rms_norm"))
        if config.get(key, known) != known
    ]
    if wrong:
        raise InputError(*wrong)
    count, d, groups, head_dim = (
        config[key] for key in ("num_transformer_layers", "model_dim", "num_gqa_groups", "head_dim")
    )
    heads = config.get("num_query_heads")
    if not isinstance(heads, list):
        alphas = _multipliers(config, "qkv_multipliers", count)
        heads = [make_divisible(alpha * d, head_dim * groups) // head_dim for alpha in alphas]
    if len(heads) != count or not all(type(one) is int and one > 0 and one % groups == 0 for one in heads):
        wanted = f"must be a multiple of num_gqa_groups {groups} for each of the {count} layers"
        raise InputError(f"config.json: num_query_heads: {shortened(heads)}: {wanted}")
    betas = _multipliers(config, "ffn_multipliers", count)
    inner = [make_divisible(beta * d, config["ffn_dim_divisor"]) for beta in betas]
    return tuple(LayerShape(one, one // groups, size) for one, size in zip(heads, inner, strict=True))


def _multipliers(config: Config, key: str, count: int) -> list[float]:
    """One a layer, from one for all, the first and the last, or all; raises InputError."""
    given = config.get(key, "missing")
    values = given if isinstance(given, list) else [given]
    if not all(type(value) in (int, float) and value > 0 for value in values) or len(values) not in (1, 2, count):
        raise InputError(f"config.json: {key}: {given}: must be a number, the first and the last, or {count} of them")
    if len(values) == 2:
        first, last = values
        step = (last - first) / max(count - 1, 1)
        return [round(first + layer * step, 2) for layer in range(count)]
    return values * count if len(values) == 1 else values


def make_divisible(value: float, divisor: int) -> int:
    """The nearest multiple of the divisor that is not more than a tenth below the value (MobileNet's rule)."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def _openelm_keys(a: Architecture) -> Config:
    inner = [shape.intermediate_size for shape in a.shapes]
    keys: Config = {
        "num_gqa_groups": a.num_heads // a.num_kv_heads,
        "num_query_heads": [shape.num_heads for shape in a.shapes],
        "num_kv_heads": [shape.num_kv_heads for shape in a.shapes],
        "ffn_dim_divisor": math.gcd(256, *inner),
        "ffn_multipliers": [one / a.hidden_size for one in inner],
        "ffn_with_glu": True,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": a.qk_norm == "head",
        "activation_fn_name": "swish",
        "rope_max_length": 2 * a.max_positions,
    }
    # The authors' code makes the heads from these, whatever else the config says; all published models have them.
    growth = {"qkv_multipliers": [0.5, 1.0]}
    common = {"num_transformer_layers": a.num_layers, "model_dim": a.hidden_size, "head_dim": a.head_dim}
    grown = _openelm_shapes({**common, **keys, "num_query_heads": None, **growth})
    return keys | growth if grown == a.shapes else keys


SWISH: dict[str, Activation] = {"swish": "silu", "silu": "silu"}
OPENELM_KEYS = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_transformer_layers",
    "max_position_embeddings": "max_context_length",
    "hidden_act": "activation_fn_name",
    "rope_theta": "rope_freq_constant",
    "tie_word_embeddings": "share_input_output_layers",
}
OPENELM = Family(
    _read_openelm,
    "OpenELMForCausalLM",
    _openelm_keys,
    keys=OPENELM_KEYS,
    omits=("intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_scaling"),
    names=Names(
        {
            "model.embed_tokens": "transformer.token_embeddings",
            "model.layers": "transformer.layers",
            "model.norm": "transformer.norm",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn": "attn",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.gate_up_proj": "ffn.proj_1",
            "mlp.down_proj": "ffn.proj_2",
        },
        prefix="transformer.",
    ),
)
"""No class of transformers is one: its authors' code comes with their models."""
