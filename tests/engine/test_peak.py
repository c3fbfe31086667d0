"""What a processor can do, and what is told of it."""

from types import SimpleNamespace

import pytest
import torch

from litrecipe.engine.peak import measured_flops, peak_flops
from litrecipe.engine.telling import Teller


def test_a_cpu_is_measured_and_random_numbers_stay_where_they_are():
    state = torch.get_rng_state()
    assert measured_flops(torch.float32) > 1e9
    assert peak_flops(torch.device("cpu"), half=False) > 1e9
    assert torch.equal(torch.get_rng_state(), state)


def test_of_a_device_that_nobody_knows_there_is_no_peak():
    assert peak_flops(torch.device("meta"), half=True) is None


def test_utilization_is_the_share_of_what_all_ranks_can_do():
    """6e9 operations in two seconds on two ranks of 1e10 a second each: 0.15."""
    teller = Teller.__new__(Teller)
    teller.fabric = SimpleNamespace(world_size=2)
    teller.flops, teller.peak_flops = 6e9, 1e10
    assert teller.utilization(2.0) == pytest.approx(0.15)
    teller.flops = 0.0
    assert teller.utilization(2.0) is None
