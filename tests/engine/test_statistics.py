"""What an objective must know of a step: gathered from other rows than those that are trained, on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from litrecipe.engine.statistics import with_statistics
from litrecipe.model.head import Predictions
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.loss import Loss


class Echo(torch.nn.Module):
    """Log-probabilities that are the tokens themselves."""

    def forward(self, row):
        assert not torch.is_grad_enabled()
        return Predictions(row.target.float(), row.target > 0)


class Numbered:
    """Tells each sample its place in the step, and the sum of all that was looked at."""

    def counts(self, row):
        return {}

    def __call__(self, predictions, row):
        return Loss(())

    def statistics_samples(self, samples):
        return samples

    def statistics(self, predictions, row):
        return {"logps": predictions.logps}

    def from_step(self, statistics, samples):
        total = statistics["logps"].sum()
        return {"place": torch.arange(samples).float(), "total": total.expand(samples)}


def sample(token):
    return Sample(str(token), (Segment(np.array([1, token]), np.array([0.0, 1.0], np.float32)),))


def rows(*samples_of_rows):
    return [make_row([sample(token) for token in tokens]) for tokens in samples_of_rows]


def of_ranks(trained, looked_at):
    """What each rank gets where all ranks together have these rows."""
    told: list = []

    def tell(value):
        told.append(value)
        return [value]

    ranks = range(len(trained))
    for rank in ranks:
        with_statistics(trained[rank], looked_at[rank], Echo(), Numbered(), 0, tell)
    return [with_statistics(trained[r], looked_at[r], Echo(), Numbered(), r, lambda _: told) for r in ranks]


def test_an_objective_that_asks_for_nothing_costs_nothing():
    waiting = iter(rows([2]))
    assert with_statistics(waiting, None, None, CausalLM(), 0, None) is waiting


@pytest.mark.parametrize(
    "looked_at",
    [
        [rows([5, 7], [8]), rows([9], [])],  # as many rows as are trained
        [rows([5, 7, 8, 9]), rows([])],  # fewer
        [rows([5], [], [7, 8]), rows([9], [], [])],  # more
    ],
)
def test_values_reach_the_samples_in_the_order_of_all_ranks(looked_at):
    """Three samples and an empty row on the first rank, two on the second; all see 5 + 7 + 8 + 9 = 29."""
    trained = [rows([2], [3, 4], []), rows([5], [6], [])]
    first, second = of_ranks(trained, looked_at)
    assert [row.extra["place"].tolist() for row in first] == [[0], [1, 2], []]
    assert [row.extra["place"].tolist() for row in second] == [[3], [4], []]
    assert [row.extra["total"].tolist() for row in first + second] == [[29], [29, 29], [], [29], [29], []]


def test_a_step_without_anything_to_look_at():
    (row,) = with_statistics(rows([2, 3]), rows([]), Echo(), Numbered(), 0, lambda value: [value])
    assert row.extra["total"].tolist() == [0, 0]


def test_a_rank_without_samples_and_extras_that_were_there():
    """The rows that come back are copies with more extras; those that went in are as they were."""
    before = make_row([Sample("a", sample(2).segments, {"scores": np.array([0.5], np.float32)})])
    first, second = of_ranks([[before], rows([])], [rows([2]), rows([])])
    assert first[0].extra.keys() == {"scores", "place", "total"}
    assert first[0].extra["scores"].tolist() == [0.5]
    assert before.extra.keys() == {"scores"}
    assert second[0].extra["place"].tolist() == []
