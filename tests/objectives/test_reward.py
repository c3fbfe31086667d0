"""The reward model's objective: beside TRL's numbers, by hand, and however the step is cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ranked, rows_of, step
from safetensors.torch import load_file
from small import CONFIG
from torch import nn

from litrecipe.config.groups import Reward
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.hydra import Hydra
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import make_row
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.reward import JointLoss, RewardLoss

NAN = float("nan")


def nls(x):
    """-log σ(x)."""
    return math.log1p(math.exp(-x))


@pytest.fixture(scope="module")
def reward_model(reference, shared):
    model = RewardModel(reference.architecture).double()
    model.load_state_dict(load_file(shared / "checks" / "trl_reference" / "reward.safetensors"))
    return model


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    ("name", "config"),
    [("bt", Reward()), ("bt_margin", Reward(margin=True)), ("bt_center0.01", Reward(centering_coef=0.01))],
)
def test_beside_trl(reference, reward_model, name, config, size):
    expected = reference.numbers["reward_model"][name]
    margins = expected.get("margin", [[1.0]] * 4)  # which the others must not look at
    samples = [
        ranked(
            str(n), [pair["chosen"], pair["rejected"]], pair["prompt"], scores=[margin or NAN, 0.0]
        )  # a margin of 0 is no tie
        for n, (pair, (margin,)) in enumerate(zip(reference.numbers["inputs"]["pairs"], margins, strict=True))
    ]
    loss, gradient, metrics = step(RewardLoss(config), reward_model, rows_of(samples, *[size] * (4 // size)))
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert float(torch.nn.utils.get_total_norm(gradient)) == pytest.approx(expected["grad_norm"], rel=1e-4)
    theirs = reference.modern["reward_model"]["bt"]["metrics"]
    for metric in ("accuracy", "margin", "mean_reward"):
        assert metrics[metric] == pytest.approx(theirs[metric], rel=1e-5), metric
    for side in ("chosen", "rejected"):
        mean = sum(reward for (reward,) in expected[f"rewards_{side}"]) / 4
        assert metrics[f"rewards/{side}"] == pytest.approx(mean, rel=1e-5)


class Given(nn.Module):
    """Rewards that depend on the last token of an answer alone."""

    def __init__(self, rewards):
        super().__init__()
        self.rewards = nn.Parameter(torch.tensor(rewards, dtype=torch.float64))

    def forward(self, row):
        return self.rewards[row.tokens[[row.spans[span].stop - 1 for span in row.answers.tolist()]]]


REWARDS = [0.0, 0.0, 1.5, 0.25, -1.0, 2.0]

BY_HAND = {
    "plain": (Reward(), [3, 2], nls(1.25)),
    "margin": (Reward(margin=True), [3, 2.5], nls(0.75)),
    "margin that nobody gave": (Reward(margin=True), [3, NAN], nls(1.25)),
    "soft label": (Reward(soft_labels=True), [3, 2.5], 0.75 * nls(1.25) + 0.25 * nls(-1.25)),
    "soft label beyond 1": (Reward(soft_labels=True), [3, 1], nls(1.25)),
    "soft label that nobody gave": (Reward(soft_labels=True), [NAN, NAN], nls(1.25)),
    "smoothing": (Reward(label_smoothing=0.1), [3, 2], 0.9 * nls(1.25) + 0.1 * nls(-1.25)),
    # Right with probability 0.9 · 0.75 + 0.1 · 0.25.
    "both": (Reward(label_smoothing=0.1, soft_labels=True), [3, 2.5], 0.7 * nls(1.25) + 0.3 * nls(-1.25)),
    "centering": (Reward(centering_coef=0.1), [3, 2], nls(1.25) + 0.1 * 1.75**2),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_by_hand(name):
    """One pair with rewards 3/2 and 1/4: they differ by 5/4 and add up to 7/4."""
    config, scores, expected = BY_HAND[name]
    loss, _, _ = step(RewardLoss(config), Given(REWARDS), rows_of([ranked("a", [[9, 2], [3]], scores=scores)]))
    assert loss == pytest.approx(expected, rel=1e-7)  # scores are fp32


def test_rows_without_scores_have_no_margin():
    samples = [ranked("a", [[2], [3]])]
    for config in (Reward(margin=True), Reward(soft_labels=True)):
        assert step(RewardLoss(config), Given(REWARDS), rows_of(samples))[0] == pytest.approx(nls(1.25), rel=1e-12)


def test_a_ranked_list_weighs_as_much_as_a_pair():
    """Rewards 3/2, 1/4, -1 with scores 3, 2, 1 make pairs 5/4, 5/2, 5/4 apart with margins 1, 2, 1; the pair -7/4 with
    margin 1/2. Centering: (7/4)², (1/2)², (-3/4)²; (9/4)²."""
    config = Reward(margin=True, centering_coef=0.1)
    samples = [ranked("a", [[2], [3], [4]], scores=[3, 2, 1]), ranked("b", [[3], [5]], scores=[1, 0.5])]
    expected = ((nls(0.25) + nls(0.5) + nls(0.25)) / 3 + nls(-2.25)) / 2
    expected += 0.1 * ((1.75**2 + 0.5**2 + 0.75**2) / 3 + 2.25**2) / 2
    for rows in (rows_of(samples), rows_of(samples[::-1], 1, 0)):
        loss, _, metrics = step(RewardLoss(config), Given(REWARDS), rows)
        assert loss == pytest.approx(expected, rel=1e-7)
        assert metrics["accuracy"] == pytest.approx((1 + 0) / 2, rel=1e-7)
        assert metrics["margin"] == pytest.approx(((1.25 + 2.5 + 1.25) / 3 - 1.75) / 2, rel=1e-12)
        assert metrics["mean_reward"] == pytest.approx((1.5 + 0.25 - 1 + 0.25 + 2) / 5, rel=1e-12)
        assert metrics["rewards/chosen"] == pytest.approx(((1.5 + 1.5 + 0.25) / 3 + 0.25) / 2, rel=1e-12)


def test_equal_scores_are_no_pair():
    """Of rewards 3/2, 1/4, -1 with scores (1, 1, 0) the pairs 5/2 and 5/4 apart are left."""
    samples = [ranked("a", [[2], [3], [4]], scores=[1, 1, 0])]
    loss, _, _ = step(RewardLoss(Reward()), Given(REWARDS), rows_of(samples))
    assert loss == pytest.approx((nls(2.5) + nls(1.25)) / 2, rel=1e-12)


def test_the_empty_row_of_another_rank_adds_nothing(reward_model):
    row, objective = make_row([]), RewardLoss(Reward(centering_coef=0.01, margin=True, soft_labels=True))
    total = sum(term.sum for term in objective(reward_model(row), row).terms)
    assert float(total.detach()) == 0
    total.backward()
    assert not any(parameter.grad.any() for parameter in reward_model.parameters())
    assert objective.counts(row) == {"bradley_terry": 0, "centering": 0}


LISTS = st.lists(st.lists(st.integers(2, 5), min_size=2, max_size=4), min_size=1, max_size=5)
CONFIGS = [Reward(), Reward(margin=True, centering_coef=0.3), Reward(soft_labels=True, label_smoothing=0.2)]


@settings(deadline=None)
@given(LISTS, st.sampled_from(CONFIGS), st.randoms(), st.data())
def test_neither_the_cut_nor_the_order_of_a_step_changes_anything(lists, config, random, data):
    samples = [
        ranked(str(n), [[t] for t in tokens], scores=[0.75 * len(tokens) / (m + 1) for m in range(len(tokens))])
        for n, tokens in enumerate(lists)
    ]
    objective, model = RewardLoss(config), Given(REWARDS)
    expected = step(objective, model, rows_of(samples))
    random.shuffle(samples)
    sizes = data.draw(st.lists(st.integers(0, len(samples)), max_size=3))
    loss, (gradient,), metrics = step(objective, model, rows_of(samples, *sizes))
    assert loss == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1][0], rtol=1e-10, atol=1e-12)
    assert metrics == pytest.approx(expected[2], rel=1e-10, abs=1e-12)


@settings(deadline=None)
@given(st.floats(-5, 5))
def test_a_constant_changes_nothing_but_the_centering(constant):
    """Rewards are told by pairs up to a constant, which is what centering is for."""
    rows = rows_of([ranked("a", [[2], [3], [4]]), ranked("b", [[5], [2]])])
    moved = Given([reward + constant for reward in REWARDS])
    plain = [step(RewardLoss(Reward(label_smoothing=0.1)), model, rows)[0] for model in (Given(REWARDS), moved)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-9)
    if abs(constant) > 1e-3:
        centred = [step(RewardLoss(Reward(centering_coef=0.1)), model, rows)[0] for model in (Given(REWARDS), moved)]
        assert centred[0] != pytest.approx(centred[1], rel=1e-9)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients(config):
    row = make_row([ranked("a", [[2], [3], [4]], scores=[1, 0.5, NAN]), ranked("b", [[5], [2]], scores=[1, 0.2])])
    objective = RewardLoss(config)

    def loss(rewards):
        return sum(term.weight * term.sum for term in objective(rewards, row).terms)

    rewards = torch.tensor([1.5, 0.25, -1.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (rewards,))


def test_the_joint_loss_is_the_two_losses_computed_apart():
    """Bradley-Terry of a reward model, and the token mean of the best answers' NLL of a language model, which share
    their weights: loss and gradient are their weighted sum, however the step is cut."""
    config = Reward(sft_coef=0.25, centering_coef=0.01)
    prompt, answers = [5, 6, 7, 8], ([9, 10, 11], [12, 13], [14, 15, 16, 17])
    samples = [ranked("a", answers, prompt), ranked("b", answers[1:], prompt[1:]), ranked("c", answers[::2], [20])]
    model = Hydra(read_architecture(CONFIG)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    state = model.state_dict()
    apart = []
    for kind, objective, taken in (
        (RewardModel, RewardLoss(config), samples),
        (Decoder, CausalLM(), [replace(one, segments=one.segments[:2]) for one in samples]),
    ):
        alone = kind(model.architecture).double()
        alone.load_state_dict({name: state[name] for name in alone.state_dict()})
        loss, gradient, metrics = step(objective, alone, rows_of(taken))
        apart.append((loss, dict(zip(dict(alone.named_parameters()), gradient, strict=True)), metrics))
    (reward, of_reward, reward_metrics), (nll, of_nll, nll_metrics) = apart
    for rows in (rows_of(samples), rows_of(samples[::-1], 1), rows_of(samples, 1, 0, 1)):
        loss, gradient, metrics = step(JointLoss(config), model, rows)
        assert loss == pytest.approx(reward + 0.25 * nll, rel=1e-10)
        assert metrics == pytest.approx({**reward_metrics, **nll_metrics}, rel=1e-6)
        for name, found in zip(dict(model.named_parameters()), gradient, strict=True):
            none = torch.zeros_like(found)
            expected = of_reward.get(name, none) + 0.25 * of_nll.get(name, none)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
