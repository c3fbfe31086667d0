from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import generate
from litrecipe.model.families import read_architecture, to_hf_config
from litrecipe.model.row import Row, Sample, Segment, make_row

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FLAGS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "head-dim": {"head_dim": 12},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
}


def make_model(seed: int = 0, **change: Any) -> Decoder:
    """A shrunken decoder whose weights are large enough that everything matters to its logits."""
    model = Decoder(read_architecture(CONFIG | change))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


def segment(rng: np.random.Generator, length: int, parent: int = -1) -> Segment:
    weights = rng.integers(0, 2, length).astype(np.float32)
    weights[-1] = 1
    if parent < 0:
        weights[0] = 0
    return Segment(rng.integers(0, CONFIG["vocab_size"], length), weights, parent)


def conversations(*lengths: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(f"c{index}", (segment(rng, length),)) for index, length in enumerate(lengths)]


def tree(seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    parents = [(9, -1), (4, 0), (6, 0), (3, 1), (1, 1)]
    return Sample("tree", tuple(segment(rng, length, parent) for length, parent in parents))


def unshared(sample: Sample) -> list[Sample]:
    """Each segment of a tree with its whole path as a conversation of its own, predicting that segment only."""
    alone = []
    for segment in sample.segments:
        path, at = [segment], segment.parent
        while at >= 0:
            path.insert(0, sample.segments[at])
            at = sample.segments[at].parent
        weights = [np.zeros(len(s.tokens), np.float32) for s in path[:-1]] + [segment.weights]
        tokens = np.concatenate([s.tokens for s in path])
        alone.append(Sample("path", (Segment(tokens, np.concatenate(weights)),)))
    return alone


def loss_and_gradients(model: Decoder, rows: list[Row]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed weighted loss over the rows, and its gradients."""
    model.zero_grad()
    losses = []
    for row in rows:
        loss = -(model(row).logps * row.weight).sum()
        loss.backward()
        losses.append(loss.detach())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum(), gradients


def assert_same(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("flag", FLAGS)
def test_logits_and_gradients_equal_transformers(flag: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make_model(**FLAGS[flag])
    theirs = LlamaForCausalLM(LlamaConfig(**to_hf_config(model.architecture))).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    tokens = torch.randint(0, CONFIG["vocab_size"], (100,))
    ours, right = model.logits(tokens), theirs(tokens[None]).logits[0]
    assert right.abs().max() > 1
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=0)
    direction = torch.randn_like(right)
    (ours * direction).sum().backward()
    (right * direction).sum().backward()
    for name, parameter in theirs.named_parameters():
        difference = (model.get_parameter(name).grad - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, name


def test_logps_and_hits_are_those_of_the_logits() -> None:
    model, (sample,) = make_model(), conversations(20)
    row = make_row([sample])
    predictions = model(row, temperature=0.5)
    logits = model.logits(row.tokens)[row.predict_from]
    assert_same(predictions.logps, (logits / 0.5).log_softmax(1).gather(1, row.target[:, None])[:, 0])
    assert torch.equal(predictions.correct, logits.argmax(1) == row.target)


@pytest.mark.parametrize("flag", ["gqa", "llama3", "tied"])
def test_packed_equals_unpacked(flag: str) -> None:
    model, samples = make_model(**FLAGS[flag]), conversations(5, 17, 3, 9)
    loss, gradients = loss_and_gradients(model, [make_row(samples)])
    alone, right = loss_and_gradients(model, [make_row([sample]) for sample in samples])
    assert_same(loss, alone)
    assert_same(gradients, right)


def test_a_tree_equals_its_unshared_paths() -> None:
    model, sample = make_model(), tree()
    loss, gradients = loss_and_gradients(model, [make_row([*conversations(4), sample])])
    alone, right = loss_and_gradients(model, [make_row(conversations(4)), make_row(unshared(sample))])
    assert_same(loss, alone)
    assert_same(gradients, right)


@pytest.mark.parametrize("frozen_base", [True, False])
def test_an_empty_row_gives_zero_gradients_everywhere(frozen_base: bool) -> None:
    model = make_model()
    if frozen_base:
        model.requires_grad_(False)
        model.model.layers[0].get_parameter("self_attn.q_proj.weight").requires_grad_()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss, gradients = loss_and_gradients(model, [make_row([])])
    assert loss == 0
    assert set(gradients) == trained
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("frozen_base", [True, False])
def test_activation_checkpointing_changes_nothing(frozen_base: bool) -> None:
    model, row = make_model(), make_row([*conversations(5, 9), tree()])
    if frozen_base:
        model.requires_grad_(False)
        model.model.layers[0].get_parameter("mlp.up_proj.weight").requires_grad_()
    loss, gradients = loss_and_gradients(model, [row])
    model.activation_checkpointing = True
    again, right = loss_and_gradients(model, [row])
    assert torch.equal(loss, again)
    assert gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, right[name]), name


def test_gradients_in_fp64() -> None:
    """Norm, gate and head have backward passes of their own."""
    model = make_model(num_hidden_layers=2).double()
    row = make_row([tree()])
    names = ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"]
    names += ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    parameters = dict(model.named_parameters())

    def logps(*values: torch.Tensor) -> torch.Tensor:
        changed = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, changed, (row,)).logps

    values = [parameters[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(logps, values, fast_mode=True)


@pytest.mark.parametrize("how", ["true", "mixed"])
def test_bf16_is_near_fp32(how: str) -> None:
    model, row = make_model(), make_row([*conversations(15, 9), tree()])
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    right, gradients = loss_and_gradients(model, [row])
    if how == "true":
        loss, near = loss_and_gradients(model.bfloat16(), [row])
        assert near["lm_head.weight"].dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss, near = loss_and_gradients(model, [row])
        assert near["lm_head.weight"].dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, right, rtol=5e-3, atol=0)
    for name, gradient in near.items():
        off = (gradient.float() - gradients[name]).norm() / gradients[name].norm()
        assert off < 0.05, name


def test_tied_weights_are_one_parameter() -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_made_on_meta_and_filled() -> None:
    with torch.device("meta"):
        model = Decoder(read_architecture(CONFIG | {"tie_word_embeddings": True, "attention_bias": True}))
    model.to_empty(device="cpu")
    model.init_weights(seed=3)
    again = Decoder(model.architecture)
    again.init_weights(seed=3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert abs(parameter.std().item() - 0.02) < 0.003
    again.init_weights(seed=4)
    assert not torch.equal(model.lm_head.weight, again.lm_head.weight)
    row = make_row(conversations(6))
    assert model(row).logps.mean().item() == pytest.approx(-np.log(CONFIG["vocab_size"]), abs=0.2)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_for_any_row() -> None:
    model = make_model()
    rows = [make_row(conversations(5, 9)), make_row([tree()]), make_row(conversations(33))]
    eager = [loss_and_gradients(model, [row]) for row in rows]
    answers = generate(model, [[1, 2, 3], [4]], max_new_tokens=6)
    names = set(model.state_dict())
    model.compile_blocks()
    assert set(model.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    for row, (loss, gradients) in zip(rows, eager, strict=True):
        again, right = loss_and_gradients(model, [row])
        assert_same(loss, again)
        assert_same(gradients, right)
    assert generate(model, [[1, 2, 3], [4]], max_new_tokens=6) == answers
    # Graphs around the attention of a layer at all places and of the last, with gradients and without; none for another
    # row or another step.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 14
