"""Rotary positions (RoPE, 2104.09864): how fast the pairs of a head turn, and turning them.

Shapes: T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from litrecipe.model.architecture import Rope, turning_dimensions
from litrecipe.model.head import widen

Turn = tuple[Tensor, Tensor]
"""What `rotary_tables` gives."""


def inverse_frequencies(rope: Rope, head_dim: int, longest: int) -> tuple[Tensor, float]:
    """Angle a position of each of the rotated pairs, half as many as the dimensions that turn, fp32 on the CPU, and by
    what what is turned is multiplied.

    `linear` stretches all wavelengths by `factor` (2306.15595). `llama3` (Llama 3.1) stretches those longer than
    original / low_freq_factor, keeps those shorter than original / high_freq_factor, and goes over in between; `yarn`
    (2309.00071) goes over from pair to pair, between those that turn `beta_fast` and `beta_slow` times, and lengthens
    queries and keys. `longrope` (2402.13753) stretches each pair by a number of its own, from the one list where the
    `longest` sequence is within the original context, else from the other, and lengthens both alike.
    """
    turning = turning_dimensions(rope, head_dim)
    exponents = torch.arange(0, turning, 2, device="cpu").float() / turning
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] == "longrope":
        is_long = longest > scaling["original_max_position_embeddings"]
        factors = torch.tensor(scaling["long_factor" if is_long else "short_factor"], device="cpu")
        return 1.0 / (factors * rope.theta**exponents), longrope_magnitude(scaling)
    stretched = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return stretched, 1.0
    if scaling["rope_type"] == "yarn":
        kept = yarn_ramp(rope, turning)
        return stretched * (1 - kept) + frequencies * kept, yarn_magnitude(scaling)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * stretched + kept * frequencies, 1.0


def yarn_ramp(rope: Rope, turning: int) -> Tensor:
    """How much of each pair's frequency YaRN keeps, of so many dimensions that turn: from 1 for the fastest to 0."""
    scaling = rope.scaling or {}
    original = scaling["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair that turns so often in the original context."""
        return turning * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turning - 1)
    ramp = (torch.arange(turning // 2, device="cpu").float() - low) / max(high - low, 0.001)
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


def longrope_magnitude(scaling: dict[str, Any]) -> float:
    """√(1 + ln s / ln original), or as the config says."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rotary_tables(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> Turn:
    """cos and ± sin of every position's angles, times the magnitude, (T, 1, n) fp32 for the n dimensions of a head that
    turn; the sine is negative in the first half."""
    angles = positions.float()[:, None, None] * frequencies.to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + n/2}) of the first n dimensions of x (T, H, D) by their positions' angles; in fp32
    inside."""
    turning = cos.shape[-1]
    if turning < x.shape[-1]:
        return torch.cat((rotate(x[..., :turning], cos, sin), x[..., turning:]), -1)
    wide = widen(x)
    return torch.addcmul(wide * cos, wide.roll(turning // 2, -1), sin).to(x.dtype)
