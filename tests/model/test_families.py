"""Every family against transformers: logits, gradients, windows, packing, decoding, and what is written back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from openelm import OPENELM, OpenElm

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Architecture, LayerKind, Rope, count_parameters
from litrecipe.model.cache import CacheStep, KVCache
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import FAMILIES, names_of, read_architecture, to_hf_config
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Sample, Segment, make_row

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.1, 2.0, 5.0, 9.0]}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 9},
    "phi3": {},
    "phi3, window": {"sliding_window": 9, "num_key_value_heads": 4},
    "phi3, part of a head": {"partial_rotary_factor": 0.5, "sliding_window": 9},
    "phi3, long": {"rope_scaling": LONG, "original_max_position_embeddings": 16},
    "phi3, short": {"rope_scaling": {**LONG, "attention_factor": 0.7}, "original_max_position_embeddings": 64},
    "phi3, long in part": {
        "rope_scaling": {name: values[:2] if name != "type" else values for name, values in LONG.items()},
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.5,
    },
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen2, yarn": {"rope_scaling": YARN},
    "qwen2, yarn as told": {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 0.8}},
    "qwen2, unused window": {"use_sliding_window": False, "sliding_window": 5},
    "qwen2, window above": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {},
    "qwen3, other heads": {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    "olmo2": {},
    "olmo2, no groups": {"num_key_value_heads": 4, "attention_bias": True},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral, three of four, window": {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 9},
    "qwen3_moe": {**QWEN3_MOE, "norm_topk_prob": True},
    "qwen3_moe, shares of all": {**QWEN3_MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    "qwen3_moe, plain layers": {
        **QWEN3_MOE,
        "mlp_only_layers": [0, 3],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "smollm3": {},
    "smollm3, other layers": {"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 5},
    "granite": {},
    "granite, multipliers": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.25,
        "logits_scaling": 0.25,
    },
    "gemma": {},
    "gemma, one head": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 24},
    "gemma2, no caps": {"sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2, tight caps": {"sliding_window": 64, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "gemma3_text, scaled": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 100.0,
    },
    "gpt_neox": {},
    "gpt_neox, one after the other": {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
    "gpt_neox, no biases": {"attention_bias": False, "rotary_emb_base": 500, "tie_word_embeddings": True},
    "gpt2": {},
    "gpt2, other scores": {"scale_attn_weights": False, "activation_function": "gelu", "n_inner": 40},
    "gpt2, head of its own": {"tie_word_embeddings": False},
    "openelm": {},
}


def family_of(case: str) -> str:
    return case.partition(",")[0]


def theirs_of(case: str, **change: Any) -> Any:
    """transformers' model of a case, or what stands in for it, with weights that all matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family_of(case) == "openelm":
        return with_weights(OpenElm(OPENELM))
    given = SMALL | CASES[case] | change
    if family_of(case) in ("phi3", "qwen2", "olmo2", "smollm3", "llama") and given["head_dim"] == 8:
        del given["head_dim"]  # the size of a head follows from the others
    config = AutoConfig.for_model(family_of(case), **given)
    return with_weights(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def with_weights(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data *= 4  # the wider its logits are apart, the rarer are ties
    return without_ties(model, getattr(model.config, "num_experts_per_tok", 0))


def without_ties(model: Any, chosen: int) -> Any:
    """The model, which fails where the last expert that is chosen is so near to the next that rounding would decide."""

    def look(_: torch.nn.Module, __: Any, output: Any) -> None:
        logits = output if isinstance(output, torch.Tensor) else output[0]
        best = logits.detach().topk(chosen + 1, -1).values
        assert (best[:, -2] - best[:, -1]).min() > 3e-5

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(look)
    return model


LONGEST = 40
"""Tokens of the longest sequence."""


def ours_of(theirs: Any) -> Decoder:
    """The same weights."""
    architecture = read_architecture(json.loads(json.dumps(theirs.config.to_dict(), default=str)))
    model = Decoder(architecture.for_length(LONGEST))
    absent = model.load_state_dict(as_in_memory(theirs.state_dict(), architecture), strict=False)
    assert not absent.unexpected_keys and set(absent.missing_keys) <= {"lm_head.weight"}  # where that is tied
    return without_ties(model, getattr(theirs.config, "num_experts_per_tok", 0))


def as_in_memory(tensors: dict[str, torch.Tensor], architecture: Architecture) -> dict[str, torch.Tensor]:
    """Tensors of transformers' model under our names, in our layouts."""
    return dict(names_of(architecture).read(tensors.items(), architecture))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_all_families_are_here() -> None:
    assert {family_of(case) for case in CASES} == set(FAMILIES)


def test_logits_and_gradients_equal_transformers(case: str) -> None:
    theirs = theirs_of(case)
    ours = ours_of(theirs)
    tokens = torch.randint(0, SMALL["vocab_size"], (LONGEST,), generator=torch.Generator().manual_seed(1))
    got, right = ours.logits(tokens), theirs(tokens[None]).logits[0]
    assert right.abs().max() > 1
    torch.testing.assert_close(got, right, atol=1e-4, rtol=0)
    direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(2))
    (got * direction).sum().backward()
    (right * direction).sum().backward()
    gradients = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None and one.grad.any()}
    found = {name: one.grad for name, one in ours.named_parameters() if one.grad is not None and one.grad.any()}
    for name, gradient in as_in_memory(gradients, ours.architecture).items():
        apart = (found.pop(name) - gradient).norm() / gradient.norm()
        assert apart < 2e-5, name
    assert not found


def test_a_left_padded_batch_of_theirs_equals_our_rows(case: str) -> None:
    theirs = theirs_of(case)
    ours = ours_of(theirs)
    chance = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, SMALL["vocab_size"], (length,), generator=chance) for length in (17, 6, 11)]
    batch, mask = torch.zeros(3, 17, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.int64)
    for place, text in enumerate(texts):
        batch[place, 17 - len(text) :] = text
        mask[place, 17 - len(text) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        right = theirs(batch, attention_mask=mask, position_ids=positions).logits
        for place, text in enumerate(texts):
            torch.testing.assert_close(ours.logits(text), right[place, 17 - len(text) :], atol=1e-4, rtol=0)


def segment(rng: np.random.Generator, length: int, parent: int = -1) -> Segment:
    weights = np.ones(length, np.float32)
    weights[0] = parent >= 0
    return Segment(rng.integers(0, SMALL["vocab_size"], length), weights, parent)


def test_packed_trees_equal_their_paths(case: str) -> None:
    """A branch sees through its window the last tokens of its path, not of the row."""
    model = ours_of(theirs_of(case))
    rng = np.random.default_rng(0)
    root, left, right, leaf = (segment(rng, n, parent) for n, parent in ((9, -1), (6, 0), (7, 0), (4, 1)))
    alone = Sample("alone", (segment(rng, 13),))
    with torch.no_grad():
        logps = model(make_row([alone, Sample("tree", (root, left, right, leaf))])).logps
        for path, start in (((root, left, leaf), 12 + 8 + 6 + 7), ((root, right), 12 + 8 + 6)):
            tokens = torch.from_numpy(np.concatenate([one.tokens for one in path]))
            wanted = model.logits(tokens)[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            last = len(path[-1].tokens)
            torch.testing.assert_close(logps[start : start + last], wanted[-last:], atol=1e-5, rtol=1e-5)


def test_decoding_equals_reading_all_at_once(case: str) -> None:
    """Prompts of unlike lengths, one for two completions, then a token at a time beyond every window."""
    model = ours_of(theirs_of(case))
    cache = KVCache(model.architecture)
    cache.resize(3, 30)
    chance = torch.Generator().manual_seed(4)
    first, second = (torch.randint(0, SMALL["vocab_size"], (length,), generator=chance) for length in (10, 3))
    texts = [first, first, second]
    with torch.no_grad():
        logits = model.decode(torch.cat((first, second)), CacheStep(cache, [], [10, 3], [2, 1]))
        logits = logits[[0, 0, 1]]
        for _ in range(8):
            for text, one in zip(texts, logits, strict=True):
                torch.testing.assert_close(one, model.logits(text)[-1], atol=1e-4, rtol=1e-5)
            new = torch.randint(0, SMALL["vocab_size"], (3,), generator=chance)
            logits = model.decode(new, CacheStep(cache, [len(text) for text in texts]))
            texts = [torch.cat((text, token[None])) for text, token in zip(texts, new, strict=True)]


def test_written_configs_mean_the_same_to_us_and_to_transformers(case: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = theirs_of(case)
    architecture = read_architecture(theirs.config.to_dict())
    written = json.loads(json.dumps(to_hf_config(architecture)))
    assert read_architecture(written) == architecture
    if isinstance(theirs, OpenElm):  # its own keys mean what they meant
        assert {key: written[key] for key in OPENELM} == OPENELM
        assert "qkv_multipliers" not in written
        return
    config = AutoConfig.for_model(**written)
    assert read_architecture(config.to_dict()) == architecture
    assert [type(theirs).__name__] == written["architectures"]
    again = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    again.load_state_dict(theirs.state_dict())
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_count_of_parameters(case: str) -> None:
    architecture = read_architecture(theirs_of(case).config.to_dict())
    with torch.device("meta"):
        assert count_parameters(architecture) == sum(p.numel() for p in Decoder(architecture).parameters())
        judge = RewardModel(architecture)
    assert count_parameters(architecture, is_reward_model=True) == sum(p.numel() for p in judge.parameters())


def test_fresh_norms_change_nothing() -> None:
    """Gemma's weights are what is added to 1."""
    for family, value in (("gemma", 0), ("llama", 1)):
        model = Decoder(read_architecture(SMALL | {"model_type": family}))
        model.init_weights(0)
        assert (model.model.norm.weight == value).all()
        assert (model.model.norm.factor() == 1).all()


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "gpt2"])
def test_bf16_is_as_near_to_fp32_as_theirs(family: str) -> None:
    """Gemma's norms are multiplied before they are cast, and the embedding's scale is rounded."""
    theirs = theirs_of(family)
    ours, tokens = ours_of(theirs), torch.arange(30)
    with torch.no_grad():
        exact = ours.logits(tokens)
        apart, right = ours.bfloat16().logits(tokens) - exact, theirs.bfloat16()(tokens[None]).logits[0] - exact
    assert apart.norm() < 1.2 * right.norm()
    assert right.norm() < 0.05 * exact.norm()


# -- published configs ------------------------------------------------------------------------------------------------

GEMMA3_270M: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
}


PYTHIA: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2_SMALL: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
PHI3_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [64.5] * 48},
    "sliding_window": 262144,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("config", "parameters"), [(PYTHIA, 162_322_944), (GPT2_SMALL, 124_439_808), (PHI3_MINI, 3_821_079_552)]
)
def test_published_models_have_their_parameters(config: dict[str, Any], parameters: int) -> None:
    assert count_parameters(read_architecture(config)) == parameters


def test_what_published_configs_say_and_leave_out() -> None:
    pythia, gpt2, phi3 = map(read_architecture, (PYTHIA, GPT2_SMALL, PHI3_MINI))
    assert pythia.ropes == (Rope(10000.0, None, 0.25),) and pythia.parallel and pythia.activation == "gelu"
    assert (pythia.bos_id, pythia.eos_ids) == (0, (0,)) and pythia.qkv_bias and pythia.o_bias
    assert gpt2.tie_embeddings and gpt2.intermediate_size == 3072 and gpt2.activation == "gelu_tanh"
    scaling = phi3.ropes[0].scaling
    assert scaling is not None and scaling["rope_type"] == "longrope"
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (32, 4096)
    # transformers 4 refuses a scaling of other keys
    written = to_hf_config(phi3)
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert written["original_max_position_embeddings"] == 4096


def test_gemma_3_has_a_global_layer_of_six() -> None:
    a = read_architecture(GEMMA3_270M)
    assert a.ropes == (Rope(1e6), Rope(1e4))
    assert [layer for layer in range(18) if a.kind(layer) == LayerKind(None, 0)] == [5, 11, 17]
    assert a.kind(0) == LayerKind(512, 1)
    assert a.attention_softcap is None and a.tie_embeddings and a.query_scalar == 256


def test_gemma_2_caps_unless_the_config_says_null() -> None:
    base = SMALL | {"model_type": "gemma2"}
    a = read_architecture(base)
    assert (a.attention_softcap, a.final_softcap, a.kind(0).window, a.kind(1).window) == (50.0, 30.0, 4096, None)
    assert read_architecture(base | {"final_logit_softcapping": None}).final_softcap is None


def test_smollm3_leaves_out_every_fourth() -> None:
    a = read_architecture(SMALL | {"model_type": "smollm3", "num_hidden_layers": 8})
    assert [a.kind(layer).rope for layer in range(8)] == [0, 0, 0, None, 0, 0, 0, None]
    assert a.ropes[0].theta == 2e6


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5}
"""What a config of GPT-2 needs."""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "config.json: hidden_activation: relu: only gelu_pyt"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "config.json: layer_types: full_attention (1)"),
        ({"model_type": "gemma2", "layer_types": ["x"] * 4}, "config.json: layer_types: x, x, x, … (4): must name"),
        ({"model_type": "gemma2", "layer_types": "all"}, "config.json: layer_types: 'all': must be a list"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "config.json: no_rope_layers: 1, 2 (2): must have a 0"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, "config.json: rope_parameters.full"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "config.json: use_bidirectional"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "config.json: sliding_window: 'wide': must be a whole"),
        (
            {"model_type": "phi3", "rope_scaling": {**YARN, "type": "linear"}},
            "config.json: rope_scaling.short_factor: No",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "config.json: rope_scaling.ro",
        ),
        ({"model_type": "phi3", "rope_scaling": {**LONG, "long_factor": [1.0]}}, "config.json: rope_scaling.long_fac"),
        ({"model_type": "phi3", "rope_scaling": {**LONG, "short_factor": [0] * 4}}, "config.json: rope_scaling.short_"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "config.json: partial_rotary_factor: 1.5: must be a"),
        ({"model_type": "llama", "partial_rotary_factor": 0.75}, "config.json: partial_rotary_factor: 0.75: all of a"),
        ({"model_type": "gpt_neox", "layer_norm_eps": 1e-5, "rotary_pct": "x"}, "config.json: rotary_pct: 'x': must"),
        ({"model_type": "gpt_neox"}, "config.json: layer_norm_eps: missing"),
        ({"model_type": "gpt2", "n_embd": 8, "n_layer": 0}, "config.json: n_layer: 0: must be a whole number above 0"),
        ({"model_type": "gpt2", **GPT2, "add_cross_attention": True}, "config.json: add_cross_attention: true: only"),
        ({"model_type": "gpt2", **GPT2, "activation_function": "relu"}, "config.json: activation_function: relu: only"),
        ({"model_type": "qwen2", "rope_scaling": {**YARN, "beta_fast": "x"}}, "config.json: rope_scaling.beta_fast"),
    ],
)
def test_refusals_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        read_architecture(SMALL | change)
    assert error.value.mistakes[0].startswith(named)
