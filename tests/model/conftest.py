"""Models of these tests are so small that a second thread only waits."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """For the length of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
