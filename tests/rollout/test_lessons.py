"""What is made of a scored rollout, by hand.

Two prompts, two completions each, of 2, 1, 1 and 2 tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litrecipe.config.online import Grpo, Online, Ppo, Rloo
from litrecipe.rollout.experience import Scored
from litrecipe.rollout.lessons import Lesson, group_lesson, ppo_lesson
from litrecipe.rollout.rewards import Moments, Scores
from litrecipe.rollout.sources import Completions

TOKENS = [[7, 2], [2], [5], [6, 2]]
LOGPS = torch.tensor([-1.0, -2.0, -1.0, -3.0, -1.0, -1.0])
REF = torch.tensor([-2.0, -2.0, -1.5, -3.0, -1.0, -2.0])
KL = [1.0, 0.5, 0.0, 1.0]
"""Of whole completions: LOGPS - REF, added up."""
SCORES = torch.tensor([1.0, 0.0, 0.0, 1.0])


def scored(scores: torch.Tensor = SCORES) -> Scored:
    prompts = [SimpleNamespace(tokens=[1], where=f"p{place // 2}") for place in range(4)]
    completions = Completions(prompts, [""] * 4, TOKENS, ["eos", "eos", "length", "eos"])  # type: ignore[arg-type]
    return Scored(completions, Scores(scores, {}, {}), torch.tensor([0, 0, 1, 1]))


def said(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logps": LOGPS, "entropy": torch.full((6,), 0.5), "ref_logps": REF, **more}


def test_ppo_without_normalisation_by_hand() -> None:
    """γ = λ = 1, values 0: the return of a token is what is still to come. With β = 0.1 the rewards are -0.1 · (1, 0 |
    .5 | 0 | 0, 1) and the scores at the ends: 0.9, 1 | -.05 | 0 | 0.9, 0.9."""
    config = Ppo(kl_coef=0.1, lam=1.0, normalise_advantages=False)
    lesson = ppo_lesson(scored(), said(values=torch.zeros(6)), config, 0.1)
    wanted = torch.tensor([0.9, 1.0, -0.05, 0.0, 0.9, 0.9])
    assert torch.allclose(lesson.extras["advantages"], wanted)
    assert torch.allclose(lesson.extras["returns"], wanted)
    assert lesson.kl is not None and lesson.kl.tolist() == KL
    assert lesson.metrics["kl"] == pytest.approx(0.625)
    assert lesson.metrics["objective/rlhf_reward"] == pytest.approx(0.5 - 0.1 * 0.625)


def test_values_are_taken_off_and_the_last_token_sees_nothing_behind_it() -> None:
    """γ = .5, λ = 0: δ_t = r_t + γ V_{t+1} - V_t, and at the end r - V; returns are advantages plus values."""
    values = torch.tensor([1.0, 2.0, 1.0, 1.0, 4.0, 2.0])
    config = Ppo(kl_coef=0.0, gamma=0.5, lam=0.0, normalise_advantages=False)
    no_reference = {name: x for name, x in said(values=values).items() if name != "ref_logps"}
    lesson = ppo_lesson(scored(), no_reference, config, 0.0)
    wanted = torch.tensor([0 + 1 - 1, 1 - 2, 0 - 1, 0 - 1, 0 + 1 - 4, 1 - 2.0])
    assert torch.allclose(lesson.extras["advantages"], wanted)
    assert torch.allclose(lesson.extras["returns"], wanted + values)
    assert lesson.kl is None and "kl" not in lesson.metrics


def test_normalised_advantages_are_those_of_tokens_that_count() -> None:
    """The third completion was cut: with `mask` its token is in no mean, and its advantage is 0."""
    lesson = ppo_lesson(scored(), said(values=torch.zeros(6)), Ppo(truncated="mask", lam=1.0), 0.0)
    counted, advantages = lesson.extras["counted"], lesson.extras["advantages"]
    assert counted.tolist() == [1, 1, 1, 0, 1, 1]
    assert advantages[3] == 0
    of_those = advantages[counted > 0]
    assert float(of_those.mean()) == pytest.approx(0, abs=1e-6)
    assert float(of_those.var(correction=0)) == pytest.approx(1, rel=1e-5)
    # 1, 1, 0, 1, 1: mean .8, deviation .4
    assert of_those.tolist() == pytest.approx([0.5, 0.5, -2.0, 0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("group", [0.7070, -0.7070]),  # (1 - .5) / (√.5 + 1e-4)
        ("centered", [0.5, -0.5]),
        ("leave_one_out", [1.0, -1.0]),
        ("group_batch", [1.0, -1.0]),
    ],
)
def test_groups_compare_completions_of_one_prompt(kind: str, wanted: list[float]) -> None:
    config = Grpo(advantage=kind)  # type: ignore[arg-type]
    high, low = wanted
    advantages = group_lesson(scored(), said(), config, 0.0).extras["advantages"]
    assert advantages.tolist() == pytest.approx([high, high, low, low, high, high], abs=2e-4)


def test_the_kl_in_the_reward_is_taken_off_before_the_comparison() -> None:
    """R = score - β KL = .9, -.05 | 0, .9: leave one out gives ±.95 and ±.9."""
    lesson = group_lesson(scored(), said(), Rloo(kl_coef=0.1), 0.1)
    assert lesson.extras["advantages"].tolist() == pytest.approx([0.95, 0.95, -0.95, -0.9, 0.9, 0.9])
    assert "ref_logps" not in lesson.extras


def test_the_kl_as_a_loss_leaves_the_scores_alone() -> None:
    lesson = group_lesson(scored(), said(), Grpo(kl_coef=0.1, advantage="centered"), 0.1)
    assert lesson.extras["advantages"].tolist() == [0.5, 0.5, -0.5, -0.5, 0.5, 0.5]
    assert lesson.extras["ref_logps"] is REF


def test_batch_whitens_what_is_still_to_come_of_kl_and_score() -> None:
    """Returns with β = .1 are 0.9, 1 | -.05 | 0 | 0.9, 0.9, as PPO's with λ = 1 and no critic."""
    config = Grpo(advantage="batch", kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    advantages = group_lesson(scored(), said(), config, 0.1).extras["advantages"]
    returns = torch.tensor([0.9, 1.0, -0.05, 0.0, 0.9, 0.9])
    assert torch.allclose(advantages, (returns - returns.mean()) / returns.std(correction=0), atol=1e-5)


DRAWN = [[-1.0, -1.0], [-2.0], [-0.5], [-4.0, -1.0]]
"""Log-probabilities of another engine: π / π_engine is 1, 1/e, e, e^-2.5, e^3, 1."""


@pytest.mark.parametrize("lesson", [ppo_lesson, group_lesson])
def test_tokens_that_another_engine_drew_are_weighed(lesson: Any) -> None:
    """min(π / π_engine, 2), and TRL's metrics of both."""
    config = Ppo(importance_cap=2.0) if lesson is ppo_lesson else Grpo(importance_cap=2.0)
    mine = scored()
    drawn = replace(mine, completions=replace(mine.completions, logps=DRAWN))
    found = lesson(drawn, said(values=torch.zeros(6)), config, 0.0)
    weights = [1, math.exp(-1), 2, math.exp(-2.5), 2, 1]
    assert found.extras["importance"].tolist() == pytest.approx(weights)
    told = {name.removeprefix("sampling/"): value for name, value in found.metrics.items() if "sampling/" in name}
    assert told == {
        "sampling_logp_difference/mean": pytest.approx((1 + 1 + 2.5 + 3) / 6),
        "sampling_logp_difference/max": pytest.approx(3),
        "importance_sampling_ratio/min": pytest.approx(math.exp(-2.5)),
        "importance_sampling_ratio/mean": pytest.approx(sum(weights) / 6),
        "importance_sampling_ratio/max": pytest.approx(2),
    }
    alone = lesson(mine, said(values=torch.zeros(6)), config, 0.0)
    assert "importance" not in alone.extras and not any("sampling/" in name for name in alone.metrics)


def test_the_critic_says_normalised_returns() -> None:
    """γ = λ = 1, no KL. So far returns had mean 3 and spread 2, so that a critic that says -1 means 1. The rollout's
    returns are the scores of the completions, 1, 1 | 0 | 0 | 1, 1; with four that were 1, 1, 5, 5 all ten have mean 1.6
    and spread √(56/10 - 1.6²)."""
    so_far = Moments()
    so_far.add([1.0, 1.0, 5.0, 5.0])
    config = Ppo(kl_coef=0.0, lam=1.0, normalise_advantages=False, normalise_values=True)
    no_reference = {name: x for name, x in said(values=torch.full((6,), -1.0)).items() if name != "ref_logps"}
    lesson = ppo_lesson(scored(), no_reference, config, 0.0, so_far)
    returns = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(lesson.extras["advantages"], returns - 1)
    assert (so_far.count, so_far.mean) == (10, pytest.approx(1.6))
    spread = math.sqrt(5.6 - 1.6**2)
    torch.testing.assert_close(lesson.extras["returns"], (returns - 1.6) / spread)
    assert lesson.extras["old_values"].tolist() == [-1.0] * 6
    masked = ppo_lesson(scored(), no_reference, replace(config, truncated="mask"), 0.0, counted := Moments())
    assert counted.count == 5 and len(masked.extras["returns"]) == 6
    plain = ppo_lesson(scored(), no_reference, replace(config, normalise_values=False), 0.0, untouched := Moments())
    assert untouched.count == 0 and plain.extras["returns"].tolist() == returns.tolist()


@pytest.mark.parametrize("lesson", [ppo_lesson, group_lesson])
def test_every_extra_has_one_number_a_token(lesson: object) -> None:
    config: Online = Ppo(kl_in="loss") if lesson is ppo_lesson else Grpo(kl_coef=0.1, truncated="mask")
    found: Lesson = lesson(scored(), said(values=torch.zeros(6)), config, 0.1)  # type: ignore[operator]
    assert {name: len(values) for name, values in found.extras.items()} == dict.fromkeys(found.extras, 6)
    assert {"old_logps", "advantages", "ref_logps"} <= found.extras.keys()
