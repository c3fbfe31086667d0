"""Mixtures of experts: gradients, experts without tokens, both ways of multiplying, adapters, quantised weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import CONFIG, relative

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model import experts
from litrecipe.model.adapters import adapter_off, adapter_state, add_adapter, describe_parameters, merge_adapter
from litrecipe.model.architecture import Experts, count_parameters
from litrecipe.model.decoder import Decoder
from litrecipe.model.experts import ExpertMLPs, Mixture, route
from litrecipe.model.families import read_architecture
from litrecipe.model.laid_out import lay_out
from litrecipe.model.quantize import dequantize, quantize_linears
from litrecipe.model.reference import frozen_twin
from litrecipe.model.row import Sample, Segment, make_row

TOKENS = torch.tensor([5, 3, 90, 41, 2, 7, 7, 60, 13, 88])
MIXTRAL: dict[str, Any] = CONFIG | {
    "model_type": "mixtral",
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LORA = Adapter(method="lora", r=4, alpha=8)


def decoder(**changes: Any) -> Decoder:
    model = Decoder(read_architecture(MIXTRAL | changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


def moved(model: Decoder, seed: int = 0) -> Decoder:
    """The model with an adapter that does something."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model


def one_by_one(x: torch.Tensor, choice: torch.Tensor, share: torch.Tensor, gate_up: Any, down: Any) -> torch.Tensor:
    """Σ over a token's experts, token by token."""
    rows = []
    for token, places in enumerate(choice.tolist()):
        outputs = []
        for k, expert in enumerate(places):
            gate, up = F.linear(x[token], gate_up[expert]).chunk(2)
            outputs.append(share[token, k] * F.linear(F.silu(gate) * up, down[expert]))
        rows.append(sum(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_one_token_after_the_other(dtype: torch.dtype) -> None:
    """Forward and all gradients, by loops (fp64) and by torch's grouped products (fp32); the last of five experts is
    never chosen: its gradients are zero, and they are there."""
    mixture = ExpertMLPs(16, Experts(5, 2, 8)).to(dtype)
    chance = torch.Generator().manual_seed(0)
    for parameter in mixture.parameters():
        parameter.data.normal_(generator=chance)
    x = torch.randn(12, 16, dtype=dtype, generator=chance, requires_grad=True)
    choice = torch.randn(12, 4, generator=chance).topk(2).indices
    share = torch.rand(12, 2, dtype=dtype, generator=chance, requires_grad=True)
    learnt = [x, share, mixture.gate_up_proj, mixture.down_proj]
    direction = torch.randn(12, 16, dtype=dtype, generator=chance)
    found = []
    for y in (mixture(x, choice, share), one_by_one(x, choice, share, *learnt[2:])):
        found.append((y.detach(), *torch.autograd.grad((y * direction).sum(), learnt)))
    for ours, right in zip(*found, strict=True):
        assert relative(ours, right) < (1e-13 if dtype == torch.float64 else 2e-6)
    assert not found[0][3][4].any() and found[0][3][:4].any(1).any(1).all()


def test_no_tokens_at_all() -> None:
    """The last layer of an empty row: nothing comes out, and every weight gets a gradient of zeros."""
    for mixture in (ExpertMLPs(16, Experts(3, 2, 8)), quantised(ExpertMLPs(16, Experts(3, 2, 8)))):
        x = torch.zeros(0, 16, requires_grad=True)
        y = mixture(x, torch.zeros(0, 2).long(), torch.zeros(0, 2))
        assert y.shape == (0, 16)
        y.sum().backward()
        assert all(not p.grad.any() for p in mixture.parameters() if p.requires_grad)


def quantised(mixture: ExpertMLPs) -> ExpertMLPs:
    quantize_linears(mixture, Quantize(method="nf4"))
    return mixture


def test_shares() -> None:
    """Odds 1 : 2 : 5; the two best, among themselves, and among all."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    for renormalise, right in ((True, [5 / 7, 2 / 7]), (False, [5 / 8, 2 / 8])):
        choice, share = route(logits, Experts(3, 2, 8, renormalise=renormalise))
        assert choice.tolist() == [[2, 1]]
        torch.testing.assert_close(share, torch.tensor([right]))


def test_jitter_is_of_training_only() -> None:
    model = decoder(router_jitter_noise=0.3)
    assert torch.equal(model.eval().logits(TOKENS), decoder().logits(TOKENS))
    assert (model.train().logits(TOKENS) - decoder().logits(TOKENS)).abs().max() > 0.1


def test_a_router_is_fp32_in_a_model_of_bf16() -> None:
    """Its logits are those of fp32 arithmetic on what it reads, under autocast too."""
    mixture = Mixture(read_architecture(MIXTRAL), Experts(4, 2, 64))
    mixture.gate.weight.data.normal_()
    x = torch.randn(9, 64)
    right = F.linear(x, mixture.gate.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixture(x)[1], right)
    logits = mixture.bfloat16()(x.bfloat16())[1]
    assert logits.dtype == torch.float32 and torch.equal(
        logits, F.linear(x.bfloat16().float(), mixture.gate.weight.float())
    )


def test_what_routers_say_comes_of_all_tokens_and_changes_nothing() -> None:
    """The last layer is computed where something is predicted only, its router everywhere."""
    model = decoder()
    rng = np.random.default_rng(0)
    weights = np.zeros(7, np.float32), np.ones(3, np.float32)
    root, leaf = (Segment(rng.integers(0, 120, len(w)), w, parent) for w, parent in zip(weights, (-1, 0), strict=True))
    row = make_row([Sample("tree", (root, leaf))])
    plain = model(row)
    model.with_routing = True
    for model.activation_checkpointing in (False, True):
        heard = model(row)
        assert heard.router_logits.shape == (2, 10, 4)
        torch.testing.assert_close(heard.logps, plain.logps, atol=1e-6, rtol=1e-6)
    read: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *args: read.append(args[2]))
    model.logits(row.tokens)
    torch.testing.assert_close(heard.router_logits, torch.stack(read), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["none", "nf4", "int8"])
def test_adapters_train_and_merge(base: Any) -> None:
    """Their gradients are those of the same product written out; merged, the model says the same; off, the base."""
    model = decoder()
    if base != "none":
        quantize_linears(model, Quantize(method=base))
    before = model.logits(TOKENS).detach()
    add_adapter(model, LORA)
    torch.testing.assert_close(model.logits(TOKENS), before, atol=1e-5, rtol=1e-5)
    moved(model)
    logits = model.logits(TOKENS)
    assert (logits - before).abs().max() > 0.1
    with adapter_off(model):
        assert torch.equal(model.logits(TOKENS), before)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * direction).sum().backward()
    layer = model.model.layers[0].mlp.experts
    name, twin = "gate_up_proj", frozen_twin(model)
    merge_adapter(model)
    torch.testing.assert_close(model.logits(TOKENS), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twin.logits(TOKENS), logits, atol=1e-5, rtol=1e-5)
    # of W + s B A of each expert: dA = s Bᵀ dW, dB = s dW Aᵀ
    weight = model.model.layers[0].mlp.experts.gate_up_proj.requires_grad_()
    weight.grad = None
    (model.logits(TOKENS) * direction).sum().backward()
    update = layer.update(name)
    grad_a = 2 * torch.bmm(update.b.mT, weight.grad)
    assert relative(layer.lora_A[name].grad.view(grad_a.shape), grad_a) < 1e-4
    grad_b = 2 * torch.bmm(weight.grad, update.a.mT)
    found = layer.lora_B[name].grad.view(128, 4, 4).permute(2, 0, 1)
    assert relative(found, grad_b) < 1e-4


def test_quantised_experts_are_what_is_restored() -> None:
    model = decoder()
    quantize_linears(model, Quantize(method="nf4"))
    assert describe_parameters(model)["experts"].total == describe_parameters(decoder())["experts"].total
    got = model.logits(TOKENS)
    dequantize(model)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, torch.nn.Parameter)
    torch.testing.assert_close(model.logits(TOKENS), got, atol=1e-4, rtol=1e-4)
    assert (got - decoder().logits(TOKENS)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (Adapter(method="dora"), {}, "adapter.method: dora: experts can have LoRA only"),
        (Adapter(method="lora", dropout=0.1), {}, "adapter.dropout: 0.1: experts can have none: set it to 0, or leave"),
        (
            Adapter(method="lora"),
            {"model_type": "qwen3_moe", "mlp_only_layers": [1], "moe_intermediate_size": 32, "num_experts": 4},
            "adapter.targets: gate_proj, up_proj, down_proj: peft cannot tell experts from plain",
        ),
        (Adapter(method="lora", targets=["gate"]), {}, "adapter.targets: gate: no such layer: the model has k_proj, o"),
    ],
)
def test_what_peft_cannot_do_is_refused(config: Adapter, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        add_adapter(decoder(**changes), config)
    assert error.value.mistakes[0].startswith(named)
    if config.method == "dora":
        attention = Adapter(method="dora", targets=["q_proj", "o_proj"])
        add_adapter(model := decoder(**changes), attention)
        assert not any(".mlp." in name for name in adapter_state(model))


def test_counts() -> None:
    """Embedding and head 7680 each, attention 12288 a layer, router 256, four experts of 12288, norms 64."""
    architecture = read_architecture(MIXTRAL)
    whole = describe_parameters(Decoder(architecture))
    assert whole["experts"].total == 2 * 4 * 3 * 64 * 64 and whole["router"].total == 2 * 4 * 64
    assert count_parameters(architecture) == whole["all"].total
    assert whole["all"].total - count_parameters(architecture, active=True) == whole["experts"].total // 2


def test_sampling_goes_the_plain_way() -> None:
    assert lay_out(decoder()) is None


def test_both_ways_of_multiplying_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logits = decoder(), []
    for can in (True, False):
        monkeypatch.setattr(experts, "_can_group", lambda *_, can=can: can)
        logits.append(model.logits(TOKENS))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
