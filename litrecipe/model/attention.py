"""Attention of a packed row: every token sees its own segment causally, its segment's ancestors wholly, nothing else.

Shapes: T tokens of a row, H query heads, G key/value heads, D head dimension, n tokens of a segment,
m tokens of its ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from litrecipe.model.row import Span


class Forest:
    """How the segments of a row hang together, prepared once for all layers."""

    def __init__(self, spans: Sequence[Span], device: torch.device | str = "cpu") -> None:
        self.lengths = [span.stop - span.start for span in spans]
        self.paths: list[list[int]] = []
        """Per segment the indices of its ancestors, eldest first, and its own."""
        for index, span in enumerate(spans):
            self.paths.append([*(self.paths[span.parent] if span.parent >= 0 else []), index])
        self.device = torch.device(device)
        self.masks = [self._mask(path) if len(path) > 1 else None for path in self.paths]
        if self.device.type == "cuda":
            self.varlen = Varlen(spans, self.paths, self.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer, see `attend`."""
        return attend(q, k, v, self)

    def _mask(self, path: list[int]) -> Tensor:
        """(n, m + n) boolean: a branch's tokens see all m ancestors, and their own segment causally."""
        n = self.lengths[path[-1]]
        m = sum(self.lengths[ancestor] for ancestor in path[:-1])
        return torch.ones(n, m + n, dtype=torch.bool, device=self.device).tril(m)


class Varlen:
    """The same forest as sequences for a variable-length kernel.

    A segment is a sequence of n queries and of m + n keys, whose causal mask is aligned to the lower right corner.
    """

    def __init__(self, spans: Sequence[Span], paths: list[list[int]], device: torch.device) -> None:
        keys = [[torch.arange(spans[i].start, spans[i].stop) for i in path] for path in paths]
        query_lengths = [span.stop - span.start for span in spans]
        key_lengths = [sum(map(len, parts)) for parts in keys]
        branches = any(len(path) > 1 for path in paths)
        self.key_places = torch.cat([places for parts in keys for places in parts]).to(device) if branches else None
        """Places in the row of all sequences' keys; None where these are the row itself."""
        self.query_bounds = torch.tensor([0, *accumulate(query_lengths)], dtype=torch.int32, device=device)
        self.key_bounds = torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32, device=device)
        self.longest = max(query_lengths), max(key_lengths)


@torch.compiler.disable  # the segments' lengths differ from row to row; traced, each row would be compiled anew
def attend(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    """softmax(q kᵀ / √D) v over what the forest lets each token see.

    q is (T, H, D), k and v are (T, G, D); returns (T, H, D).
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _attend_varlen(q, k, v, forest.varlen)
    return _attend_segments(q, k, v, forest)


def _attend_segments(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    """One fused attention a segment. `split` rather than slices: its backward pass is a single concatenation."""
    keys, values = k.split(forest.lengths), v.split(forest.lengths)
    outputs = []
    for query, path, mask in zip(q.split(forest.lengths), forest.paths, forest.masks, strict=True):
        key = keys[path[0]] if mask is None else torch.cat([keys[i] for i in path])
        value = values[path[0]] if mask is None else torch.cat([values[i] for i in path])
        outputs.append(_fused(query, key, value, mask))
    return torch.cat(outputs)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (n, H, D), k and v (m + n, G, D) → (n, H, D); causal without a mask."""
    q, k, v = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return output[0].transpose(0, 1)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if varlen.key_places is not None:
        k, v = k[varlen.key_places], v[varlen.key_places]
    bounds = varlen.query_bounds, varlen.key_bounds, *varlen.longest
    causal = (-1, 0)
    return cast(Tensor, varlen_attn(q, k, v, *bounds, window_size=causal, enable_gqa=q.shape[1] != k.shape[1]))
