"""Do DPO and PPO put probability on answers that no comparison is about? The bandit of 2404.10719, section 4.2.

    python benchmarks/bandit.py

Eight prompts, eight answers each, of which the one on the diagonal is the best; policies and reward models are small
networks. Comparisons of the best answer with some of the others cover a part of the answers only. Told is the
probability of the answers that are in no comparison, before and after, over 20 seeds: of DPO at several numbers of
steps, of PPO on a learnt reward model, and of the policy that PPO looks for, π_ref exp(r / β). Once with reward models
that nothing holds back and policies that start at random; once with an L2 penalty on rewards and policies fine-tuned on
the answers of the comparisons first. One run proves nothing here: look at the spread.

Shapes: S seeds, 8 prompts, 8 answers, h hidden units.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import print_table, write_result
from torch import Tensor, nn

from litrecipe.objectives.policy_gradient import clipped
from litrecipe.objectives.preference import nls, sigmoid

SEEDS, N, HIDDEN = 20, 8, 32
BETA = 0.1
COVERED = 4
"""Answers of each prompt that are in comparisons, the best one among them."""
DPO_STEPS = (10, 30, 100, 300, 1000)
L2 = 0.01


class Networks(nn.Module):
    """S networks from a prompt to a number for each of its answers."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(SEEDS, N, HIDDEN, generator=generator) / N**0.5)
        self.second = nn.Parameter(torch.randn(SEEDS, HIDDEN, N, generator=generator) / HIDDEN**0.5)

    def forward(self) -> Tensor:
        """(S, 8, 8)"""
        return self.first.tanh() @ self.second


def learn(networks: Networks, loss: Callable[[Tensor], Tensor], steps: int, lr: float = 1e-2) -> None:
    """Adam on the sum over seeds of losses (S,), so that each seed learns alone."""
    optimizer = torch.optim.Adam(networks.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(networks()).sum().backward()
        optimizer.step()


def copy_of(networks: Networks) -> Networks:
    """The same weights, learning apart."""
    twin = Networks(torch.Generator())
    twin.load_state_dict(networks.state_dict())
    return twin


def comparisons(generator: torch.Generator) -> Tensor:
    """(S, 8, 8) bool: which answers are in comparisons; the diagonal is."""
    order = torch.rand(SEEDS, N, N, generator=generator)
    order.diagonal(dim1=1, dim2=2).fill_(-1)
    return order.argsort(-1).argsort(-1) < COVERED


def best_of(values: Tensor) -> Tensor:
    """(S, 8, 8) → (S, 8, 1), of the best answer of each prompt."""
    return values.diagonal(dim1=1, dim2=2)[..., None]


def over_pairs(losses: Tensor, covered: Tensor) -> Tensor:
    """(S, 8, 8) → (S,), the mean over the pairs of the best answer with each other one that is covered."""
    worse = covered & ~torch.eye(N, dtype=torch.bool)
    return (losses * worse).sum((1, 2)) / worse.sum((1, 2))


def uncovered(logps: Tensor, covered: Tensor) -> list[float]:
    """Probability of what is in no comparison, the mean over the prompts of each seed."""
    return (logps.exp() * ~covered).sum(-1).mean(-1).tolist()


def ppo(start: Networks, rewards: Tensor, generator: torch.Generator, rollouts: int = 60, samples: int = 64) -> Tensor:
    """Log-probabilities (S, 8, 8) after PPO with a KL of weight β in the reward."""
    policy = copy_of(start)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    reference = start().log_softmax(-1).detach()
    for _ in range(rollouts):
        old = policy().log_softmax(-1).detach()
        drawn = torch.multinomial(old.exp().flatten(0, 1), samples, True, generator=generator).view(SEEDS, N, samples)
        scores = (rewards - BETA * (old - reference)).gather(-1, drawn)
        advantages = (scores - scores.mean(-1, keepdim=True)) / (scores.std((1, 2), keepdim=True) + 1e-8)
        for _ in range(4):
            log_ratio = (policy().log_softmax(-1) - old).gather(-1, drawn)
            loss = clipped(log_ratio.flatten(), advantages.flatten(), 0.2, 0.2, None).view(SEEDS, -1).mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy().log_softmax(-1).detach()


def arm(seed: int, l2: float, sft_steps: int) -> dict[str, list[float]]:
    """Probability of uncovered answers by method, a number a seed."""
    generator = torch.Generator().manual_seed(seed)
    covered = comparisons(generator)
    start = Networks(generator)
    share = covered / covered.sum(-1, keepdim=True)
    if sft_steps:
        learn(start, lambda logits: -(share * logits.log_softmax(-1)).sum(-1).mean(-1), sft_steps)
    reference = start().log_softmax(-1).detach()
    found = {"start": uncovered(reference, covered)}

    policy, done = copy_of(start), 0
    for steps in DPO_STEPS:

        def dpo(logits: Tensor) -> Tensor:
            ratios = logits.log_softmax(-1) - reference
            return over_pairs(sigmoid(best_of(ratios).expand_as(ratios), ratios, BETA), covered)

        learn(policy, dpo, steps - done)
        done = steps
        found[f"DPO, {steps} steps"] = uncovered(policy().log_softmax(-1).detach(), covered)

    judge = Networks(generator)

    def bradley_terry(rewards: Tensor) -> Tensor:
        return over_pairs(nls(best_of(rewards) - rewards), covered) + l2 * rewards.square().mean((1, 2))

    learn(judge, bradley_terry, 300)
    rewards = judge().detach()
    found["exact optimum"] = uncovered((reference + rewards / BETA).log_softmax(-1), covered)
    found["PPO"] = uncovered(ppo(start, rewards, generator), covered)
    return found


def main() -> None:
    """Runs all arms and prints the table."""
    began = time.monotonic()
    torch.set_num_threads(1)
    arms = {
        "free reward model, random start": arm(0, 0.0, 0),
        "free reward model, fine-tuned start": arm(0, 0.0, 200),
        f"L2 of {L2} on rewards, fine-tuned start": arm(0, L2, 200),
    }
    rows = []
    result: dict[str, object] = {}
    for name, found in arms.items():
        for method, values in found.items():
            spread = statistics.quantiles(values, n=10)
            mean, sd = statistics.mean(values), statistics.stdev(values)
            rows.append([name, method, f"{mean:.3f} ± {sd:.3f}", f"{min(values):.3f} to {max(values):.3f}"])
            result.setdefault(name, {})[method] = {  # type: ignore[attr-defined]
                "mean": mean,
                "sd": sd,
                "deciles": spread,
                "values": values,
            }
    print_table(["arm", "method", "uncovered, mean ± sd", "range"], rows)
    write_result("bandit", {"seeds": SEEDS, "seconds": time.monotonic() - began, "arms": result})


if __name__ == "__main__":
    main()
