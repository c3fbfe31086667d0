"""Learning from what was sampled, as an objective: beside TRL's numbers, by hand, and however the step is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import flat, float64, ranked, rows_of, step
from safetensors.torch import load_file
from torch import nn

from litrecipe.config.online import Grpo, Ppo, Rloo
from litrecipe.model.actor_critic import ActorCriticOutput
from litrecipe.model.critic import Critic
from litrecipe.model.head import Predictions
from litrecipe.model.row import make_row
from litrecipe.objectives.loss import detached, metric_maxima, metric_sums, quotients, step_loss
from litrecipe.objectives.online import ActorCritic, PolicyGradient

SETTINGS = {
    "grpo": Grpo(),
    "dapo": Grpo(aggregate="token"),
    "dr_grpo": Grpo(aggregate="constant", max_new_tokens=6),
    "cispo": Grpo(loss="cispo", clip_high=4.0, aggregate="token"),
    "grpo_beta0.04": Grpo(kl_coef=0.04),
    "gspo": Grpo(ratio="sequence_mean"),
    "grpo_clip_higher0.28": Grpo(clip_high=0.28),
    "grpo_delta1.5": Grpo(dual_clip=1.5),
}


def sampled(prompts, completions, lengths, extras):
    """TRL's rows without their padding; `extras` are laid out as the completions are."""
    return [
        ranked(
            str(n),
            [completion[:length]],
            [token for token in prompt if token],
            **{name: rows[n][:length] for name, rows in extras.items()},
        )
        for n, (prompt, completion, length) in enumerate(zip(prompts, completions, lengths, strict=True))
    ]


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_beside_trl(reference, name, cut):
    """TRL 1.16's GRPO and its kin; the policy is its reference's weights."""
    known = reference.modern["grpo"]
    given, expected = known["inputs"], known[name]
    lengths = torch.tensor(given["completion_mask"]).sum(1).tolist()
    extras = {
        "old_logps": given["old_per_token_logps"],
        "ref_logps": given["ref_per_token_logps"],
        "advantages": [[advantage] * 6 for advantage in given["advantages"]],
    }
    samples = sampled(given["prompt_ids"], given["completion_ids"], lengths, extras)
    policy = reference.frozen
    policy.with_entropy = "measured"
    loss, gradient, metrics = step(PolicyGradient(SETTINGS[name]), policy, rows_of(samples, cut))
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert float(torch.nn.utils.get_total_norm(gradient)) == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert metrics["policy/entropy"] == pytest.approx(expected["metrics"]["entropy"], rel=1e-5)
    if name == "cispo":
        assert metrics["policy/clipfrac_high"] == expected["metrics"]["cispo_clip_ratio"]
    else:
        assert metrics["policy/clipfrac_low"] == expected["metrics"]["clip_ratio/low_mean"]
        assert metrics["policy/clipfrac_high"] == expected["metrics"]["clip_ratio/high_mean"]


class Both(nn.Module):
    """A policy at TRL's temperature, and a critic."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, row):
        return ActorCriticOutput(self.policy(row, 0.7), self.critic(row))


class Grown(nn.Module):
    """The values of the rollout times 1.05."""

    def __init__(self):
        super().__init__()
        self.growth = nn.Parameter(float64(1.05))

    def forward(self, row):
        return self.growth * row.extra.get("old_values", torch.zeros(0))  # an empty row has none


@pytest.fixture(scope="module")
def critic_weights(shared):
    """Of the critic that looked at the rollout."""
    weights = load_file(shared / "checks" / "trl_reference" / "value.safetensors")
    return {name: weight.double() for name, weight in weights.items()}


@pytest.fixture
def model(reference, critic_weights):
    """Policy and critic as they are after the rollout in TRL's numbers: the reference, and all weights times 1.05."""
    critic = Critic(reference.architecture).double()
    critic.load_state_dict({name: weight * 1.05 for name, weight in critic_weights.items()})
    return Both(reference.frozen, critic)


def rollout(reference, block, mask, **extras):
    """The samples of TRL's PPO, with as many tokens of each response as its mask says."""
    inputs, helpers = reference.numbers["inputs"]["ppo"], reference.numbers["ppo"]["helpers"]
    lengths = torch.tensor(block[mask]).sum(1).long().tolist()
    known = {name: block[name] for name in ("advantages", "returns")}
    known |= {"old_logps": helpers["logprobs"], "old_values": helpers["values"]}
    return sampled(inputs["query"], inputs["response"], lengths, known | extras)


def norms(gradient, model):
    """Of policy and critic."""
    n = len(list(model.policy.parameters()))
    return [float(torch.nn.utils.get_total_norm(part)) for part in (gradient[:n], gradient[n:])]


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("name", ["v1_kl", "v1_abs", "v1_mse"])
def test_ppo_beside_trl(reference, name, cut):
    """TRL's first PPO, whose policy and value are of the same tokens."""
    block = reference.numbers["ppo"][name]
    rows = rows_of(rollout(reference, block, "mask"), cut)
    loss, _, metrics = step(ActorCritic(Ppo()), Both(reference.frozen, Grown()), rows)
    stats = block["stats"]
    assert loss == pytest.approx(block["pg_loss"] + block["vf_coef_x_vf_loss"], rel=1e-5)
    assert metrics["policy/approxkl"] == pytest.approx(stats["policy/approxkl"], rel=1e-5)
    assert metrics["policy/clipfrac_low"] + metrics["policy/clipfrac_high"] == stats["policy/clipfrac"]
    assert metrics["value/mean"] == pytest.approx(stats["val/vpred"], rel=1e-5)
    assert metrics["value/error"] == pytest.approx(stats["val/error"], rel=1e-5)
    assert metrics["value/clipfrac"] == stats["val/clipfrac"]


@pytest.mark.parametrize("name", ["v2_default", "v2_whiten_rewards", "v2_missing_eos_penalty1", "v2_gamma0.99_lam0.9"])
def test_ppo_and_its_gradients_beside_trl(reference, model, name):
    """TRL's second PPO: its critic has a value more where there is room, so each of the two has a step of its own."""
    block = reference.numbers["ppo"][name]
    samples = rollout(reference, block, "value_mask", counted=block["response_mask"])
    _, gradient, _ = step(ActorCritic(Ppo(value_coef=0.0)), model, rows_of(samples, 2))
    assert norms(gradient, model) == [pytest.approx(block["grad_norm_policy"], rel=1e-4), 0]
    critic = ActorCritic(Ppo())
    critic.learns_policy = False
    rows = rows_of(rollout(reference, block, "value_mask"), 2)
    loss, gradient, _ = step(critic, model, rows, trained=list(model.critic.parameters()))
    assert loss == pytest.approx(0.1 * block["vf_loss"], rel=1e-5)
    assert float(torch.nn.utils.get_total_norm(gradient)) == pytest.approx(block["grad_norm_value"], rel=1e-4)


class Tables(nn.Module):
    """log π, entropy and value of a token depend on the token alone: numbers of tables (V,)."""

    def __init__(self, logps, entropy=None, values=None):
        super().__init__()
        self.logps = nn.Parameter(float64(*logps))
        self.entropy = None if entropy is None else nn.Parameter(float64(*entropy))
        self.values = None if values is None else nn.Parameter(float64(*values))

    def forward(self, row):
        entropy = None if self.entropy is None else self.entropy[row.target]
        predictions = Predictions(self.logps[row.target], row.target > 0, entropy=entropy)
        return predictions if self.values is None else ActorCriticOutput(predictions, self.values[row.target])


LOGPS = [0.0, -1.0, -1.0, -2.0, -0.5, -3.0, -1.5, -0.25]
ENTROPY = [0.0, 0.5, 1.0, 1.5, 2.0, 0.25, 0.75, 1.25]
VALUES = [0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 0.25, 1.5]


def completion(name, tokens, ratios, advantages, **extras):
    """With the policy's own ratios to the one that sampled."""
    old = [LOGPS[token] - math.log(ratio) for token, ratio in zip(tokens, ratios, strict=True)]
    return ranked(name, [tokens], old_logps=old, advantages=advantages, **extras)


PAIR = [completion("a", [2, 3, 4], [1.1, 1.0, 0.9], [1, 1, 1]), completion("b", [5], [1.5], [-2.0])]
"""Policy losses -1.1, -1, -.9 and 3."""


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("token", (-3 + 3) / 4), ("sequence", (-1 + 3) / 2), ("constant", (-3 + 3) / (2 * 10))],
)
def test_what_counts_alike(aggregate, expected):
    """Losses -1.1 - 1 - .9 of three tokens and 3 of one."""
    objective = PolicyGradient(Grpo(aggregate=aggregate, max_new_tokens=10))
    loss, _, metrics = step(objective, Tables(LOGPS), rows_of(PAIR))
    assert loss == pytest.approx(expected, abs=1e-6)
    assert metrics["policy/ratio"] == pytest.approx(4.5 / 4, rel=1e-6)
    squares = [math.log(ratio) ** 2 for ratio in (1.1, 1.0, 0.9, 1.5)]
    assert metrics["policy/approxkl"] == pytest.approx(sum(squares) / 8, rel=1e-5)
    assert "policy/entropy" not in metrics


def test_the_longest_completion_may_be_told_apart_from_the_recipe():
    config = Grpo(aggregate="constant", max_new_tokens=10)
    row = make_row(PAIR)
    assert PolicyGradient(config).counts(row) == {"policy": 20}
    assert PolicyGradient(config, max_new_tokens=7).counts(row) == {"policy": 14}


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("token", -3 / 3), ("sequence", -1.0), ("constant", -3 / 10)],
)
def test_what_is_left_out_is_in_no_count_and_in_no_metric(aggregate, expected):
    """The pair's second completion does not count, its numbers may be anything."""
    out = completion("b", [5], [1e6], [math.nan], counted=[0])
    samples = [completion("a", [2, 3, 4], [1.1, 1.0, 0.9], [1, 1, 1], counted=[1, 1, 1]), out]
    objective = PolicyGradient(Grpo(aggregate=aggregate, max_new_tokens=10, kl_coef=0.0))
    model = Tables(LOGPS, ENTROPY)
    loss, (gradient,), metrics = step(objective, model, rows_of(samples, 1), trained=[model.logps])
    assert loss == pytest.approx(expected, abs=1e-6)
    assert gradient[5] == 0
    assert metrics["policy/ratio"] == pytest.approx(1.0, rel=1e-6)
    assert metrics["policy/entropy"] == pytest.approx((1 + 1.5 + 2) / 3)
    losses = [objective(model(row), row) for row in rows_of(samples, 1)]
    assert metric_maxima(losses) == {"policy/ratio_max": pytest.approx(1.1, rel=1e-6)}
    assert losses[1].maxima == {}


def test_the_largest_ratio_of_a_step():
    model, objective = Tables(LOGPS), PolicyGradient(Grpo())
    losses = [detached(objective(model(row), row)) for row in rows_of(PAIR, 1)]
    assert metric_maxima(losses) == {"policy/ratio_max": pytest.approx(1.5, rel=1e-6)}
    assert metric_maxima(losses[:1]) == {"policy/ratio_max": pytest.approx(1.1, rel=1e-6)}
    assert not losses[0].maxima["policy/ratio_max"].requires_grad


@pytest.mark.parametrize(("ratio", "expected"), [("sequence", 1.1 * 0.9), ("sequence_mean", (1.1 * 0.9) ** (1 / 3))])
def test_one_ratio_for_the_completion(ratio, expected):
    """1.1 · 1 · .9, or its cube root, at all three tokens; 1.5 at the only one of the other."""
    loss, _, metrics = step(PolicyGradient(Grpo(ratio=ratio)), Tables(LOGPS), rows_of(PAIR))
    assert loss == pytest.approx((-expected + 3) / 2, rel=1e-6)
    assert metrics["policy/ratio"] == pytest.approx((3 * expected + 1.5) / 4, rel=1e-6)


def test_rloo_is_the_ratio_of_the_completion_times_its_advantage():
    """With the recipe's defaults, and the KL in the reward."""
    objective = PolicyGradient(Rloo())
    assert not objective.needs_reference
    assert objective.counts(make_row(PAIR)) == {"policy": 2}
    assert step(objective, Tables(LOGPS), rows_of(PAIR))[0] == pytest.approx((-1.1 * 0.9 + 3) / 2, rel=1e-6)


def test_mirror_has_no_clipping_to_tell_of():
    """-ρA + .1 (ρ log ρ - ρ + 1)."""
    loss, _, metrics = step(PolicyGradient(Grpo(loss="mirror")), Tables(LOGPS), rows_of(PAIR))
    kl = [ratio * math.log(ratio) - ratio + 1 for ratio in (1.1, 1.0, 0.9, 1.5)]
    assert loss == pytest.approx((-1 + 0.1 * sum(kl[:3]) / 3 + 3 + 0.1 * kl[3]) / 2, rel=1e-6)
    assert not any("clipfrac" in name for name in metrics)


def test_the_kl_as_a_loss_is_averaged_as_the_policy_is_and_can_be_steered():
    """k1 = 1, 2, 3 and 4: means 2 and 4 over the completions."""
    kl = {2: 1, 3: 2, 4: 3, 5: 4}
    samples = [
        completion("a", [2, 3, 4], [1, 1, 1], [0, 0, 0], ref_logps=[LOGPS[t] - kl[t] for t in (2, 3, 4)]),
        completion("b", [5], [1], [0], ref_logps=[LOGPS[5] - kl[5]]),
    ]
    objective = PolicyGradient(Grpo(kl_coef=0.5, kl_estimator="k1"))
    assert objective.needs_reference
    assert objective.counts(make_row(samples)) == {"policy": 2, "kl": 2}
    assert step(objective, Tables(LOGPS), rows_of(samples, 1))[0] == pytest.approx(0.5 * 3)
    objective.kl_coef = 0.25
    assert step(objective, Tables(LOGPS), rows_of(samples, 1))[0] == pytest.approx(0.25 * 3)
    in_reward = PolicyGradient(Grpo(kl_coef=0.5, kl_in="reward"))
    assert not in_reward.needs_reference
    assert step(in_reward, Tables(LOGPS), rows_of(samples, 1))[0] == pytest.approx(0, abs=1e-6)


def test_the_entropy_is_a_bonus():
    """Entropies 1, 1.5, 2 and .25: -.1 · (1.5 + .25) / 2, and its gradient -.1 / 6 for each of three tokens."""
    objective = PolicyGradient(Grpo(entropy_coef=0.1))
    assert objective.needs_entropy
    model = Tables(LOGPS, ENTROPY)
    plain = step(PolicyGradient(Grpo()), model, rows_of(PAIR), trained=[model.logps])[0]
    loss, (_, gradient), metrics = step(objective, model, rows_of(PAIR))
    assert loss == pytest.approx(plain - 0.1 * 1.75 / 2, rel=1e-6)
    torch.testing.assert_close(gradient[2:6].float(), -0.1 * torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))
    assert metrics["policy/entropy"] == pytest.approx(4.75 / 4)


def test_a_bonus_for_an_entropy_that_teaches_nothing_is_a_mistake_of_ours():
    objective, model, row = PolicyGradient(Grpo(entropy_coef=0.1)), Tables(LOGPS), make_row(PAIR)
    with pytest.raises(ValueError, match="entropy with gradient"):
        objective(model(row), row)
    with pytest.raises(ValueError, match="entropy with gradient"):
        objective(model(row)._replace(entropy=torch.zeros(4)), row)
    with torch.no_grad():
        objective(model(row)._replace(entropy=torch.zeros(4)), row)


@pytest.mark.parametrize(("aggregate", "expected"), [("token", (-1.1 - 2 - 0.45 + 9) / 4), ("sequence", 3.90833)])
def test_what_another_engine_drew_is_weighed(aggregate, expected):
    """Losses -1.1, -1, -.9 and 3, times 1, 2, ½ and 3; the KL and what is counted are not."""
    ref = [LOGPS[token] - 1 for token in (2, 3, 4)]
    samples = [
        completion("a", [2, 3, 4], [1.1, 1.0, 0.9], [1, 1, 1], importance=[1, 2, 0.5], ref_logps=ref),
        completion("b", [5], [1.5], [-2.0], importance=[3], ref_logps=[LOGPS[5] - 1]),
    ]
    for rows in (rows_of(samples), rows_of(samples, 1)):
        assert step(PolicyGradient(Grpo(aggregate=aggregate)), Tables(LOGPS), rows)[0] == pytest.approx(expected)
        held = PolicyGradient(Grpo(aggregate=aggregate, kl_coef=0.5, kl_estimator="k1"))
        assert step(held, Tables(LOGPS), rows)[0] == pytest.approx(expected + 0.5)


def test_weighed_by_the_ratio_the_gradient_is_that_of_the_policys_own_samples():
    """One token out of six that q draws, on average over q with weights π / q: ∇ Σ π A."""
    z = nn.Parameter(float64(0.3, -0.2, 0.5, 0.0, -1.0, 0.1))
    advantages, q = float64(3, -1, 0, 2, 1, -4), float64(0.3, 0.1, 0.1, 0.2, 0.1, 0.2)
    logps = z.log_softmax(0)
    (wanted,) = torch.autograd.grad(-(logps.exp() * advantages).sum(), z, retain_graph=True)
    total = torch.zeros(6).double()
    for token in range(6):
        old = logps.detach()[token]
        extra = {"old_logps": [old], "advantages": [advantages[token]], "importance": [old.exp() / q[token]]}
        row = make_row([ranked("a", [[token]], **extra)])
        predictions = Predictions(z.log_softmax(0)[row.target], row.target >= 0)
        loss = PolicyGradient(Grpo())(predictions, row)
        total += q[token] * torch.autograd.grad(loss.terms[0].sum, z)[0]
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-7)


def with_text():
    """A completion and, beside it, plain text of tokens 6 and 7 with log π -1.5 and -.25."""
    asked = completion("a", [2, 3, 4], [1.1, 1.0, 0.9], [1, 1, 1], ptx=[0, 0, 0], counted=[1, 1, 1])
    text = ranked("t", [[6, 7]], old_logps=[0, 0], advantages=[9, 9], ptx=[1, 1], counted=[1, 1])
    return [asked, text]


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_plain_text_is_learnt_along_and_counts_there_only(aggregate):
    objective = PolicyGradient(Grpo(ptx_coef=2.0, aggregate=aggregate, max_new_tokens=10))
    for rows in (rows_of(with_text()), rows_of(with_text(), 1)):
        policy = {"token": -1, "sequence": -1, "constant": -0.3}[aggregate]
        loss, (gradient,), metrics = step(objective, Tables(LOGPS), rows)
        assert loss == pytest.approx(policy + 2 * 1.75 / 2, rel=1e-6)
        assert gradient[6:].tolist() == [-1, -1]
        assert metrics["policy/ratio"] == pytest.approx(1, rel=1e-6)
    counts = objective.counts(make_row(with_text()))
    assert counts == {"policy": {"token": 3, "sequence": 1, "constant": 10}[aggregate], "ptx": 2}


def judged(name, tokens, ratios, advantages, returns, old_values, **extras):
    return completion(name, tokens, ratios, advantages, returns=returns, old_values=old_values, **extras)


JUDGED = [
    judged("a", [2, 3, 4], [1.1, 1.0, 0.9], [1, 1, 1], [0, 0, 0], [-1, 0, 0]),
    judged("b", [5], [1.5], [-2.0], [0.5], [-0.5]),
]
"""Values -1, .5, 2 and -.5: errors 1, .25, 4, 1; moved by 0, .5, 2, 0."""


def test_the_critic_learns_beside_the_policy():
    """Clip 1: the third value is held at 1, which is nearer to the return, so 4 stands. ½ (1 + .25 + 4 + 1) / 4."""
    objective, model = ActorCritic(Ppo(value_clip=1.0, value_coef=0.5)), Tables(LOGPS, values=VALUES)
    assert objective.counts(make_row(JUDGED)) == {"policy": 4, "value": 4}
    loss, (of_policy, of_critic), metrics = step(objective, model, rows_of(JUDGED, 1))
    assert loss == pytest.approx(0 + 0.5 * 0.5 * 6.25 / 4, abs=1e-6)
    assert of_critic[2:6].tolist() == pytest.approx([-1 / 8, 0.5 / 8, 2 / 8, -1 / 8])
    assert of_policy[2:5].tolist() == pytest.approx([-1.1 / 4, -1 / 4, -0.9 / 4], rel=1e-6)
    assert metrics["value/mean"] == pytest.approx(1 / 4)
    assert metrics["value/error"] == pytest.approx(6.25 / 4)
    assert metrics["value/clipfrac"] == 0
    assert metrics["policy/clipfrac_high"] == 0


@pytest.mark.parametrize(("aggregate", "expected"), [("sequence", (5.25 / 3 + 1) / 2), ("constant", 6.25 / 20)])
def test_values_are_averaged_as_the_policy_is(aggregate, expected):
    """Errors 1, .25, 4 of one completion and 1 of the other."""
    objective = ActorCritic(Ppo(value_coef=1.0, value_clip=None, aggregate=aggregate, max_new_tokens=10))
    objective.learns_policy = False
    model = Tables(LOGPS, values=VALUES)
    assert step(objective, model, rows_of(JUDGED, 1), trained=[model.values])[0] == pytest.approx(expected / 2)


def test_where_the_critic_is_held():
    """The fourth value was 5 when sampled and moved by -5.5, past a return of .5: held at 4, an error of 3.5² instead
    of 1, and no gradient."""
    held = [JUDGED[0], judged("b", [5], [1.5], [-2.0], [0.5], [5])]
    model = Tables(LOGPS, values=VALUES)
    _, (_, gradient), metrics = step(ActorCritic(Ppo(value_clip=1.0)), model, rows_of(held))
    assert metrics["value/clipfrac"] == 1 / 4
    assert gradient[5] == 0
    loose = step(ActorCritic(Ppo(value_clip=None)), model, rows_of(held))
    assert "value/clipfrac" not in loose[2]
    assert loose[1][1][5] != 0


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_a_critic_that_warms_up_leaves_the_policy_without_gradients(aggregate):
    objective = ActorCritic(Ppo(aggregate=aggregate, entropy_coef=0.1))
    model, row = Tables(LOGPS, ENTROPY, VALUES), make_row(JUDGED)
    objective.learns_policy = False
    counts, loss = objective.counts(row), objective(model(row), row)
    assert list(counts) == [term.name for term in loss.terms] == ["value"]
    step_loss(loss, counts).backward()
    assert model.logps.grad is None
    assert model.entropy.grad is None
    assert model.values.grad.any()
    assert "policy/approxkl" in loss.metrics
    objective.learns_policy = True
    assert list(objective.counts(row)) == ["policy", "entropy", "value"]
    step_loss(objective(model(row), row), objective.counts(row)).backward()
    assert model.logps.grad.any()


def test_the_empty_row_of_another_rank_adds_nothing():
    row, model = make_row([]), Tables(LOGPS, ENTROPY, VALUES)
    objective = ActorCritic(Ppo(kl_coef=0.1, kl_in="loss", entropy_coef=0.1, ptx_coef=1.0))
    counts = objective.counts(row)
    assert counts == {"policy": 0, "kl": 0, "entropy": 0, "ptx": 0, "value": 0}
    loss = objective(model(row), row)
    total = step_loss(loss, counts)
    assert total.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, list(model.parameters())))
    assert quotients(metric_sums([loss])) == {}
    assert metric_maxima([loss]) == {}


@pytest.mark.parametrize("name", ["old_logps", "advantages", "returns", "old_values"])
def test_what_a_row_lacks_is_named(name):
    sample = JUDGED[0]
    row, model = make_row([sample]), Tables(LOGPS, values=VALUES)
    del row.extra[name]
    with pytest.raises(ValueError, match=f"the loss needs {name}"):
        ActorCritic(Ppo())(model(row), row)


CONFIGS = [
    Grpo(clip_high=0.4, dual_clip=1.5),
    Grpo(loss="cispo", ratio="sequence_mean", kl_coef=0.1, kl_estimator="k2"),
    Grpo(loss="mirror", ratio="sequence", entropy_coef=0.1),
    Grpo(ratio="sequence_mean", ptx_coef=0.5, kl_coef=0.2),
    Ppo(entropy_coef=0.01, kl_in="loss", ptx_coef=0.5),
]
NUMBER = st.integers(-8, 8).map(lambda n: n / 4)
TOKEN = st.tuples(st.integers(2, 7), *[NUMBER] * 5)
STEPS = st.lists(
    st.tuples(st.lists(st.lists(TOKEN, min_size=1, max_size=4), min_size=1, max_size=3), st.sampled_from("abct")),
    min_size=1,
    max_size=5,
)


def groups_of(steps):
    """Prompts with their completions; of kind `c` the first completion does not count, `t` is plain text."""
    samples = []
    for n, (completions, kind) in enumerate(steps):
        tokens = [token for completion in completions for token in completion]
        names = "old_logps", "ref_logps", "advantages", "returns", "old_values"
        extras = {name: [token[1 + place] for token in tokens] for place, name in enumerate(names)}
        extras["old_logps"] = [LOGPS[token[0]] + token[1] / 4 for token in tokens]
        first = len(completions[0]) if kind == "c" else 0
        counted = [float(place >= first) for place in range(len(tokens))]
        text = [float(kind == "t")] * len(tokens)
        answers = [[token[0] for token in completion] for completion in completions]
        samples.append(ranked(str(n), answers, **extras, counted=counted, ptx=text))
    return samples


@settings(deadline=None)
@given(STEPS, st.sampled_from(CONFIGS), st.sampled_from(["token", "sequence", "constant"]), st.randoms(), st.data())
def test_neither_the_cut_nor_the_order_of_a_step_changes_anything(steps, config, aggregate, random, data):
    config = type(config)(**{**vars(config), "aggregate": aggregate})
    ppo = isinstance(config, Ppo)
    objective = (ActorCritic if ppo else PolicyGradient)(config)
    model = Tables(LOGPS, ENTROPY if config.entropy_coef else None, VALUES if ppo else None)
    samples = groups_of(steps)
    expected = step(objective, model, rows_of(samples))
    random.shuffle(samples)
    sizes = data.draw(st.lists(st.integers(0, len(samples)), max_size=3))
    loss, gradient, metrics = step(objective, model, rows_of(samples, *sizes))
    assert loss == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
    for found, right in zip(gradient, expected[1], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    assert metrics == pytest.approx(expected[2], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("config", [CONFIGS[0], *CONFIGS[2:]])
def test_gradients_in_fp64(config, aggregate):
    """Of the whole step's loss. CISPO has none of this kind, its weight is held fast."""
    config = type(config)(**{**vars(config), "aggregate": aggregate})
    ppo = isinstance(config, Ppo)
    objective = (ActorCritic if ppo else PolicyGradient)(config)
    torch.manual_seed(1)
    draws = np.round(np.random.default_rng(0).normal(size=(9, 5)), 2) + 0.003
    tokens = [(2 + n % 6, *draw) for n, draw in enumerate(draws.tolist())]
    row = make_row(groups_of([([tokens[:2], tokens[2:5]], "c"), ([tokens[5:7]], "a"), ([tokens[7:]], "t")]))
    counts = objective.counts(row)

    def loss(logps, entropy, values):
        predictions = Predictions(logps[row.target], row.target > 0, entropy=entropy[row.target])
        output = ActorCriticOutput(predictions, values[row.target]) if ppo else predictions
        return step_loss(objective(output, row), counts)

    tables = [float64(*table).requires_grad_() for table in (LOGPS, ENTROPY, VALUES)]
    assert torch.autograd.gradcheck(loss, tables)


def test_trl_reads_its_completions_as_they_are_laid_out_here(reference, critic_weights):
    """Parity of what the tests above stand on: log-probabilities under policy and reference, and values."""
    block, helpers = reference.numbers["ppo"]["v1_kl"], reference.numbers["ppo"]["helpers"]
    samples = rollout(reference, block, "mask")
    row, lengths = make_row(samples), torch.tensor(block["mask"]).sum(1).long()
    for model, name in ((reference.policy, "logprobs"), (reference.frozen, "ref_logprobs")):
        torch.testing.assert_close(model(row, 0.7).logps, flat(helpers[name], lengths), rtol=1e-5, atol=1e-6)
    critic = Critic(reference.architecture).double()
    critic.load_state_dict(critic_weights)
    torch.testing.assert_close(critic(row), flat(helpers["values"], lengths), rtol=1e-5, atol=1e-6)
