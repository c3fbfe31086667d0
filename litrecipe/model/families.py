"""Families of models: how the `config.json` of each is read, in both dialects, and written back in the Hub's.

A family is one entry of `FAMILIES`: what its config says beside the keys of all, and what the decoder makes of it. The
dialects are the Hub's (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`, `layer_types`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Architecture, Experts, LayerKind
from litrecipe.model.hf_config import (
    ACTIVATIONS,
    GLOBAL,
    LOCAL,
    REQUIRED_KEYS,
    Config,
    read_common,
    read_kinds,
    read_rope,
    shortened,
    types_of,
    window_of,
)


class Family(NamedTuple):
    """How the `config.json` of a family is read and written."""

    read: Callable[[Config], Architecture]
    """Raises InputError for what the decoder cannot honour."""
    class_name: str
    """The model's class in transformers."""
    own_keys: Callable[[Architecture], Config]
    """What its config holds beside the keys of all families."""
    classifier: str | None = None
    """Its sequence classifier's class, where that is not named like the model's."""


def read_architecture(config: Config) -> Architecture:
    """The architecture of a `config.json`, in the Hub's dialect or that of transformers 5.

    Raises InputError with all missing keys and all values that this decoder cannot honour.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"config.json: model_type: {family}: one of {', '.join(FAMILIES)} can be read")
    return FAMILIES[family].read(config)


def to_hf_config(architecture: Architecture, dtype: str = "float32") -> Config:
    """A `config.json` that transformers 4 and 5 both load; `dtype` is the name of the saved weights' torch dtype."""
    family, rope = FAMILIES[architecture.family], architecture.ropes[0]
    eos = architecture.eos_ids
    return {
        "architectures": [family.class_name],
        "model_type": architecture.family,
        "hidden_act": ACTIVATIONS[architecture.activation][0],
        "torch_dtype": dtype,
        **{key: getattr(architecture, name) for name, key in REQUIRED_KEYS.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "tie_word_embeddings": architecture.tie_embeddings,
        "initializer_range": architecture.initializer_range,
        "bos_token_id": architecture.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": architecture.pad_id,
        "use_cache": True,
        **family.own_keys(architecture),
    }


def to_classifier_config(architecture: Architecture, dtype: str, pad_id: int) -> Config:
    """A `config.json` of a sequence classifier with one label, which is how transformers keeps a reward model.

    transformers scores the last token that is not `pad_id`.
    """
    family = FAMILIES[architecture.family]
    class_name = family.classifier or family.class_name.replace("ForCausalLM", "ForSequenceClassification")
    return {
        **to_hf_config(architecture, dtype),
        "architectures": [class_name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


# -- families ---------------------------------------------------------------------------------------------------------


def _nothing(_: Config) -> dict[str, Any]:
    return {}


def _mistral(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window")
    return {
        "kinds": (LayerKind(window),) * config["num_hidden_layers"] if window else (),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False),
    }


def _phi3(config: Config) -> dict[str, Any]:
    """Projections of the same input are one. Its older configs say yarn where they mean longrope."""
    rope = read_rope(config)
    if rope.scaling is not None:
        kind = rope.scaling["rope_type"]
        raise InputError(f"config.json: rope_scaling.type: {kind}: only models without scaling are read of this family")
    return {**_mistral(config), "fused": True, "ropes": (rope,)}


def _phi3_keys(a: Architecture) -> Config:
    return {"sliding_window": window_of(a), "original_max_position_embeddings": a.max_positions}


def _qwen(config: Config) -> dict[str, Any]:
    """Upper layers may have a window, which the hub's configs name and then do not use."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return {}
    first = config.get("max_window_layers")
    kinds = read_kinds(config, lambda layer: layer >= (28 if first is None else first))
    return {"kinds": kinds if any(kind.window for kind in kinds) else ()}


def _qwen2(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qkv_bias": True, "o_bias": False, "mlp_bias": False}


def _qwen3(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qk_norm": "head", "mlp_bias": False}


def _qwen_keys(a: Architecture) -> Config:
    window = window_of(a)
    used = {"sliding_window": window, "layer_types": types_of(a)} if window else {"sliding_window": None}
    return {"use_sliding_window": bool(window), "max_window_layers": a.num_layers, **used}


def _mixtral(config: Config) -> dict[str, Any]:
    rope = read_rope(config, default=1e6)
    return {**_mistral(config), "ropes": (rope,), **_experts(config, 8, size=config["intermediate_size"])}


def _mixtral_keys(a: Architecture) -> Config:
    assert a.experts is not None
    return {
        "sliding_window": window_of(a),
        **_experts_keys(a, "num_local_experts"),
        "router_jitter_noise": a.experts.jitter,
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    """Some layers may have a plain MLP; a window is that of all layers."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    every, count = config.get("decoder_sparse_step") or 1, config["num_hidden_layers"]
    named = config.get("mlp_only_layers") or []
    dense = tuple(layer for layer in range(count) if layer in named or (layer + 1) % every)
    if len(dense) == count:
        raise InputError("config.json: mlp_only_layers, decoder_sparse_step: no layer has experts: it is a qwen3")
    size, renormalise = config["moe_intermediate_size"], config.get("norm_topk_prob") or False
    return {
        "kinds": (LayerKind(window),) * count if window else (),
        "qk_norm": "head",
        "mlp_bias": False,
        **_experts(config, 128, size=size, renormalise=renormalise, dense_layers=dense),
    }


def _qwen3_moe_keys(a: Architecture) -> Config:
    assert a.experts is not None
    return {
        **_experts_keys(a, "num_experts"),
        "moe_intermediate_size": a.experts.size,
        "norm_topk_prob": a.experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(a.experts.dense_layers),
        "use_sliding_window": window_of(a) is not None,
        "sliding_window": window_of(a),
        "attention_bias": a.o_bias,
    }


def _experts(config: Config, default: int, **fields: Any) -> dict[str, Experts]:
    """How many there are is `num_local_experts`, `num_experts`, or the `default`."""
    names = config.get("num_local_experts"), config.get("num_experts"), default
    count, chosen = next(filter(None, names)), config["num_experts_per_tok"]
    if chosen > count:
        raise InputError(f"config.json: num_experts_per_tok: {chosen}: there are {count}: fetch the model again")
    coef, jitter = config.get("router_aux_loss_coef"), config.get("router_jitter_noise") or 0.0
    coef = 0.001 if coef is None else coef
    return {"experts": Experts(count, chosen, jitter=jitter, balance_coef=coef, **fields)}


def _experts_keys(a: Architecture, count: str) -> Config:
    assert a.experts is not None
    return {
        count: a.experts.count,
        "num_experts_per_tok": a.experts.chosen,
        "router_aux_loss_coef": a.experts.balance_coef,
        "output_router_logits": False,
    }


def _olmo2(_: Config) -> dict[str, Any]:
    return {"norms": "after", "norm": "rms_wide", "qk_norm": "whole", "mlp_bias": False}


def _smollm3(config: Config) -> dict[str, Any]:
    """Some layers know no positions; `no_rope_layers` has a 0 for these."""
    count, every = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    turns = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    if len(turns) < count or not set(turns) <= {0, 1}:
        wanted = f"must have a 0 or 1 for each of the {count} layers"
        raise InputError(f"config.json: no_rope_layers: {shortened(turns)}: {wanted}: fetch the model again")
    has_window = config.get("use_sliding_window") and config.get("sliding_window")
    local = read_kinds(config, lambda layer: bool(has_window) and not turns[layer])
    return {
        "kinds": tuple(kind._replace(rope=0 if turn else None) for kind, turn in zip(local, turns, strict=False)),
        "ropes": (read_rope(config, default=2e6),),
    }


def _smollm3_keys(a: Architecture) -> Config:
    turns = [int(a.kind(layer).rope is not None) for layer in range(a.num_layers)]
    window = window_of(a)
    used = {"use_sliding_window": bool(window), "sliding_window": window}
    return {"no_rope_layers": turns, "layer_types": types_of(a), **used, **_biases(a)}


def _biases(a: Architecture) -> Config:
    return {"attention_bias": a.o_bias, "mlp_bias": a.mlp_bias}


def _gemma(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention: true: only causal models are read")
    return {"norm": "rms_plus_one", "embedding_scale": math.sqrt(config["hidden_size"]), "mlp_bias": False}


def _gemma2(config: Config) -> dict[str, Any]:
    return {
        **_gemma(config),
        "norms": "around",
        "kinds": read_kinds(config, lambda layer: layer % 2 == 0),
        "query_scalar": config["query_pre_attn_scalar"],
        "attention_softcap": config.get("attn_logit_softcapping"),
        "final_softcap": config.get("final_logit_softcapping"),
    }


def _gemma3(config: Config) -> dict[str, Any]:
    """Local layers turn by a base of their own, unscaled; every sixth is global."""
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    local = {"rope_parameters": {LOCAL: {}} | (config.get("rope_parameters") or {})}
    base = config.get("rope_local_base_freq") or 10000.0
    return {
        **_gemma2(config),
        "kinds": read_kinds(config, lambda layer: (layer + 1) % every != 0, local_rope=1),
        "qk_norm": "head",
        "ropes": (read_rope(config, GLOBAL, default=1e6), read_rope(local, LOCAL, default=base)),
    }


def _gemma_keys(a: Architecture) -> Config:
    return {"hidden_activation": ACTIVATIONS[a.activation][0], "attention_bias": a.o_bias}


def _gemma2_keys(a: Architecture) -> Config:
    return {
        **_gemma_keys(a),
        "query_pre_attn_scalar": a.query_scalar,
        "attn_logit_softcapping": a.attention_softcap,
        "final_logit_softcapping": a.final_softcap,
        "sliding_window": window_of(a),
        "layer_types": types_of(a),
    }


def _gemma3_keys(a: Architecture) -> Config:
    return {**_gemma2_keys(a), "rope_local_base_freq": a.ropes[1].theta}


GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
"""What configs of the family may leave out."""
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096}
MIXTRAL = {"num_key_value_heads": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(lambda c: read_common(c, _nothing), "LlamaForCausalLM", _biases),
    "mistral": Family(
        lambda c: read_common(c, _mistral), "MistralForCausalLM", lambda a: {"sliding_window": window_of(a)}
    ),
    "phi3": Family(lambda c: read_common(c, _phi3), "Phi3ForCausalLM", _phi3_keys),
    "qwen2": Family(lambda c: read_common(c, _qwen2), "Qwen2ForCausalLM", _qwen_keys),
    "qwen3": Family(
        lambda c: read_common(c, _qwen3, head_dim=128),
        "Qwen3ForCausalLM",
        lambda a: {**_qwen_keys(a), "attention_bias": a.o_bias},
    ),
    "mixtral": Family(lambda c: read_common({**MIXTRAL, **c}, _mixtral), "MixtralForCausalLM", _mixtral_keys),
    "qwen3_moe": Family(lambda c: read_common({**QWEN3_MOE, **c}, _qwen3_moe), "Qwen3MoeForCausalLM", _qwen3_moe_keys),
    "olmo2": Family(lambda c: read_common(c, _olmo2), "Olmo2ForCausalLM", lambda a: {"attention_bias": a.o_bias}),
    "smollm3": Family(
        lambda c: read_common(c, _smollm3, tie_word_embeddings=True, num_key_value_heads=4),
        "SmolLM3ForCausalLM",
        _smollm3_keys,
    ),
    "gemma": Family(lambda c: read_common(c, _gemma, "gelu_tanh", **GEMMA), "GemmaForCausalLM", _gemma_keys),
    "gemma2": Family(
        lambda c: read_common({**SOFTCAPS, **c}, _gemma2, "gelu_tanh", **GEMMA2), "Gemma2ForCausalLM", _gemma2_keys
    ),
    "gemma3_text": Family(
        lambda c: read_common(c, _gemma3, "gelu_tanh", **GEMMA2),
        "Gemma3ForCausalLM",
        _gemma3_keys,
        classifier="Gemma3TextForSequenceClassification",
    ),
}
"""`model_type` → family."""
