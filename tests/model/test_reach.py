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


def test_a_fresh_gpt2_is_drawn_as_transformers_draws_it() -> None:
    """What writes into the residual stream has 1/√(2 · 4 layers) of the deviation; over 256 · 64 numbers and more."""
    transformers = pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": 120}
    config |= {"layer_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_id": 0}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).transformer.h[1]
    model = Decoder(read_architecture(config))
    model.init_weights(0)
    ours = model.model.layers[1]
    for mine, other in (
        (ours.self_attn.qkv_proj, theirs.attn.c_attn),
        (ours.self_attn.o_proj, theirs.attn.c_proj),
        (ours.mlp.up_proj, theirs.mlp.c_fc),
        (ours.mlp.down_proj, theirs.mlp.c_proj),
    ):
        assert mine.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.05)
