"""Two heads on one transformer: each says what a model with that head alone says; and a judge below an adapter."""

from __future__ import annotations

import numpy as np
import torch
from small import CONFIG, decoder

from litrecipe.config.groups import Adapter
from litrecipe.model.adapters import add_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.hydra import BaseJudge, Hydra, of_best
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Sample, Segment, make_row


def ranked(name: str, *lengths: int) -> Sample:
    """A prompt of 4 tokens and answers of these lengths, best first."""
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(3, CONFIG["vocab_size"], length) for length in (4, *lengths)]
    root = Segment(ids[0], np.zeros(4, np.float32))
    return Sample(name, (root, *(Segment(one, np.ones(len(one), np.float32), parent=0) for one in ids[1:])))


ROW = make_row([ranked("pair", 5, 3), ranked("list", 2, 6, 1)])


def hydra(**changes: object) -> Hydra:
    """A Llama of CONFIG whose weights all matter."""
    model = Hydra(read_architecture(CONFIG | changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def alone(model: Hydra) -> tuple[RewardModel, Decoder]:
    """Models with one head each, and the same weights."""
    found = RewardModel(model.architecture), Decoder(model.architecture)
    state = model.state_dict()
    for one in found:
        one.load_state_dict({name: state[name] for name in one.state_dict()})
        one.eval()
    return found


def test_each_head_says_what_it_says_alone() -> None:
    """Of the tied and of the untied kind; no head is computed for answers that are not the best."""
    for tied in (True, False):
        model = hydra(tie_word_embeddings=tied)
        rewards, language = alone(model)
        said = model(ROW)
        torch.testing.assert_close(said.rewards, rewards(ROW), rtol=1e-5, atol=1e-5)
        best = torch.isin(ROW.segment, torch.tensor([1, 4]))
        torch.testing.assert_close(said.predictions.logps, language(ROW).logps[best], rtol=1e-5, atol=1e-5)
        assert len(said.predictions.logps) == 5 + 2


def test_the_best_answer_stands_first() -> None:
    best = of_best(ROW)
    assert best.answers.tolist() == [1, 4]
    assert best.segment.tolist() == [1] * 5 + [4] * 2
    assert best.target.tolist() == [*ROW.tokens[4:9].tolist(), *ROW.tokens[16:18].tolist()]
    assert best.predict_from.tolist() == [3, 4, 5, 6, 7, 15, 16]


def test_an_empty_row_hangs_on_the_graph() -> None:
    """So that ranks without samples keep step with the others."""
    said = hydra()(make_row([]))
    assert said.rewards.shape == said.predictions.logps.shape == (0,)
    (said.rewards.sum() + said.predictions.logps.sum()).backward()


def noisy(policy: Decoder) -> Decoder:
    """With an adapter that says something."""
    add_adapter(policy, Adapter("lora", r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return policy


@torch.no_grad()
def test_a_judge_below_an_adapter_is_the_reward_model_to_the_bit() -> None:
    """Whatever the adapter says, which is on again afterwards; and it holds no weights of its own but the score."""
    policy = decoder(seed=3, spread=0.3)
    rewards = RewardModel(policy.architecture)
    rewards.load_state_dict(policy.state_dict(), strict=False)
    expected = rewards.eval()(ROW)
    before = policy(ROW).logps
    judge = BaseJudge(noisy(policy), rewards.score.weight.detach().clone(), (0.5, 2.0))
    adapted = policy(ROW).logps
    assert not torch.allclose(adapted, before, atol=0.1)
    assert torch.equal(judge(ROW), expected)
    assert torch.equal(policy(ROW).logps, adapted)
    assert torch.equal(judge.normalised(expected), (expected - 0.5) / 2.0)
    shared = {id(parameter) for parameter in policy.parameters()}
    assert [name for name, one in judge.named_parameters() if id(one) not in shared] == ["score.weight"]
    assert not judge.score.weight.requires_grad
