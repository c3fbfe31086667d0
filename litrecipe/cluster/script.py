"""The script that sbatch is given, made so that it is right on any cluster.

No line `#SBATCH` holds a variable, which sbatch would not expand; all names are quoted. The tasks of a job are those of
one `srun`, to which the signal before the end of the time goes as well; the script itself outlives what stops them, and
queues the job again where they have saved.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from litrecipe.config.checks import parse_duration
from litrecipe.config.slurm import LAUNCHER, Slurm
from litrecipe.config.stop import PREEMPTED

SCRIPT, RECIPE, NOTE, LOG = "job.sh", "job.yaml", "job.json", "job.log"
"""Files of a run directory: the script, the recipe as it is run, what is noted of the job, and what it wrote."""
KEPT = ("checkpoints/step-*[0-9]", "candidates.jsonl")
"""What a run goes on from, in its directory: whole checkpoints, and what was sampled to be learnt."""
PAUSE, PATIENCE = 5, 60
"""Seconds between two tries to ask a Slurm that does not answer, and of all of them."""
FIRST_PORT, PORTS = 10000, 20000
"""Below those that Linux gives to whoever asks for any."""
NOTHING_NEW = "stopped before anything new was saved: not queued again: give it more slurm.time"
"""What is said where the next start would come no further."""
LAST_TASK = 60
"""Seconds that tasks have left when the first of them is gone: they end together, or who would have told the others
was killed with it."""


@dataclass(frozen=True)
class Job:
    """What a script is made of."""

    name: str
    """What the queue calls it, unless `slurm.name` does."""
    folder: Path
    """Absolute; of the script and of what the job writes."""
    slurm: Slurm
    """With `nodes` and `tasks_per_node` worked out."""
    command: Sequence[str]
    """Words of the program, without its name."""
    runs: Sequence[Path] = ()
    """Absolute run directories of an array, one a task: `$run` in the command, and where that writes."""
    indices: Sequence[int] = ()
    """Which of these are to run."""
    launches_stages: bool = False
    """The command is one process, and starts the tasks."""
    resume_from: Path | None = None
    """A checkpoint of another run, absolute, where the first start begins."""
    kept: Sequence[str] = KEPT
    """Patterns of what the verb goes on from, beside what it writes; none where it always begins anew."""

    @property
    def script(self) -> Path:
        """The script's file."""
        return self.folder / SCRIPT

    @property
    def log(self) -> Path:
        """What the job writes."""
        return self.folder / LOG


def text_of(job: Job, here: Path) -> str:
    """The script of a job whose relative paths are meant from the folder `here`."""
    parts = [
        ["#!/bin/bash", "# Written by `litrecipe submit`, anew each time that it is called.", *_asked(job, here)],
        _array(job),
        _environment(job.slurm),
        _meeting(job.slurm),
        _own(job.slurm),
        _start(job),
        job.slurm.post,
        _end(job),
    ]
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part) + "\n"


def _asked(job: Job, here: Path) -> Iterator[str]:
    """The lines for sbatch."""
    slurm = job.slurm
    gpus = slurm.gpus_per_node and f"{slurm.gpu_type}:{slurm.gpus_per_node}" if slurm.gpu_type else slurm.gpus_per_node
    limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
    flags: dict[str, object] = {
        "job-name": slurm.name or job.name,
        "chdir": here,
        "output": str(job.log).replace("%", "%%"),
        "open-mode": "append",
        "array": ",".join(map(str, job.indices)) + limit if job.runs else None,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.tasks_per_node,
        "gpus-per-node": gpus,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "time": None if slurm.time is None else clock(parse_duration(slurm.time)),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "signal": f"USR1@{slurm.signal}",
    }
    for name, value in flags.items():
        if value is not None:
            yield f"#SBATCH --{name}={quoted(str(value))}"
    yield "#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue"
    yield "#SBATCH --kill-on-invalid-dep=yes"
    for flag in slurm.sbatch_flags:
        yield f"#SBATCH {flag}"


def _environment(slurm: Slurm) -> Iterator[str]:
    if slurm.modules:  # a function, which other shells than those of a login may lack
        yield "type module &> /dev/null || source /etc/profile"
    for module in slurm.modules:
        yield f"module load {shlex.quote(module)} || exit 1"
    activate = Path(sys.prefix) / "bin" / "activate"
    if not slurm.is_contained and sys.prefix != sys.base_prefix and activate.is_file():
        yield f"source {shlex.quote(str(activate))}"
    yield "export PYTHONUNBUFFERED=1"
    if slurm.cpus_per_task is not None:
        yield f"export OMP_NUM_THREADS={slurm.cpus_per_task}"
    if slurm.offline:
        yield "export HF_HUB_OFFLINE=1 WANDB_MODE=offline"


def _meeting(slurm: Slurm) -> Iterator[str]:
    if (slurm.nodes or 1) * (slurm.tasks_per_node or 1) > 1:
        yield "# The tasks meet at the first node, which is this one, on a port of this job's own where nobody listens."
        yield 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        yield "MASTER_ADDR=$(scontrol show node \"$first\" | sed -nE 's/.*NodeAddr=([^ ]+).*/\\1/p')"
        yield f'export MASTER_ADDR="${{MASTER_ADDR:-$first}}" MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))'
        yield 'while (: < "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done'


def _own(slurm: Slurm) -> Iterator[str]:
    """What the recipe wants done before; last, so that it has the last word."""
    for name, value in slurm.env.items():
        yield f"export {name}={shlex.quote(value)}"
    yield from slurm.pre


def _array(job: Job) -> Iterator[str]:
    """Each task of an array finds its run, and writes there from then on."""
    if not job.runs:
        return
    yield "runs=("
    yield from (f"    {shlex.quote(str(run))}" for run in job.runs)
    yield ")"
    yield "run=${runs[$SLURM_ARRAY_TASK_ID]}"
    yield f'exec >> "$run/{LOG}" 2>&1'


def _start(job: Job) -> Iterator[str]:
    slurm = job.slurm
    if job.resume_from is not None:
        saved = shlex.quote(str(job.folder / "checkpoints"))
        yield "resume=auto"
        yield f"[ -n \"$(find {saved} -maxdepth 1 -regex '.*/step-[0-9]*' 2> /dev/null)\" ] \\"
        yield f"    || resume={shlex.quote(str(job.resume_from))}"
    srun = ["srun", f"--ntasks-per-node={slurm.tasks_per_node}", "--kill-on-bad-exit=0", f"--wait={LAST_TASK}"]
    srun.append("--export=ALL")  # of this script, also where the cluster lets jobs have nothing of who submits
    if slurm.cpus_per_task is not None:  # srun does not take it over from sbatch
        srun += [f"--cpus-per-task={slurm.cpus_per_task}", "--cpu-bind=cores"]
    start = shlex.join([*srun, *slurm.srun_flags])
    command = " ".join(map(_word, job.command))
    if slurm.requeue:
        yield f"kept() {{ {_kept(job)}; }}"
        yield 'kept="$(kept)"'
    yield "trap : TERM USR1 # these are for the tasks; what they answer is looked at below"
    if job.launches_stages:
        yield f"export {LAUNCHER}={shlex.quote(f'{start} {shlex.join(program_of(slurm))}')}"
        yield f"{shlex.join(own_program())} {command}"
    else:
        yield f"{start} \\"
        yield f"    {shlex.join(program_of(slurm))} {command}"
    yield "code=$?"


def _kept(job: Job) -> str:
    """The command that tells what there is to go on from."""
    if not job.kept:
        return ":"
    folder = '"$run"' if job.runs else shlex.quote(str(job.folder))
    patterns = (pattern if "*" in pattern else shlex.quote(pattern) for pattern in job.kept)
    return f"(cd {folder} && stat --format='%n %s %Y' {' '.join(patterns)}) 2> /dev/null"


def _word(word: str) -> str:
    """A word of the command: quoted, but for the script's own variables."""
    for name in ("run", "resume"):
        variable = f"${name}"
        if word == variable or word.startswith(f"{variable}/"):
            return f'"{word}"'
    return shlex.quote(word)


def program_of(slurm: Slurm) -> list[str]:
    """The words that start litrecipe in a task: this one, or the container's."""
    return [*shlex.split(slurm.container or ""), "litrecipe"] if slurm.is_contained else own_program()


def own_program() -> list[str]:
    """The words that start this litrecipe."""
    beside = Path(sys.executable).with_name("litrecipe")
    return [str(beside)] if beside.is_file() else [sys.executable, "-P", "-m", "litrecipe"]


def _end(job: Job) -> Iterator[str]:
    if job.slurm.requeue:
        tries = PATIENCE // PAUSE
        yield f"# {PREEMPTED}: stopped, and all is saved. Nobody queues again what was cancelled, or is queued already."
        yield 'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"'
        yield f'answered() {{ for _ in {{1..{tries}}}; do "$@" && return; sleep {PAUSE}; done; return 1; }}'
        yield f'if [ "$code" -eq {PREEMPTED} ] &&'
        yield '    [ "$(answered squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then'
        yield '    if [ "$(kept)" = "$kept" ]; then'
        yield f'        echo "litrecipe: {NOTHING_NEW}" >&2'
        yield "        exit 1"
        yield "    fi"
        yield '    answered scontrol requeue "$job" && exit 0'
        yield "fi"
    yield 'exit "$code"'


def quoted(text: str) -> str:
    """A value as sbatch reads it in a line `#SBATCH`: within double quotes, where it needs any."""
    if shlex.quote(text) == text:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def clock(seconds: float) -> str:
    """Seconds as Slurm writes them, rounded up: `1-02:03:04`, `02:03:04`."""
    minutes, rest = divmod(-(-seconds // 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02}:{minutes:02}:{int(rest):02}"
