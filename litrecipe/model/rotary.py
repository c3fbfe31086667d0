"""Rotary positions (RoPE, 2104.09864): how fast the pairs of a head turn, and turning them.

Shapes: T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from litrecipe.model.architecture import Rope
from litrecipe.model.head import widen

Turn = tuple[Tensor, Tensor]
"""What `rotary_tables` gives."""


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angle a position of each of the D / 2 rotated pairs, fp32 on the CPU (RoPE, 2104.09864), and by what what is
    turned is multiplied.

    `linear` stretches all wavelengths by `factor` (2306.15595). `llama3` (Llama 3.1) stretches those longer than
    original / low_freq_factor, keeps those shorter than original / high_freq_factor, and goes over in between; `yarn`
    (2309.00071) goes over from pair to pair, between those that turn `beta_fast` and `beta_slow` times, and lengthens
    queries and keys.
    """
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    stretched = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return stretched, 1.0
    if scaling["rope_type"] == "yarn":
        kept = yarn_ramp(rope, head_dim)
        return stretched * (1 - kept) + frequencies * kept, yarn_magnitude(scaling)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * stretched + kept * frequencies, 1.0


def yarn_ramp(rope: Rope, head_dim: int) -> Tensor:
    """How much (D / 2,) of each pair's frequency YaRN keeps: from 1 for the fastest down to 0."""
    scaling = rope.scaling or {}
    original = scaling["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair that turns so often in the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, device="cpu").float() - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def yarn_magnitude(scaling: dict[str, Any]) -> float:
    """0.1 ln s + 1, or as the config says."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1)


def rotary_tables(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> Turn:
    """cos and ± sin of every position's angles, times the magnitude, (T, 1, D) fp32; the sine is negative in the first
    half."""
    angles = positions.float()[:, None, None] * frequencies.to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of x (T, H, D) by their positions' angles; in fp32 inside."""
    wide = widen(x)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
