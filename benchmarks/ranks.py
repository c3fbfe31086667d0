"""Real ranks whose collectives are counted, and what a dry run reckons of them; for benchmarks/scaling.py.

    python benchmarks/ranks.py FOLDER

FOLDER has `cases.json`: name → verb and flags, of which a dry run's numbers go to `reckoned.json`, and `runs.json`: a
list of name, number of ranks, words, each of which is run twice: once to count, each rank writing
`NAME/counted-R.json`, and once undisturbed, for `NAME/measured-R.json`; a line on standard output names each that is
done. Ranks are forks of this process, which has imported everything and computed nothing. Counting looks at what torch
is asked for, below FSDP2, DDP and litrecipe: every collective passes the dispatcher, and the profiler sees each
tensor's memory come and go. Time is taken by the clock, and by the processor's, which other work does not lengthen.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litrecipe.config.progress import WATCHED

PRELOADED = ("litrecipe.recipes.pretrain", "lightning_fabric", "lightning_fabric.strategies", "torch.distributed.fsdp")
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


def trained(words: list[str], step: Callable[[Callable[[], Any], int], Any]) -> None:
    """Run litrecipe, whose steps are taken by `step`: it is given the step and its number, from 1."""
    from litrecipe import cli
    from litrecipe.engine import fit

    own, numbers = fit.Run.train_step, itertools.count(1)

    def train_step(run: Any, samples: Any) -> Any:
        run.fabric.barrier()
        return step(lambda: own(run, samples), next(numbers))

    fit.Run.train_step = train_step  # type: ignore[method-assign]
    if cli.main(words):
        sys.exit("the run failed")


def write(out: Path, what: str, told: dict[str, Any]) -> None:
    """What this rank has to tell."""
    (out / f"{what}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


def count(out: Path, words: list[str]) -> None:
    """Train, and write which collectives a step asked for, and the most bytes of tensors that the next one held."""
    from torch.profiler import ProfilerActivity, profile, record_function

    traffic = Traffic()

    def step(take: Callable[[], Any], number: int) -> Any:
        if number == COUNTED:
            with traffic:
                return take()
        with record_function(f"step {number}"):
            return take()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trained(words, step)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    last = next(event for event in events if event.name() == f"step {COUNTED + 1}")
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if last.start_ns() <= event.start_ns() <= last.end_ns():
                peak = max(peak, held)
    counted = [[kind, size, times] for (kind, size), times in sorted(traffic.counted.items())]
    write(out, "counted", {"collectives": counted, "peak": peak})


def measure(out: Path, words: list[str]) -> None:
    """Train, and write how long steps took, and the most memory that was resident meanwhile."""
    timed, peaks = list[tuple[float, float]](), list[int]()

    def step(take: Callable[[], Any], number: int) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the highest is that of this step from here on
        clock, processor = time.perf_counter(), time.process_time()
        result = take()
        if number > 1:
            timed.append((time.perf_counter() - clock, time.process_time() - processor))
            peaks.append(resident("VmHWM"))
        return result

    trained(words, step)
    write(out, "measured", {"seconds": timed, "peak": max(peaks)})


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
    write(out, "measured", told)
    dist.destroy_process_group()


def forked(folder: Path, act: Any, words: list[str], meet: dict[str, str]) -> int:
    """A process that does it; its number."""
    number = os.fork()
    if number:
        return number
    os.environ.update(meet)
    log = os.open(folder / f"log-{meet.get('RANK', '0')}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        act(folder, words)
        code = 0
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def together(folder: Path, act: Any, words: list[str], ranks: int) -> None:
    """Processes that meet as torchrun's do. Ends this one where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    meet |= {"TORCHELASTIC_RUN_ID": "scaling", "GROUP_RANK": "0", WATCHED: "seen"}
    folder.mkdir(exist_ok=True)
    own = [meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    left = {forked(folder, act, words, one) for one in own}
    while left:
        number, status = os.wait()
        if status:
            for other in left - {number}:
                os.kill(other, signal.SIGKILL)
            said = "".join(log.read_text()[-2000:] for log in sorted(folder.glob("log-*")))
            sys.exit(f"ranks: {folder.name}: a process ended with {status}:\n{said}")
        left.discard(number)


def main() -> None:
    folder = Path(sys.argv[1])
    for module in PRELOADED:
        importlib.import_module(module)
    together(folder, reckon, [], 1)
    print("reckoned", flush=True)
    for name, ranks, words in json.loads((folder / "runs.json").read_text()):
        for act in (count, measure) if words else (probe,):
            if words:
                shutil.rmtree(words[words.index("--out_dir") + 1], ignore_errors=True)
            together(folder / name, act, words, ranks)
        print(name, flush=True)


if __name__ == "__main__":
    main()
