"""Quantised layers: what they compute, what they cost, and training an adapter on them."""

import copy
import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from small import decoder, relative
from torch import nn

from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import adapter_off, add_adapter, describe_parameters
from litrecipe.model.quantize import dense_weight, dequantize, quantize_linear, quantize_linears

KINDS = ["nf4", "int8"]
TOKENS = torch.arange(3, 40)


def loss_of(model):
    return F.cross_entropy(model.logits(TOKENS[:-1]), TOKENS[1:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_the_product_with_its_restored_weight(kind, bias):
    torch.manual_seed(0)
    layer = quantize_linear(nn.Linear(64, 96, bias=bias), Quantize(method=kind))
    for shape in ((5, 64), (2, 3, 64), (1, 64), (0, 64)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, F.linear(x, dense_weight(layer, torch.float32), layer.bias))
        grad = torch.randn_like(y)
        y.backward(grad)
        assert torch.equal(x.grad, grad @ dense_weight(layer, torch.float32))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_nf4_rounds_to_the_nearest_of_its_sixteen_values():
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    weight = linear.weight.detach().clone()
    restored = dense_weight(quantize_linear(linear, Quantize(method="nf4", double_quant=False)), torch.float32)
    largest = weight.abs().amax(1, keepdim=True)  # a row is one block
    code = bnb.functional.get_4bit_type("nf4", device="cpu").data
    nearest = code[(weight / largest)[..., None].sub(code).abs().argmin(-1)] * largest
    torch.testing.assert_close(restored, nearest)


def test_int8_rounds_each_row_to_127_steps():
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    weight = linear.weight.detach().half().float()  # what bitsandbytes starts from
    restored = dense_weight(quantize_linear(linear, Quantize(method="int8")), torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(restored, (weight / step).round() * step)


@pytest.mark.parametrize("double_quant", [False, True])
def test_double_quantisation_is_the_recipes_choice(double_quant):
    layer = quantize_linear(nn.Linear(64, 64), Quantize(method="nf4", double_quant=double_quant))
    assert layer.quant_state.nested is double_quant


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_quantised_and_embedding_and_head_are_not(kind):
    model = decoder(kind, tie_word_embeddings=False)
    wanted = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[kind]
    for layer in model.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        assert len(linears) == 7
        assert all(isinstance(module, wanted) for module in linears)
    assert type(model.lm_head) is nn.Linear
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert (
        describe_parameters(model)["all"].total == describe_parameters(decoder(tie_word_embeddings=False))["all"].total
    )


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.14), ("int8", 0.26)])
def test_memory_falls(kind, share):
    """Every tensor that came with the model counts, wherever it hangs."""
    strangers = tensors()  # what other tests left behind, also tensors that hold no memory of their own
    model = decoder(hidden_size=256, intermediate_size=768)
    before = sum(p.nbytes for p in model.model.layers.parameters())
    old = [weakref.ref(p) for p in model.model.layers.parameters() if p.ndim == 2]
    alive = nbytes(strangers)
    quantize_linears(model, Quantize(method=kind))
    fell = alive - nbytes(strangers)
    assert not any(ref() is not None for ref in old)
    assert fell > (1 - share) * before


def tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def nbytes(strangers):
    """Bytes of the memory that all tensors but the strangers hold, each storage once."""
    known = {id(thing) for thing in strangers}
    storages = [thing.untyped_storage() for thing in tensors() if id(thing) not in known]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_is_a_plain_model_that_computes_the_same(kind):
    model = decoder(kind, attention_bias=True)
    expected = model.logits(TOKENS)
    dequantize(model)
    assert torch.equal(model.logits(TOKENS), expected)
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    dequantize(model, dtype=torch.bfloat16)  # nothing is left to restore
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_casting_and_copying_a_model_keep_its_values(kind):
    model = decoder(kind)
    weight = dense_weight(model.model.layers[0].mlp.up_proj, torch.float32)
    clone = copy.deepcopy(model)
    model.to(torch.bfloat16).to("cpu")
    for other in (clone, model):
        assert torch.equal(dense_weight(other.model.layers[0].mlp.up_proj, torch.float32), weight)
    assert model.logits(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_restored_in_the_dtype_the_layer_had(kind):
    layer = quantize_linear(nn.Linear(64, 64, dtype=torch.bfloat16), Quantize(method=kind))
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "method"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora"), ("int8", "dora")])
def test_an_adapter_gets_the_gradients_of_the_restored_base(kind, method):
    gradients = []
    for restore in (False, True):
        model = decoder(kind)
        if restore:
            dequantize(model)
        add_adapter(model, Adapter(method=method, r=4, alpha=8, targets=["q_proj", "down_proj"]), seed=1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(relative(gradients[0][name], gradients[1][name]) < 1e-6 for name in gradients[1])


@pytest.mark.parametrize(("kind", "method"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora"), ("int8", "dora")])
def test_an_adapter_learns_also_after_an_evaluation(kind, method):
    model = decoder(kind, initializer_range=0.2)
    expected = model.logits(TOKENS)
    add_adapter(model, Adapter(method=method, r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        model.eval()
        with torch.no_grad():
            losses.append(loss_of(model).item())
        model.train()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)
    with adapter_off(model):
        assert torch.equal(model.logits(TOKENS), expected)
