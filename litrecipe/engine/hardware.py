"""Machines that a run may be planned for, and how long a step would take there.

Figures of makers are of dense products; what is reached of them is said beside, with where it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from litrecipe.engine.cost import Collective

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One kind of device in nodes of one kind. Bytes and seconds."""

    name: str
    half: float
    """Operations a second of dense products in bf16."""
    full: float
    """The same in fp32."""
    memory: float
    bandwidth: float
    """Of the memory."""
    link: float
    """Bytes a second that a device can send to others of its node, while it receives as many."""
    network: float
    """The same to other nodes."""
    host: float
    """Between a device and main memory, each way."""
    attained: float
    """Share of the products' peak that a transformer's layers come to, all they do besides included. Set so that a
    published run comes out, see `docs/scaling.md`."""
    carried: float = 0.8
    """Share of link and network that collectives come to. 230 to 250 of an A100's 300 GB/s and more of an H100's 450
    GB/s are what `nccl-tests` is expected to show (docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests)."""
    link_hop: float = 3.4e-6
    """Seconds that each step round a ring takes besides (NCCL's tuning model, src/graph/tuning.cc: hwLat, Ring,
    Simple, NVLink)."""
    network_hop: float = 14e-6
    """The same over a network (there)."""
    base: float = 8.4e-6
    """Seconds that a collective takes besides (there: baseLat, Ring, Simple)."""
    alone: bool = False
    """Whether exchanging and arithmetic take turns: on a CPU both are done by the same cores."""

    def peak(self, *, half: bool) -> float:
        """Operations a second in either precision."""
        return self.half if half else self.full


KNOWN = {
    one.name: one
    for one in (
        # NVIDIA A100 80GB SXM data sheet: 312 and 19.5 TFLOPS, 2,039 GB/s, NVLink 600 GB/s, which counts both
        # directions, PCIe 4.0 64 GB/s both ways; DGX A100 data sheet: eight adapters of 200 Gb/s.
        Hardware("a100-80", 312e12, 19.5e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 32 * GB, 0.60),
        # NVIDIA H100 SXM data sheet: 989.4 and 66.9 TFLOPS, 80 GB, 3.35 TB/s, NVLink 900 GB/s and PCIe 5.0 128 GB/s
        # both ways; eight adapters of 400 Gb/s as in the Llama 3 report (2407.21783, section 3.3.1).
        Hardware("h100", 989.4e12, 66.9e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 64 * GB, 0.42),
        # NVIDIA H200 data sheet: the same chip with 141 GB at 4.8 TB/s.
        Hardware("h200", 989.4e12, 66.9e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 64 * GB, 0.42),
    )
}


def seconds(one: Collective, hardware: Hardware) -> float:
    """Of one time of a collective.

    A ring through several nodes enters each node over the network, and all rings of a node share its adapters, one a
    device: with m ranks of a node in a ring, that is the bandwidth of m adapters.
    """
    if one.ranks == 1:
        return 0.0
    passes = 2 if one.kind == "all-reduce" else 1
    inside = min(one.neighbours, one.ranks)
    nodes = -(-one.ranks // inside)
    bandwidth = hardware.link if nodes == 1 else min(hardware.link, hardware.network * inside)
    hops = hardware.link_hop * (one.ranks - nodes if nodes > 1 else one.ranks - 1)
    hops += hardware.network_hop * nodes * (nodes > 1)
    moved = one.bytes * (one.ranks - 1) / one.ranks / (bandwidth * hardware.carried)
    return hardware.base + passes * (hops + moved)
