"""Optimizers: which parameters decay, and a state that comes back bit for bit."""

import pytest
import torch
from torch import nn

from litrecipe.checkpoint import state
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Optim
from litrecipe.engine.optim import load_optimizer_state, make_optimizer, optimizer_state, trained_parameters


def model():
    torch.manual_seed(0)
    # Large enough that bitsandbytes keeps its moments in 8 bits (from 4096 values on).
    net = nn.Sequential(nn.Linear(80, 80), nn.LayerNorm(80), nn.Linear(80, 60))
    net[2].bias.requires_grad_(False)
    return net


def take_steps(net, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        net(torch.randn(16, 80, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_decay_spares_vectors_and_nothing_frozen_is_trained():
    net = model()
    optimizer = make_optimizer(trained_parameters(net), Optim(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay.get(id(p)) for name, p in net.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": None,
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit", "paged_adamw8bit"])
def test_saved_and_loaded_continues_to_the_bit(tmp_path, name):
    config = Optim(name=name, lr=1e-2, weight_decay=0.01)
    unbroken = model()
    optimizer = make_optimizer(trained_parameters(unbroken), config)
    take_steps(unbroken, optimizer, 3, seed=1)
    parameters = trained_parameters(unbroken)
    target = tmp_path / "step-00000003"
    state.save(target, parameters, optimizer_state(optimizer, parameters), {"step": 3})
    take_steps(unbroken, optimizer, 3, seed=2)

    resumed = model()
    again = make_optimizer(trained_parameters(resumed), config)
    saved = state.Saved(target)
    with torch.no_grad():
        for key, parameter in trained_parameters(resumed).items():
            parameter.copy_(saved.tensors("weights").read(key))
    load_optimizer_state(again, trained_parameters(resumed), saved.tensors("optimizer"), name, name)
    take_steps(resumed, again, 3, seed=2)
    for (key, a), b in zip(unbroken.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key
    first, second = optimizer_state(optimizer, parameters), optimizer_state(again, trained_parameters(resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if "8bit" in name:
        assert first["0.weight::state1"].dtype == torch.uint8


def test_the_state_of_another_optimizer_is_refused():
    with pytest.raises(InputError, match=r"optim\.name: sgd"):
        load_optimizer_state(torch.optim.SGD(model().parameters()), {}, None, "sgd", "adamw (fused)")
