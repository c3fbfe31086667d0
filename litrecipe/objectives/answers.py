"""From predictions of single tokens to what whole answers got.

Shapes: P predictions of a row, S segments of it, N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litrecipe.model.row import Row


def sum_by_segment(values: Tensor, row: Row) -> Tensor:
    """Sums (S,) of what the row's predictions (P,) got, one a segment; 0 where a segment predicts nothing.

    A segment's predictions lie side by side, so the sums are taken in order on every device.
    """
    lengths = tokens_by_segment(row)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)


def tokens_by_segment(row: Row) -> Tensor:
    """How many tokens (S,) of each segment are predicted."""
    return torch.bincount(row.segment, minlength=len(row.spans))


def pairs_of(row: Row) -> Tensor:
    """Segments (N, 2) of each sample's chosen and rejected answer: the first and second that is predicted.

    Raises ValueError for a sample that has not two.
    """
    predicts = (tokens_by_segment(row) > 0).tolist()
    answers: list[list[int]] = [[] for _ in row.sample_ids]
    for span, (sample, answered) in enumerate(zip(row.sample_of_span, predicts, strict=True)):
        if answered:
            answers[sample].append(span)
    for name, found in zip(row.sample_ids, answers, strict=True):
        if len(found) != 2:
            raise ValueError(f"sample {name}: {len(found)} answers, a pair has two")
    return torch.tensor(answers, dtype=torch.int64, device=row.segment.device).reshape(-1, 2)


def beyond_the_shorter(row: Row, pairs: Tensor) -> Tensor:
    """Which predictions (P,) lie beyond the length of the shorter answer of their pair; `pairs` is `pairs_of(row)`."""
    tokens = tokens_by_segment(row)
    limits = tokens.index_put((pairs,), tokens[pairs].amin(1, keepdim=True).expand_as(pairs))
    begin = tokens.cumsum(0) - tokens
    return torch.arange(len(row.segment), device=row.segment.device) - begin[row.segment] >= limits[row.segment]
