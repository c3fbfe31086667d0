"""Attention of a packed row: every token sees its own segment causally, its segment's ancestors wholly, nothing else;
through a window, of all these only the last ones.

Shapes: T tokens of a row, H query heads, G key/value heads, D head dimension, n tokens of a segment,
m tokens of its ancestors, B segments that are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from litrecipe.model.architecture import Architecture
from litrecipe.model.row import Span

SHORT = 64
"""Tokens of a segment with its ancestors up to which those that are alike are computed together: there a call of the
kernel costs more than what it computes (128 segments of 13 tokens, forward and backward: 11 ms for 54, one thread)."""


@dataclass(frozen=True)
class Alike:
    """Segments of n tokens below ancestors of equal lengths, with m tokens in all."""

    count: int
    """B."""
    queries: Tensor
    """(B n,) their places in the row."""
    keys: Tensor
    """(B (m + n),) places of their ancestors' tokens and their own."""
    mask: Tensor | None
    """(n, m + n) what they see; None: causally all."""


class Forest:
    """How the segments of a row hang together, prepared once for all layers that look alike."""

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device | str = "cpu",
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """A query sees `window` tokens of its path, itself among them (None: all); `softcap` is that of the scores."""
        self.window, self.softcap = window, softcap
        self.starts = [span.start for span in spans]
        self.lengths = [span.stop - span.start for span in spans]
        self.paths: list[list[int]] = []
        """Per segment the indices of its ancestors, eldest first, and its own."""
        for index, span in enumerate(spans):
            self.paths.append([*(self.paths[span.parent] if span.parent >= 0 else []), index])
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.varlen = Varlen(spans, self.paths, self.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer, see `attend`."""
        return attend(q, k, v, self)

    @cached_property
    def alike(self) -> list[Alike]:
        """Short segments of which there are several of a kind; the others are computed one by one."""
        return [self._alike([self.paths[index] for index in several]) for several in self._several]

    @cached_property
    def alone(self) -> list[tuple[list[int], Tensor | None]]:
        """Path and mask of the segments that are computed one by one."""
        together = {index for several in self._several for index in several}
        return [(path, self._mask(path)) for path in self.paths if path[-1] not in together]

    @cached_property
    def order(self) -> Tensor | None:
        """(T,) where a token of the row stands among the outputs of `alone` and `alike`; None where it stays."""
        if not self.alike:
            return None
        alone = [self._places([path], -1) for path, _ in self.alone]
        return torch.cat([*alone, *(one.queries for one in self.alike)]).argsort()

    @cached_property
    def _several(self) -> list[list[int]]:
        """Indices of segments by kind, see `alike`."""
        kinds: dict[tuple[int, ...], list[int]] = {}
        for index, path in enumerate(self.paths):
            kinds.setdefault(tuple(self.lengths[one] for one in path), []).append(index)
        return [found for lengths, found in kinds.items() if len(found) > 1 and sum(lengths) <= SHORT]

    def _alike(self, paths: list[list[int]]) -> Alike:
        keys = [self._places(paths, depth).view(len(paths), -1) for depth in range(len(paths[0]))]
        return Alike(len(paths), keys[-1].flatten(), torch.cat(keys, 1).flatten(), self._mask(paths[0]))

    def _places(self, paths: list[list[int]], depth: int) -> Tensor:
        """Places, end to end, of the tokens that segments of one length at a depth of their paths have."""
        starts = torch.tensor([self.starts[path[depth]] for path in paths])
        return (starts[:, None] + torch.arange(self.lengths[paths[0][depth]])).flatten().to(self.device)

    def _mask(self, path: list[int]) -> Tensor | None:
        """(n, m + n) boolean: a branch's tokens see all m ancestors, and their own segment causally, as far back as the
        window reaches: positions go on along a path. None: causally all."""
        n = self.lengths[path[-1]]
        m = sum(self.lengths[ancestor] for ancestor in path[:-1])
        is_cut = self.window is not None and self.window < m + n
        if not m and not is_cut:
            return None
        mask = torch.ones(n, m + n, dtype=torch.bool, device=self.device).tril(m)
        return mask.triu(m + 1 - cast(int, self.window)) if is_cut else mask


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
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and forest.softcap is None:
        return _attend_varlen(q, k, v, forest.varlen, forest.window)
    return _attend_segments(q, k, v, forest)


def _attend_segments(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    """One fused attention a segment, or one for many short segments that are alike."""
    outputs = []
    if forest.alone:
        # `split` rather than slices: its backward pass is a single concatenation
        queries, keys, values = (x.split(forest.lengths) for x in (q, k, v))
        for path, mask in forest.alone:
            key = keys[path[0]] if len(path) == 1 else torch.cat([keys[i] for i in path])
            value = values[path[0]] if len(path) == 1 else torch.cat([values[i] for i in path])
            outputs.append(_fused(queries[path[-1]][None], key[None], value[None], mask, forest.softcap)[0])
    for one in forest.alike:
        query, key, value = (
            x.index_select(0, places).unflatten(0, (one.count, -1))
            for x, places in ((q, one.queries), (k, one.keys), (v, one.keys))
        )
        outputs.append(_fused(query, key, value, one.mask, forest.softcap).flatten(0, 1))
    return torch.cat(outputs) if forest.order is None else torch.cat(outputs).index_select(0, forest.order)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """q (B, n, H, D), k and v (B, m + n, G, D) → (B, n, H, D); causal without a mask."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if softcap is not None:
        seen = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
        return capped_attention(q.unflatten(1, (k.shape[1], -1)), k, v, seen, softcap).flatten(1, 2).transpose(1, 2)
    output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return output.transpose(1, 2)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float) -> Tensor:
    """softmax(c tanh(q kᵀ / (c √D))) v (Gemma 2, 2408.00118), which no fused kernel computes.

    q (B, G, R, n, D) with R queries a key/value head, k and v (B, G, m, D), `seen` boolean, (n, m) or with what stands
    before it; → (B, G, R, n, D). Softmax in fp32.
    """
    scores = q @ k[:, :, None].transpose(-1, -2) * (q.shape[-1] ** -0.5 / softcap)
    scores = scores.tanh() * softcap
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, torch.promote_types(q.dtype, torch.float32))
    return weights.to(v.dtype) @ v[:, :, None]


def forests(architecture: Architecture, spans: Sequence[Span], device: torch.device | str = "cpu") -> list[Forest]:
    """What each layer of a model sees; layers that look alike share it, and a window that nothing in the row is longer
    than is none."""
    longest = _longest(spans)
    made: dict[int | None, Forest] = {}
    found = []
    for layer in range(architecture.num_layers):
        window = architecture.kind(layer).window
        window = window if window is not None and window < longest else None
        if window not in made:
            made[window] = Forest(spans, device, window=window, softcap=architecture.attention_softcap)
        found.append(made[window])
    return found


def _longest(spans: Sequence[Span]) -> int:
    """Tokens of the longest path."""
    lengths: list[int] = []
    for span in spans:
        lengths.append(span.stop - span.start + (lengths[span.parent] if span.parent >= 0 else 0))
    return max(lengths, default=0)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if varlen.key_places is not None:
        k, v = k[varlen.key_places], v[varlen.key_places]
    bounds = varlen.query_bounds, varlen.key_bounds, *varlen.longest
    behind = -1 if window is None else window - 1
    return cast(Tensor, varlen_attn(q, k, v, *bounds, window_size=(behind, 0), enable_gqa=q.shape[1] != k.shape[1]))
