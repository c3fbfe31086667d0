"""Losses of policy gradients and critics, token by token: beside TRL's numbers, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from made import flat, float64

from litrecipe.objectives.policy_gradient import (
    beyond_clip,
    cispo,
    clipped,
    log_ratios,
    mirror,
    value_loss,
)

V2 = ["v2_default", "v2_whiten_rewards", "v2_missing_eos_penalty1", "v2_gamma0.99_lam0.9"]


def logs(*values):
    return float64(*values).log()


@pytest.mark.parametrize("block", V2)
def test_beside_trl(reference, block):
    """TRL's second PPO, whose critic has a value more a completion where there is room (`value_mask`)."""
    ppo = reference.numbers["ppo"]
    expected, helpers, asked = ppo[block], ppo["helpers"], ppo[block]["settings"]
    lengths, longer = (torch.tensor(expected[name]).sum(1) for name in ("response_mask", "value_mask"))
    new, old, advantages = (
        flat(rows, lengths) for rows in (expected["new_logprobs"], helpers["logprobs"], expected["advantages"])
    )
    log_ratio = log_ratios(new, old, lengths)
    loss = clipped(log_ratio, advantages, asked["cliprange"]).mean()
    assert loss.item() == pytest.approx(expected["pg_loss"], rel=1e-5)
    low, high = beyond_clip(log_ratio, advantages, asked["cliprange"])
    assert (low | high).double().mean().item() == expected["pg_clipfrac"]
    of_critic = [flat(rows, longer) for rows in (expected["vpred"], helpers["values"], expected["returns"])]
    assert value_loss(*of_critic, asked["cliprange_value"]).mean().item() == pytest.approx(
        expected["vf_loss"], rel=1e-5
    )


def test_the_cases_of_the_clip():
    """ε = .2, A = ±10. Better and likelier than 1.2: held at 12; rarer: its own. Worse and rarer than .8: held at 8;
    likelier: its own, however much that is."""
    log_ratio = logs(1.1, 1.5, 0.5, 0.9, 0.5, 1.5, 9.0)
    advantages = float64(10, 10, 10, -10, -10, -10, -10)
    torch.testing.assert_close(clipped(log_ratio, advantages, 0.2), float64(-11, -12, -5, 9, 8, 15, 90))
    low, high = beyond_clip(log_ratio, advantages, 0.2)
    assert high.tolist() == [False, True, False, False, False, False, False]
    assert low.tolist() == [False, False, False, False, True, False, False]


def test_the_clip_may_be_wider_above():
    """ε = .2 below and .6 above (DAPO): 1.5 is within, 1.7 held at 1.6, .7 still at .8."""
    log_ratio, advantages = logs(1.5, 1.7, 0.7), float64(1, 1, -1)
    torch.testing.assert_close(clipped(log_ratio, advantages, 0.2, 0.6), float64(-1.5, -1.6, 0.8))
    low, high = beyond_clip(log_ratio, advantages, 0.2, 0.6)
    assert [low.tolist(), high.tolist()] == [[False, False, True], [False, True, False]]


def test_the_dual_clip_bounds_what_was_worse_than_expected():
    """c = 3, A = -2: at ρ = 9 the loss is 6, not 18, and teaches nothing; at ρ = 2 it is 4 as without; for A > 0 it
    changes nothing."""
    log_ratio = logs(9, 2, 9).requires_grad_()
    losses = clipped(log_ratio, float64(-2, -2, 2), 0.2, dual=3.0)
    torch.testing.assert_close(losses.detach(), float64(6, 4, -2.4))
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
    torch.testing.assert_close(gradient, float64(0, 4, 0))
    plain = clipped(logs(9, 2, 9), float64(-2, -2, 2), 0.2)
    torch.testing.assert_close(plain, float64(18, 4, -2.4))


def test_where_clipping_stops_there_is_no_gradient():
    """d/d log ρ of -ρA elsewhere."""
    ratios = float64(1.1, 1.5, 0.5, 0.9, 0.5, 1.5)
    advantages = float64(1, 1, 1, -1, -1, -1)
    log_ratio = ratios.log().requires_grad_()
    (gradient,) = torch.autograd.grad(clipped(log_ratio, advantages, 0.2).sum(), log_ratio)
    low, high = beyond_clip(log_ratio, advantages, 0.2)
    torch.testing.assert_close(gradient, torch.where(low | high, 0.0, -ratios * advantages))


def test_at_the_policy_that_sampled_every_loss_has_the_policy_gradient():
    """ρ = 1: the gradient towards log π is -A, with or without clipping."""
    advantages = float64(1.5, -2)
    for loss in (
        lambda logps, ratio: clipped(ratio, advantages, 0.2, dual=3.0),
        lambda logps, ratio: cispo(logps, ratio, advantages, 0.2),
        lambda logps, ratio: mirror(ratio, advantages, 0.7),
    ):
        logps = float64(-1, -2).requires_grad_()
        ratio = log_ratios(logps, logps.detach(), torch.tensor([1, 1]))
        (gradient,) = torch.autograd.grad(loss(logps, ratio).sum(), logps)
        torch.testing.assert_close(gradient, -advantages)


def test_cispo_weighs_the_log_probability_and_never_leaves_a_token_out():
    """Cap 1.5: weights .1, 1, 1.5 (of 2) with advantages 1, -1, -2 on log π = -1, -2, -3; all of them have a gradient,
    and none goes through the weight."""
    logps = float64(-1, -2, -3).requires_grad_()
    old = logps.detach() - logs(0.1, 1, 2)
    ratio = log_ratios(logps, old, torch.tensor([3]))
    losses = cispo(logps, ratio, float64(1, -1, -2), 0.5)
    torch.testing.assert_close(losses.detach(), float64(0.1, -2, -9))
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradient, float64(-0.1, 1, 3))


def test_mirror_by_hand():
    """ρ = 2, A = 3, coefficient ½: -6 + ½ (2 log 2 - 1); slope towards log ρ: -6 + ½ · 2 log 2."""
    log_ratio = logs(2).requires_grad_()
    loss = mirror(log_ratio, float64(3), 0.5)
    assert loss.item() == pytest.approx(-6 + 0.5 * (2 * math.log(2) - 1), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert gradient.item() == pytest.approx(-6 + math.log(2), rel=1e-12)


def test_the_kl_of_mirror_is_that_to_the_policy_that_sampled():
    """Σ p_old of it is KL(p ‖ p_old), and its gradient too, for p = softmax(z) = (.5, .3, .2), p_old = (.2, .2, .6)."""
    old = float64(0.2, 0.2, 0.6)
    z = logs(0.5, 0.3, 0.2).requires_grad_()
    log_ratio = z.log_softmax(0) - old.log()
    estimate = (old * mirror(log_ratio, torch.zeros(3), 1.0)).sum()
    exact = (z.log_softmax(0).exp() * log_ratio).sum()
    torch.testing.assert_close(estimate, exact)
    gradients = [torch.autograd.grad(x, z, retain_graph=True)[0] for x in (estimate, exact)]
    torch.testing.assert_close(*gradients)


def test_ratios_of_tokens_and_of_completions():
    """Log-ratios (1, 2) and (4): means 1.5 and 4, sums 3 and 4, at every token of the completion."""
    logps, old, lengths = float64(-1, -1, -1), float64(-2, -3, -5), torch.tensor([2, 1])
    assert log_ratios(logps, old, lengths).tolist() == [1, 2, 4]
    assert log_ratios(logps, old, lengths, "sequence_mean").tolist() == [1.5, 1.5, 4]
    assert log_ratios(logps, old, lengths, "sequence").tolist() == [3, 3, 4]


def test_the_mean_over_a_completion_of_its_one_ratio_teaches_as_the_ratio_does():
    """∂/∂ log π_t of mean_t s = s / |y| for the geometric mean s, s for the product s."""
    logps, lengths = float64(-1.0, -1.5).requires_grad_(), torch.tensor([2])
    old = float64(-1.2, -1.7)
    for kind, ratio, slope in (("sequence_mean", math.exp(0.2), 0.5), ("sequence", math.exp(0.4), 1.0)):
        loss = clipped(log_ratios(logps, old, lengths, kind), float64(-1, -1), 0.1).mean()
        assert loss.item() == pytest.approx(ratio, rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, logps)
        torch.testing.assert_close(gradient, torch.full((2,), slope * ratio).double())


@pytest.mark.parametrize("kind", ["token", "sequence_mean", "sequence"])
def test_far_ratios_stay_finite(kind):
    found = log_ratios(torch.tensor([-1.0, -300.0]), torch.tensor([-300.0, -1.0]), torch.tensor([1, 1]), kind)
    assert found.tolist() == [20, -20]
    assert clipped(found, torch.tensor([-1.0, -1.0]), 0.2).isfinite().all()
    assert mirror(found, torch.tensor([1.0, -1.0]), 0.2).isfinite().all()


def test_the_sum_over_a_completion_is_held_not_its_parts():
    """30 and -29 make 1, which is no reason to hold anything."""
    assert log_ratios(float64(30, -29), float64(0, 0), torch.tensor([2]), "sequence").tolist() == [1, 1]


def test_value_loss_by_hand():
    """V_old = 0, c = 1. Moved to 3 with R = 5: held at 1, (1 - 5)² is worse than (3 - 5)²; R = 1: (3 - 1)² is worse
    than none; moved by ½: as it is. Held values have no gradient."""
    values = float64(3, 3, 0.5).requires_grad_()
    returns = float64(5, 1, 2)
    losses = value_loss(values, torch.zeros(3).double(), returns, 1.0)
    torch.testing.assert_close(losses.detach(), float64(8, 2, 1.125))
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    torch.testing.assert_close(gradient, float64(0, 2, -1.5))
    free = value_loss(values, torch.zeros(3).double(), returns, None)
    torch.testing.assert_close(free.detach(), float64(2, 2, 1.125))


@pytest.mark.parametrize("kind", ["token", "sequence_mean", "sequence"])
@pytest.mark.parametrize("name", ["clipped", "dual", "cispo", "mirror"])
def test_gradients_in_fp64(name, kind):
    """Of CISPO the weight is held fast, as its gradient has it."""
    torch.manual_seed(3)
    logps = (-torch.rand(7).double() * 2).requires_grad_()
    old, advantages, lengths = logps.detach() + 0.3 * torch.randn(7).double(), torch.randn(7).double(), [3, 1, 3]
    fixed = log_ratios(logps.detach(), old, torch.tensor(lengths), kind)

    def losses(x):
        ratio = log_ratios(x, old, torch.tensor(lengths), kind)
        if name == "cispo":
            return cispo(x, fixed, advantages, 0.2)
        if name == "mirror":
            return mirror(ratio, advantages, 0.3)
        return clipped(ratio, advantages, 0.2, 0.25, dual=1.3 if name == "dual" else None)

    assert torch.autograd.gradcheck(losses, (logps,))


def test_gradients_of_the_value_loss_in_fp64():
    torch.manual_seed(0)
    old, returns = torch.randn(2, 9).double()
    values = (old + 0.4 * torch.randn(9).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, 0.2), (values,))
