"""Keys and values of the tokens that were already read, for decoding.

Shapes: L layers, B sequences, P prompts, T tokens of a step, G key/value heads, S slots that are looked at,
D head dimension, H query heads, R of them a key/value head.

Each sequence has a row of its own and fills it from the left: a token's slot is its position, so there is nothing to
align when sequences of other lengths come and go. What stands in a row behind its sequence is stale and never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from litrecipe.model.architecture import Architecture
from litrecipe.model.attention import Forest, capped_attention, forests
from litrecipe.model.row import Span


class KVCache:
    """Rows of slots in one tensor a layer; sequences stand in the first rows. Has no room until `resize`."""

    def __init__(
        self, architecture: Architecture, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.architecture = architecture
        heads = (architecture.shape(layer).num_kv_heads for layer in range(architecture.num_layers))
        self.layers = [torch.empty(2, 0, G, 0, architecture.head_dim, dtype=dtype, device=device) for G in heads]
        """L tensors (2, rows, G, slots, D): keys, and values."""

    @property
    def rows(self) -> int:
        """Sequences there is room for."""
        return self.layers[0].shape[1]

    @property
    def slots(self) -> int:
        """Tokens a row has room for."""
        return self.layers[0].shape[3]

    def resize(self, rows: int, slots: int) -> None:
        """Have so many rows and slots, and keep what fits of what is there; takes the memory of one layer besides."""
        for index, old in enumerate(self.layers):
            new = old.new_zeros(2, rows, old.shape[2], slots, old.shape[4])
            kept = slice(None), slice(min(rows, old.shape[1])), slice(None), slice(min(slots, old.shape[3]))
            new[kept] = old[kept]
            self.layers[index] = new

    def copy(self, sources: Sequence[int], targets: Sequence[int], slots: int) -> None:
        """Copy the first slots of some rows into as many others."""
        for layer in self.layers:
            layer[:, targets, :, :slots] = layer[:, sources, :, :slots]


class CacheStep:
    """What one forward pass reads: a token each of the first B sequences, then P prompts, all end to end.

    A prompt fills the rows behind those of the B sequences, as many of them as it has completions.
    """

    def __init__(
        self, cache: KVCache, positions: Sequence[int], prompts: Sequence[int] = (), copies: Sequence[int] | None = None
    ) -> None:
        """`positions` of the B tokens, and of each prompt its length and its rows (default: one)."""
        B, device = len(positions), cache.layers[0].device
        bounds = [0, *accumulate(prompts)]
        whole = [torch.tensor(positions, dtype=torch.int64), *(torch.arange(n) for n in prompts)]
        self.positions = torch.cat(whole).to(device)
        """(T,)"""
        self.places = torch.tensor([*range(B), *(B + stop - 1 for stop in bounds[1:])]).to(device)
        """(B + P,) where the next token is predicted."""
        self.count = B
        self.slots_seen = max(positions, default=-1) + 1
        """S"""
        self.sources, self.rows, self.slots = self._stores(prompts, copies or [1] * len(prompts))
        """Which token is kept where: (T,), or more where a prompt fills several rows. None: each once, in order."""
        architecture, dtype = cache.architecture, cache.layers[0].dtype
        self.softcap = architecture.attention_softcap
        kinds = [architecture.kind(layer) for layer in range(len(cache.layers))]
        windows = [kind.window if kind.window and kind.window < self.slots_seen else None for kind in kinds]
        needed = {window for window in windows if window or self.softcap or len(set(positions)) > 1}
        masks = {window: self._mask(window, dtype) for window in needed}
        self.spans = [Span(start, stop, -1) for start, stop in pairwise(bounds)]
        """Of the prompts."""
        read = forests(architecture, self.spans, device) if self.spans else [None] * len(kinds)
        self.layers = [
            CachedAttention(self, layer, masks.get(window), forest)
            for layer, window, forest in zip(cache.layers, windows, read, strict=True)
        ]

    def _stores(self, prompts: Sequence[int], copies: Sequence[int]) -> tuple[Tensor | None, Tensor, Tensor]:
        """sources, rows and slots."""
        own, *read = torch.arange(self.count + sum(prompts)).split([self.count, *prompts])
        sources = torch.cat([own, *(tokens.repeat(n) for tokens, n in zip(read, copies, strict=True))])
        lengths = [1] * self.count + [length for length, n in zip(prompts, copies, strict=True) for _ in range(n)]
        rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        device = self.positions.device
        sources, rows = sources.to(device), rows.to(device)
        return sources if len(sources) > len(self.positions) else None, rows, self.positions[sources]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, S), added to the scores. One mask for all layers that look alike: made of booleans, each layer
        would convert it; with capped scores it is one of booleans, true where a slot is seen."""
        own = self.positions[: self.count, None, None, None]
        slots = torch.arange(self.slots_seen, device=own.device)
        unseen = slots > own
        if window is not None:
            unseen |= slots <= own - window
        if self.softcap is not None:
            return ~unseen
        return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)


class CachedAttention:
    """One layer's attention in a step: stores the new keys and values, and looks at all so far."""

    def __init__(self, step: CacheStep, layer: Tensor, mask: Tensor | None, forest: Forest | None) -> None:
        self.step, self.mask, self.forest = step, mask, forest
        self.keys, self.values = layer

    @torch.compiler.disable  # the number of filled slots changes with every step
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, G, D) → (T, H, D)."""
        step, B = self.step, self.step.count
        for stored, new in ((self.keys, k), (self.values, v)):
            new = new.to(stored.dtype)
            stored[step.rows, :, step.slots] = new if step.sources is None else new[step.sources]
        if self.forest is None:
            return self._continue(q)
        read = self.forest.attend(q[B:], k[B:], v[B:])
        return torch.cat((self._continue(q[:B]), read)) if B else read

    def _continue(self, q: Tensor) -> Tensor:
        """A token of each sequence: q (B, H, D) → (B, H, D)."""
        step = self.step
        keys, values = (x[: step.count, :, : step.slots_seen] for x in (self.keys, self.values))
        # The R query heads of a key/value head are laid out as R queries of it, so no key is repeated.
        query = q.view(step.count, keys.shape[1], -1, q.shape[2])
        if step.softcap is not None and self.mask is not None:
            found = capped_attention(query[:, :, :, None], keys, values, self.mask[:, None], step.softcap)
            return found.reshape(q.shape)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).reshape(q.shape)
