"""Adapters: equal to peft's own computation, exact when off, merged without a trace, read by peft."""


import pytest
import torch
from torch import nn

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import (
    adapter_config,
    adapter_off,
    adapter_state,
    add_adapter,
    describe_parameters,
    load_adapter_state,
    merge_adapter,
    refresh_dora,
)
from litrecipe.model.architecture import read_architecture
from litrecipe.model.decoder import Decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METHODS = ["lora", "dora"]
TOKENS = torch.arange(3, 40)


def decoder(**changes):
    model = Decoder(read_architecture(CONFIG | changes))
    model.init_weights(seed=0)
    return model


def adapted(method="lora", **changes):
    """A decoder whose adapter says something: B is zero when it is fresh."""
    model = decoder(**changes)
    add_adapter(model, Adapter(method=method, r=4, alpha=8), seed=1)
    shake(model)
    return model


def shake(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def step(model, tokens=TOKENS):
    """Logits, and the gradients of some scalar of them."""
    model.zero_grad()
    logits = model.logits(tokens)
    logits.log_softmax(-1)[:, 5].sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def with_peft(model, method, **settings):
    """The same model under peft's own layers and forward pass."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = Adapter().targets
    inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=method == "dora", **settings), model
    )
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equals_pefts_own_forward_and_gradients(method, bias):
    flags = {"attention_bias": bias, "mlp_bias": bias}
    ours = adapted(method, **flags).double()
    theirs = with_peft(decoder(**flags), method).double()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.load_state_dict(ours.state_dict())
    theirs.requires_grad_(False)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name)
    (logits, gradients), (expected, expected_gradients) = step(ours), step(theirs)
    assert relative(logits, expected) < 1e-6  # norms and rotations are fp32 inside
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-6, name
