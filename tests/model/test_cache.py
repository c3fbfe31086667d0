from __future__ import annotations

import pytest
import torch

from litrecipe.model.architecture import read_architecture
from litrecipe.model.cache import KVCache
from litrecipe.model.decoder import Decoder

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


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 3, 2, 1]], ids=["whole", "single", "mixed"])
def test_reading_in_pieces_equals_the_packed_forward(model: Decoder, pieces: list[int]) -> None:
    (tokens,) = tokens_of(12)
    right = model.logits(tokens)
    cache, start = KVCache(model.architecture, 1, 12), 0
    for piece in pieces:
        stop = start + piece
        logits = model.decode(tokens[None, start:stop], torch.arange(start, stop)[None], cache)
        torch.testing.assert_close(logits[0], right[stop - 1], atol=1e-5, rtol=1e-5)
        start = stop
    assert cache.length == 12


@torch.no_grad()
def test_padding_on_the_left_is_never_seen(model: Decoder) -> None:
    sequences = tokens_of(9, 4, 1)
    cache = KVCache(model.architecture, 3, 9)
    batch = torch.stack([torch.cat([torch.full((9 - len(s),), 7), s]) for s in sequences])
    positions = torch.arange(9) - torch.tensor([[0], [5], [8]])
    first = model.decode(batch[:, :6], positions[:, :6], cache)
    assert first.isfinite().all()
    for piece in (slice(6, 8), slice(8, 9)):
        logits = model.decode(batch[:, piece], positions[:, piece], cache)
    for row, sequence in zip(logits, sequences, strict=True):
        torch.testing.assert_close(row, model.logits(sequence)[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keeping_some_sequences(model: Decoder) -> None:
    sequences = tokens_of(6, 6, 6)
    cache = KVCache(model.architecture, 3, 6)
    batch, positions = torch.stack(sequences), torch.arange(6).expand(3, 6)
    model.decode(batch[:, :5], positions[:, :5], cache)
    cache.keep([0, 2])
    logits = model.decode(batch[[0, 2], 5:], positions[:2, 5:], cache)
    for row, index in zip(logits, (0, 2), strict=True):
        torch.testing.assert_close(row, model.logits(sequences[index])[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tensors_are_made_once(model: Decoder) -> None:
    cache = KVCache(model.architecture, 2, 8)
    places = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    for position in range(8):
        model.decode(torch.tensor([[3], [4]]), torch.full((2, 1), position), cache)
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == places
    with pytest.raises(RuntimeError):
        model.decode(torch.tensor([[3], [4]]), torch.full((2, 1), 8), cache)
