"""One rank of a run whose collectives are counted, or what a dry run reckons of them; for benchmarks/scaling.py.

    python benchmarks/ranks.py count OUT verb flags…
    python benchmarks/ranks.py reckon OUT
    python benchmarks/ranks.py probe OUT

What is reckoned is asked for in `cases.json` of OUT, name → verb and flags. Counting looks at what torch is asked for,
below FSDP2, DDP and litrecipe: every collective passes the dispatcher. Of a run's steps the second is counted and the
later ones are timed, as counting slows a step down; by the clock, and by the processor's time, which other work on the
machine does not lengthen.
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
COUNTED = 2
"""The step that is counted."""
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

    traffic, timed, done = Traffic(), list[tuple[float, float]](), 0
    step = fit.Run.train_step

    def train_step(run: Any, samples: Any) -> Any:
        nonlocal done
        done += 1
        if done == COUNTED:
            with traffic:
                return step(run, samples)
        run.fabric.barrier()
        clock, processor = time.perf_counter(), time.process_time()
        result = step(run, samples)
        if done > COUNTED:
            timed.append((time.perf_counter() - clock, time.process_time() - processor))
        return result

    fit.Run.train_step = train_step  # type: ignore[method-assign]
    if cli.main(words):
        sys.exit("the run failed")
    told = {
        "counted": [[kind, size, times] for (kind, size), times in sorted(traffic.counted.items())],
        "seconds": timed,
        "peak": resident("VmHWM"),
    }
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


def reckon(out: Path, _: list[str]) -> None:
    """Write what a dry run knows of some cases."""
    from litrecipe import cli
    from litrecipe.recipes import dry_run_ranks

    told: dict[str, dict[str, Any]] = {}
    forecast, table_of = dry_run_ranks.forecast, dry_run_ranks.parameter_and_memory_table
    peak = products()

    def kept_forecast(*args: Any, **keys: Any) -> Any:
        here = dataclasses.replace(keys.pop("hardware"), half=peak, full=peak)
        found = forecast(*args, hardware=here, **keys)
        told[name]["collectives"] = [[one.kind, one.bytes, one.times] for one in found.collectives]
        told[name]["time"] = dataclasses.asdict(found.time)
        return found

    def kept_table(recipe: Any, table: Any, *others: Any) -> Any:
        told[name]["memory"] = dataclasses.asdict(table) | {"peak": table.peak}
        return table_of(recipe, table, *others)

    dry_run_ranks.forecast, dry_run_ranks.parameter_and_memory_table = kept_forecast, kept_table
    for name, words in json.loads((out / "cases.json").read_text()).items():
        told[name] = {"peak": peak}
        if cli.main([*words, "--dry_run"]):
            sys.exit(f"the dry run of {name} failed")
    (out / "reckoned.json").write_text(json.dumps(told))


def products() -> float:
    """Operations of fp32 products in a second of the processor's time, with one thread."""
    left = torch.linspace(0, 1, 2**20).reshape(2**10, 2**10)
    taken = []
    for _ in range(TIMES + 1):
        started = time.process_time()
        for _ in range(8):
            left @ left
        taken.append(time.process_time() - started)
    return 8 * 2 * 2**30 / statistics.median(taken[1:])


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
