"""What an objective must know of a whole step before the first backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from litrecipe.model.row import Row
from litrecipe.objectives.loss import Objective, StepGlobal


@torch.no_grad()
def with_statistics(
    rows: Iterable[Row],
    looked_at: Iterable[Row],
    module: nn.Module,
    objective: Objective,
    rank: int,
    gather: Callable[[Any], list[Any]],
) -> Iterable[Row]:
    """This rank's `rows`, which carry what the objective makes of all ranks' statistics.

    `looked_at` are this rank's rows of `objective.statistics_samples`, at least one (which may be empty) and on every
    rank as many; they may be others than `rows`, and more or fewer. Costs a forward pass of them for objectives that
    are `StepGlobal`, nothing for others. Every rank must call it.
    """
    if not isinstance(objective, StepGlobal):
        return rows
    mine = [objective.statistics(module(row), row) for row in looked_at]
    return completed(list(rows), mine, objective, rank, gather)


@torch.no_grad()
def completed(
    rows: list[Row],
    mine: list[dict[str, Tensor]],
    objective: StepGlobal,
    rank: int,
    gather: Callable[[Any], list[Any]],
) -> list[Row]:
    """This rank's `rows` with what the objective makes of all ranks' statistics, of which these are `mine`."""
    told = gather(([_on_cpu(found) for found in mine], [len(row.sample_ids) for row in rows]))
    of_rows = [found for found_by_rank, _ in told for found in found_by_rank]
    whole = {name: torch.cat([found[name] for found in of_rows]) for name in of_rows[0]}
    sizes = [size for _, sizes_of_rank in told for size in sizes_of_rank]
    extras = {name: values.split(sizes) for name, values in objective.from_step(whole, sum(sizes)).items()}
    first = sum(len(sizes_of_rank) for _, sizes_of_rank in told[:rank])
    return [
        replace(row, extra=row.extra | {name: parts[first + n].to(row.tokens.device) for name, parts in extras.items()})
        for n, row in enumerate(rows)
    ]


def _on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in found.items()}
