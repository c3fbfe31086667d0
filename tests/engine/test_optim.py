"""Optimizers: which parameters decay, and a state that comes back bit for bit."""

import math

import pytest
import torch
from torch import nn

from litrecipe.checkpoint import state
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Optim
from litrecipe.engine.optim import (
    Role,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_rates,
    trained_parameters,
)


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


def moved(style, gradients, eps=1e-5, lr=0.1):
    """Where Adam takes a weight that starts at 0."""
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(1))
    config = Optim(lr=lr, eps=eps, adam_style=style)
    optimizer = make_optimizer(trained_parameters(net), config)
    for gradient in gradients:
        net.weight.grad = torch.tensor([gradient])
        set_rates(optimizer, config, {"": 1.0})
        optimizer.step()
    return net.weight.item()


GRADIENTS = [1e-5, -3e-5, 2e-5, 5e-5, 1e-6]


@pytest.mark.parametrize("style", ["torch", "tf"])
def test_adams_two_epsilons_by_hand(style):
    """Kingma and Ba's algorithm 1, m̂ / (√v̂ + ε), and the faster form at the end of their section 2, which TensorFlow
    runs: α √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε)."""
    m = v = weight = 0.0
    for t, gradient in enumerate(GRADIENTS, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        if style == "torch":
            weight -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-5)
        else:
            weight -= 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + 1e-5)
    assert moved(style, GRADIENTS) == pytest.approx(weight, rel=1e-5)


def test_epsilon_outside_of_the_bias_correction_holds_early_steps_back():
    """As PPO's first programs had it: at ε = 1e-5 the policy moved less in two epochs, approxkl .00037 against .00237
    (Huang et al., 2023). With a gradient of 1e-5 the first step is ½ of the rate, and 1/33 of it."""
    assert moved("torch", [1e-5]) == pytest.approx(-0.1 / 2, rel=1e-4)
    assert moved("tf", [1e-5]) == pytest.approx(-0.1 / (1 + 1 / math.sqrt(0.001)), rel=1e-3)


def test_roles_have_rates_of_their_own():
    net = nn.ModuleDict({"policy": nn.Linear(2, 2), "critic": nn.Linear(2, 2)})
    roles = [Role("policy", 1e-3, 1.0), Role("critic", 1e-2, None)]
    optimizer = make_optimizer(trained_parameters(net), Optim(weight_decay=0.1), roles)
    set_rates(optimizer, Optim(), {"policy": 0.5, "critic": 0.25})
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, rate in (("policy", 5e-4), ("critic", 2.5e-3)):
        assert [rates[id(p)] for p in net[name].parameters()] == [pytest.approx(rate)] * 2


def test_the_state_of_another_optimizer_is_refused():
    with pytest.raises(InputError, match=r"optim\.name: sgd"):
        load_optimizer_state(torch.optim.SGD(model().parameters()), {}, None, "sgd", "adamw (fused)")
