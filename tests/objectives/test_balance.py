"""Losses of a router: by hand, beside transformers, and however the tokens are cut into rows."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.objectives.balance import load_balancing, router_sums, router_z

L, T, E = 3, 10, 5


def logits(seed=0, tokens=T):
    return torch.randn(L, tokens, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(logits, top_k, mask=None, **how):
    sums = router_sums(logits, top_k, mask)
    return load_balancing(sums, sums, **how)


@pytest.mark.parametrize("pooled", [True, False])
def test_by_hand(pooled):
    """One layer, two experts with odds 3 : 1 for the first in two tokens, 1 : 3 in a third, k = 1: f = (2/3, 1/3),
    P = (7/12, 5/12), so 2 (14/36 + 5/36) = 19/18; logsumexp = log 4 twice and log 8: the third has odds 2 : 6."""
    rows = torch.tensor([[[3.0, 1], [3, 1], [2, 6]]]).double().log()
    sums = router_sums(rows, 1)
    assert sums.chosen.tolist() == [[2, 1]]
    assert float(load_balancing(sums, sums, pooled)) == pytest.approx(19 / 18, rel=1e-12)
    assert float(router_z(sums, sums)) == pytest.approx((2 * math.log(4) ** 2 + math.log(8) ** 2) / 3, rel=1e-12)


def test_layers_that_lean_in_opposite_ways_cancel_only_where_they_are_pooled():
    """Odds 3 : 1 for the first expert, and for the second in the other layer: pooled f = P = (½, ½); else 2 · ¾."""
    rows = torch.tensor([[[3.0, 1]], [[1, 3]]]).double().log()
    assert float(whole(rows, 1, pooled=True)) == pytest.approx(1.0, rel=1e-12)
    assert float(whole(rows, 1, pooled=False)) == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_used_alike_give_k(top_k, pooled):
    """Every expert is among the best k equally often: the rotations of one token's logits."""
    one = torch.tensor([2.0, 1.0, 0.5, 0.1]).double()
    rows = torch.stack([one.roll(shift) for shift in range(4)]).expand(L, 4, 4)
    assert float(whole(rows, top_k, pooled=pooled)) == pytest.approx(top_k, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_beside_transformers(top_k, masked):
    """Value and gradient of the pooled loss, without and with padding."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours, theirs = (logits().float().requires_grad_() for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    expected = load_balancing_loss_func(tuple(theirs), E, top_k, mask)
    found = whole(ours, top_k, None if mask is None else mask.flatten().bool())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    expected.backward()
    found.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, T), max_size=4), st.booleans(), st.integers(1, E), st.randoms())
def test_shares_of_rows_add_up_to_the_step(cuts, pooled, top_k, random):
    """Value and gradient, whatever the cut and the order of tokens; empty rows add nothing."""
    at_once = logits().requires_grad_()
    sums = router_sums(at_once, top_k)
    expected = torch.stack([load_balancing(sums, sums, pooled), router_z(sums, sums)])
    expected.sum().backward()

    order = list(range(T))
    random.shuffle(order)
    in_rows = logits()[:, order].requires_grad_()
    ends = [0, *sorted(cuts), T]
    rows = [router_sums(in_rows[:, a:b], top_k) for a, b in pairwise(ends)]
    step = reduce(add, rows)
    found = sum(torch.stack([load_balancing(row, step, pooled), router_z(row, step)]) for row in rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # The step's sums come from a pass without gradient; here they have one, which must not count.
    found.sum().backward()
    torch.testing.assert_close(in_rows.grad, at_once.grad[:, order], rtol=1e-10, atol=1e-12)


@settings(deadline=None)
@given(st.integers(0, 4), st.floats(-50, 50))
def test_masked_tokens_say_nothing(padding, value):
    plain = router_sums(logits(), 2)
    padded = torch.cat([logits(), torch.full((L, padding, E), value).double()], 1)
    masked = router_sums(padded, 2, torch.arange(T + padding) < T)
    for name in ("tokens", "chosen", "probability", "squared_logsumexp"):
        torch.testing.assert_close(getattr(masked, name), getattr(plain, name), rtol=1e-12, atol=1e-12)


def test_bf16_logits_are_summed_in_fp32():
    sums = router_sums(logits().bfloat16(), 2)
    torch.testing.assert_close(sums.probability, logits().bfloat16().float().softmax(-1).sum(1))
    assert sums.squared_logsumexp.dtype == torch.float32


@pytest.mark.parametrize("pooled", [True, False])
def test_gradients(pooled):
    """Towards the probabilities: counts of chosen experts do not move where the order of logits does not."""
    assert torch.autograd.gradcheck(lambda x: whole(x, 2, pooled=pooled), (logits(tokens=4).requires_grad_(),))
    assert torch.autograd.gradcheck(
        lambda x: router_z(router_sums(x, 2), router_sums(x, 2)), (logits(tokens=4).requires_grad_(),)
    )
