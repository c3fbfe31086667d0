"""The batch of every training verb: a row of tokens that holds a forest of segments, without padding.

Shapes: T tokens of a row, P predictions, S segments, A segments of them that predict something.

A *segment* is a run of tokens. It may hang from a *parent* segment, whose tokens it sees and whose positions it
continues; a token attends causally to its own segment, wholly to the segment's ancestors, and to nothing else.
A conversation is one segment without a parent; a preference pair is one prompt with two branches. The last token of
a parent predicts the first token of each of its branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of tokens and how much each is learnt."""

    tokens: np.ndarray
    """(n,) token ids, n ≥ 1."""
    weights: np.ndarray
    """(n,) float32; the weight of *predicting* this token. 0: not predicted, so no head is computed for it. The first
    token of a segment without a parent has no predecessor and must weigh 0."""
    parent: int = -1
    """Index of the parent within the sample (always smaller than this segment's own), -1 for none."""


@dataclass(frozen=True)
class Sample:
    """What a step is counted in: a conversation, a pair, a prompt with its completions. Never split over rows."""

    id: str
    """Names the sample in the flight recorder and in error messages, e.g. `train.jsonl:17`."""
    segments: tuple[Segment, ...]
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What an objective wants to know besides, by name, such as the `scores` of the answers: 1-d, float32 or integers.
    All samples of a source have the same names."""

    @property
    def length(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.tokens) for segment in self.segments)


class Span(NamedTuple):
    """Where a segment stands in its row."""

    start: int
    stop: int
    parent: int
    """Index among the row's spans, -1 for none."""


@dataclass
class Row:
    """One forward pass. A row of another rank's step may be empty: one token, no predictions."""

    tokens: Tensor
    """(T,) int64."""
    positions: Tensor
    """(T,) int64; restart at 0 with each segment that has no parent."""
    spans: tuple[Span, ...]
    """S segments in order of `start`; they cover the row."""
    predict_from: Tensor
    """(P,) int64; the place in the row whose hidden state predicts."""
    target: Tensor
    """(P,) int64; the token predicted there."""
    weight: Tensor
    """(P,) float32, never 0."""
    segment: Tensor
    """(P,) int64; index in `spans` of the segment the target belongs to."""
    answers: Tensor
    """(A,) int64; indices in `spans` of the segments with a target, in order."""
    sample_ids: tuple[str, ...]
    """One a sample, in order."""
    sample_of_span: tuple[int, ...]
    """(S,) index in `sample_ids`."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """name → (E,) float32 or int64, the samples' values end to end; empty in an empty row."""

    def to(self, device: torch.device | str) -> Row:
        """The same row with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "positions", "predict_from", "target", "weight", "segment", "answers")
        }
        extra = {name: values.to(device, non_blocking=True) for name, values in self.extra.items()}
        return replace(self, **moved, extra=extra)


def make_row(samples: Sequence[Sample]) -> Row:
    """Lay samples one after the other into a row.

    No samples give the empty row (one token 0, no predictions) with which ranks that ran out keep step with the
    others. Raises ValueError when a root segment's first token carries a weight, and when samples have other extras.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    spans: list[Span] = []
    sample_of_span: list[int] = []
    predict_from: list[np.ndarray] = []
    target: list[np.ndarray] = []
    weight: list[np.ndarray] = []
    segment_of: list[np.ndarray] = []
    answers: list[int] = []
    cursor = 0
    for sample_index, sample in enumerate(samples):
        first_span = len(spans)
        next_position: list[int] = []
        for segment in sample.segments:
            n = len(segment.tokens)
            has_parent = segment.parent >= 0
            if not has_parent and segment.weights[0] != 0:
                raise ValueError(f"sample {sample.id}: its first token has no predecessor and must weigh 0")
            begin = next_position[segment.parent] if has_parent else 0
            next_position.append(begin + n)
            parent = first_span + segment.parent if has_parent else -1
            before = np.arange(cursor - 1, cursor + n - 1)
            if has_parent:
                before[0] = spans[parent].stop - 1
            learnt = np.flatnonzero(segment.weights)
            predict_from.append(before[learnt])
            target.append(np.asarray(segment.tokens)[learnt])
            weight.append(np.asarray(segment.weights)[learnt])
            segment_of.append(np.full(len(learnt), len(spans)))
            if len(learnt):
                answers.append(len(spans))
            tokens.append(np.asarray(segment.tokens))
            positions.append(np.arange(begin, begin + n))
            spans.append(Span(cursor, cursor + n, parent))
            sample_of_span.append(sample_index)
            cursor += n
        if sample.extra.keys() != samples[0].extra.keys():
            raise ValueError(f"sample {sample.id}: has extras {list(sample.extra)}, not {list(samples[0].extra)}")
    if not samples:
        tokens, positions, spans, sample_of_span = [np.zeros(1)], [np.zeros(1)], [Span(0, 1, -1)], [-1]

    def flat(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(joined.astype(np.float32 if dtype == torch.float32 else np.int64))

    return Row(
        tokens=flat(tokens, torch.int64),
        positions=flat(positions, torch.int64),
        spans=tuple(spans),
        predict_from=flat(predict_from, torch.int64),
        target=flat(target, torch.int64),
        weight=flat(weight, torch.float32),
        segment=flat(segment_of, torch.int64),
        answers=torch.tensor(answers, dtype=torch.int64),
        sample_ids=tuple(sample.id for sample in samples),
        sample_of_span=tuple(sample_of_span),
        extra={
            name: flat([np.asarray(sample.extra[name]) for sample in samples], _dtype_of(values))
            for name, values in (samples[0].extra if samples else {}).items()
        },
    )


def _dtype_of(extra: np.ndarray) -> torch.dtype:
    """In a row."""
    return torch.int64 if np.issubdtype(np.asarray(extra).dtype, np.integer) else torch.float32
