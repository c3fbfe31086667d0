"""Steps that a run passes over because something is wrong with them: a loss or gradient far above those before."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from litrecipe.config.errors import InputError

IN_A_ROW = 16
"""As many steps in a row are no spikes: the level has changed, or the run is lost."""


class SpikeGuard:
    """Refuses a step whose loss or gradient norm lies `sigmas` standard deviations above the mean of the last `window`
    steps that were taken, or is not finite. Its state is a part of the run's, so that a resumed run refuses the same.

    A quarter of a window must be there first. After 16 refused steps in a row the numbers of before do not count any
    longer; where even then they are not finite, InputError says that the run is lost.
    """

    def __init__(self, sigmas: float, window: int) -> None:
        self.sigmas, self.window = sigmas, window
        self.taken: dict[str, deque[float]] = {name: deque(maxlen=window) for name in ("loss", "grad_norm")}
        self.refused = 0
        """Steps, over the run."""
        self.in_a_row = 0

    def __call__(self, numbers: dict[str, float]) -> str | None:
        """Why a step is refused, if it is. `numbers` has its `loss` and `grad_norm`."""
        why = self._why(numbers)
        if why is None:
            self.in_a_row = 0
            for name, values in self.taken.items():
                values.append(numbers[name])
            return None
        self.refused, self.in_a_row = self.refused + 1, self.in_a_row + 1
        if self.in_a_row > IN_A_ROW:
            if not all(math.isfinite(numbers[name]) for name in self.taken):
                cure = "lower optim.lr, or go on from an earlier checkpoint with --checkpoint.resume FOLDER"
                raise InputError(f"pretrain.spike_sigmas: {self.in_a_row} steps in a row were not finite: {cure}")
            self.start_anew()
        return f"{why}: passed over ({self.refused} so far)"

    def start_anew(self) -> None:
        """Forget what was normal: where a stage begins, for example."""
        self.in_a_row = 0
        for values in self.taken.values():
            values.clear()

    def _why(self, numbers: dict[str, float]) -> str | None:
        for name, values in self.taken.items():
            value = numbers[name]
            if not math.isfinite(value):
                return f"{name} {value}"
            if len(values) < self.window // 4:
                continue
            mean, deviation = float(np.mean(values)), float(np.std(values))
            if value > mean + self.sigmas * deviation:
                beyond = (value - mean) / max(deviation, 1e-12)
                return f"{name} {value:.4g} lies {beyond:.1f} standard deviations above the last {len(values)} steps"
        return None

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        taken = {name: list(values) for name, values in self.taken.items()}
        return {"taken": taken, "refused": self.refused, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; of a longer window the last steps are kept."""
        self.refused, self.in_a_row = state["refused"], state["in_a_row"]
        for name, values in self.taken.items():
            values.clear()
            values.extend(state["taken"][name])
