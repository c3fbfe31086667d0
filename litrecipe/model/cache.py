"""Keys and values of the tokens that were already read, for decoding.

Shapes: B sequences, G key/value heads, S slots, D head dimension, t new tokens, R query heads a key/value head.

All sequences use the same slots; shorter prompts are padded on the left, so that the next token of every sequence goes
to the same slot. A token's position is its slot minus the sequence's padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litrecipe.model.architecture import Architecture


class KVCache:
    """Keys and values in tensors that are made once and filled from the left."""

    def __init__(
        self,
        architecture: Architecture,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (architecture.num_layers, batch, architecture.num_kv_heads, max_length, architecture.head_dim)
        self.keys = list(torch.zeros(shape, dtype=dtype, device=device))
        self.values = list(torch.zeros(shape, dtype=dtype, device=device))
        self.length = 0
        """Slots that are filled."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the sequences only, given by their indices."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]

    def mask(self, positions: Tensor) -> Tensor:
        """What new tokens at `positions` (B, t) may see: (B, 1, t, slots), boolean.

        Padding (negative positions) sees itself, so that its values stay finite; nobody else sees it.
        """
        batch, t = positions.shape
        stop = self.length + t
        padding = stop - 1 - positions[:, -1].view(batch, 1, 1, 1)
        slot = torch.arange(stop, device=positions.device)
        query = slot[-t:].view(t, 1)
        return (slot <= query) & ((slot >= padding) | (slot == query))


class CacheStep:
    """One layer's attention in a decoding step: stores the new keys and values, and looks at all so far."""

    def __init__(self, cache: KVCache, layer: int, mask: Tensor) -> None:
        self.keys, self.values = cache.keys[layer], cache.values[layer]
        self.start = cache.length
        self.mask = mask

    @torch.compiler.disable  # the number of filled slots changes with every step
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B t, H, D), k and v (B t, G, D) → (B t, H, D)."""
        (tokens, H, D), (B, G) = q.shape, self.keys.shape[:2]
        t = tokens // B
        stop = self.start + t
        self.keys[:, :, self.start : stop] = k.view(B, t, G, D).transpose(1, 2)
        self.values[:, :, self.start : stop] = v.view(B, t, G, D).transpose(1, 2)
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        # The R query heads of a key/value head are laid out as R queries of it, so no key is repeated.
        query = q.view(B, t, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * t, D)
        mask = self.mask if t == 1 else self.mask.repeat(1, 1, H // G, 1)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return output.view(B, G, H // G, t, D).permute(0, 3, 1, 2, 4).reshape(tokens, H, D)
