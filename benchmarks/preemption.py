"""Stop runs of a Slurm cluster in all the ways that it knows, let it queue them again, and compare with unbroken runs.

    python benchmarks/preemption.py [--only finetune ppo …] [--events USR1 …] [--shapes 1x2 2x1] [--forked]

A Slurm of two nodes is started on 127.0.0.1. Of each verb a run of two ranks is submitted by `litrecipe submit`, on one
node or on two. When it has trained some steps it is stopped: by a signal to its tasks, by `scontrol requeue`, by a job
of a partition that comes first, or by its own time limit. It must save, end with 85, be queued again, and go on to its
end by itself. Final weights, the last checkpoint with optimizer and state, metrics (timing aside), the flight record,
and what was sampled must then equal those of a run that nobody stopped, byte for byte.

`--forked` starts ranks from a process that has imported everything, which saves seconds each time. What was measured
before stays in the result, cell by cell, with its commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import LITRECIPE, MACHINE, REPO, RESULTS, environment, print_table, write_result
from kills import DATA, FULL, LORA, ROLLOUT, align, differences, shrunken_model, steps_done

sys.path.append(str(REPO / "tests"))
from cluster import Cluster, running, why_not
from preempting import STOPS

BEFORE = 5
"""Steps that a run has taken at least when it is stopped."""
STEPS = {"finetune": 60, "dpo": 60, "ppo": 32, "pretrain": 60}
METHODS = {
    "finetune": ["finetune", *LORA, "--adapter.dropout", "0.1"],
    "dpo": ["align", "dpo", *FULL, "--dpo.reference", "copy"],
    "ppo": align("ppo --adapter.r 8 --ppo.kl_target 0.5 --rewards.scale running", **ROLLOUT),
    "pretrain": ["pretrain", "--optim.lr", "1e-3"],
}
OWN: dict[str, dict[str, Any]] = {
    "finetune": DATA["finetune"],
    "dpo": DATA["align"],
    "ppo": DATA["online"],
    "pretrain": {"data.max_length": 64, "train.global_batch_size": 8, "data.workers": 1},
}
SHAPES = {"1x2": (1, 2), "2x1": (2, 1)}
"""Nodes and tasks of each."""
LIMIT = {"slurm.time": "3m", "slurm.signal": 100}
"""A time limit of which the signal comes 20 to 80 seconds after the start: Slurm may send it a minute early."""
LONGER = 48
"""Times as many steps has a run that is to reach that limit."""
EVENTS: dict[str, Callable[[Cluster, str], None] | None] = {**STOPS, "time": None}
"""What stops a run; None: it is stopped by its own time limit."""


class Place:
    """Where the runs of one benchmark lie, and how they are started."""

    def __init__(self, folder: Path, cluster: Cluster, forked: bool) -> None:
        self.folder, self.cluster, self.forked = folder, cluster, forked
        self.model = shrunken_model(folder)
        texts = (
            {"text": " ".join(f"{word}{n * k % 97}" for k, word in enumerate(["so", "it", "goes", "on"] * (n % 9 + 1)))}
            for n in range(400)
        )
        (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))

    def flags(self, verb: str, steps: int, out: Path, more: Mapping[str, Any]) -> list[str]:
        given = self.model | OWN[verb] | {"train.max_steps": steps, "checkpoint.every": 20, "out_dir": out}
        if verb == "pretrain":
            given["data.train"] = self.folder / "texts.jsonl"
        return [*METHODS[verb], *(f"--{key}={value}" for key, value in (given | more).items())]

    def unbroken(self, verb: str, steps: int) -> Path:
        """A run of two ranks that nobody stopped; made once."""
        kept, out = self.folder / f"{verb}-{steps}-unbroken", self.folder / verb
        if not kept.exists():
            shutil.rmtree(out, ignore_errors=True)
            words = self.flags(verb, steps, out, {"fabric.devices": 2, "checkpoint.resume": "auto"})
            if self.forked:
                from preloaded import run

                done = run(words, 600, REPO, ranks=2)[0]
                code, said = done.returncode, done.stderr
            else:
                one = subprocess.run(
                    [*LITRECIPE, *words], cwd=REPO, env=environment(threads=1), capture_output=True, text=True
                )
                code, said = one.returncode, one.stderr
            if code:
                sys.exit(f"preemption: the unbroken run failed:\n{said[-3000:]}")
            out.rename(kept)  # all are made at one place: names of sources and samples tell it
        return kept

    def stopped(self, verb: str, shape: str, event: str) -> dict[str, Any]:
        """How a run was stopped, went on and ended, and what differs from one that was not stopped."""
        act = EVENTS[event]
        steps = STEPS[verb] * (LONGER if act is None else 1)
        unbroken, out = self.unbroken(verb, steps), self.folder / verb
        shutil.rmtree(out, ignore_errors=True)
        nodes, tasks = SHAPES[shape]
        asked: dict[str, Any] = {"slurm.nodes": nodes, "slurm.tasks_per_node": tasks, "slurm.time": "10m"}
        if self.forked:
            from preloaded import address

            asked["slurm.container"] = f"{sys.executable} {REPO}/tests/preloaded.py {address()}"
        words = self.flags(verb, steps, out, asked | (LIMIT if act is None else {}))
        env = self.cluster.environment | environment(
            threads=1, extra={"SLURM_CONF": self.cluster.environment["SLURM_CONF"]}
        )
        done = subprocess.run([*LITRECIPE, "submit", *words], cwd=REPO, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"preemption: not submitted:\n{done.stderr[-3000:]}")
        job = json.loads((out / "job.json").read_text())["job"]
        if act is not None:
            self.wait(job, lambda told: told["JobState"] == "RUNNING" and steps_done(out) >= BEFORE)
            act(self.cluster, job)
        self.wait(job, lambda told: int(told["Restarts"]) > 0 and told["JobState"] in ("PENDING", "RUNNING"))
        at = steps_done(out)
        saved = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-????????"))
        state = self.cluster.wait(job, seconds=900)
        told = self.cluster.told(job)
        log = (out / "job.log").read_text()
        return {
            "stopped_after_step": at,
            "saved_step": saved,
            "said_by_ranks": log.count("stopped by SIG"),
            "restarts": int(told["Restarts"]),
            "state": state,
            "exit_code": told["ExitCode"],
            "different": differences(unbroken, out) if (out / "final").exists() else ["no result"],
        }

    def wait(self, job: str, until: Callable[[dict[str, str]], bool]) -> None:
        self.cluster.wait(job, until, seconds=600)


def is_right(cell: Mapping[str, Any]) -> bool:
    """Whether a run saved where it stood, went on by itself, and is as one that was not stopped."""
    same_step = cell["stopped_after_step"] == cell["saved_step"]
    ended = cell["state"] == "COMPLETED" and cell["exit_code"] == "0:0" and cell["restarts"] >= 1
    return bool(same_step and ended and not cell["different"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=list(EVENTS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--forked", action="store_true", help="start ranks from a process that has imported everything")
    parser.add_argument("--work", type=Path, help="a folder for the runs (default: one that is removed)")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"preemption: {reason}")
    kept = RESULTS / "preemption.json"
    cells = json.loads(kept.read_text())["cells"] if kept.exists() else {}
    os.environ.update(environment(threads=1))
    with tempfile.TemporaryDirectory() as folder, running() as cluster:
        place = Place(args.work or Path(folder), cluster, args.forked)
        for verb in args.only:
            for shape in args.shapes:
                for event in args.events:
                    began = time.monotonic()
                    cell = place.stopped(verb, shape, event)
                    cell |= {"right": is_right(cell), "seconds": round(time.monotonic() - began, 1)}
                    cell["commit"] = MACHINE["commit"]
                    cell["started"] = "forked from a process that had imported everything" if args.forked else "as jobs"
                    name = f"{verb} {shape} {event}"
                    cells[name] = cell
                    print(name, json.dumps(cell), flush=True)
                    order = [f"{v} {s} {e}" for v in METHODS for s in SHAPES for e in EVENTS]
                    write_result(
                        "preemption", {"steps": STEPS, "cells": {one: cells[one] for one in order if one in cells}}
                    )
    rows = [
        [name, c["stopped_after_step"], c["restarts"], c["right"], c["different"] or "nothing"]
        for name, c in cells.items()
    ]
    print_table(["run", "stopped after step", "restarts", "right", "different from the unbroken run"], rows)
    if not all(cell["right"] for cell in cells.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
