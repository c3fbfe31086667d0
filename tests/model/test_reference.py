"""The frozen reference: what it computes, what it shares, and that it stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import decoder

from litrecipe.config.groups import Adapter
from litrecipe.model.adapters import add_adapter
from litrecipe.model.reference import PolicyAndReference, frozen_twin
from litrecipe.model.row import Sample, Segment, make_row


def row():
    prompt = Segment(np.arange(3, 9), np.zeros(6, np.float32))
    answers = [Segment(np.arange(start, start + 5), np.ones(5, np.float32), parent=0) for start in (20, 40)]
    return make_row([Sample("a", (prompt, *answers))])


def adapted(method="lora", quantized="none", dropout=0.0):
    model = decoder(quantized)
    add_adapter(model, Adapter(method=method, r=4, alpha=8, dropout=dropout), seed=1)
    return model


def learn(model):
    """A large step on everything that learns."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("quantized", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_without_a_reference_it_is_the_base(method, quantized):
    model = PolicyAndReference(adapted(method, quantized))
    learn(model)
    found = model(row())
    assert torch.equal(found.ref_logps, decoder(quantized)(row()).logps)
    assert not torch.allclose(found.logps, found.ref_logps, atol=1e-3)
    assert found.logps.requires_grad and not found.ref_logps.requires_grad


@pytest.mark.parametrize("quantized", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_twin_of_an_adapter_shares_the_base_and_stays_as_it_was(method, quantized):
    policy = adapted(method, quantized)
    learn(policy)  # an adapter that was trained before
    was = policy(row()).logps.detach()
    twin = frozen_twin(policy)
    model = PolicyAndReference(policy, twin)
    assert torch.equal(model(row()).ref_logps, was)
    learn(policy)
    assert torch.equal(model(row()).ref_logps, was)
    assert not torch.equal(model(row()).logps, was)
    own = {id(p) for p in policy.parameters() if p.requires_grad}
    theirs = {id(p) for p in twin.parameters()}
    assert not own & theirs
    assert theirs >= {id(p) for p in policy.parameters() if not p.requires_grad}
    assert not any(p.requires_grad for p in twin.parameters())


def test_a_twin_of_a_whole_model_is_a_second_one():
    policy = decoder()
    was = policy(row()).logps.detach()
    twin = frozen_twin(policy)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight  # tied, as in the policy
    learn(policy)
    assert torch.equal(twin(row()).logps, was)
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in twin.parameters()}


@pytest.mark.parametrize("with_twin", [False, True])
def test_only_the_policy_learns_and_only_the_policy_drops_out(with_twin):
    policy = adapted(dropout=0.5)
    learn(policy)
    twin = frozen_twin(policy) if with_twin else None
    still = policy.eval()(row()).logps.detach()
    model = PolicyAndReference(policy, twin).train()
    first, second = model(row()), model(row())
    assert not torch.equal(first.logps, second.logps)
    assert torch.equal(first.ref_logps, second.ref_logps)
    if with_twin:
        assert torch.equal(first.ref_logps, still)
    first.logps.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("policy.") * parameter.requires_grad


@pytest.mark.parametrize("quantized", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_empty_row_still_takes_part_in_the_backward_pass(method, quantized):
    """A rank that has nothing in a step exchanges its gradients all the same; the last o_proj then sees no place."""
    policy = decoder(quantized)
    add_adapter(policy, Adapter(method=method, r=4, alpha=8, targets=["q_proj", "o_proj", "down_proj"]), seed=1)
    for reference in (None, frozen_twin(policy)):
        policy.zero_grad()
        found = PolicyAndReference(policy, reference)(make_row([]))
        assert found.logps.shape == found.ref_logps.shape == (0,)
        found.logps.sum().backward()
        assert all(not p.grad.any() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("has_reference", [True, False])
def test_the_divergence_is_that_of_all_logits(has_reference):
    """Of the answers and their ends, from logits of each whole text; the base is the reference where there is none."""
    policy = decoder() if has_reference else adapted()
    model = PolicyAndReference(policy, frozen_twin(policy) if has_reference else None, temperature=0.8)
    assert not model.divergence(row()).any()
    learn(policy)
    apart = []
    for start in (20, 40):
        text = torch.tensor([*range(3, 9), *range(start, start + 5)])
        p, q = (torch.log_softmax(one.logits(text)[5:-1] / 0.8, -1) for one in (policy, decoder()))
        apart.append((p.exp() * (p - q)).sum(-1).detach())
    expected = torch.cat(apart)
    assert expected.min() > 0.01
    torch.testing.assert_close(model.divergence(row()), expected, rtol=1e-4, atol=1e-5)
