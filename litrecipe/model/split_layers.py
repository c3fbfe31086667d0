"""Layers that are computed by a group of ranks, of which each has a part of the weight.

Shapes: i inputs, o outputs, T tokens, V vocabulary, d hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from litrecipe.model.group import Group, added_up


class RowLinear(nn.Linear):
    """A linear layer of which a rank has the columns of its own inputs; the outputs are the group's sum."""

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        """Takes weight (o, own i) and bias (o,) of `linear`."""
        super().__init__(linear.weight.shape[1], linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.group = linear.weight, group
        if linear.bias is not None:
            self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (…, own i) → (…, o)."""
        return self.completed(F.linear(x, self.weight))

    def completed(self, y: Tensor) -> Tensor:
        """The sum of all ranks' y (…, o), and the bias, which is added once."""
        y = added_up(y, self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TokenEmbedding(nn.Embedding):
    """An embedding of which a rank has the rows of its own tokens."""

    def __init__(self, embedding: nn.Embedding, group: Group, start: int) -> None:
        """Takes the weight (own V, d) of `embedding`, whose first row is that of token `start`."""
        super().__init__(len(embedding.weight), embedding.embedding_dim, device="meta")
        self.weight, self.group, self.start = embedding.weight, group, start

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (T,) → (T, d)."""
        places = (tokens - self.start).clamp(0, len(self.weight) - 1)
        x = F.embedding(places, self.weight) * (places + self.start == tokens)[..., None]
        return added_up(x, self.group)
