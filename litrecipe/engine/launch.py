"""The ranks of a run as children of a process that computes nothing: it starts them, passes on what asks them to stop,
and when one of them dies it ends the others and tells which one it was, with the last that it said.

Left alone the others would wait for the dead one in a collective operation: gloo notices a closed connection, NCCL on
one machine nothing for half an hour. Where several ranks of a machine are wanted they are all children of one process.
Where torchrun or srun start a process for each, every one of them watches a rank of its own, as a dead process tells
nothing of itself.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from litrecipe.config import stop
from litrecipe.config.errors import WRONG_INPUT
from litrecipe.config.groups import Fabric
from litrecipe.config.progress import WATCHED, WHISPER, tell_past_buffers
from litrecipe.engine.allocation import is_a_task
from litrecipe.engine.child import EVERY, FAILED, ask_where, dies_with

ANSWERS = (0, WRONG_INPUT, stop.PREEMPTED, stop.INTERRUPTED)
"""Exit codes of ranks that knew what they did."""
READ = 1 << 16
"""Bytes that are read at once."""
PAUSE = 0.5
"""Seconds without a word after which a rank has said where it is."""
KEPT = 20
"""Lines that are kept of what a rank said last."""
SETTLES = 1.0
"""Seconds after the first death in which others may be found dead, to tell the cause from its consequences."""
HEARS = 5.0
"""Seconds in which the last lines of a dead rank are read; a child of its may hold the line for ever."""
GRACE = 30.0
"""Seconds in which ranks must follow one that has ended by itself, before they are killed."""
OTHERS_FAILED = signal.SIGUSR2
"""What tells processes that watch the other ranks of a Slurm step that one has failed."""
OF_TASK = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID")
"""Variables that say which task of a Slurm step a process is."""
GO_ON = "the same command with --checkpoint.resume auto goes on from the newest checkpoint"


def ranks_to_start(config: Fabric) -> list[dict[str, str]]:
    """What to add to the environment of each rank that this process is to start and watch; none where it is the only
    process of its run, or a rank that is watched."""
    if WATCHED in os.environ:
        return []
    if tasks := _started_by_others():
        return [{}] if tasks > 1 else []
    # Of several nodes that do not know one another, nothing is started: that is told where the ranks would meet.
    if config.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        return []
    count = _devices(config)
    if count * config.num_nodes == 1:
        return []
    node = int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0)
    common = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or _free_port(),
        "NODE_RANK": str(node),
        "WORLD_SIZE": str(count * config.num_nodes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, processors() // count)),
    }
    return [common | {"LOCAL_RANK": str(local), "RANK": str(node * count + local)} for local in range(count)]


def _started_by_others() -> int:
    """As how many ranks torchrun, srun or a person's script started this process and others; 0: nobody did."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE") or 1)
    if is_a_task():  # a step of one task, a shell of srun's perhaps, has room for ranks as a job of one task has
        tasks = int(os.environ.get("SLURM_NTASKS") or 1)
        return tasks if tasks > 1 else 0
    # In a job of several tasks nothing is started without srun: that is told where the ranks would meet.
    return 1 if int(os.environ.get("SLURM_NTASKS") or 1) > 1 else 0


def _devices(config: Fabric) -> int:
    if config.devices != "auto":
        return config.devices
    if config.accelerator == "cpu":
        return 1
    from litrecipe.engine.fabric import devices_of

    return devices_of(config)


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("", 0))
        return str(one.getsockname()[1])


class Rank:
    """One rank: a process, and what it said last."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], room: Room) -> None:
        """A first rank keeps the terminal, if there is one; others are heard through this process, line by line."""
        # A job of one task has room for several ranks: they are none of its tasks.
        told = {name: value for name, value in os.environ.items() if not (env and name in OF_TASK)}
        whole = {**told, **env}
        number = whole.get("RANK") or whole.get("SLURM_PROCID") or whole.get("LOCAL_RANK") or "0"
        self.number = int(number)
        self.is_first = room.ranks == 1 or env.get("LOCAL_RANK") == "0"
        is_heard = not (self.is_first and sys.stderr.isatty())
        self.answers, answered_at = os.pipe()
        self.process = subprocess.Popen(
            command,
            env=whole | {WATCHED: "heard" if is_heard else "seen", stop.ANSWERED_AT: str(answered_at)},
            stdin=subprocess.DEVNULL,
            stdout=None if self.is_first else subprocess.PIPE,
            stderr=None if not is_heard else subprocess.PIPE if self.is_first else subprocess.STDOUT,
            process_group=0,  # or Ctrl-C at a terminal would reach it twice, which ends a run without saving
            preexec_fn=dies_with(os.getpid()),
            pass_fds=[answered_at],
        )
        os.close(answered_at)
        self.asked: int | None = None
        """The signal that was passed on to it."""
        self.last: deque[str] | None = deque(maxlen=KEPT) if is_heard else None
        self.ear = threading.Thread(target=self._listen, args=(room,), daemon=True)
        self.other_ear = threading.Thread(target=self._hear_where, args=(room,), daemon=True)

    def _listen(self, room: Room) -> None:
        pipe = self.process.stderr or self.process.stdout
        if pipe is None or self.last is None:
            return
        for line in pipe:
            text = line.decode(errors="replace").rstrip("\n")
            self.last.append(text.removeprefix(WHISPER))
            if not text.startswith(WHISPER):
                room.repeat(self, text)

    def _hear_where(self, room: Room) -> None:
        """Wait for what it answers when it is asked where it is, and say that in one piece."""
        with os.fdopen(self.answers, "rb", buffering=0) as answers:
            while told := answers.read(READ):
                while select.select([answers], [], [], PAUSE)[0] and (more := answers.read(READ)):
                    told += more
                room.tell(f"\nlitrecipe: rank {self.number} ({self._place}) is here:\n{told.decode(errors='replace')}")

    @property
    def _place(self) -> str:
        return f"process {self.process.pid} on {socket.gethostname()}"

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs. One that was asked to stop before it could answer has stopped, too."""
        code, asked = self.process.poll(), self.asked or stop.requested()
        return int(stop.Stopped(asked).code or 0) if asked is not None and code == -asked else code

    @property
    def failed(self) -> bool:
        """Whether it is over otherwise than it should be."""
        return self.code is not None and self.code not in ANSWERS

    def last_words(self) -> list[str]:
        """What became of it, in lines."""
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cure = " (was there enough memory?)" if code == -signal.SIGKILL else ""
        self.ear.join(HEARS)
        told = f"litrecipe: error: rank {self.number} ({self._place}) {how}{cure}; the run ends; {GO_ON}"
        if self.last is None:  # what it said stands above
            return [told]
        if not self.last:
            return [told, f"rank {self.number} had said nothing"]
        return [told, f"the last that rank {self.number} said:", *(f"  {line}" for line in self.last)]


class Room:
    """Where ranks are heard: what several say alike is said once."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.said: deque[tuple[int, str]] = deque(maxlen=200)
        self.lock = threading.Lock()

    def repeat(self, rank: Rank, text: str) -> None:
        """A line of a rank, on standard error."""
        with self.lock:
            others = [line for number, line in self.said if number != rank.number]
            self.said.append((rank.number, text))
            if text and text in others:
                return
            speaker = "" if rank.is_first or text.startswith("litrecipe: ") else f"rank {rank.number}: "
            tell_past_buffers(f"{speaker}{text}\n")

    def tell(self, text: str) -> None:
        """Several lines at once."""
        with self.lock:
            tell_past_buffers(text)


def run_ranks(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Start a rank for each environment, and return the exit code of the run when all are over.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on, once, and SIGQUIT whenever it comes; that one rank was stopped is told to
    the others, which must follow. Where one fails the others are killed, and the code is 1.
    """
    others_failed = threading.Event()
    signal.signal(OTHERS_FAILED, lambda *_: others_failed.set())
    with stop.deferred(), stop.child_speaks():
        room = Room(len(environments))
        ranks = [Rank(command, env, room) for env in environments]
        # To all processes of a step Slurm itself sends it.
        ask_where(*(rank.process for rank in ranks if not is_a_task()))
        for rank in ranks:  # all are forked before there is a thread, which could hold what a fork needs
            rank.ear.start()
            rank.other_ear.start()
        try:
            return _watch(ranks, others_failed)
        finally:
            for rank in ranks:
                if rank.code is None:
                    rank.process.kill()
            for rank in ranks:
                rank.process.wait()
                rank.ear.join(HEARS)


def _watch(ranks: Sequence[Rank], others_failed: threading.Event) -> int:
    first, ended = None, 0.0
    while any(rank.code is None for rank in ranks):
        running = [rank for rank in ranks if rank.code is None]
        if first is None and (bad := [rank for rank in ranks if rank.code]):
            first, ended = bad[0], time.monotonic()
        asked = stop.requested()
        if asked is None and first is not None and first.code == stop.PREEMPTED:
            asked = signal.SIGTERM
        if asked is not None and not any(rank.asked for rank in ranks):
            for rank in running:
                rank.asked = asked
                rank.process.send_signal(asked)
        since = time.monotonic() - ended if first is not None else 0.0
        if others_failed.is_set() or since > (SETTLES if any(rank.failed for rank in ranks) else GRACE):
            break
        time.sleep(EVERY)
    first = first or next((rank for rank in ranks if rank.code), None)
    if first is None:
        return FAILED if others_failed.is_set() else 0
    failed = [rank for rank in ranks if rank.failed]
    if not first.failed:
        if first.code == WRONG_INPUT and not any(rank.is_first and rank.code == WRONG_INPUT for rank in ranks):
            _say(line.strip() for line in first.last_words() if line.startswith("  litrecipe: error: "))
        return int(first.code or 0)
    # One that was killed did not end for want of another, as its neighbours may have.
    culprit = min(failed, key=lambda rank: (int(rank.code or 0) > 0, rank is not first))
    if not others_failed.is_set():
        _say(culprit.last_words())
        _tell_slurm()
    return FAILED


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        tell_past_buffers(f"{line}\n")


def _tell_slurm() -> None:
    """Let the processes that watch the other ranks of a Slurm step know: their ranks may wait for ever."""
    scancel = shutil.which("scancel")
    if scancel is None or not is_a_task() or int(os.environ.get("SLURM_NTASKS") or 1) == 1:
        return
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    command = [scancel, f"--signal={OTHERS_FAILED.name.removeprefix('SIG')}", step]
    subprocess.run(command, stdin=subprocess.DEVNULL, timeout=GRACE, check=False)
