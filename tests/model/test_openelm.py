"""OpenELM's layer-wise scaling at its published sizes, and AFM's parts, which are Qwen 3's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openelm import OPENELM, OpenElm

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Architecture, LayerShape, count_parameters
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture, to_hf_config
from litrecipe.model.gpt_families import make_divisible

SCALED = {"qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0], "num_gqa_groups": 4, "ffn_dim_divisor": 256}
LISTS = {"num_query_heads": None, "num_kv_heads": None}


def published(layers: int, width: int, head: int) -> dict[str, Any]:
    """A config as its authors' recipes have it: how widths grow, not what they are."""
    shape = {"num_transformer_layers": layers, "model_dim": width, "head_dim": head}
    return OPENELM | LISTS | SCALED | shape | {"vocab_size": 32000, "max_context_length": 2048}


SIZES = {
    "270M": ((16, 1280, 64), 271_527_168, {12: 5, 16: 7, 20: 4}, (768, 5120)),
    "450M": ((20, 1536, 64), 457_179_136, {12: 3, 16: 7, 20: 6, 24: 4}, (768, 6144)),
    "1.1B": ((28, 2048, 64), 1_079_891_456, {16: 3, 20: 7, 24: 8, 28: 6, 32: 4}, (1024, 8192)),
    "3B": ((36, 3072, 128), 3_036_647_424, {12: 4, 16: 14, 20: 12, 24: 6}, (1536, 12288)),
}
"""Name → layers, width and head; parameters; how many layers have so many heads; inner size of the first and last."""


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    shape, parameters, heads, (first, last) = SIZES[size]
    a = read_architecture(published(*shape))
    assert [one.num_heads for one in a.shapes] == [count for count, times in heads.items() for _ in range(times)]
    assert all(one.num_heads == 4 * one.num_kv_heads for one in a.shapes)
    assert (a.shapes[0].intermediate_size, a.shapes[-1].intermediate_size) == (first, last)
    assert count_parameters(a) == parameters
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(a).parameters()) == parameters
    assert (a.num_heads, a.num_kv_heads, a.intermediate_size) == (max(heads), max(heads) // 4, last)
    assert a.cached_numbers == 2 * a.head_dim * sum(one.num_kv_heads for one in a.shapes)


def test_what_is_written_is_what_the_hub_has() -> None:
    """All widths, and the multipliers from which the authors' code makes the heads."""
    a = read_architecture(published(16, 1280, 64))
    written = to_hf_config(a, "bfloat16")
    assert written["num_query_heads"] == [12] * 5 + [16] * 7 + [20] * 4
    assert written["num_kv_heads"] == [3] * 5 + [4] * 7 + [5] * 4
    assert written["qkv_multipliers"] == [0.5, 1.0] and written["ffn_dim_divisor"] == 256
    given = [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0]
    assert read_architecture(written) == a
    assert read_architecture(written | {"ffn_multipliers": given}) == a
    assert written["architectures"] == ["OpenELMForCausalLM"] and "num_attention_heads" not in written


def test_one_width_for_all_layers() -> None:
    a = read_architecture(published(3, 256, 64) | {"qkv_multipliers": 1.0, "ffn_multipliers": 4})
    assert a.shapes == (LayerShape(4, 1, 1024),) * 3


@pytest.mark.parametrize(("value", "expected"), [(640, 768), (511, 512), (100, 256), (1200, 1280), (896, 1024)])
def test_multiples(value: float, expected: int) -> None:
    """Up from the half, and up where a tenth would be lost."""
    assert make_divisible(value, 256) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ffn_multipliers": [1.0] * 3}, "config.json: ffn_multipliers: [1.0, 1.0, 1.0]: must be a number, the first"),
        ({"ffn_multipliers": None}, "config.json: ffn_multipliers: None: must be a number"),
        ({"num_query_heads": [2, 2]}, "config.json: num_query_heads: 2, 2 (2): must be a multiple of num_gqa_groups 2"),
        ({"num_query_heads": [2, 3, 4, 6]}, "config.json: num_query_heads: 2, 3, 4, … (4): must be a multiple"),
        ({"num_query_heads": None}, "config.json: qkv_multipliers: missing: must be a number"),
        ({"ffn_with_glu": False}, "config.json: ffn_with_glu: False: only True is known"),
        ({"normalization_layer_name": "layer_norm"}, "config.json: normalization_layer_name: layer_norm: only rms"),
        ({"model_dim": "x"}, "config.json: model_dim: x: must be a whole number above 0"),
        ({"max_context_length": None}, "config.json: max_context_length: missing"),
        ({"activation_fn_name": "relu"}, "config.json: activation_fn_name: relu: only swish and silu"),
    ],
)
def test_refusals_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        read_architecture(OPENELM | change)
    assert error.value.mistakes[0].startswith(named)


# -- AFM --------------------------------------------------------------------------------------------------------------

AFM: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 8032,
    "num_hidden_layers": 26,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""AFM-on-device (2407.21075, table 1). The report is silent about the MLP; with this width it has the parameters that
are named there."""


def test_afm_has_the_parameters_of_its_report() -> None:
    a = read_architecture(AFM)
    embedding = 49152 * 3072
    layer = 3072 * 128 * (24 + 8 + 8 + 24) + 3 * 3072 * 8032 + 2 * 128 + 2 * 3072
    assert count_parameters(a) == embedding + 26 * layer + 3072
    assert (round(embedding / 1e9, 2), round((count_parameters(a) - embedding) / 1e9, 2)) == (0.15, 2.58)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(a).parameters()) == count_parameters(a)


def test_afm_computes_what_its_report_says() -> None:
    """Pre-norms, QK-norm, groups of queries, SwiGLU, tied embedding: OpenELM with one width and another base."""
    layers = 2
    uniform = {"num_query_heads": [4] * layers, "num_kv_heads": [2] * layers, "ffn_multipliers": [1.5] * layers}
    theirs = OpenElm(OPENELM | uniform | {"num_transformer_layers": layers, "rope_freq_constant": 500000.0})
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ours = Decoder(read_architecture(AFM | shape))
    ours.load_state_dict(parted(theirs, ours.architecture), strict=False)
    tokens = torch.arange(40)
    with torch.no_grad():
        right = theirs(tokens[None]).logits[0]
        torch.testing.assert_close(ours.logits(tokens), right, atol=1e-4, rtol=0)
    assert right.abs().max() > 1


def parted(theirs: OpenElm, a: Architecture) -> dict[str, torch.Tensor]:
    """The reference's weights with projections of their own for q, k, v, gate and up."""
    t = theirs.transformer
    found = {"model.embed_tokens.weight": t.token_embeddings.weight, "model.norm.weight": t.norm.weight}
    widths = [heads * a.head_dim for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads)]
    for layer, one in enumerate(t.layers):
        q, k, v = one.attn.qkv_proj.weight.split(widths)
        gate, up = one.ffn.proj_1.weight.chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        parts |= {"self_attn.o_proj": one.attn.out_proj.weight, "mlp.gate_proj": gate, "mlp.up_proj": up}
        parts |= {"mlp.down_proj": one.ffn.proj_2.weight, "input_layernorm": one.attn_norm.weight}
        parts |= {"self_attn.q_norm": one.attn.q_norm.weight, "self_attn.k_norm": one.attn.k_norm.weight}
        parts["post_attention_layernorm"] = one.ffn_norm.weight
        found |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    return found
