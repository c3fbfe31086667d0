"""The stages of a run, as its loop goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from litrecipe.config.groups import Schedule
from litrecipe.config.progress import counted


@dataclass(frozen=True)
class Leg:
    """Steps of a run that have a learning rate and rows of their own; a run without stages is one."""

    name: str
    """Empty where there is one."""
    steps: int
    lr: float
    """Peak learning rate, of the first role."""
    schedule: Schedule
    """Over the steps of the leg."""
    micro_batch_tokens: int
    begin: Callable[[], None] = lambda: None
    """Sets the module to how the leg trains it; called before its first step, and when a run goes on in it."""

    @property
    def where(self) -> str:
        """What stands before its keys."""
        return f"stages.{self.name}." if self.name else ""

    def without_room(self) -> Iterator[str]:
        """What the schedule has no room for; no mistake, as a recipe is often tried for a few steps."""
        what = "the stage" if self.name else "the run"
        for key in ("warmup_steps", "decay_steps"):
            steps = getattr(self.schedule, key) or 0
            if steps > self.steps:
                yield f"{self.where}schedule.{key} {steps}: {what} ends after {counted(self.steps, 'step')}"


def leg_of(legs: Sequence[Leg], step: int) -> tuple[Leg, int]:
    """The leg of a step (0-based), and how many steps of the run are before that; beyond the end the last."""
    begin = 0
    for leg in legs[:-1]:
        if step < begin + leg.steps:
            return leg, begin
        begin += leg.steps
    return legs[-1], begin
