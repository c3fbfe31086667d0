"""There is no padding; what stands left and right of a pair in its row, and where the row is cut, is as nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ranked, rows_of, step
from small import CONFIG, decoder

from litrecipe.config.groups import Dpo, Reward
from litrecipe.model.families import read_architecture
from litrecipe.model.reference import PolicyAndReference
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import make_row
from litrecipe.objectives.dpo import make_dpo
from litrecipe.objectives.reward import RewardLoss

IDS = st.lists(st.integers(3, 119), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(IDS, IDS, IDS), min_size=1, max_size=4)
POLICY = decoder(spread=0.3).double()
BESIDE = PolicyAndReference(POLICY, decoder(spread=0.3, seed=1).double())
REWARDS = RewardModel(read_architecture(CONFIG)).double()
REWARDS.load_state_dict({**POLICY.model.state_dict(prefix="model."), "score.weight": torch.linspace(-1, 1, 64)[None]})


def samples(pairs):
    return [ranked(str(n), [chosen, rejected], prompt) for n, (prompt, chosen, rejected) in enumerate(pairs)]


@settings(deadline=None, max_examples=25)
@given(PAIRS)
@torch.no_grad()
def test_a_pair_gets_the_same_numbers_in_any_company(pairs):
    """Log-probabilities of policy and reference, and rewards, of each answer: alone, first, in the midst, last."""
    objective = make_dpo(Dpo())
    together, alone = make_row(samples(pairs)), rows_of(samples(pairs), *[1] * (len(pairs) - 1))
    found = objective.pairs(BESIDE(together), together)
    wanted = [objective.pairs(BESIDE(row), row) for row in alone]
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        one_by_one = torch.cat([getattr(one, name) for one in wanted])
        torch.testing.assert_close(getattr(found, name), one_by_one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(REWARDS(together), torch.cat([REWARDS(row) for row in alone]), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=15)
@given(PAIRS, st.sampled_from(["dpo", "reward"]), st.randoms(), st.data())
def test_a_step_of_a_real_model_depends_on_neither_order_nor_cut(pairs, kind, random, data):
    """Loss and all gradients."""
    objective = make_dpo(Dpo(loss="ipo", nll_coef=0.3)) if kind == "dpo" else RewardLoss(Reward(centering_coef=0.1))
    model = BESIDE if kind == "dpo" else copy.deepcopy(REWARDS)
    trained = list((model.policy if kind == "dpo" else model).parameters())
    here = samples(pairs)
    loss, gradient, _ = step(objective, model, rows_of(here), trained=trained)
    random.shuffle(here)
    cuts = data.draw(st.lists(st.integers(1, 2), max_size=3))
    other, other_gradient, _ = step(objective, model, rows_of(here, *cuts), trained=trained)
    assert other == pytest.approx(loss, rel=1e-9, abs=1e-12)
    for ours, theirs in zip(gradient, other_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
