"""A model that is trained on longer sequences, by another base of its positions."""

import pytest
import torch
from small import CONFIG, decoder, relative

from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture

TOKENS = torch.arange(3, 60)


def test_it_is_the_model_that_its_config_then_says() -> None:
    model = decoder(spread=0.2)
    before = model.logits(TOKENS)
    model.reach(256, 5e5)
    other = Decoder(read_architecture(CONFIG | {"rope_theta": 5e5, "max_position_embeddings": 256}))
    other.load_state_dict(model.state_dict())
    assert model.architecture == other.architecture
    assert torch.equal(model.logits(TOKENS), other.logits(TOKENS))
    assert relative(model.logits(TOKENS), before) > 1e-2


def test_a_shorter_sequence_leaves_the_context_as_it_is() -> None:
    model = decoder(spread=0.2)
    before = model.logits(TOKENS)
    model.reach(16)
    assert model.architecture.max_positions == CONFIG["max_position_embeddings"]
    assert torch.equal(model.logits(TOKENS), before)


def test_of_two_bases_that_of_the_layers_without_a_window_moves() -> None:
    config = CONFIG | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, "rope_theta": 1e6}
    a = read_architecture(config).trained_on(128, 4e6)
    assert [rope.theta for rope in a.ropes] == pytest.approx([4e6, 1e4])
