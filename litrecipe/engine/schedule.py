"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from litrecipe.config.groups import Schedule


def lr_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak rate at optimizer step `step` (0-based) of a run of `total_steps`.

    Warm-up rises linearly and reaches the peak at step `warmup_steps`; the first step's rate is never 0. `cosine` and
    `linear` then fall to `min_lr_ratio`, which they would reach at step `total_steps`. `wsd` (MiniCPM, 2404.06395)
    stays at the peak and falls over its last `decay_steps` by the curve `decay`: to `min_lr_ratio` too, but for
    `exponential`, which halves every `half_life_steps` and falls no further than that.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    start, curve = schedule.warmup_steps, str(schedule.name)
    if schedule.name == "wsd":
        start, curve = max(start, total_steps - decay_steps(schedule, total_steps)), schedule.decay
        if step < start:
            return 1.0
    if curve == "exponential":
        assert schedule.half_life_steps is not None
        return max(schedule.min_lr_ratio, 0.5 ** ((step - start) / schedule.half_life_steps))
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "sqrt": 1 - math.sqrt(progress)}
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * falling.get(curve, 1 - progress)


def decay_steps(schedule: Schedule, total_steps: int) -> int:
    """Steps of `wsd`'s final decay: as given, or a tenth of the run."""
    return schedule.decay_steps if schedule.decay_steps is not None else math.ceil(total_steps / 10)
