"""How many floating-point operations a device can do in a second: what MFU is measured against."""

from __future__ import annotations

import time

import torch

SIZE, TIMES = 1536, 5
"""Rows and columns of the matrices that are multiplied on a CPU, and how often."""


def peak_flops(device: torch.device, *, half: bool) -> float | None:
    """Of dense matrix products in `half` precision or fp32; None where it is not known.

    Of a GPU it is what the maker promises. Makers promise nothing comparable for CPUs: there it is the best of a few
    large products, which takes part of a second.
    """
    if device.type == "cuda":
        from lightning_fabric.utilities.throughput import get_available_flops

        found = get_available_flops(device, torch.bfloat16 if half else torch.float32)
        return None if found is None else float(found)
    return measured_flops(torch.bfloat16 if half else torch.float32) if device.type == "cpu" else None


def measured_flops(dtype: torch.dtype) -> float:
    """The best of some products on the CPU, with the threads that torch uses."""
    # Made without the generators: whatever asks must not move the run's random numbers.
    left = torch.linspace(0, 1, SIZE * SIZE, dtype=torch.float32).reshape(SIZE, SIZE).to(dtype)
    right, seconds = left.T.contiguous(), []
    for _ in range(TIMES):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds)
