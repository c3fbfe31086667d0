"""Samples and log-probabilities that are made up, and a step on them however it is cut into rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from litrecipe.engine.statistics import with_statistics
from litrecipe.model.head import Predictions
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.objectives.loss import add_up, metric_sums, quotients, step_loss


def ranked(name, answers, prompt=(1,), **extra):
    """A prompt with its answers, lists of token ids, best first."""
    root = Segment(np.array(prompt), np.zeros(len(prompt), np.float32))
    branches = [Segment(np.array(ids), np.ones(len(ids), np.float32), parent=0) for ids in answers]
    return Sample(name, (root, *branches), {key: np.array(v, dtype=np.float32) for key, v in extra.items()})


class Table(nn.Module):
    """log π of a token depends on the token alone: a number of a table (V,), with a reference and collisions beside."""

    def __init__(self, logps, ref=None, log_collisions=None):
        super().__init__()
        self.logps = nn.Parameter(torch.tensor(logps, dtype=torch.float64))
        self.ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
        self.log_collisions = None if log_collisions is None else torch.tensor(log_collisions, dtype=torch.float64)

    def forward(self, row):
        ref, collisions = (None if x is None else x[row.target] for x in (self.ref, self.log_collisions))
        return Predictions(self.logps[row.target], torch.ones_like(row.target, dtype=torch.bool), ref, collisions)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def flat(rows, lengths):
    """The first so many numbers of each row, end to end."""
    return torch.cat([float64(*row[:length]) for row, length in zip(rows, lengths.tolist(), strict=True)])


def alone(value):
    """The gather of a single rank."""
    return [value]


def rows_of(samples, *sizes):
    """Rows of so many samples each; the rest in a last one."""
    ends = np.cumsum((0, *sizes))
    parts = [samples[start:stop] for start, stop in zip(ends, [*ends[1:], len(samples)], strict=True)]
    return [make_row(part) for part in parts]


def step(objective, model, rows, looked_at=None, trained=None):
    """Loss, its gradient towards the model's parameters, and metrics of a step of these rows on one rank."""
    rows = list(with_statistics(rows, rows if looked_at is None else looked_at, model, objective, 0, alone))
    counts = add_up([objective.counts(row) for row in rows])
    losses = [objective(model(row), row) for row in rows]
    total = torch.stack([step_loss(loss, counts) for loss in losses]).sum()
    gradient = torch.autograd.grad(total, trained or list(model.parameters()))
    return total.item(), gradient, quotients(metric_sums(losses))
