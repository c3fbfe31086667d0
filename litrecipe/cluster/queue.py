"""What Slurm is asked: whether it takes a script, to take it, and where its jobs are."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from litrecipe.config.errors import InputError
from litrecipe.config.slurm import LAUNCHER

PATIENCE = 60
"""Seconds after which Slurm is taken for one that does not answer."""
OF_A_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("MASTER_ADDR", "MASTER_PORT", LAUNCHER),
)
"""Variables that would tell the tasks of a job that somebody else had started them."""
OTHER_NAMES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX", "ntasks-per-node": "NTASKS_PER_NODE"}
"""Flag of sbatch → its variable, behind SBATCH_, where that is called otherwise."""


@dataclass(frozen=True)
class Queued:
    """A job that has not ended."""

    id: str
    """`123`, or `123_4` for a task of an array."""
    state: str
    """`PENDING`, `RUNNING`, ..."""
    reason: str
    """Why it waits: `Priority`, `Dependency`, ..."""
    script: str
    """The file that it was made from."""


def there_is_slurm() -> bool:
    """Whether sbatch is installed here."""
    return which("sbatch") is not None


def test(script: Path) -> str:
    """What `sbatch --test-only` says of a script that it would take: when and where it would start.

    Raises InputError with its words otherwise.
    """
    done = _call(["sbatch", "--test-only", str(script)], environment_for(script.read_text()))
    if done.returncode:
        raise InputError(*refusal(done.stderr))
    return " ".join(_words(done.stderr))


def submit(script: Path, dependency: str | None) -> str:
    """Queue a script; returns the job's id. Raises InputError with sbatch's words where it does not take it."""
    after = [] if dependency is None else [f"--dependency={dependency}"]
    done = _call(["sbatch", "--parsable", *after, str(script)], environment_for(script.read_text()))
    if done.returncode:
        raise InputError(*refusal(done.stderr))
    return done.stdout.strip().partition(";")[0]


def cancel(jobs: Iterable[str]) -> None:
    """Take jobs out of the queue."""
    _call(["scancel", *jobs])


def queued(jobs: Iterable[str] | None = None) -> list[Queued]:
    """Those of some jobs, or of all, that have not ended; arrays task by task.

    Raises InputError with squeue's words where it does not answer.
    """
    which_ones = [] if jobs is None else [f"--jobs={','.join(jobs)}"]
    if which_ones == ["--jobs="]:
        return []
    done = _call(["squeue", "--noheader", "--array", *which_ones, "--format=%i|%T|%r|%o"])
    if done.returncode and "Invalid job id" in done.stderr:  # it has forgotten them
        return []
    if done.returncode:
        raise InputError(*(f"squeue: {word}: is the cluster up?" for word in _words(done.stderr)))
    return [Queued(*line.split("|", 3)) for line in done.stdout.splitlines()]


def refusal(said: str) -> list[str]:
    """A line for each of sbatch's own."""
    return [f"sbatch: {word}: put that right in the slurm group" for word in _words(said)] or ["sbatch: failed"]


def _words(said: str) -> list[str]:
    """What a program of Slurm's says, without its name."""
    return [re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in said.splitlines() if line.strip()]


def environment_for(script: str) -> dict[str, str]:
    """The environment in which sbatch reads a script: nothing of it beats the script's lines, and neither an allocation
    that this process runs in nor whoever launched it shows in the job."""
    inside = "SLURM_JOB_ID" in os.environ
    flags = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    beaten = {f"SBATCH_{OTHER_NAMES.get(flag, flag.upper().replace('-', '_'))}" for flag in flags}
    beaten |= {"SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", *OF_A_LAUNCHER}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in beaten and not (inside and name.startswith("SLURM_") and name != "SLURM_CONF")
    }


def _call(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
    except FileNotFoundError:
        cure = "no Slurm here: submit on a machine of the cluster; --dry_run works without"
        raise InputError(f"{words[0]}: not found: {cure}") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{words[0]}: no answer in {PATIENCE} s: is the cluster up?") from None
