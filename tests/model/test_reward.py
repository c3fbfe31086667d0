"""Rewards: the same however answers are laid out, read where they end, in fp32, and trained beside an adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import CONFIG, decoder

from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import add_adapter
from litrecipe.model.families import read_architecture
from litrecipe.model.quantize import quantize_linears
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Sample, Segment, make_row


def reward_model(**changes: Any) -> RewardModel:
    """A Llama of CONFIG whose weights, norms too, all matter to the rewards."""
    model = RewardModel(read_architecture(CONFIG | changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


def segment(length: int, parent: int = -1, *, learnt: bool = True, seed: int = 0) -> Segment:
    rng = np.random.default_rng((seed, length))
    weights = np.full(length, float(learnt), np.float32)
    if parent < 0:
        weights[0] = 0
    return Segment(rng.integers(3, CONFIG["vocab_size"], length), weights, parent)


PAIR = Sample("pair", (segment(7, learnt=False), segment(5, 0), segment(9, 0)))
OTHER = Sample("other", (segment(4, learnt=False, seed=1), segment(3, 0, seed=1), segment(1, 0, seed=1)))
ALONE = Sample("alone", (segment(11),))


def unshared(sample: Sample) -> list[Sample]:
    """Prompt and answer as one text, for each answer."""
    prompt, *answers = sample.segments
    texts = [np.concatenate((prompt.tokens, answer.tokens)) for answer in answers]
    return [Sample("text", (Segment(text, np.arange(len(text)).astype(np.float32)),)) for text in texts]


def rewards_and_gradients(model: RewardModel, rows: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rewards of all rows, and the gradients of the sum of their squares."""
    model.zero_grad()
    rewards = torch.cat([model(row) for row in rows])
    rewards.square().sum().backward()
    return rewards.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_branches_equal_texts_of_their_own() -> None:
    model = reward_model()
    rewards, gradients = rewards_and_gradients(model, [make_row([PAIR, ALONE, OTHER])])
    texts = [*unshared(PAIR), ALONE, *unshared(OTHER)]
    expected, right = rewards_and_gradients(model, [make_row([text]) for text in texts])
    assert rewards.shape == (5,)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, right, atol=1e-4, rtol=1e-4)


def test_the_score_is_read_at_the_last_token_of_an_answer() -> None:
    model = reward_model()
    row = make_row([PAIR])
    at_once = model(row)
    language_model = decoder(tie_word_embeddings=False)
    language_model.load_state_dict(model.state_dict(), strict=False)
    for index, text in enumerate(unshared(PAIR)):
        language_model.lm_head.weight.data[:1] = model.score.weight.data
        last = language_model.logits(torch.from_numpy(text.segments[0].tokens))[-1, 0]
        torch.testing.assert_close(at_once[index], last, atol=1e-5, rtol=1e-5)


def test_only_scored_places_go_through_the_last_layer() -> None:
    model, seen = reward_model(), []
    last = model.model.layers[-1]
    for module in (last.self_attn.o_proj, last.mlp, model.model.norm):
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    model(make_row([PAIR, ALONE]))
    assert seen == [(3, 64)] * 3


@pytest.mark.parametrize("adapter", [False, True])
def test_an_empty_row_gives_zero_gradients_everywhere(adapter: bool) -> None:
    model = reward_model()
    if adapter:
        add_adapter(model, Adapter(method="lora", r=2))
    rewards, gradients = rewards_and_gradients(model, [make_row([])])
    assert rewards.shape == (0,)
    assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in gradients.values())


def test_rewards_are_fp32_and_computed_in_it() -> None:
    model, row = reward_model(), make_row([PAIR])
    exact = model(row)
    hidden = []
    model.model.norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(row)
    assert torch.equal(mixed, hidden[-1].float() @ model.score.weight[0])
    true = model.bfloat16()(row)
    assert torch.equal(true, hidden[-1].float() @ model.score.weight[0].float())
    for rewards in (mixed, true):
        assert rewards.dtype == torch.float32
        torch.testing.assert_close(rewards, exact, atol=0.05 * exact.abs().max().item(), rtol=0)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model, row = reward_model(), make_row([PAIR, ALONE])
    _, gradients = rewards_and_gradients(model, [row])
    model.activation_checkpointing = True
    _, again = rewards_and_gradients(model, [row])
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_a_fresh_score_follows_from_its_seed_alone() -> None:
    model = RewardModel(read_architecture(CONFIG | {"hidden_size": 4096, "num_hidden_layers": 1}))
    model.init_score(3)
    first = model.score.weight.detach().clone()
    assert first.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    assert abs(first.mean().item()) < 3 / 4096
    torch.manual_seed(9)
    model.init_weights(3)
    assert torch.equal(model.score.weight, first)
    embedding = model.model.embed_tokens.weight[0]
    assert abs(torch.corrcoef(torch.stack((first[0], embedding)))[0, 1].item()) < 0.1
    model.init_score(4)
    assert not torch.equal(model.score.weight, first)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_under_an_adapter_the_score_trains_in_fp32(method: str, base: str) -> None:
    model = RewardModel(read_architecture(CONFIG))
    model.init_weights(0)
    if base == "bf16":
        model.bfloat16()
    if base == "nf4":
        quantize_linears(model.model, Quantize(method="nf4"))
    add_adapter(model, Adapter(method=method, r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "score.weight" for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    row = make_row([PAIR, OTHER])
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    losses = []
    for _ in range(5):
        chosen, rejected = model(row).view(-1, 2).T
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
    # B starts at 0, so A gets a gradient from the second step on.
    assert all(p.grad.any() for p in trained.values())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(model.get_parameter(name), before) for name, before in frozen.items())
