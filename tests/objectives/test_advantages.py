"""From scores to advantages: beside TRL's numbers, and by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import flat, float64

from litrecipe.objectives.advantages import (
    best_of,
    best_of_kl,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    length_penalty,
    pass_at_k,
    steered,
    token_rewards,
    whiten,
    zero_variance,
)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def bessel(whitened):
    """As if the variance had been divided by n - 1."""
    n = len(whitened)
    return (whitened - whitened.mean()) * math.sqrt((n - 1) / n) + whitened.mean()


@pytest.mark.parametrize(("block", "kind"), [("v1_kl", "k1"), ("v1_mse", "k2")])
def test_beside_trl_with_the_score_at_the_last_token(reference, block, kind):
    """TRL's first PPO: rewards, returns and advantages; those are whitened with Bessel's correction there."""
    ppo = reference.numbers["ppo"]
    expected, helpers = ppo[block], ppo["helpers"]
    lengths = torch.tensor(expected["mask"]).sum(1).long()
    old, ref, values = (flat(helpers[name], lengths) for name in ("logprobs", "ref_logprobs", "values"))
    kl = kl_estimate(old, ref, kind)
    close(kl, flat(expected["kl"], lengths))
    rewards = token_rewards(kl, float64(*helpers["score"]), lengths, 0.05)
    close(rewards, flat(expected["rewards"], lengths))
    advantages, returns = gae(rewards, values, lengths, 1.0, 0.95)
    close(returns, flat(expected["returns"], lengths))
    close(bessel(whiten(advantages, shift_mean=True)), flat(expected["advantages"], lengths))


V2 = ["v2_default", "v2_whiten_rewards", "v2_missing_eos_penalty1", "v2_gamma0.99_lam0.9"]


@pytest.mark.parametrize("block", V2)
def test_beside_trl_with_the_score_one_place_later(reference, block):
    """TRL's second PPO: its numbers are ours of completions that are one token longer where there is room."""
    ppo = reference.numbers["ppo"]
    expected, helpers, asked = ppo[block], ppo["helpers"], ppo[block]["settings"]
    inside, longer = (torch.tensor(expected[name]).bool() for name in ("response_mask", "value_mask"))
    lengths = longer.sum(1)
    values = flat(helpers["values"], lengths)
    rewards = token_rewards(flat(expected["kl"], lengths), float64(*expected["scores"]), lengths, asked["kl_coef"])
    if asked["whiten_rewards"]:
        rewards = bessel(whiten(rewards, shift_mean=False))
    close(rewards, flat(expected["rewards"], lengths))
    advantages, returns = gae(rewards, values, lengths, asked["gamma"], asked["lam"])
    close(returns, flat(expected["returns"], lengths))
    at_tokens = advantages[inside[longer]]
    close(bessel(whiten(at_tokens, shift_mean=True)), flat(expected["advantages"], inside.sum(1)))


def test_the_score_belongs_to_the_last_token_and_not_behind_it(reference):
    """Where TRL's two versions differ, ours is the first: a completion of three tokens has three values, not four."""
    ppo = reference.numbers["ppo"]
    lengths, score = torch.tensor([3]), float64(ppo["helpers"]["score"][1])
    kl = flat([ppo["v1_kl"]["kl"][1]], lengths)
    rewards = token_rewards(kl, score, lengths, 0.05)
    close(rewards, flat([ppo["v1_kl"]["rewards"][1]], lengths))
    later = flat([ppo["v2_default"]["rewards"][1]], torch.tensor([4]))
    close(rewards, later[:3] + float64(0, 0, 1) * later[3])


def test_the_controller_beside_trl(reference):
    known = reference.numbers["ppo"]["adaptive_kl_controller"]
    coef = known["init"]
    for kl, expected in zip(known["observed_kl"], known["values"], strict=True):
        coef = steered(coef, kl, known["target"], known["horizon"], known["n_steps"])
        assert coef == pytest.approx(expected, rel=1e-12)


def test_the_controller():
    """2 nats over a target of 20 are an error of 0.1, held at 0.2 from 4 on; 500 of 10,000 completions have 1/20 of
    the effect. Without a target nothing moves."""
    assert steered(0.4, 22, 20, 10_000, 500) == pytest.approx(0.4 * (1 + 0.1 / 20), rel=1e-12)
    assert steered(0.4, 24, 20, 10_000, 500) == steered(0.4, 1e9, 20, 10_000, 500) == 0.4 * (1 + 0.2 / 20)
    assert steered(0.4, -5, 20, 10_000, 500) == pytest.approx(0.4 * (1 - 0.2 / 20), rel=1e-12)
    assert steered(0.4, 1e9, None, 10_000, 500) == 0.4


def test_estimates_of_the_kl():
    """log-ratio log 2: k1 log 2, k2 log²2 / 2, k3 1/2 - 1 + log 2."""
    logps, ref = float64(-1.0), float64(-1.0 - math.log(2))
    assert kl_estimate(logps, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logps, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logps, ref, "k3").item() == pytest.approx(math.log(2) - 0.5)


P_, Q = float64(0.5, 0.3, 0.2), float64(0.2, 0.2, 0.6)


def test_k1_and_k3_are_the_kl_on_average():
    """Σ p k of p = (.5, .3, .2), q = (.2, .2, .6) is Σ p log(p / q); that of k2 is not."""
    exact = (P_ * (P_ / Q).log()).sum().item()
    means = {kind: (P_ * kl_estimate(P_.log(), Q.log(), kind)).sum().item() for kind in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(exact, rel=1e-12)
    assert means["k3"] == pytest.approx(exact, rel=1e-12)
    assert abs(means["k2"] - exact) > 0.004


def test_what_the_estimates_teach_as_losses():
    """Of samples from p = softmax(z), on average: k1 nothing, k2 the gradient of KL(p ‖ q), k3 that of KL(q ‖ p)."""
    z = P_.log().requires_grad_()
    logp = z.log_softmax(0)
    (right,) = torch.autograd.grad((logp.exp() * (logp - Q.log())).sum(), z, retain_graph=True)
    (forward,) = torch.autograd.grad((Q * (Q.log() - logp)).sum(), z, retain_graph=True)
    expected = {"k1": torch.zeros(3).double(), "k2": right, "k3": forward}
    for kind, gradient in expected.items():
        loss = (P_ * kl_estimate(logp, Q.log(), kind)).sum()  # P_ is held fast, as samples are
        (found,) = torch.autograd.grad(loss, z, retain_graph=True)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("far", [200.0, -200.0])
def test_k3_stays_finite_and_never_points_away(far):
    """Held at ±20, where it has no gradient; not one that leads further off."""
    logps = torch.tensor([far], requires_grad=True)
    k3 = kl_estimate(logps, torch.zeros(1), "k3")
    assert k3.item() == pytest.approx(math.exp(20) - 21 if far < 0 else 19, rel=1e-6)
    k3.sum().backward()
    assert logps.grad.tolist() == [0.0]


def test_gae_by_hand():
    """γ = ½, λ = ½. Completion (r = 1, 2; V = 4, 8): δ = 1 + 4 - 4, 2 - 8 = 1, -6; A = 1 - 6/4, -6. Completion (r = 3;
    V = 1): A = 2. Nothing flows from one to the next."""
    rewards, values = float64(1, 2, 3), float64(4, 8, 1)
    advantages, returns = gae(rewards, values, torch.tensor([2, 1]), 0.5, 0.5)
    assert advantages.tolist() == [-0.5, -6.0, 2.0]
    assert returns.tolist() == [3.5, 2.0, 3.0]


COMPLETIONS = st.lists(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6), min_size=1, max_size=5
)


def gae_alone(rewards, values, gamma, lam):
    """Σ_k (γλ)^k δ_{t+k}, written out."""
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@settings(deadline=None)
@given(COMPLETIONS, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_the_sum_of_the_definition(completions, gamma, lam):
    lengths = torch.tensor([len(completion) for completion in completions])
    rewards, values = float64(*itertools.chain(*completions)).unbind(1)
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    expected = [gae_alone(*zip(*completion, strict=True), gamma, lam) for completion in completions]
    torch.testing.assert_close(advantages, float64(*itertools.chain(*expected)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, advantages + values)


@settings(deadline=None)
@given(COMPLETIONS)
def test_returns_with_lambda_one_are_what_is_still_to_come(completions):
    """λ = γ = 1: A + V = Σ of the rewards from here on, whatever the critic thinks."""
    lengths = torch.tensor([len(completion) for completion in completions])
    rewards, values = float64(*itertools.chain(*completions)).unbind(1)
    to_come = [sum(r for r, _ in completion[t:]) for completion in completions for t in range(len(completion))]
    torch.testing.assert_close(gae(rewards, values, lengths, 1.0, 1.0)[1], float64(*to_come), rtol=1e-9, atol=1e-9)


def test_gae_of_bf16_is_fp32_and_of_nothing_is_nothing():
    rewards, values = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 0.1, dtype=torch.bfloat16)
    advantages, returns = gae(rewards, values, torch.tensor([3]), 1.0, 1.0)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages, float64(3, 2, 1).float() - values.float())
    empty = torch.zeros(0)
    assert [x.shape for x in gae(empty, empty, torch.zeros(0, dtype=torch.int64), 1, 1)] == [(0,), (0,)]


def test_token_rewards_of_several_completions():
    """-½ kl everywhere, the scores 10 and 20 at tokens 1 and 2; k is untouched."""
    kl = float64(1, 2, 4)
    rewards = token_rewards(kl, float64(10, 20), torch.tensor([2, 1]), 0.5)
    assert rewards.tolist() == [-0.5, 9.0, 18.0]
    assert kl.tolist() == [1, 2, 4]


def test_whitening():
    """(1, 2, 3, 6): mean 3, variance 14/4 without Bessel's correction."""
    x, deviation = float64(1, 2, 3, 6), math.sqrt(3.5 + 1e-8)
    expected = (x - 3) / deviation
    torch.testing.assert_close(whiten(x, shift_mean=True), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(whiten(x, shift_mean=False), expected + 3, rtol=1e-12, atol=0)
    assert whiten(float64(5, 5), shift_mean=True).tolist() == [0, 0]
    assert whiten(torch.zeros(0), shift_mean=True).shape == (0,)


R = (1.0, 0.0, 0.0, 1.0)
GROUP_KINDS = ["group", "centered", "leave_one_out", "group_batch"]


@pytest.mark.parametrize(
    ("kind", "size"),
    [("group", 0.5 / (math.sqrt(1 / 3) + 1e-4)), ("centered", 0.5), ("leave_one_out", 2 / 3), ("batch", 1.0)],
)
def test_advantages_of_half_right_answers(kind, size):
    """R = (1, 0, 0, 1): .8659 with the deviation √(1/3), .5 without, 2/3 against the other three, 1 whitened."""
    found = group_advantages(float64(*R), torch.zeros(4, dtype=torch.int64), kind)
    torch.testing.assert_close(found, size * float64(1, -1, -1, 1), rtol=1e-7, atol=0)
    assert kind != "group" or size == pytest.approx(0.8659, abs=5e-5)


def test_groups_have_baselines_of_their_own_wherever_they_stand():
    """Groups 7 (1, 3) and 2 (10, 10, 40), mixed: baselines 2 and 20. `group_batch` has the mean square
    (1 + 1 + 100 + 100 + 400) / 5 over the batch."""
    scores, groups = float64(10, 1, 10, 3, 40), torch.tensor([2, 7, 2, 7, 2])
    centered = float64(-10, -1, -10, 1, 20)
    close(group_advantages(scores, groups, "centered"), centered)
    close(group_advantages(scores, groups, "leave_one_out"), centered * float64(1.5, 2, 1.5, 2, 1.5))
    close(group_advantages(scores, groups, "group_batch"), centered / math.sqrt(602 / 5))
    deviations = float64(math.sqrt(300), math.sqrt(2), math.sqrt(300), math.sqrt(2), math.sqrt(300))
    close(group_advantages(scores, groups, "group"), centered / (deviations + 1e-4))
    close(group_advantages(scores, groups, "batch"), (scores - 12.8) / scores.std(correction=0))


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_where_all_score_alike_there_is_no_advantage(kind):
    """Seven times 0.1 in fp32, whose mean is not 0.1; and a group of one."""
    tenths = torch.full((7,), 0.1)
    assert (tenths - torch.zeros(1).index_add(0, torch.zeros(7, dtype=torch.int64), tenths) / 7).any()
    scores, groups = torch.cat((tenths, torch.tensor([5.0, 1.0, 2.0]))), torch.tensor([0] * 7 + [1, 2, 2])
    found = group_advantages(scores, groups, kind)
    assert found[:8].tolist() == [0] * 8
    assert found[8] < 0 < found[9]
    assert zero_variance(scores, groups).tolist() == [True] * 8 + [False] * 2


SCORED = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 3)), min_size=1, max_size=12)


@settings(deadline=None)
@given(SCORED, st.sampled_from([*GROUP_KINDS, "batch"]), st.randoms())
def test_advantages_do_not_depend_on_order_or_on_what_is_added_to_all(scored, kind, random):
    scores, groups = float64(*[s for s, _ in scored]), torch.tensor([g for _, g in scored])
    found = group_advantages(scores, groups, kind)
    order = list(range(len(scored)))
    random.shuffle(order)
    torch.testing.assert_close(group_advantages(scores[order], groups[order], kind), found[order])
    torch.testing.assert_close(group_advantages(scores + 3, groups + 5, kind), found)
    if kind != "batch":
        sums = torch.zeros(4).double().index_add(0, groups, found)
        torch.testing.assert_close(sums, torch.zeros(4).double(), rtol=0, atol=1e-9)


def test_the_length_penalty():
    """Up to 100 tokens with a limit of 20: none until 80, half at 90, whole at 100 and beyond."""
    lengths = torch.tensor([1, 80, 85, 90, 100, 101, 150])
    assert length_penalty(lengths, 100, 20).tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert length_penalty(lengths, 100, 0).tolist() == [0, 0, 0, 0, 0, -1, -1]


def test_pass_at_k_counts_the_draws():
    """Of five samples with two right, all draws of k: those with a right one among them."""
    right = [True, True, False, False, False]
    for k in range(1, 6):
        draws = [any(draw) for draw in itertools.combinations(right, k)]
        assert pass_at_k(5, 2, k) == pytest.approx(sum(draws) / len(draws), rel=1e-12)
    assert pass_at_k(5, 0, 3) == 0
    assert pass_at_k(1000, 1000, 1000) == 1
    with pytest.raises(ValueError, match="pass@6 of 5 samples"):
        pass_at_k(5, 2, 6)


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7), st.data())
def test_best_of_counts_the_draws(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    draws = [max(draw) for draw in itertools.combinations(scores, n)]
    assert best_of(float64(*scores), n).item() == pytest.approx(sum(draws) / len(draws), rel=1e-9, abs=1e-9)


def test_best_of_more_than_there_are():
    assert best_of(torch.arange(600.0), 600) == 599
    with pytest.raises(ValueError, match="best of 3 cannot be told from 2"):
        best_of(float64(1, 2), 3)


def test_the_kl_of_best_of_n():
    assert best_of_kl(1) == 0
    assert best_of_kl(64) == pytest.approx(math.log(64) - 63 / 64)


def test_explained_variance():
    """Returns (0, 2, 4), variance 8/3. Errors (0, 0, 3): variance 2, so ¼ is explained; a constant explains nothing,
    and off by a constant everything."""
    returns = float64(0, 2, 4)
    assert explained_variance(float64(0, 2, 1), returns) == pytest.approx(0.25)
    assert explained_variance(float64(7, 7, 7), returns) == pytest.approx(0)
    assert explained_variance(returns + 5, returns) == pytest.approx(1)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.full((3,), 0.1)) is None
    assert explained_variance(torch.zeros(0), torch.zeros(0)) is None
