"""The cluster's job that this process may be a part of: whether it was started there as it has to be."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import warnings

from litrecipe.config.errors import InputError

FIRST_OF_SHELLS = 0xFFFFFFF0
"""Numbers from here on are of no srun: the script's step, and that of a shell of salloc's."""

NO_TASKS = ("bash", "interactive")
"""Names of jobs, those of salloc's, whose tasks Lightning takes for none."""


ANSWERS = 30.0
"""Seconds in which Slurm says where a node is."""


def is_a_task() -> bool:
    """Whether srun started this process."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < FIRST_OF_SHELLS


def tasks_per_node() -> int | None:
    """Tasks that srun started on each machine, where it started this one and was told so."""
    told = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return int(told) if is_a_task() and told.isdecimal() else None


def refuse_plain_start() -> None:
    """Python that sbatch or a shell started, and neither srun nor torchrun, would wait for ranks that nobody starts, or
    leave machines of its job alone."""
    if is_a_task() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"):
        told = os.environ.get(name, "")
        if told.isdecimal() and int(told) > 1:
            raise InputError(f"{name}: {told}: litrecipe was started without srun: start it as `srun litrecipe …`")


def join(devices: int, num_nodes: int) -> None:
    """Be one of srun's tasks, where this process is one, also in an allocation of salloc's.

    Another number of tasks than the recipe has processes would wait for those that are not there: raises InputError.
    """
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # on every machine of a cluster
    if not is_a_task() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if os.environ.get("SLURM_JOB_NAME") in NO_TASKS:
        os.environ["SLURM_JOB_NAME"] = "litrecipe"
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and tasks_per_node() is None:
        tasks = os.environ["SLURM_NTASKS"]
        raise InputError(f"SLURM_NTASKS: {tasks}: nobody says how many on each machine: use srun --ntasks-per-node")
    mistakes = [
        f"{key}: {value}: {name} is {told}: make them the same ({flag}={value})"
        for key, value, name, flag in (
            ("fabric.devices", devices, "SLURM_NTASKS_PER_NODE", "srun --ntasks-per-node"),
            ("fabric.num_nodes", num_nodes, "SLURM_NNODES", "srun --nodes"),
        )
        if (told := os.environ.get(name, "")).isdecimal() and int(told) != value
    ]
    tasks, processes = os.environ.get("SLURM_NTASKS", ""), devices * num_nodes
    if not mistakes and tasks.isdecimal() and int(tasks) != processes:
        said = f"SLURM_NTASKS: {tasks}: fabric.devices × fabric.num_nodes is {processes}"
        mistakes.append(f"{said}: make them the same (srun --ntasks-per-node={devices})")
    if mistakes:
        raise InputError(*mistakes)


def meeting_place() -> str:
    """Where the ranks of several processes meet: `MASTER_ADDR`, which tasks of srun's work out where nobody gives it.

    Raises InputError where no machine of that name is known here: ranks would try to reach it for hours.
    """
    place = os.environ.get("MASTER_ADDR")
    if not place and is_a_task() and "TORCHELASTIC_RUN_ID" not in os.environ:
        place = os.environ["MASTER_ADDR"] = _first_node()
    place = place or "127.0.0.1"
    if not _is_known(place):
        raise InputError(
            f"MASTER_ADDR: {place}: no machine of this name is known here: export the address of the first"
        )
    return place


def _first_node() -> str:
    """By its name; where that is known to Slurm alone, by the address at which Slurm reaches it."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    name = SLURMEnvironment.resolve_root_node_address(nodes)
    if _is_known(name):
        return name
    command = ["scontrol", "show", "node", name]
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWERS).stdout
    except (OSError, subprocess.TimeoutExpired):  # the name is told as unknown
        return name
    found = re.search(r"\bNodeAddr=(\S+)", told)
    return found[1] if found else name


def _is_known(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
