"""The ways in which a Slurm stops a job that is queued again. conftest.py puts this folder on the path."""

from __future__ import annotations

from collections.abc import Callable

from cluster import Cluster


def signalled(name: str) -> Callable[[Cluster, str], None]:
    """A signal to all tasks, as comes before the end of a time limit."""

    def act(cluster: Cluster, job: str) -> None:
        cluster.call("scancel", f"--signal={name}", job)

    return act


def requeued(cluster: Cluster, job: str) -> None:
    """By its owner."""
    cluster.call("scontrol", "requeue", job)


def pushed_out(cluster: Cluster, job: str) -> None:
    """By a job of the partition that comes first, which wants its nodes for a moment."""
    told = cluster.told(job)
    wants = [f"--nodelist={told['NodeList']}", f"--nodes={told['NumNodes'].partition('-')[0]}", "--exclusive"]
    cluster.call("sbatch", "--partition=urgent", "--output=/dev/null", *wants, "--wrap=true")


STOPS: dict[str, Callable[[Cluster, str], None]] = {
    "USR1": signalled("USR1"),
    "TERM": signalled("TERM"),
    "requeue": requeued,
    "partition": pushed_out,
}
