"""What DPO and PPO do to answers that no comparison covers: the bandit of 2404.10719, section 4.2.

    python benchmarks/bandit.py [--seeds 20]

Eight prompts have eight answers each; the best is the one on the diagonal, and the further from it the worse. Policies
and the reward model are small networks that read the prompt. Each prompt has a few comparisons of answers that the
reference gave, so the answers that it seldom gives are in none. How much probability do policies give to wrong answers
that no comparison of their prompt covers: at the start, after DPO of several lengths, after PPO on samples scored by
the learned reward model, and at the exact optimum of what PPO maximises, π_ref exp(r / β)? Three times: as it comes;
with rewards held near 0 (0.01 times their mean square over all answers, covered or not); and with a start besides,
which is then the reference too, that was fine-tuned on the better answers of the comparisons.

The setting (spread of the reference, four comparisons a prompt) was chosen among four in which the effect was looked
for. With full coverage there is none; with a wider spread or two comparisons holding rewards near 0 did not bring PPO's
share to 0 (0.07 to 0.28). That it does so here says that it can, not that it always will.

All seeds are computed together: each has networks of its own, and no number of one enters another's. The deterministic
part of the section, one prompt and a policy without a network, is tests/objectives/test_bandit.py.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from common import print_table, write_result
from torch import Tensor

from litrecipe.objectives.advantages import whiten
from litrecipe.objectives.policy_gradient import clipped, value_loss
from litrecipe.objectives.preference import bradley_terry, sigmoid

PROMPTS = ANSWERS = 8
HIDDEN = 32
COMPARISONS = 4
"""Of a prompt."""
BETA = 0.1
DPO_STEPS = (20, 100, 500, 2000)
REWARD_STEPS = 1000
SFT_STEPS = 20
ROLLOUTS, BATCH, EPOCHS, CLIP = 300, 256, 4, 0.2
LR = 1e-2
L2 = 0.01
"""Weight of the mean square of the rewards."""

Weights = list[Tensor]


class Bandits:
    """S bandits side by side. Shapes: S seeds, X prompts, Y answers, N comparisons, B samples of a rollout."""

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.draws = torch.Generator().manual_seed(0)
        self.start = self.network()
        chances = self.logps(self.start).exp().detach().flatten(0, 1)
        sampled = torch.multinomial(chances, 2 * COMPARISONS, replacement=True, generator=self.draws)
        answers = sampled.view(seeds, PROMPTS, COMPARISONS, 2)
        prompts = torch.arange(PROMPTS)[:, None, None]
        far = (answers - prompts).abs()
        answers = answers.gather(-1, far.argsort(stable=True, dim=-1))
        self.counts = (far[..., 0] != far[..., 1]).float().flatten(1)
        """(S, N) 0 for comparisons of answers that are equally good, which say nothing."""
        self.better, self.worse = (prompts * ANSWERS + answers).flatten(1, 2).unbind(-1)
        """(S, N) places of each comparison's answers among the X Y of all."""
        covered = torch.zeros(seeds, PROMPTS * ANSWERS)
        for places in (self.better, self.worse):
            covered.scatter_add_(1, places, self.counts)
        self.uncovered = (covered == 0).view(seeds, PROMPTS, ANSWERS) & ~torch.eye(PROMPTS, dtype=torch.bool)
        """(S, X, Y) wrong answers that are in no comparison of their prompt."""

    def network(self) -> Weights:
        """Fresh networks of two layers, X → HIDDEN → Y, whose outputs have a spread of about 1."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.seeds, *shape, generator=self.draws).requires_grad_()

        first, second = normal(PROMPTS, HIDDEN), normal(HIDDEN, ANSWERS)
        second.data /= 0.63 * HIDDEN**0.5  # tanh of a normal number has a spread of 0.63
        return [first, second, torch.zeros(self.seeds, 1, ANSWERS, requires_grad=True)]

    @staticmethod
    def outputs(weights: Weights) -> Tensor:
        """(S, X, Y) of all prompts; each is one unit vector."""
        first, second, bias = weights
        return first.tanh() @ second + bias

    def logps(self, weights: Weights) -> Tensor:
        """(S, X, Y) log-probabilities of a policy."""
        return self.outputs(weights).log_softmax(-1)

    def masses(self, logps: Tensor) -> dict[str, list[float]]:
        """S X probabilities of wrong answers that are not covered, together, and of the best."""
        chances = logps.exp()
        found = {"uncovered": (chances * self.uncovered).sum(-1), "best": chances.diagonal(dim1=1, dim2=2)}
        return {name: [round(value, 5) for value in one.flatten().tolist()] for name, one in found.items()}

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over a bandit's comparisons (S, N), summed over the seeds."""
        return ((losses.view_as(self.counts) * self.counts).sum(1) / self.counts.sum(1)).sum()

    def sft(self, start: Weights) -> Weights:
        """Fine-tuned on the better answers of the comparisons."""

        def loss(weights: Weights) -> Tensor:
            return self.mean(-self.logps(weights).flatten(1).gather(1, self.better))

        return descend(copied(start), loss, SFT_STEPS)

    def dpo(self, start: Weights) -> dict[int, Tensor]:
        """Log-probabilities (S, X, Y) after so many steps on all comparisons."""
        reference = self.logps(start).detach()
        found = {}

        def loss(weights: Weights) -> Tensor:
            ratios = (self.logps(weights) - reference).flatten(1)
            chosen, rejected = (ratios.gather(1, places).flatten() for places in (self.better, self.worse))
            return self.mean(sigmoid(chosen, rejected, BETA))

        def keep(step: int, weights: Weights) -> None:
            if step in DPO_STEPS:
                found[step] = self.logps(weights).detach()

        descend(copied(start), loss, max(DPO_STEPS), keep)
        return found

    def rewards(self, l2: float) -> Tensor:
        """(S, X, Y) what networks say that learnt the comparisons."""

        def loss(weights: Weights) -> Tensor:
            rewards = self.outputs(weights).flatten(1)
            chosen, rejected = (rewards.gather(1, places).flatten() for places in (self.better, self.worse))
            return self.mean(bradley_terry(chosen, rejected)) + l2 * rewards.square().mean(1).sum()

        return self.outputs(descend(self.network(), loss, REWARD_STEPS)).detach()

    def ppo(self, start: Weights, rewards: Tensor) -> Tensor:
        """Log-probabilities (S, X, Y) after rollouts of B samples each, with a critic of a value a prompt."""
        reference = self.logps(start).detach()
        policy, values = copied(start), torch.zeros(self.seeds, PROMPTS, requires_grad=True)
        optimizer = torch.optim.Adam([*policy, values], lr=LR)
        for _ in range(ROLLOUTS):
            with torch.no_grad():
                prompts = torch.randint(PROMPTS, (self.seeds, BATCH), generator=self.draws)
                old = self.logps(policy)
                chances = old.exp().gather(1, prompts[..., None].expand(-1, -1, ANSWERS))
                answers = torch.multinomial(chances.flatten(0, 1), 1, generator=self.draws).view(self.seeds, BATCH)
                places = prompts * ANSWERS + answers
                old, ref, scores = (one.flatten(1).gather(1, places) for one in (old, reference, rewards))
                returns = scores - BETA * (old - ref)
                apart = returns - values.gather(1, prompts)
                advantages = torch.stack([whiten(one, shift_mean=True) for one in apart]).flatten()
            for _ in range(EPOCHS):
                log_ratio = (self.logps(policy).flatten(1).gather(1, places) - old).flatten()
                said = values.gather(1, prompts)
                loss = clipped(log_ratio, advantages, CLIP).sum() + value_loss(said, said, returns, None).sum()
                optimizer.zero_grad()
                (loss / BATCH).backward()
                optimizer.step()
        return self.logps(policy).detach()


def copied(weights: Weights) -> Weights:
    """The same, to be changed."""
    return [one.detach().clone().requires_grad_() for one in weights]


def descend(
    weights: Weights,
    loss: Callable[[Weights], Tensor],
    steps: int,
    after: Callable[[int, Weights], None] = lambda _, __: None,
) -> Weights:
    """Adam on a sum over the seeds, which are independent: it moves each weight by its own gradients alone."""
    optimizer = torch.optim.Adam(weights, lr=LR)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(weights).backward()
        optimizer.step()
        after(step, weights)
    return weights


def setting(bandits: Bandits, start: Weights, l2: float) -> dict[str, dict[str, list[float]]]:
    """All policies from one start."""
    rewards = bandits.rewards(l2)
    reference = bandits.logps(start).detach()
    policies = {
        "before": reference,
        **{f"DPO, {steps} steps": logps for steps, logps in bandits.dpo(start).items()},
        "PPO": bandits.ppo(start, rewards),
        "exact optimum": (reference + rewards / BETA).log_softmax(-1),
    }
    return {name: bandits.masses(logps) for name, logps in policies.items()}


def summary(masses: Sequence[float]) -> dict[str, Any]:
    """How S X probabilities are distributed; `tenths` counts those in each tenth of the way from 0 to 1."""
    values = torch.tensor(masses, dtype=torch.float64)
    low, middle, high, extreme = values.quantile(torch.tensor([0.25, 0.5, 0.75, 0.95], dtype=torch.float64)).tolist()
    told = {"mean": values.mean(), "sd": values.std(), "above_a_half": (values > 0.5).double().mean()}
    quantiles = {"q25": low, "median": middle, "q75": high, "q95": extreme}
    tenths = values.histc(10, 0, 1).int().tolist()
    return {name: round(float(value), 4) for name, value in {**told, **quantiles}.items()} | {"tenths": tenths}


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Every prompt of every seed as a dot, over the distribution, a panel a setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(found), 4.4), layout="constrained")
    jitter = torch.Generator().manual_seed(0)
    for axes, (name, policies) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        values = [one["uncovered"] for one in policies.values()]
        places = range(len(values))
        for part in axes.violinplot(values, places, showextrema=False, widths=0.9)["bodies"]:
            part.set_facecolor("#7a9cc6")
        for place, some in zip(places, values, strict=True):
            spread = place + 0.3 * (torch.rand(len(some), generator=jitter) - 0.5)
            axes.scatter(spread.tolist(), some, s=3, color="#22446c", alpha=0.5)
        axes.plot(places, [torch.tensor(some).mean() for some in values], "_", color="#b5482f", markersize=22)
        axes.set_xticks(places, [one.replace(", ", ",\n") for one in policies], fontsize=8)
        axes.set(title=name, ylim=(-0.02, 1.02))
    figure.axes[0].set_ylabel("probability of wrong answers that are not covered")
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """All settings, as a table, a result and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    began = time.monotonic()
    bandits = Bandits(seeds)
    start = bandits.start
    found = {
        "as it comes": setting(bandits, start, 0.0),
        "rewards held near 0": setting(bandits, start, L2),
        "rewards held near 0, start fine-tuned": setting(bandits, bandits.sft(start), L2),
    }
    told: dict[str, Any] = {}
    for name, policies in found.items():
        told[name] = {
            policy: {which: summary(masses) for which, masses in one.items()} for policy, one in policies.items()
        }
        print(f"\n{name}: probability of wrong answers that are not covered, and of the best one")
        names = ("mean", "sd", "median", "q95", "above_a_half")
        rows = [
            [policy, *(f"{one['uncovered'][key]:.3f}" for key in names), f"{one['best']['mean']:.3f}"]
            for policy, one in told[name].items()
        ]
        print_table(["policy", *names, "best: mean"], rows)
    spent = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time(), 1)}
    job = {"seeds": seeds, "prompts": PROMPTS, "answers": ANSWERS, "comparisons": COMPARISONS, "beta": BETA, "l2": L2}
    result = {"job": job, **spent, "settings": told}
    draw(found, write_result("bandit", result).with_suffix(".png"))


if __name__ == "__main__":
    main()
