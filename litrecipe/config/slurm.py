"""The `slurm` group: what `litrecipe submit` asks of a cluster.

As in `groups.py`: every field is one key, the string under it its documentation, and defaults live here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LONGEST_SIGNAL = 65535
"""Seconds; Slurm knows no longer notice."""

LAUNCHER = "LITRECIPE_LAUNCHER"
"""Environment variable: the words that start litrecipe for a stage of a pipeline, which so gets the tasks of its job.
"""


@dataclass
class Slurm:
    """The job on a cluster. `litrecipe submit` reads it, and nobody else: the same recipe runs without Slurm."""

    cluster: str | None = None
    """A name under `clusters` in the file of defaults (~/.config/litrecipe/slurm.yaml): its keys are taken, too."""
    nodes: int | None = None
    """Machines (default: `fabric.num_nodes`)."""
    gpus_per_node: int | None = None
    """GPUs of a machine, with one task each."""
    gpu_type: str | None = None
    """Which GPUs, as the cluster calls them: `a100`."""
    tasks_per_node: int | None = None
    """Tasks of a machine, where they have no GPUs, or `sbatch_flags` ask for these (default: `fabric.devices`)."""
    cpus_per_task: int | None = None
    """Cores of a task, to which it is bound."""
    mem: str | None = None
    """Memory of a machine: `64G`; `0` is all of it."""
    time: str | None = None
    """Longest time of the job, after which it is requeued and goes on: `4h`, `04:00:00`, `1-12:00:00`."""
    partition: str | None = None
    """Partition, or several: `gpu,long`."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that machines must have: `a100&nvlink`."""
    reservation: str | None = None
    """Name of a reservation."""
    dependency: str | None = None
    """What the job waits for: `afterok:1234`."""
    name: str | None = None
    """What the queue calls the job (default: the verb and the run directory's name)."""
    signal: int = 120
    """Seconds before the time is up at which the run is told to save and to stop: as many as a checkpoint takes, and
    a step."""
    requeue: bool = True
    """Queue the job again, to go on where it was, when it was stopped: by its time, by others, by a failed node."""
    array_limit: int | None = None
    """How many points of a sweep run at once (default: as many as the cluster lets)."""
    offline: bool = True
    """Fetch nothing from the hub on the nodes, which often cannot: what is missing of models and data is fetched when
    the job is submitted, but not the data of lm-eval tasks. W&B writes to disk."""
    modules: list[str] = field(default_factory=list)
    """Environment modules that are loaded first: `[cuda/12.4, gcc]`."""
    container: str | None = None
    """A command that is put before `litrecipe` on the nodes: `apptainer exec --nv lit.sif`. The container has its own
    litrecipe. Where srun itself starts containers (Pyxis: `srun_flags: [--container-image=…]`, or
    `--environment=…`) their litrecipe is taken, too."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables: `{NCCL_SOCKET_IFNAME: ib0}`. Values are quoted, so they hold no other variables."""
    pre: list[str] = field(default_factory=list)
    """Lines of the script before the run, on the first node: `[source ~/keys.sh]`."""
    post: list[str] = field(default_factory=list)
    """Lines of the script after the run, however that ended; `$code` is its exit code."""
    sbatch_flags: list[str] = field(default_factory=list)
    """What else sbatch is told: `[--exclusive, --mail-type=END]`."""
    srun_flags: list[str] = field(default_factory=list)
    """What else srun is told."""

    @property
    def is_contained(self) -> bool:
        """Whether the tasks run in containers, with a litrecipe of their own."""
        return self.container is not None or any(map(OF_CONTAINERS.match, self.srun_flags))


OF_CONTAINERS = re.compile(r"--(container-|environment)")
"""Begins flags by which plugins of srun start containers: NVIDIA's Pyxis, the Container Engine of CSCS."""
OWN_FLAGS = {
    "--nodes": "nodes",
    "-N": "nodes",
    "--gpus-per-node": "gpus_per_node",
    "--ntasks-per-node": "tasks_per_node",
    "--ntasks": "tasks_per_node",
    "-n": "tasks_per_node",
    "--cpus-per-task": "cpus_per_task",
    "-c": "cpus_per_task",
    "--mem": "mem",
    "--time": "time",
    "-t": "time",
    "--partition": "partition",
    "-p": "partition",
    "--account": "account",
    "-A": "account",
    "--qos": "qos",
    "-q": "qos",
    "--constraint": "constraint",
    "-C": "constraint",
    "--reservation": "reservation",
    "--dependency": "dependency",
    "-d": "dependency",
    "--job-name": "name",
    "-J": "name",
    "--signal": "signal",
    "--requeue": "requeue",
    "--no-requeue": "requeue",
}
"""Flag → the key that says it."""
GIVEN_FLAGS = (
    "--array",
    "-a",
    "--output",
    "-o",
    "--error",
    "-e",
    "--open-mode",
    "--chdir",
    "-D",
    "--wrap",
    "--parsable",
)
"""Flags that `litrecipe submit` decides."""
ON_ONE_LINE = ("gpu_type", "partition", "account", "qos", "constraint", "reservation", "dependency", "name")
"""Keys that become a line `#SBATCH …`."""

SLURM_RANGES: dict[str, tuple[Any, str]] = {
    **{
        f"slurm.{key}": (lambda value: value >= 1, "1 or more")
        for key in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "array_limit")
    },
    "slurm.signal": (lambda value: 1 <= value <= LONGEST_SIGNAL, f"seconds from 1 to {LONGEST_SIGNAL}"),
    "slurm.mem": (lambda text: re.fullmatch(r"\d+[KMGT]?", text), "a number with K, M, G or T, such as 64G"),
}


def check_slurm(slurm: Slurm, seconds: float | None) -> Iterator[tuple[str, Any, str]]:
    """What types and ranges cannot say: key, value, cure. `seconds` is what `time` comes to, None without one."""
    for key in ON_ONE_LINE:
        value = getattr(slurm, key)
        if value is not None and (not value.strip() or not value.isprintable() or "$" in value):
            cure = "sbatch knows no variables" if "$" in value else "it is one line of sbatch's"
            yield f"slurm.{key}", value, f"{cure}: write out what is meant"
    if slurm.gpu_type is not None and slurm.gpus_per_node is None:
        yield "slurm.gpu_type", slurm.gpu_type, "give slurm.gpus_per_node, or remove it"
    if None not in (slurm.gpus_per_node, slurm.tasks_per_node) and slurm.gpus_per_node != slurm.tasks_per_node:
        cure = f"slurm.gpus_per_node is {slurm.gpus_per_node}, and each GPU has one task: remove this"
        yield "slurm.tasks_per_node", slurm.tasks_per_node, cure
    if seconds is not None and slurm.signal >= seconds:
        yield "slurm.signal", slurm.signal, f"slurm.time is {slurm.time}: give fewer seconds, or more time"
    for name in slurm.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield "slurm.env", name, "is no name for a variable: use letters, digits and _"
    for key in ("sbatch_flags", "srun_flags"):
        for flag in getattr(slurm, key):
            yield from _check_flag(f"slurm.{key}", flag)
    for key in ("modules", "pre", "post"):
        for line in getattr(slurm, key):
            if not line.strip():
                yield f"slurm.{key}", "''", "remove it"


def fetch_as_jobs(slurm: Slurm) -> None:
    """Let this process use the caches of the hub and of litrecipe that `env` names for the job. To be called before
    anything reads these variables."""
    for name, value in slurm.env.items():
        if name == "LITRECIPE_CACHE" or (name.startswith("HF_") and name != "HF_HUB_OFFLINE"):
            os.environ[name] = value


def _check_flag(key: str, flag: str) -> Iterator[tuple[str, Any, str]]:
    name = re.match(r"--[a-z][a-z-]*|-[A-Za-z]", flag)
    if name is None or not flag.isprintable():
        yield key, flag, "give flags with their values, such as --exclusive or --mail-type=END"
    elif key.endswith("sbatch_flags") and "$" in flag:
        yield key, flag, "sbatch knows no variables: write out what is meant"
    elif (own := OWN_FLAGS.get(name[0])) is not None:
        yield key, flag, f"slurm.{own} says it: use that"
    elif name[0] in GIVEN_FLAGS:
        yield key, flag, "litrecipe says it itself: remove it"
