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

from litrecipe.model.architecture import Architecture, count_parameters
from litrecipe.model.row import Sample


def training_flops(architecture: Architecture, samples: Sequence[Sample]) -> float:
    """Of one optimizer step with all weights trained."""
    return 3.0 * forward_flops(architecture, samples)


def forward_flops(architecture: Architecture, samples: Sequence[Sample]) -> float:
    """Of the forward pass, all that is asked of a model that does not learn (PaLM, 2204.02311, appendix B, with causal
    attention counted as the half that it is)."""
    a = architecture
    outside = a.vocab_size * (2 - a.tie_embeddings) + a.learned_positions * a.max_positions
    in_layers = count_parameters(a, active=True) - outside * a.hidden_size
    tokens = sum(sample.length for sample in samples)
    predictions = sum(int((segment.weights != 0).sum()) for sample in samples for segment in sample.segments)
    heads: Counter[int | None] = Counter()
    for layer in range(a.num_layers):
        heads[a.kind(layer).window] += a.shape(layer).num_heads
    pairs = sum(count * visible_pairs(sample, window) for window, count in heads.items() for sample in samples)
    forward = 2 * in_layers * tokens + 2 * a.hidden_size * a.vocab_size * predictions
    return float(forward + 4 * a.head_dim * pairs)


def visible_pairs(sample: Sample, window: int | None) -> int:
    """Pairs of a token and one it sees, of one layer; each token sees at most `window`, itself included."""
    pairs = 0
    before: list[int] = []
    for segment in sample.segments:
        length = len(segment.tokens)
        first = before[segment.parent] if segment.parent >= 0 else 0
        before.append(first + length)
        if window is None:
            pairs += length * first + length * (length + 1) // 2
        else:
            # Positions first … first + length - 1 see min(position + 1, window) each.
            growing = max(0, min(first + length, window) - first)
            pairs += growing * first + growing * (growing + 1) // 2 + (length - growing) * window
    return pairs
