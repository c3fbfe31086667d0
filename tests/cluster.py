"""A Slurm of the tests' own on 127.0.0.1: munged, slurmctld and a slurmd a node, on free ports, in a folder of its own.

The daemons are children of this process, which the kernel ends with it. They need neither systemd nor cgroups, and
leave what is installed in /etc as it is. There is no accounting (`sacct`), and memory is not enforced. All nodes are
this machine, so programs on them meet at 127.0.0.1.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "setpriv")
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=600
FirstJobId={first}
MailProg=/bin/true
ReturnToService=2
EnforcePartLimits=ALL
{more}
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes={names} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=15
PartitionName=urgent Nodes={names} MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF
"""
PATH = re.compile(r"\s*(Command|WorkDir|StdErr|StdIn|StdOut)=")
"""Begins a line of `scontrol show job` that is one value, perhaps with spaces."""
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
"""States of a job that will not run again."""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    return "slurmd has to be started by root" if os.geteuid() else None


class Cluster:
    """A running Slurm. Its programs find it through `SLURM_CONF`, which is in `environment`."""

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(
        self, *words: object, check: bool = True, cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program with this cluster's environment, and `more` of it; output as text."""
        done = subprocess.run(
            list(map(str, words)), env=self.environment | more, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise AssertionError(f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def told(self, job: object) -> dict[str, str]:
        """What Slurm knows of a job: `JobState`, `ExitCode`, `Restarts`, ..."""
        lines = self.call("scontrol", "show", "job", job).stdout.partition("\n\n")[0].splitlines()
        words = [word for line in lines for word in ([line] if PATH.match(line) else line.split())]
        return dict(word.strip().split("=", 1) for word in words if "=" in word)

    def wait(self, job: object, until: Callable[[dict[str, str]], bool] | None = None, seconds: float = 90) -> str:
        """Until a job is over, or `until` says so of what is told of it; returns its state.

        Raises AssertionError with what the job wrote when that takes longer, or cannot come any more.
        """
        end = time.monotonic() + seconds
        while True:
            told = self.told(job)
            is_over = told["JobState"] in OVER
            if until(told) if until else is_over:
                return told["JobState"]
            if is_over or time.monotonic() > end:
                output = Path(told.get("StdOut", ""))
                raise AssertionError(f"{told}\n{output.read_text() if output.is_file() else 'no output'}")
            time.sleep(0.05)

    def hasten(self, job: object, restarts: int = 1, seconds: float = 90) -> None:
        """Wait until a job was requeued so often, and let it start soon: Slurm would hold it back for six seconds."""
        self.wait(job, lambda told: int(told["Restarts"]) >= restarts, seconds)
        time.sleep(1.1)  # a credential of the second in which the last one was revoked is taken for revoked, too
        self.call("scontrol", "update", f"job={job}", "StartTime=now", check=False)  # it may have started

    def clear(self) -> None:
        """End all jobs, and wait until they are gone."""
        self.call("scancel", "--user=root", check=False)
        end = time.monotonic() + 30
        while self.call("squeue", "--noheader", check=False).stdout.strip() and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def running(nodes: int = 2, cpus: int = 2, more: Sequence[str] = ("RequeueExit=85",)) -> Iterator[Cluster]:
    """A cluster of so many nodes (n1, n2, ...) of so many CPUs, with `more` lines in its slurm.conf, until the body
    ends. Only what was started here is stopped."""
    host = socket.gethostname().partition(".")[0]
    names = [f"n{number}" for number in range(1, nodes + 1)]
    port, *ports = _free_ports(nodes + 1)
    # Not below pytest's folder: a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as place, ExitStack() as stack:
        folder = Path(place)
        folder.chmod(0o755)
        for name in ("state", *(f"spool/{name}" for name in names)):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=folder,
                host=host,
                port=port,
                names=",".join(names),
                ports=",".join(map(str, ports)),
                cpus=cpus,
                first=random.SystemRandom().randrange(1, 1_000_000),  # ports of jobs are made of it
                more="\n".join(more),
            )
        )
        cluster = Cluster(folder, names)
        munge = [f"--{option}={folder}/munge.{ending}" for option, ending in MUNGE.items()]
        _start(stack, cluster, "munged", "--foreground", "--force", *munge)
        _until(lambda: (folder / "munge.socket").exists(), cluster)
        _start(stack, cluster, "slurmctld", "-D", "-c")
        for name in names:
            _start(stack, cluster, "slurmd", "-D", "-c", "-N", name)
        _until(lambda: _states(cluster) == ["idle"] * nodes, cluster)
        stack.callback(cluster.clear)  # first of all: a step whose slurmd is gone lingers
        yield cluster


MUNGE = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
"""Option of munged → ending of the file."""


def _start(stack: ExitStack, cluster: Cluster, *words: str) -> None:
    """A daemon that is stopped when the stack unwinds; the kernel ends it if this process is killed before."""
    path = os.pathsep.join((cluster.environment.get("PATH", ""), "/usr/sbin", "/sbin"))
    log = stack.enter_context((cluster.folder / f"{words[0]}.out").open("ab"))
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *words],
        env=cluster.environment | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,
    )

    def stop() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)


def _states(cluster: Cluster) -> list[str]:
    done = cluster.call("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%t", check=False)
    return done.stdout.split()


def _until(condition: Callable[[], bool], cluster: Cluster) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(
                f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                for path in sorted((*cluster.folder.glob("*.log"), *cluster.folder.glob("*.out")))
            )
            raise RuntimeError(f"Slurm did not start\n{logs}")
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


if __name__ == "__main__":  # a shell on a cluster, to try things
    if reason := why_not():
        sys.exit(reason)
    with running() as here:
        subprocess.run([os.environ.get("SHELL", "bash"), *sys.argv[1:]], env=here.environment)
