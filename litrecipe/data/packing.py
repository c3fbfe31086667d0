"""Samples into rows of a fixed token budget: best fit decreasing.

The loss of a step does not depend on the packing (documents of a row never see each other); packing only decides how
much is computed at once and how evenly the ranks are loaded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace


@dataclass(frozen=True)
class Packing:
    """Which samples share a row."""

    rows: list[list[int]]
    """Indices of samples, ascending within a row; fullest rows first, so rows that run side by side on several ranks
    are alike in size. Empty rows, if any, come last."""
    oversized: list[int]
    """Indices of samples longer than the budget; they are in no row."""


def pack(lengths: Sequence[int], budget: int, multiple_of: int = 1) -> Packing:
    """Put samples of the given lengths into few rows of at most `budget` tokens.

    The number of rows is a multiple of `multiple_of` (the number of ranks). The same arguments always give the same
    packing.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    oversized = sorted(index for index in longest_first if lengths[index] > budget)
    fitting = [index for index in longest_first if lengths[index] <= budget]

    rows = _best_fit(fitting, lengths, budget)
    wanted = -(-len(rows) // multiple_of) * multiple_of
    if wanted > len(rows):
        rows = _spread(fitting, lengths, wanted)
        if any(sum(lengths[index] for index in row) > budget for row in rows):
            rows = _best_fit(fitting, lengths, budget)
            rows += [[] for _ in range(wanted - len(rows))]
    rows = [sorted(row) for row in rows]
    rows.sort(key=lambda row: (-sum(lengths[index] for index in row), not row, row))
    return Packing(rows, oversized)


def _best_fit(longest_first: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each sample into the row where it leaves the least room; a new row when it fits nowhere."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in longest_first:
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            free, row = budget, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def _spread(longest_first: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Each sample into the emptiest of `count` rows, so that ranks share the work (may overflow a budget)."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    heapify(filled)
    for index in longest_first:
        tokens, row = filled[0]
        rows[row].append(index)
        heapreplace(filled, (tokens + lengths[index], row))
    return rows
