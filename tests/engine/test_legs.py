"""Stages as the loop goes through them."""

import pytest

from litrecipe.config.groups import Schedule
from litrecipe.engine.legs import Leg, leg_of


def leg(name, steps, schedule=Schedule()):  # noqa: B008 - nobody changes it
    return Leg(name, steps, 1e-3, schedule, 64)


@pytest.mark.parametrize(
    ("step", "name", "before"), [(0, "a", 0), (2, "a", 0), (3, "b", 3), (3 + 4, "c", 7), (8, "c", 7), (99, "c", 7)]
)
def test_a_step_belongs_to_the_leg_that_it_falls_in(step, name, before):
    legs = [leg("a", 3), leg("b", 4), leg("c", 2)]
    found, begun = leg_of(legs, step)
    assert (found.name, begun) == (name, before)


def test_what_a_schedule_has_no_room_for_is_told_of_the_stage():
    assert list(leg("", 5, Schedule(warmup_steps=5)).without_room()) == []
    assert list(leg("", 5, Schedule(warmup_steps=6)).without_room()) == [
        "schedule.warmup_steps 6: the run ends after 5 steps"
    ]
    told = list(leg("long", 5, Schedule("wsd", decay_steps=9)).without_room())
    assert told == ["stages.long.schedule.decay_steps 9: the stage ends after 5 steps"]
