"""Ranks each of which has the whole model: Lightning's strategy for them, without torch's DDP.

Gradients are added up by `gradients.add_up_copies`, once a step, so that no hooks stand between rows; ranks begin alike
because weights come from the same files or the same seeds, as they do where ranks share a model.
"""

from __future__ import annotations

from lightning_fabric.strategies import DDPStrategy
from torch import nn


class Copies(DDPStrategy):
    """Starts and finds ranks as DDP does."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """As it is."""
        return module
