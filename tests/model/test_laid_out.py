"""Weights laid out for sampling: the same logits as the model's own layers, and nothing of the model touched."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small import decoder

from litrecipe.config.groups import Adapter
from litrecipe.model import decoding, laid_out
from litrecipe.model.adapters import adapter_off, add_adapter
from litrecipe.model.cache import CacheStep, KVCache
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import generate
from litrecipe.model.laid_out import LaidOut, lay_out, size

PROMPTS = [[3, 7, 9, 4], [5], [8, 8, 60, 2, 1, 30, 4], [90, 14]]
BIASES = {"attention_bias": True, "mlp_bias": True}
SHAPES = {"plain": {}, "biases": BIASES, "all heads": {"num_key_value_heads": 4}, "wide heads": {"head_dim": 24}}
SHAPES |= {
    "window": {"model_type": "mistral", "sliding_window": 3},
    "some biases": {"model_type": "qwen2"},
    "no positions": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "fused": {"model_type": "phi3", "sliding_window": None},
    "part of a head turns": {"model_type": "phi3", "partial_rotary_factor": 0.5},
}


def adapted(method: str, **changes: object) -> Decoder:
    """A decoder on one of whose layers an adapter says something, and leaves out others."""
    model = decoder(spread=0.3, **changes)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    add_adapter(model, Adapter(method=method, r=4, alpha=8, dropout=0.5, targets=targets), seed=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def logits_of(model: Decoder, decode) -> list[torch.Tensor]:
    """Prompts enter, go on by a token, and go on while another enters."""
    cache = KVCache(model.architecture)
    cache.resize(5, 12)
    lengths = [len(prompt) for prompt in PROMPTS]
    first = decode(torch.tensor([token for prompt in PROMPTS for token in prompt]), CacheStep(cache, [], lengths))
    second = decode(torch.tensor([11, 12, 13, 14]), CacheStep(cache, lengths))
    third = decode(torch.tensor([1, 2, 3, 4, 77, 78]), CacheStep(cache, [n + 1 for n in lengths], [2]))
    return [first, second, third]


def assert_same(model: Decoder) -> None:
    copied = lay_out(model)
    assert copied is not None
    for found, wanted in zip(logits_of(model, copied.decode), logits_of(model, model.decode), strict=True):
        # two orders of adding up in fp32, of sums no longer than 128
        torch.testing.assert_close(found, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_layers(changes: dict) -> None:
    assert_same(decoder(spread=0.3, **changes))


@pytest.mark.parametrize("changes", [{}, BIASES, SHAPES["fused"]], ids=["plain", "biases", "fused"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_in_the_copies_where_it_is_on(method: str, changes: dict) -> None:
    model = adapted(method, **changes)
    assert_same(model)
    with adapter_off(model):
        assert_same(model)
        off = logits_of(model, model.decode)[0]
    assert (logits_of(model, model.decode)[0] - off).abs().max() > 0.1


def test_what_cannot_be_copied_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lay_out(decoder()) is not None
    assert lay_out(decoder().double()) is None
    for family in ("olmo2", "qwen3", "gemma", "gemma2", "gemma3_text"):
        assert lay_out(decoder(model_type=family)) is None, "made of other parts"
    assert lay_out(decoder(model_type="gpt_neox", layer_norm_eps=1e-5)) is None
    assert lay_out(decoder().bfloat16()) is None
    assert lay_out(decoder().to("meta")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert lay_out(decoder()) is None
    compiled = decoder()
    compiled.compile_blocks()
    assert lay_out(compiled) is None
    dropping = adapted("lora").train()
    assert lay_out(dropping) is None
    assert lay_out(dropping.eval()) is not None
    monkeypatch.setattr(laid_out, "LARGEST", size(decoder().architecture) - 1)
    assert lay_out(decoder()) is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_layers_are_left_as_they_are(kind: str) -> None:
    assert lay_out(decoder(kind)) is None
    one = decoder()
    one.model.layers[1].mlp.down_proj = decoder(kind).model.layers[1].mlp.down_proj  # type: ignore[union-attr]
    assert lay_out(one) is None


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_the_size_is_that_of_the_copies(changes: dict) -> None:
    copied = lay_out(decoder(**changes))
    assert copied is not None
    products = [product for layer in copied.layers for product in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    products.append(copied.head)
    assert size(copied.model.architecture) == sum(product.weight.nbytes for product in products)


SAMPLED = {"max_new_tokens": 12, "temperature": 1.0, "completions": 3}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LaidOut]:
    """Copies are made for any sampling; those that were."""
    found: list[LaidOut] = []

    def watch(model: Decoder) -> LaidOut:
        copied = lay_out(model)
        assert copied is not None
        found.append(copied)
        return copied

    monkeypatch.setattr(laid_out, "COMPLETIONS", 1)
    monkeypatch.setattr(laid_out, "TOKENS", 1)
    monkeypatch.setattr(decoding, "lay_out", watch)
    return found


@pytest.mark.parametrize("method", ["none", "lora", "dora"])
def test_weights_that_were_trained_are_seen(method: str, made: list[LaidOut], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two samplings every trained parameter moves, in place, as an optimizer moves it."""
    model = decoder(spread=0.3) if method == "none" else adapted(method)
    before = generate(model, PROMPTS, **SAMPLED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.7)
    after = generate(model, PROMPTS, **SAMPLED)
    assert len(made) == 2
    monkeypatch.setattr(laid_out, "TOKENS", 10**9)
    assert after == generate(model, PROMPTS, **SAMPLED) != before
    assert len(made) == 2


@pytest.mark.parametrize("how", ["to the end", "an exception", "given up"])
@pytest.mark.parametrize("method", ["none", "dora"])
def test_nothing_of_the_model_is_touched(how: str, method: str, made: list[LaidOut]) -> None:
    """Neither values nor where they lie, nor a module's attributes."""
    model = decoder(spread=0.3) if method == "none" else adapted(method)
    places = {name: (one.data_ptr(), one.stride()) for name, one in model.named_parameters()}
    values = {name: one.clone() for name, one in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]

    def on_token(index: int, token: int) -> bool:
        if how == "an exception":
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt) if how == "an exception" else nullcontext():
        coming = decoding.sample(model, PROMPTS, on_token=on_token, **SAMPLED)  # type: ignore[arg-type]
        next(coming)
        if how == "to the end":
            list(coming)
    assert len(made) == 1
    assert places == {name: (one.data_ptr(), one.stride()) for name, one in model.named_parameters()}
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert all(torch.equal(one, values[name]) for name, one in model.state_dict().items())


def test_copies_are_made_where_they_pay(made: list[LaidOut], monkeypatch: pytest.MonkeyPatch) -> None:
    """For many completions, and many tokens of them."""
    monkeypatch.setattr(laid_out, "COMPLETIONS", 4)
    monkeypatch.setattr(laid_out, "TOKENS", 40)
    for prompts, tokens, wanted in ((PROMPTS[:3], 20, 0), (PROMPTS, 9, 0), (PROMPTS, 10, 1)):
        made.clear()
        generate(decoder(), prompts, max_new_tokens=tokens)
        assert len(made) == wanted


@pytest.mark.real_model
@torch.no_grad()
def test_the_real_model(real_model: Path) -> None:
    """The difference is that between two orders of adding up 30 layers in fp32: logits reach 36."""
    from litrecipe.checkpoint.load import load_model
    from litrecipe.checkpoint.source import open_model

    model = load_model(open_model(str(real_model)))
    copied = lay_out(model)
    assert copied is not None
    for found, wanted in zip(logits_of(model, copied.decode), logits_of(model, model.decode), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)
