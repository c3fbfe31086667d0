"""Learning-rate schedules against values worked out by hand, and cosine and linear against transformers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litrecipe.config.groups import Schedule
from litrecipe.engine.schedule import lr_factor


def curve(total, **keys):
    return [lr_factor(Schedule(**keys), step, total) for step in range(total)]


def test_linear_by_hand():
    """4 steps from 1 to 0: 1, 3/4, 2/4, 1/4."""
    assert curve(4, name="linear") == [1.0, 0.75, 0.5, 0.25]


def test_warmup_never_wastes_a_step_at_zero():
    """3 warm-up steps on the way from 0 to the peak at step 3: 1/4, 2/4, 3/4, then 1."""
    assert curve(6, name="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_wsd_by_hand():
    """10 steps, the last 4 decay to a tenth: 1 - 0.9·(k/4) for k = 0..3."""
    got = curve(10, name="wsd", decay_steps=4, min_lr_ratio=0.1)
    assert got == pytest.approx([1] * 6 + [1.0, 0.775, 0.55, 0.325])


def test_wsds_curves_by_hand():
    """Ten steps, of which the last four decay, at x = 0, 1/4, 2/4, 3/4: 1 - √x; half a cosine; halves every 2 steps."""
    decay = [curve(10, name="wsd", decay_steps=4, decay=name)[6:] for name in ("sqrt", "cosine")]
    assert decay[0] == pytest.approx([1, 1 - math.sqrt(0.25), 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])
    assert decay[1] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    halving = {"decay": "exponential", "half_life_steps": 2}
    assert curve(10, name="wsd", decay_steps=4, **halving)[6:] == pytest.approx([1, 0.5**0.5, 0.5, 0.5**1.5])
    assert curve(10, name="wsd", decay_steps=4, min_lr_ratio=0.6, **halving)[6:] == pytest.approx(
        [1, 0.5**0.5, 0.6, 0.6]
    )


@pytest.mark.parametrize("decay", ["linear", "cosine", "1-sqrt"])
def test_wsd_equals_transformers(decay):
    """Theirs is told the lengths of all three parts, and falls to 0."""
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_wsd_schedule(optimizer, num_warmup_steps=0, num_decay_steps=8, num_training_steps=30, decay_type=decay)
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = curve(30, name="wsd", decay_steps=8, decay={"1-sqrt": "sqrt"}.get(decay, decay))
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_equals_transformers_without_warmup(name):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=37)
    expected = []
    for _ in range(37):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert curve(37, name=name) == pytest.approx(expected, abs=1e-12)


@given(
    st.sampled_from(["cosine", "linear", "constant", "wsd"]), st.integers(1, 60), st.integers(0, 30), st.floats(0, 1)
)
def test_stays_between_zero_and_the_peak(name, total, warmup, ratio):
    values = curve(total, name=name, warmup_steps=warmup, min_lr_ratio=ratio)
    assert all(0 < value <= 1 for value in values)
    after = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(value >= ratio - 1e-12 for value in after)
