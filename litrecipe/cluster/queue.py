"""What Slurm is asked: whether it takes a script, to take it, and where its jobs are."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from litrecipe.config.errors import InputError
from litrecipe.config.slurm import LAUNCHER

PATIENCE = 60
"""Seconds after which Slurm is taken for one that does not answer."""
ASKED_BY_NAME = 1000
"""Jobs; the kernel takes arguments of 128 KiB."""
OF_A_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("MASTER_ADDR", "MASTER_PORT", LAUNCHER),
)
"""Variables that would tell the tasks of a job that somebody else had started them."""
OTHER_NAMES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX", "ntasks-per-node": "NTASKS_PER_NODE"}
"""Flag of sbatch → its variable, behind SBATCH_, where that is called otherwise."""
KEYS = {
    "partition": ["partition"],
    "account": ["account"],
    "qos": ["qos"],
    "time limit": ["time"],
    r"generic resource|gres\b": ["gpus_per_node", "gpu_type"],
    "node count|node configuration": ["nodes", "gpus_per_node", "cpus_per_task", "mem"],
    "cpu count": ["cpus_per_task", "tasks_per_node"],
    "memory": ["mem"],
    "feature": ["constraint"],
    "reservation": ["reservation"],
    "dependency": ["dependency"],
}
"""Pattern in what Slurm says → the keys of the `slurm` group that it speaks of."""
OF_NODES = re.compile(r"(?i)node configuration is not available|not available \(|nodes are busy|reservation is in use")
"""Slurm's words for what is so now and may be otherwise later."""
BUSY = re.compile(r"(?i)timed out|zero bytes|unable to contact|unexpected message|connection (refused|reset)")
"""Its words after which nothing is sure."""
NO_CLUSTER = re.compile(rf"{BUSY.pattern}|configuration source|config server|no such cluster")
"""Those of one that is installed, and whose cluster is not to be reached."""


class NoAnswer(InputError):
    """Slurm did not say anything in time, or cannot be reached."""


class Unanswered(InputError):
    """Nobody knows whether a script is queued now."""


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
    """What `sbatch --test-only` says of a script that it would take: when and where it would start, or that no node is
    free for it now, which sbatch itself may wait for.

    Raises InputError with its words otherwise, NoAnswer where it cannot be asked.
    """
    done = _call(["sbatch", "--test-only", str(script)], environment_for(script.read_text()))
    words = _words(done.stderr)
    if done.returncode and NO_CLUSTER.search(done.stderr):
        raise NoAnswer(f"sbatch: {words[-1]}: is the cluster up?")
    if done.returncode and not (words and all(map(OF_NODES.search, words))):
        raise InputError(*refusal(done.stderr))
    return " ".join(words)


def submit(script: Path, dependency: str | None, known: Collection[str] = ()) -> str:
    """Queue a script; returns the job's id.

    Raises InputError with sbatch's words where it does not take it, and Unanswered where nobody knows: a busy Slurm may
    have queued a script without saying so. Such a job is looked for in the queue; those with the ids `known` are older.
    """
    after = [] if dependency is None else [f"--dependency={dependency}"]
    try:
        done = _call(["sbatch", "--parsable", *after, str(script)], environment_for(script.read_text()))
    except NoAnswer:
        said, is_sure = [f"sbatch: no answer in {PATIENCE} s"], False
    else:
        if not done.returncode and (number := re.search(r"^(\d+)(;|$)", done.stdout, re.MULTILINE)):
            return number[1]
        said = refusal(done.stderr)
        is_sure = bool(done.returncode) and not BUSY.search(done.stderr)
    if is_sure:
        raise InputError(*said)
    cure = "it may have been queued nevertheless: look with `squeue --me`, and submit again where it was not"
    try:
        found = {job.id.partition("_")[0] for job in queued() if job.script == str(script)} - set(known)
    except InputError as error:
        raise Unanswered(*said, *error.mistakes, f"{script}: {cure}") from None
    if len(found) != 1:
        raise Unanswered(*said, f"{script}: {cure}")
    return found.pop()


def cancel(jobs: Iterable[str]) -> None:
    """Take jobs out of the queue."""
    _call(["scancel", *jobs])


def queued(jobs: Iterable[str] | None = None) -> list[Queued]:
    """Those of some jobs, or of all, that have not ended; arrays task by task.

    Raises InputError with squeue's words where it does not answer.
    """
    asked = None if jobs is None else list(jobs)
    if asked == []:
        return []
    # More than a line holds are looked for among all.
    which_ones = [f"--jobs={','.join(asked)}"] if asked and len(asked) <= ASKED_BY_NAME else []
    done = _call(["squeue", "--noheader", "--array", *which_ones, "--format=%i|%T|%r|%o"])
    if done.returncode and "Invalid job id" in done.stderr:  # it has forgotten them
        return []
    if done.returncode:
        raise InputError(f"squeue: {(_words(done.stderr) or ['failed'])[-1]}: is the cluster up?")
    return [Queued(*line.split("|", 3)) for line in done.stdout.splitlines()]


def refusal(said: str) -> list[str]:
    """A line for each of sbatch's own that says something of its own, with the keys that it speaks of."""
    words = _words(said)
    told = [word for word in words if not word.startswith("allocation failure")] or words
    return [f"sbatch: {word}: {_cure(word)}" for word in told] or ["sbatch: failed"]


def _cure(word: str) -> str:
    keys = [f"slurm.{key}" for pattern, of in KEYS.items() if re.search(pattern, word, re.IGNORECASE) for key in of]
    return f"look at {', '.join(keys)}" if keys else "put that right in the slurm group"


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
        raise NoAnswer(f"{words[0]}: no answer in {PATIENCE} s: is the cluster up?") from None
