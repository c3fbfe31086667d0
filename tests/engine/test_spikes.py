"""The guard against spikes: what it refuses, and that it goes on as it was."""

import json

import numpy as np
import pytest

from litrecipe.config.errors import InputError
from litrecipe.engine.spikes import IN_A_ROW, SpikeGuard

STEPS = [{"loss": 4 + 0.01 * n, "grad_norm": 1 + 0.1 * m} for n, m in np.random.default_rng(0).normal(size=(40, 2))]


def guarded(steps, sigmas=6.0, window=32):
    guard = SpikeGuard(sigmas, window)
    assert [guard(numbers) for numbers in steps] == [None] * len(steps)
    return guard


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_it_refuses_a_step_beyond_so_many_deviations_of_the_window(name):
    """The bound is mean + 6 deviations of the last 32 values, computed here from the list."""
    last = [numbers[name] for numbers in STEPS[-32:]]
    bound = np.mean(last) + 6 * np.std(last)
    normal = STEPS[0]
    assert guarded(STEPS)(normal | {name: bound + 1e-9}).startswith(f"{name} ")
    assert guarded(STEPS)(normal | {name: bound - 1e-9}) is None


def test_it_says_what_and_counts_and_does_not_learn_from_spikes():
    guard = guarded(STEPS)
    for count in (1, 2):
        said = guard({"loss": 9.0, "grad_norm": 1.0})
        assert said.startswith("loss 9 lies ")
        assert said.endswith(f"standard deviations above the last 32 steps: passed over ({count} so far)")
    assert guard.refused == 2


def test_it_refuses_nothing_finite_before_a_quarter_of_the_window():
    guard = guarded(STEPS[:7])
    assert guard({"loss": 900.0, "grad_norm": 1.0}) is None
    assert guarded(STEPS[:8])({"loss": 900.0, "grad_norm": 1.0}) is not None
    assert guarded([])({"loss": float("nan"), "grad_norm": 1.0}) == "loss nan: passed over (1 so far)"


def test_after_many_in_a_row_the_level_has_changed_or_the_run_is_lost():
    guard = guarded(STEPS)
    high = {"loss": 6.0, "grad_norm": 1.0}
    assert all(guard(high) for _ in range(IN_A_ROW + 1))
    assert guard(high) is None
    guard = guarded(STEPS)
    lost = {"loss": 4.0, "grad_norm": float("inf")}
    assert all(guard(lost) for _ in range(IN_A_ROW))
    with pytest.raises(InputError, match="17 steps in a row were not finite"):
        guard(lost)


def test_its_state_goes_on_exactly():
    steps = [numbers | ({"loss": 7.0} if place % 9 == 8 else {}) for place, numbers in enumerate(STEPS * 2)]
    whole = SpikeGuard(6.0, 32)
    said = [whole(numbers) for numbers in steps]
    assert sum(one is not None for one in said) == 8
    first, second = SpikeGuard(6.0, 32), SpikeGuard(6.0, 32)
    head = [first(numbers) for numbers in steps[:33]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + [second(numbers) for numbers in steps[33:]] == said
    assert second.state_dict() == whole.state_dict()
