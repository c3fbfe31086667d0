"""What an objective must know of a whole step before the first backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from litrecipe.model.row import Row
from litrecipe.objectives.loss import Objective, StepGlobal


@torch.no_grad()
def with_statistics(
    rows: Iterable[Row], module: nn.Module, objective: Objective, rank: int, gather: Callable[[Any], list[Any]]
) -> Iterable[Row]:
    """This rank's rows, which carry what the objective makes of all ranks' statistics.

    Costs a forward pass for objectives that are `StepGlobal`, nothing for others. Every rank must call it.
    """
    if not isinstance(objective, StepGlobal):
        return rows
    rows = list(rows)
    mine = [objective.statistics(module(row), row) for row in rows]
    of_ranks = gather([{name: values.cpu() for name, values in found.items()} for found in mine])
    of_rows = [found for of_rank in of_ranks for found in of_rank]
    sizes = [len(next(iter(found.values()))) for found in of_rows]
    whole = {name: torch.cat([found[name] for found in of_rows]) for name in of_rows[0]}
    extras = {name: values.split(sizes) for name, values in objective.from_step(whole).items()}
    first = sum(len(of_rank) for of_rank in of_ranks[:rank])
    return [
        replace(row, extra=row.extra | {name: parts[first + n].to(row.tokens.device) for name, parts in extras.items()})
        for n, row in enumerate(rows)
    ]
