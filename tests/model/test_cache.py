from __future__ import annotations

import pytest
import torch

from litrecipe.model.cache import CacheStep, KVCache
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model() -> Decoder:
    model = Decoder(read_architecture(CONFIG))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


def tokens_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


def cache_of(model: Decoder, rows: int, slots: int) -> KVCache:
    """With room for so much, and full of what earlier sequences left behind."""
    cache = KVCache(model.architecture)
    cache.resize(rows, slots)
    generator = torch.Generator().manual_seed(2)
    for layer in cache.layers:
        layer.normal_(0, 9, generator=generator)
    return cache


def assert_ends(model: Decoder, logits: torch.Tensor, *sequences: torch.Tensor) -> None:
    """The logits are those after each sequence, read on its own and whole."""
    assert len(logits) == len(sequences)
    for row, sequence in zip(logits, sequences, strict=True):
        torch.testing.assert_close(row, model.logits(sequence)[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("whole", [0, 1, 5, 12])
def test_reading_in_pieces_equals_the_packed_forward(model: Decoder, whole: int) -> None:
    """The first `whole` tokens as a prompt, the others one by one."""
    (tokens,) = tokens_of(12)
    cache = cache_of(model, 1, 12)
    if whole:
        assert_ends(model, model.decode(tokens[:whole], CacheStep(cache, [], [whole])), tokens[:whole])
    for place in range(whole, 12):
        logits = model.decode(tokens[place : place + 1], CacheStep(cache, [place]))
        assert_ends(model, logits, tokens[: place + 1])


@torch.no_grad()
def test_sequences_go_on_while_prompts_enter(model: Decoder) -> None:
    """Two of unlike lengths go on by a token, and behind them enter a prompt with two rows and one with one; then all
    five go on."""
    long, short, first, second = tokens_of(9, 3, 7, 1)
    cache = cache_of(model, 6, 12)
    model.decode(torch.cat((long[:8], short[:2])), CacheStep(cache, [], [8, 2]))
    entering = torch.cat((long[8:], short[2:], first, second))
    logits = model.decode(entering, CacheStep(cache, [8, 2], [7, 1], [2, 1]))
    assert_ends(model, logits, long, short, first, second)
    (new,) = tokens_of(5)
    sequences = [torch.cat((old, new[i : i + 1])) for i, old in enumerate((long, short, first, first, second))]
    assert_ends(model, model.decode(new, CacheStep(cache, [9, 3, 7, 7, 1])), *sequences)


@torch.no_grad()
def test_rows_are_copied_up_to_a_slot(model: Decoder) -> None:
    first, second, third = tokens_of(6, 4, 5)
    cache = cache_of(model, 3, 8)
    model.decode(torch.cat((first[:5], second, third[:4])), CacheStep(cache, [], [5, 4, 4]))
    cache.copy([2, 0], [0, 1], 5)
    logits = model.decode(torch.stack((third[4], first[5])), CacheStep(cache, [4, 5]))
    assert_ends(model, logits, third, first)
    before = cache.layers[1].clone()
    cache.copy([0], [2], 3)
    assert torch.equal(cache.layers[1][:, 2, :, :3], before[:, 0, :, :3])
    assert torch.equal(cache.layers[1][:, 2, :, 3:], before[:, 2, :, 3:])


@torch.no_grad()
def test_a_cache_is_made_anew_with_what_it_holds(model: Decoder) -> None:
    first, second, third = tokens_of(4, 3, 5)
    cache = cache_of(model, 2, 9)
    model.decode(torch.cat((first[:3], second[:2])), CacheStep(cache, [], [3, 2]))
    cache.resize(3, 6)
    assert (cache.rows, cache.slots) == (3, 6)
    last = torch.cat((first[3:], second[2:], third))
    assert_ends(model, model.decode(last, CacheStep(cache, [3, 2], [5])), first, second, third)
    cache.resize(1, 7)
    again = torch.cat((first, third[:1]))
    assert_ends(model, model.decode(third[:1], CacheStep(cache, [4])), again)


@torch.no_grad()
def test_tensors_are_made_once(model: Decoder) -> None:
    cache = cache_of(model, 2, 8)
    places = [layer.data_ptr() for layer in cache.layers]
    for position in range(8):
        model.decode(torch.tensor([3, 4]), CacheStep(cache, [position, position]))
    assert [layer.data_ptr() for layer in cache.layers] == places
    with pytest.raises(IndexError):
        model.decode(torch.tensor([3, 4]), CacheStep(cache, [8, 8]))
