"""How many floating-point operations learning from some samples takes, whatever computes it.

Shapes: T tokens, P predictions, d hidden size, V vocabulary, H query heads, D head dimension.

Counted is what is asked for: two operations a token and weight of the layers that works on it (of experts those that
are chosen), 2 d V a prediction in the head, 4 H D for each pair of a token and one that it sees, itself included, in
each layer; three times that with the backward pass. Softmax, the optimizer and what is computed again (activation
checkpointing, logits) do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from litrecipe.model.architecture import Architecture, count_parameters
from litrecipe.model.row import Row, Sample

Shape = tuple[list[int], list[int]]
"""Lengths of segments, and the parent of each."""


class Forward(NamedTuple):
    """Operations of one forward pass."""

    layers: float
    head: float


def training_flops(architecture: Architecture, samples: Sequence[Sample]) -> float:
    """Of one optimizer step with all weights trained."""
    return 3.0 * forward_flops(architecture, samples)


def forward_flops(architecture: Architecture, samples: Sequence[Sample]) -> float:
    """Of the forward pass, all that is asked of a model that does not learn (PaLM, 2204.02311, appendix B, with causal
    attention counted as the half that it is)."""
    shapes = [_shape(sample) for sample in samples]
    predictions = sum(int((segment.weights != 0).sum()) for sample in samples for segment in sample.segments)
    return sum(_forward(architecture, shapes, predictions))


def row_flops(architecture: Architecture, row: Row) -> Forward:
    """Of one pass over a row."""
    shape = [span.stop - span.start for span in row.spans], [span.parent for span in row.spans]
    return _forward(architecture, [shape], len(row.target))


def _forward(a: Architecture, shapes: Sequence[Shape], predictions: int) -> Forward:
    outside = a.vocab_size * (2 - a.tie_embeddings) + a.learned_positions * a.max_positions
    in_layers = count_parameters(a, active=True) - outside * a.hidden_size
    tokens = sum(sum(lengths) for lengths, _ in shapes)
    heads: Counter[int | None] = Counter()
    for layer in range(a.num_layers):
        heads[a.kind(layer).window] += a.shape(layer).num_heads
    pairs = sum(count * _pairs(shape, window) for window, count in heads.items() for shape in shapes)
    return Forward(
        2.0 * in_layers * tokens + 4.0 * a.head_dim * pairs, 2.0 * a.hidden_size * a.vocab_size * predictions
    )


def visible_pairs(sample: Sample, window: int | None) -> int:
    """Pairs of a token and one it sees, of one layer; each token sees at most `window`, itself included."""
    return _pairs(_shape(sample), window)


def _shape(sample: Sample) -> Shape:
    return [len(segment.tokens) for segment in sample.segments], [segment.parent for segment in sample.segments]


def _pairs(shape: Shape, window: int | None) -> int:
    pairs = 0
    before: list[int] = []
    for length, parent in zip(*shape, strict=True):
        first = before[parent] if parent >= 0 else 0
        before.append(first + length)
        if window is None:
            pairs += length * first + length * (length + 1) // 2
        else:
            # Positions first … first + length - 1 see min(position + 1, window) each.
            growing = max(0, min(first + length, window) - first)
            pairs += growing * first + growing * (growing + 1) // 2 + (length - growing) * window
    return pairs
