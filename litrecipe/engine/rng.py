"""Random number generators: seeded once, and as JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Start every generator anew; ranks, and those that begin at other steps, draw different numbers."""
    mine = seed + 100_003 * rank + 1_000_000_007 * step
    random.seed(mine)
    np.random.seed(mine % 2**32)  # noqa: NPY002 - what user code may still draw from
    torch.manual_seed(mine)


def capture_rng() -> dict[str, Any]:
    """The state of every generator a step may draw from."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put every generator back where it stood."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _tensor(hexadecimal: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(hexadecimal), dtype=np.uint8).copy())
