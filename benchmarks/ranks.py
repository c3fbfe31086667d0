"""One rank of a run whose collectives are counted, or what a dry run reckons of them; for benchmarks/scaling.py.

    python benchmarks/ranks.py count OUT verb flags…
    python benchmarks/ranks.py reckon OUT verb flags…
    python benchmarks/ranks.py probe OUT

Counting looks at what torch is asked for, below FSDP2, DDP and litrecipe: every collective passes the dispatcher. Of a
run's steps the second is counted and the others are timed, as counting slows a step down.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TIMES = 5
"""Of each exchange that is timed."""
COUNTED = 1
"""The step, from 0, that is counted."""
KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
SMALL = 4096
"""Bytes up to which a collective is one of those by which ranks agree (sums of losses, a norm, a flag)."""


class Traffic(TorchDispatchMode):
    """Counts collectives by kind and bytes of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2].replace("all_", "all")
            kind = next((kind for part, kind in KINDS.items() if part in name), None)
            tensors = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
            if kind is not None:
                # An all-gather is told its output beside its input, a reduce-scatter the other way round: the whole is
                # the larger of the two. An all-reduce may be told of several tensors.
                sizes = [one.numel() * one.element_size() for one in tensors]
                self.counted[kind, sum(sizes) if kind == "all-reduce" else max(sizes)] += 1
        return func(*args, **(kwargs or {}))


def resident(field: str) -> int:
    """Bytes of this process's resident memory: `VmRSS` now, `VmHWM` at its highest."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(field)).split()[1])


def count(out: Path, words: list[str]) -> None:
    """Train, and write what was counted and measured of this rank's steps."""
    from litrecipe import cli
    from litrecipe.engine import fit

    traffic, seconds, step = Traffic(), list[float](), fit.Run.train_step

    def train_step(run: Any, samples: Any) -> Any:
        if len(seconds) == COUNTED:
            with traffic:
                result = step(run, samples)
            seconds.append(0.0)
            return result
        run.fabric.barrier()
        started = time.perf_counter()
        result = step(run, samples)
        seconds.append(time.perf_counter() - started)
        return result

    fit.Run.train_step = train_step  # type: ignore[method-assign]
    if cli.main(words):
        sys.exit("the run failed")
    told = {
        "counted": [[kind, size, times] for (kind, size), times in sorted(traffic.counted.items())],
        "seconds": [one for place, one in enumerate(seconds) if place not in (0, COUNTED)],
        "peak": resident("VmHWM"),
    }
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


def reckon(out: Path, words: list[str]) -> None:
    """Write what a dry run knows of the same."""
    from litrecipe import cli
    from litrecipe.recipes import dry_run_ranks

    told: dict[str, Any] = {}
    forecast, table_of = dry_run_ranks.forecast, dry_run_ranks.parameter_and_memory_table

    def kept_forecast(*args: Any, **keys: Any) -> Any:
        found = forecast(*args, **keys)
        told["collectives"] = [[one.kind, one.bytes, one.times] for one in found.collectives]
        told["time"] = dataclasses.asdict(found.time)
        return found

    def kept_table(recipe: Any, table: Any, *others: Any) -> Any:
        told["memory"] = dataclasses.asdict(table) | {"peak": table.peak}
        return table_of(recipe, table, *others)

    dry_run_ranks.forecast, dry_run_ranks.parameter_and_memory_table = kept_forecast, kept_table
    if cli.main([*words, "--dry_run"]):
        sys.exit("the dry run failed")
    (out / "reckoned.json").write_text(json.dumps(told))


def probe(out: Path, _: list[str]) -> None:
    """How long ranks on this machine take to exchange a little and a lot."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ranks, told = dist.get_world_size(), {}
    for size in (1024, 2**25):
        piece = torch.zeros(size // 4 // ranks)
        whole, taken = torch.empty(len(piece) * ranks), []
        for _ in range(TIMES + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_gather_into_tensor(whole, piece)
            taken.append(time.perf_counter() - started)
        told[str(size)] = statistics.median(taken[1:])
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    {"count": count, "reckon": reckon, "probe": probe}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
