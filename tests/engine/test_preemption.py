"""Runs of two ranks that a real Slurm stops and queues again, on one node and on two, are to the bit those that nobody
stopped. All verbs and ways to stop: benchmarks/preemption.py.

The ranks are forked from a process that has imported everything, and watched as a user's are.
"""

from __future__ import annotations

import json
import random
import re
import sys
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "nodes", "stop"),
    [("finetune", 1, "USR1"), ("dpo", 2, "partition"), ("ppo", 1, "requeue"), ("pretrain", 2, "TERM")],
)
def test_what_the_cluster_stops_goes_on_by_itself_and_ends_as_one_that_was_not_stopped(
    slurm: Cluster,
    litrecipe: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    nodes: int,
    stop: str,
) -> None:
    for name, value in (slurm.environment | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    flags: list[object] = [*METHODS[verb], "--model", tiny_model, "--data.cache_dir", tmp_path / "cache", *COMMON]
    flags += ["--train.max_steps", STEPS, "--checkpoint.every", 25]
    if verb == "pretrain":
        draw = random.Random(0)
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(f'{{"text": "{"the answer is " * draw.randrange(1, 9)}"}}\n' for _ in range(99)))
        flags += ["--data.train", texts]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    asked = ["--slurm.nodes", nodes, "--slurm.tasks_per_node", 2 // nodes, "--slurm.time", "10m"]
    asked += ["--slurm.container", f"{sys.executable} {preloaded.__file__} {preloaded.address()}"]
    assert cli.main(["submit", *map(str, [*flags, *asked, "--out_dir", broken])]) == 0
    job = json.loads((broken / "job.json").read_text())["job"]
    slurm.wait(job, lambda told: told["JobState"] == "RUNNING" and steps_done(broken) >= 5)
    STOPS[stop](slurm, job)
    slurm.hasten(job)
    assert slurm.wait(job) == "COMPLETED"
    assert slurm.told(job)["ExitCode"] == "0:0"
    said = re.findall(r"stopped by SIG\S+: step (\d+) of (\d+) is saved", (broken / "job.log").read_text())
    assert [int(total) for _, total in said] == [STEPS], "one stop, told once for all ranks"
    assert 5 <= int(said[0][0]) < STEPS
    litrecipe(*flags, "--out_dir", unbroken, "--fabric.devices", 2)
    assert_equal_runs(unbroken, broken, STEPS)
