"""Runs of two ranks that a real Slurm stops and queues again, on one node and on two, are to the bit those that nobody
stopped. All verbs and ways to stop: benchmarks/preemption.py.

The ranks are forked from a process that has imported everything, and watched as a user's are.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
from cluster import Cluster
from preempting import STOPS
from processes import assert_equal_runs, steps_done

from litrecipe import cli

STEPS = 60
METHODS: dict[str, list[object]] = {
    "finetune": ["finetune", "--data.train", "toy:units?n=30&seed=0", "--adapter.method", "lora", "--adapter.r", 4],
    "dpo": ["align", "dpo", "--data.train", "toy:units-pairs?n=30&seed=0", "--dpo.reference", "copy"],
    "ppo": [
        *("align", "ppo", "--data.train", "toy:units?n=24&seed=0", "--adapter.r", 4, "--train.epochs", 99),
        *("--rewards.sources", '{"regex?pattern=[aeiou]": 1.0}', "--ppo.rollout_batch_size", 12, "--ppo.epochs", 2),
        *("--ppo.minibatches", 2, "--ppo.max_new_tokens", 8),
    ],
    "pretrain": ["pretrain", "--data.max_length", 32, "--data.workers", 1],
}
COMMON = ("--train.micro_batch_tokens", 300, "--log.loggers", "[]", "--fabric.accelerator", "cpu")


class Submitted:
    """Runs of two ranks that are given to a cluster, and how the same run goes without one."""

    def __init__(self, cluster: Cluster, litrecipe: Callable[..., Any], folder: Path, model: Path) -> None:
        self.cluster, self.litrecipe, self.folder, self.model = cluster, litrecipe, folder, model
        self.broken, self.unbroken = folder / "broken", folder / "unbroken"

    def flags(self, verb: str) -> list[object]:
        cache = self.folder / "cache"
        flags: list[object] = [*METHODS[verb], "--model", self.model, "--data.cache_dir", cache, *COMMON]
        flags += ["--train.max_steps", STEPS, "--checkpoint.every", 25]
        if verb == "pretrain":
            draw = random.Random(0)
            texts = self.folder / "texts.jsonl"
            texts.write_text("".join(f'{{"text": "{"the answer is " * draw.randrange(1, 9)}"}}\n' for _ in range(99)))
            flags += ["--data.train", texts]
        return flags

    def submit(self, verb: str, nodes: int) -> str:
        """The number of its job."""
        asked = ["--slurm.nodes", nodes, "--slurm.tasks_per_node", 2 // nodes, "--slurm.time", "10m"]
        asked += ["--slurm.container", f"{sys.executable} {preloaded.__file__} {preloaded.address()}"]
        assert cli.main(["submit", *map(str, [*self.flags(verb), *asked, "--out_dir", self.broken])]) == 0
        return str(json.loads((self.broken / "job.json").read_text())["job"])

    def wait_until_it_learns(self, job: str, steps: int = 5) -> None:
        self.cluster.wait(job, lambda told: told["JobState"] == "RUNNING" and steps_done(self.broken) >= steps)

    def assert_as_unbroken(self, verb: str) -> None:
        self.litrecipe(*self.flags(verb), "--out_dir", self.unbroken, "--fabric.devices", 2)
        assert_equal_runs(self.unbroken, self.broken, STEPS)


@pytest.fixture
def submitted(
    slurm: Cluster,
    litrecipe: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Submitted:
    for name, value in (slurm.environment | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    return Submitted(slurm, litrecipe, tmp_path, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "nodes", "stop"),
    [("finetune", 1, "USR1"), ("dpo", 2, "partition"), ("ppo", 1, "requeue"), ("pretrain", 2, "TERM")],
)
def test_what_the_cluster_stops_goes_on_by_itself_and_ends_as_one_that_was_not_stopped(
    submitted: Submitted, slurm: Cluster, verb: str, nodes: int, stop: str
) -> None:
    job = submitted.submit(verb, nodes)
    submitted.wait_until_it_learns(job)
    STOPS[stop](slurm, job)
    slurm.hasten(job)
    assert slurm.wait(job) == "COMPLETED"
    assert slurm.told(job)["ExitCode"] == "0:0"
    log = (submitted.broken / "job.log").read_text()
    said = re.findall(r"stopped by SIG\S+: step (\d+) of (\d+) is saved", log)
    assert [int(total) for _, total in said] == [STEPS], "one stop, told once for all ranks"
    assert 5 <= int(said[0][0]) < STEPS
    submitted.assert_as_unbroken(verb)


@pytest.mark.slow
def test_a_job_of_two_nodes_ends_when_a_rank_is_killed_and_the_next_one_goes_on_to_the_bit(
    submitted: Submitted, slurm: Cluster
) -> None:
    """Asked before where it is it said so, and went on."""
    job = submitted.submit("finetune", 2)
    submitted.wait_until_it_learns(job, steps=27)
    slurm.call("scancel", "--signal=QUIT", job)
    submitted.wait_until_it_learns(job, steps=steps_done(submitted.broken) + 2)
    first = json.loads((submitted.broken / ".lock").read_text())["pid"]
    os.kill(first, signal.SIGKILL)
    began = time.monotonic()
    assert slurm.wait(job) == "FAILED"
    assert time.monotonic() - began < 60
    log = (submitted.broken / "job.log").read_text()
    assert re.search(r"litrecipe: error: rank 0 \(process \d+ on \S+\) was killed by SIGKILL", log)
    assert len(re.findall(r'^  File "\S+/engine/fit.py", line \d+ in fit$', log, re.MULTILINE)) >= 2
    assert re.search(r"the last that rank 0 said:\n.*  step \d+/60: loss \d", log, re.DOTALL)
    assert steps_done(submitted.broken) < STEPS
    job = submitted.submit("finetune", 2)
    assert slurm.wait(job) == "COMPLETED"
    submitted.assert_as_unbroken("finetune")
