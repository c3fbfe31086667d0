"""Runs of the program that need not import everything anew: forked from a process that has, and has done nothing else.

A run starts in a tenth of a second in place of five, and is a process like any other: it has its own signals, exit
code, working directory and output, and can be killed. What differs: its imports are over before it begins, so tests of
signals in set-up start a fresh one; several ranks are started by Fabric, which needs a real command line.

Run as a program, this file is the process that is forked from.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any

from litrecipe.config import stop
from litrecipe.config.progress import WATCHED

MODULES = (
    "torch",
    "lightning_fabric",
    "lightning_fabric.strategies",
    "peft",
    "litrecipe.cli",
    *(f"litrecipe.recipes.{name}" for name in ("dpo", "evaluate", "finetune", "generate", "grpo", "ppo", "reward")),
)


class Server:
    """The process that is forked from; made when it is first needed."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self.folder.name) / "socket")
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self.close)
        end = time.monotonic() + 300
        while not Path(self.address).exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the process to fork from did not start")
            time.sleep(0.01)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


_server: Server | SimpleNamespace | None = None


class Run:
    """A forked run; as much of `subprocess.Popen` as the tests use."""

    def __init__(
        self,
        words: Sequence[str],
        output: IO[Any],
        errors: IO[Any],
        cwd: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        script: str | None = None,
    ) -> None:
        """The program, or a script, with `words` behind its name; `env` is added to the environment."""
        self.args = list(words)
        self.returncode: int | None = None
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._line.connect(address())
        whole = {**os.environ, **(env or {})}
        job = json.dumps({"words": self.args, "cwd": str(cwd), "env": whole, "script": script}).encode()
        socket.send_fds(self._line, [len(job).to_bytes(8, "big")], [output.fileno(), errors.fileno()])
        self._line.sendall(job)
        self._told = b""
        self.pid = int(self._read_line(None))

    def _read_line(self, timeout: float | None) -> str:
        """The next line; TimeoutError when it takes longer."""
        self._line.settimeout(timeout)
        while b"\n" not in self._told:
            try:
                more = self._line.recv(100)
            except BlockingIOError as error:
                raise TimeoutError from error
            if not more:
                raise RuntimeError("the process that runs are forked from is gone")
            self._told += more
        line, _, self._told = self._told.partition(b"\n")
        return line.decode()

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                self.returncode = int(self._read_line(0.0))
            except TimeoutError:
                return None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            try:
                self.returncode = int(self._read_line(timeout))
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from error
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ranks_of(words: Sequence[str]) -> int:
    """How many processes a command line asks for."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--fabric.devices":
            return int(value or following)
    return 1


def meeting(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun tells a rank of one node."""
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
    told[WATCHED] = "seen"
    return told | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def run(
    words: Sequence[str],
    timeout: float,
    cwd: str | os.PathLike[str],
    ranks: int = 1,
    script: str | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """The ranks of a run to their end; output as text. `{rank}` among the words is the rank's.

    Those that take too long say where they are.
    """
    end = time.monotonic() + timeout
    port, world = free_port(), []
    with ExitStack() as stack:
        # Pipes, as a script may forbid itself to write long files.
        threads = stack.enter_context(ThreadPoolExecutor(2 * ranks))
        for rank in range(ranks):
            pipes = [os.pipe() for _ in range(2)]
            readers = [stack.enter_context(os.fdopen(reading, "r")) for reading, _ in pipes]
            writers = [os.fdopen(writing, "wb") for _, writing in pipes]
            env = meeting(rank, ranks, port) if ranks > 1 else None
            process = Run([word.replace("{rank}", str(rank)) for word in words], *writers, cwd, env, script)
            stack.callback(process.kill)
            for writer in writers:
                writer.close()
            world.append((process, [threads.submit(reader.read) for reader in readers]))
        try:
            codes = [process.wait(max(0.1, end - time.monotonic())) for process, _ in world]
        except subprocess.TimeoutExpired:
            for process, _ in world:
                process.send_signal(stop.WHERE)
            time.sleep(2)
            for rank, (process, (_, told)) in enumerate(world):
                process.kill()
                sys.stderr.write(f"rank {rank}:\n{told.result()}\n")
            raise
    return [
        subprocess.CompletedProcess(process.args, code, *(told.result() for told in texts))
        for code, (process, texts) in zip(codes, world, strict=True)
    ]


def serve(address: str) -> None:
    """Fork a run for each connection, and tell it the pid and, when it is over, the exit code."""
    for name in MODULES:
        __import__(name)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno())
    parent = os.getppid()
    lines: dict[int, socket.socket] = {}
    listening.bind(f"{address}.new")
    listening.listen()
    Path(f"{address}.new").rename(address)
    while os.getppid() == parent:
        ready, _, _ = select.select([listening, reader], [], [], 5.0)
        if listening in ready:
            line, _ = listening.accept()
            head, files, _, _ = socket.recv_fds(line, 8, 2)
            job = json.loads(read_exactly(line, int.from_bytes(head, "big")))
            pid = os.fork()
            if pid == 0:
                for other in (listening, reader, writer, line, *lines.values()):
                    other.close()
                become(job, files)
            for file in files:
                os.close(file)
            lines[pid] = line
            line.sendall(f"{pid}\n".encode())
        if reader in ready:
            reader.recv(4096)
        while lines:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with lines.pop(pid) as line, suppress(BrokenPipeError):  # of whom nobody waited for
                line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def read_exactly(line: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += line.recv(count - len(found))
    return found


def become(job: dict[str, Any], files: array.array[int] | list[int]) -> None:
    """The program, in the forked process; does not return."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for target, file in enumerate(files, start=1):
        os.dup2(file, target)
        os.close(file)
    from litrecipe import cli

    stop.tell_where_asked()
    sys.argv = ["litrecipe" if job["script"] is None else "-c", *job["words"]]
    code: Any = 1
    try:
        if job["script"] is None:
            code = cli.main(job["words"])
        else:
            main = ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(job["script"], main.__dict__)
            code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ask(address: str, words: Sequence[str]) -> int:
    """Be a run that the process at `address` forks, for whoever starts processes himself: signals are passed on,
    and it ends by the one by which the run does."""
    global _server
    _server = SimpleNamespace(address=address)
    waiting: list[int] = []
    os.environ.pop(stop.ANSWERED_AT, None)  # the one that is forked has not got the file
    signals = (signal.SIGTERM, signal.SIGUSR1, stop.WHERE)
    for number in signals:
        signal.signal(number, lambda number, _: waiting.append(number))
    process = Run(words, sys.stdout, sys.stderr, Path.cwd(), {WATCHED: os.environ.get(WATCHED, "seen")})
    for number in signals:
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    for number in waiting:
        os.kill(process.pid, number)
    code = process.wait()
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def address() -> str:
    """Where the process that is forked from is asked."""
    global _server
    _server = _server or Server()
    return _server.address


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and WATCHED not in os.environ:
        # Ranks of several tasks are watched, as a user's are.
        from litrecipe.engine import launch

        stop.install()
        sys.exit(launch.run_ranks([sys.executable, *sys.argv], [{}]))
    else:
        sys.exit(ask(sys.argv[1], sys.argv[3:]))  # the word between is the program's name
