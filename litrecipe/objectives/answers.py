"""From predictions of single tokens to what whole answers got, and which answers are held against each other.

Shapes: P predictions of a row, S segments of it, A answers (segments that are predicted), N pairs of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations, islice, repeat

import torch
from torch import Tensor

from litrecipe.model.head import Predictions
from litrecipe.model.row import Row

REF_LOGPS = "ref_logps"
"""Name of the extra that holds a sample's log-probabilities under the reference, one a prediction."""
LABEL = "label"
"""Name of the extra that rates a sample's single answer: 1 good, 0 bad."""
SCORES = "scores"
"""Name of the extra that holds the scores of a sample's answers, in their order; NaN where nobody gave one."""


def sum_by_segment(values: Tensor, row: Row) -> Tensor:
    """Sums (S,) of what the row's predictions (P,) got, one a segment; 0 where a segment predicts nothing.

    A segment's predictions lie side by side, so the sums are taken in order on every device.
    """
    lengths = tokens_by_segment(row)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)


def tokens_by_segment(row: Row) -> Tensor:
    """How many tokens (S,) of each segment are predicted."""
    return torch.bincount(row.segment, minlength=len(row.spans))


def answers_of(row: Row) -> list[list[int]]:
    """Segments of each sample's answers, in order."""
    answers: list[list[int]] = [[] for _ in row.sample_ids]
    for span in row.answers.tolist():
        answers[row.sample_of_span[span]].append(span)
    return answers


def pairs_of(row: Row) -> Tensor:
    """Segments (N, 2) of a better and a worse answer: all pairs of each sample, whose answers stand best first.

    A pair whose `scores` are equal is left out. Raises ValueError for a sample without a pair.
    """
    known = row.extra.get(SCORES)
    scores = repeat(torch.nan) if known is None else iter(known.tolist())
    pairs: list[tuple[int, int]] = []
    for name, answers in zip(row.sample_ids, answers_of(row), strict=True):
        if len(answers) < 2:
            raise ValueError(f"sample {name}: {len(answers)} answers, a pair has two")
        rated = list(zip(answers, islice(scores, len(answers)), strict=True))
        # NaN equals nothing: where a score is unknown, the order tells.
        differing = [(better, worse) for (better, a), (worse, b) in combinations(rated, 2) if a != b]
        if not differing:
            raise ValueError(f"sample {name}: all its answers have the same score")
        pairs += differing
    return torch.tensor(pairs, dtype=torch.int64, device=row.segment.device).reshape(-1, 2)


def siblings_of(row: Row, pairs: Tensor) -> Tensor:
    """How many pairs (N,) the sample of each has, itself included; `pairs` is `pairs_of(row)`.

    They share the sample's weight: correlated as they are, as many votes as pairs would let long lists rule the step
    (InstructGPT, 2203.02155, section 3.5, equation 1).
    """
    sample = torch.tensor(row.sample_of_span, device=pairs.device)[pairs[:, 0]]
    return sample.bincount()[sample]


def places_of(row: Row, pairs: Tensor) -> Tensor:
    """The pairs (N, 2) as places among all answers (A,) of the row."""
    return torch.searchsorted(row.answers, pairs)


def sum_by_pair(values: Tensor, row: Row, pairs: Tensor, beyond: float = 1.0) -> Tensor:
    """Sums (N, 2) of what the predictions (P,) of each pair's answers got.

    Values beyond the length of the pair's shorter answer count `beyond` times (LD-DPO, 2409.06411).
    """
    if beyond == 1.0:
        return sum_by_segment(values, row)[pairs]
    tokens = tokens_by_segment(row)
    begins, lengths = (tokens.cumsum(0) - tokens)[pairs].flatten(), tokens[pairs].flatten()
    limits = tokens[pairs].amin(1, keepdim=True).expand_as(pairs).flatten()
    # An answer of several pairs is cut differently in each: its values are laid out once a pair.
    begins_here, limits, starts = (x.repeat_interleave(lengths) for x in (begins, limits, lengths.cumsum(0) - lengths))
    place = torch.arange(len(starts), device=starts.device) - starts
    laid_out = values[begins_here + place]
    weighed = torch.where(place >= limits, beyond * laid_out, laid_out)
    sums = torch.segment_reduce(weighed, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
    return sums.view_as(pairs)


def reference_logps(predictions: Predictions, row: Row) -> Tensor:
    """Log-probabilities (P,) under the reference, which come with the predictions or lie in the row.

    Raises ValueError where there are none.
    """
    known = predictions.ref_logps if predictions.ref_logps is not None else row.extra.get(REF_LOGPS)
    if known is None and len(row.target):
        raise ValueError("the loss needs a reference: neither predictions nor row hold its log-probabilities")
    return torch.zeros_like(predictions.logps) if known is None else known  # an empty row has no extras


def without_targets(row: Row, ids: Collection[int]) -> tuple[Row, Tensor]:
    """The row without the predictions of some tokens, and which of its predictions (P,) are left."""
    left = ~torch.isin(row.target, torch.tensor(list(ids), dtype=torch.int64, device=row.target.device))
    names = "predict_from", "target", "weight", "segment"
    return replace(row, **{name: getattr(row, name)[left] for name in names}), left
