"""Log-likelihoods of continuations, with every shared prefix computed once.

A *request* is a context and a continuation, both token ids. The requests of an evaluation overlap: the choices of a
question have one context, the choices themselves often begin alike, and a few-shot preamble stands before hundreds of
questions. So the requests, written as sequences, are sorted and grown into tries: a node of a trie is a segment of a
`Sample`, and what several sequences begin with is one segment above them all. Tries are packed into rows like any other
sample. A request's log-likelihood is the sum over the last tokens of the path from its leaf to the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from litrecipe.config import stop
from litrecipe.config.progress import track
from litrecipe.data.packing import pack
from litrecipe.model.decoder import Decoder
from litrecipe.model.row import Sample, Segment, make_row

Request = tuple[Sequence[int], Sequence[int]]
"""Context and continuation, token ids; neither is empty."""

Scores = tuple[torch.Tensor, torch.Tensor]
"""Of p predicted tokens: log-probabilities (p,) fp64 and hits (p,) bool."""

MIN_SHARED = 8
"""A prefix shorter than this is computed again rather than shared: a segment has a cost of its own."""

KEYS_PER_TOKEN = 16
"""On a GPU each segment gets a copy of its ancestors' keys and values. As many to a token as this take about as much
memory as what a forward pass keeps of the token, and count as one token."""


def loglikelihoods(
    model: Decoder,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    max_length: int,
    progress: str | None = None,
) -> list[tuple[float, bool]]:
    """Score each continuation after its context.

    Returns, per request and in their order, the sum of the log-probabilities (nats) of the continuation's tokens, and
    whether greedy decoding would have produced them all. Of a request longer than `max_length` + 1 tokens the
    beginning is cut off: the last token is predicted but never read, so `max_length` tokens are read (as lm-eval's
    Hugging Face backend does). A row holds at most `batch_tokens` tokens and `KEYS_PER_TOKEN` times as many keys, or
    one sequence if that is longer. Neither the order of the requests nor the rows change the results, beyond rounding.

    `progress` names the progress line; without it none is shown. Raises ValueError for an empty context or continuation
    and for a continuation longer than `max_length`.
    """
    sequences = [_clip(index, request, max_length) for index, request in enumerate(requests)]
    tries = [_grow(group) for group in _groups(sequences, batch_tokens)]
    samples = [trie.sample(str(index)) for index, trie in enumerate(tries)]
    costs = [_cost(sample.length, trie.keys) for sample, trie in zip(samples, tries, strict=True)]
    rows = pack(costs, max([batch_tokens, *costs])).rows
    results: dict[int, tuple[float, bool]] = {}
    for members in track(rows, f"{progress}: row") if progress else rows:
        stop.poll()
        scores = _score([samples[index] for index in members], model)
        for index in members:
            of_trie, scores = scores[: len(samples[index].segments)], scores[len(samples[index].segments) :]
            results.update(tries[index].results(of_trie))
    return [results[index] for index in range(len(requests))]


@torch.no_grad()
def _score(samples: list[Sample], model: Decoder) -> list[Scores]:
    """One forward pass; what each segment's predicted tokens got, segments in order."""
    row = make_row(samples).to(model.device)
    predictions = model(row)
    sizes = row.segment.bincount(minlength=len(row.spans)).tolist()
    return list(zip(predictions.logps.cpu().double().split(sizes), predictions.correct.cpu().split(sizes), strict=True))


@dataclass(frozen=True)
class _Sequence:
    """A request, cut to what the model can read."""

    request: int
    tokens: tuple[int, ...]
    scored: int
    """How many of the last tokens are the continuation."""

    @property
    def context(self) -> int:
        return len(self.tokens) - self.scored


def _clip(index: int, request: Request, max_length: int) -> _Sequence:
    context, continuation = request
    if not len(context) or not len(continuation):
        raise ValueError(f"request {index}: {'continuation' if len(context) else 'context'} without tokens")
    if len(continuation) > max_length:
        raise ValueError(f"request {index}: {len(continuation)} tokens to predict, but the model reads {max_length}")
    return _Sequence(index, (*context, *continuation)[-(max_length + 1) :], len(continuation))


def _groups(sequences: list[_Sequence], budget: int) -> list[list[_Sequence]]:
    """Sorted runs of sequences: neighbours share a prefix, and a run's tokens and keys fit into the budget."""
    groups: list[list[_Sequence]] = []
    size = keys = 0
    for sequence in sorted(sequences, key=lambda s: (s.tokens, s.scored, s.request)):
        shared = _common_prefix(groups[-1][-1].tokens, sequence.tokens) if groups else 0
        size += len(sequence.tokens) - shared
        keys += len(sequence.tokens) + shared  # its own segment's, and those of a segment that splits for it
        if shared >= min(MIN_SHARED, len(sequence.tokens)) and _cost(size, keys) <= budget:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
            size = keys = len(sequence.tokens)
    return groups


def _cost(tokens: int, keys: int) -> int:
    """What a trie takes of a row's budget."""
    return max(tokens, -(-keys // KEYS_PER_TOKEN))


@dataclass(frozen=True)
class _Trie:
    """Sequences with common beginnings as a tree of segments."""

    segments: list[Segment]
    leaves: list[tuple[_Sequence, int]]
    """Each sequence and the segment in which it ends."""

    @property
    def keys(self) -> int:
        """Keys that its tokens look at: each segment's own and those of its ancestors."""
        depths: list[int] = []
        for segment in self.segments:
            depths.append(len(segment.tokens) + (depths[segment.parent] if segment.parent >= 0 else 0))
        return sum(depths)

    def sample(self, name: str) -> Sample:
        return Sample(name, tuple(self.segments))

    def results(self, scores: list[Scores]) -> dict[int, tuple[float, bool]]:
        """Request → result, from the log-probs and hits of each segment's predicted tokens.

        A segment predicts a tail of its tokens (all that any sequence through it needs), so along a path the last
        `scored` predictions are those of the continuation.
        """
        results = {}
        for sequence, leaf in self.leaves:
            total, greedy, missing, segment = 0.0, True, sequence.scored, leaf
            while missing:
                logps, correct = scores[segment]
                total += float(logps[-missing:].sum())
                greedy = greedy and bool(correct[-missing:].all())
                missing -= min(missing, len(logps))
                segment = self.segments[segment].parent
            results[sequence.request] = (total, greedy)
        return results


def _grow(group: list[_Sequence]) -> _Trie:
    """The trie of a sorted group. A node splits where its sequences part; children that share less than `MIN_SHARED`
    further tokens with their neighbour stand alone."""
    shared = [0, *(_common_prefix(a.tokens, b.tokens) for a, b in pairwise(group))]
    trie = _Trie([], [])
    work = [(0, len(group), 0, -1)]
    while work:
        first, last, begin, parent = work.pop()
        end = min([len(group[first].tokens), *shared[first + 1 : last]])
        node = parent
        if end > begin:
            node = len(trie.segments)
            tokens = np.array(group[first].tokens[begin:end], dtype=np.int64)
            scored_from = min(sequence.context for sequence in group[first:last])
            weights = (np.arange(begin, end) >= scored_from).astype(np.float32)
            trie.segments.append(Segment(tokens, weights, parent))
        if end == len(group[last - 1].tokens):
            trie.leaves.extend((sequence, node) for sequence in group[first:last])
            continue
        bounds = [first, *(i for i in range(first + 1, last) if shared[i] < end + MIN_SHARED), last]
        work.extend((a, b, end, node) for a, b in pairwise(bounds))
    return trie


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many first tokens are equal."""
    if a[: len(b)] == b[: len(a)]:
        return min(len(a), len(b))
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
