"""The reward model's objective: rewards of a row's answers in, terms and the field's metrics out.

Shapes: A answers of a row, N pairs of them, C predictions of the best answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litrecipe.config.groups import Reward
from litrecipe.model.hydra import HydraOutput, of_best
from litrecipe.model.row import Row
from litrecipe.objectives import preference
from litrecipe.objectives.answers import SCORES, pairs_of, places_of, siblings_of
from litrecipe.objectives.loss import Loss, Term


class RewardLoss:
    """Mean over the step's samples of the Bradley-Terry loss, plus a centering term if asked for.

    A sample of more than two answers gives all its pairs, which share its weight (InstructGPT, 2203.02155, equation 1).
    What a row's scores say of a pair, their difference m, may ask for a margin (Llama 2, 2307.09288, section 3.2.2), or
    make the label soft: chosen is better with probability (1 + m) / 2, m from 0 to 1.
    """

    def __init__(self, config: Reward) -> None:
        self.config = config

    def counts(self, row: Row) -> dict[str, float]:
        """Samples for each term."""
        names = ["bradley_terry"] + ["centering"] * bool(self.config.centering_coef)
        return dict.fromkeys(names, float(len(row.sample_ids)))

    def __call__(self, rewards: Tensor, row: Row) -> Loss:
        """Terms of the rewards (A,) of the row's answers in order of its segments; and metrics of pairs and answers."""
        pairs = pairs_of(row)
        places, siblings = places_of(row, pairs), siblings_of(row, pairs)
        chosen, rejected = rewards[places].unbind(1)
        apart = self._apart(row, places)
        margin = torch.where(apart.isnan(), 0.0, apart) if self.config.margin else 0.0
        losses = preference.bradley_terry(chosen, rejected, margin, self._doubt(apart))
        terms = [Term("bradley_terry", (losses / siblings).sum())]
        if self.config.centering_coef:
            centering = preference.centering(chosen, rejected)
            terms.append(Term("centering", (centering / siblings).sum(), self.config.centering_coef))
        values = {
            "accuracy": (chosen > rejected).to(rewards.dtype),
            "margin": (chosen - rejected).detach(),
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
        }
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            name: ((value / siblings).sum(), float(len(row.sample_ids))) for name, value in values.items()
        }
        metrics["mean_reward"] = (rewards.detach().sum(), float(len(rewards)))
        return Loss(tuple(terms), metrics)

    @staticmethod
    def _apart(row: Row, places: Tensor) -> Tensor:
        """By how much the scores of each pair (N,) differ, NaN where that is unknown."""
        scores = row.extra.get(SCORES)
        if scores is None:
            return torch.full((len(places),), torch.nan, device=places.device)
        better, worse = scores[places].unbind(1)
        return better - worse

    def _doubt(self, apart: Tensor) -> Tensor | float:
        """How likely each pair's label (N,) is wrong: what its scores leave open, part of it turned by smoothing."""
        smoothing = self.config.label_smoothing
        if not self.config.soft_labels:
            return smoothing
        sure = torch.where(apart.isnan(), 1.0, apart.clamp(0, 1))
        wrong = (1 - sure) / 2
        return smoothing + (1 - 2 * smoothing) * wrong


class JointLoss:
    """A reward model's loss, and on the same transformer that of fine-tuning on what was chosen (Hydra-RLHF,
    2309.00754): the mean over the step's tokens of best answers of their NLL, `sft_coef` times.
    """

    def __init__(self, config: Reward) -> None:
        self.of_rewards = RewardLoss(config)
        self.sft_coef = config.sft_coef

    def counts(self, row: Row) -> dict[str, float]:
        """Samples for the rewards' terms, tokens of best answers for the NLL."""
        return {**self.of_rewards.counts(row), "nll": float(len(of_best(row).target))}

    def __call__(self, output: HydraOutput, row: Row) -> Loss:
        """Terms and metrics as `RewardLoss`; and `mean_token_accuracy`, how many of C targets were the likeliest."""
        loss = self.of_rewards(output.rewards, row)
        said = output.predictions
        nll = Term("nll", -said.logps.sum(), self.sft_coef)
        metrics = {**loss.metrics, "mean_token_accuracy": (said.correct.float().sum(), float(len(said.correct)))}
        return Loss((*loss.terms, nll), metrics)
