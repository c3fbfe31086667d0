"""Ranks as children of a process that computes nothing: one that dies ends the others and is named with its last words;
one that is stopped stops the others. The ranks are small scripts here, and real runs at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from processes import FRESH, assert_equal_runs, start, steps_done, wait_until

from litrecipe.config import progress, stop
from litrecipe.config.groups import Fabric
from litrecipe.engine import launch

WATCHER = """
import json, sys
from litrecipe.config import stop
from litrecipe.engine import launch
stop.install()
launch.GRACE = 2.0
words = json.loads(sys.argv[2])
ranks = [{"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(len(words))]
sys.exit(launch.run_ranks([sys.executable, "-c", sys.argv[1], sys.argv[2]], ranks))
"""
RANK = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def say(text):
    print(text, file=sys.stderr, flush=True)
def whisper(text):
    say("\\x1f" + text)
def wait():
    time.sleep(60)
def on(number, code):
    signal.signal(number, lambda *_: sys.exit(code))
say("both say this")
exec(json.loads(sys.argv[1])[rank])
"""
DEAF = "for n in (signal.SIGTERM, signal.SIGUSR1): signal.signal(n, signal.SIG_IGN)\nsay('deaf'); wait()"
MEEK = "on(signal.SIGTERM, 85); on(signal.SIGUSR1, 85); say('meek'); wait()"


def watch(*ranks: str) -> subprocess.Popen[str]:
    """A process that watches a rank for each of some programs."""
    command = [sys.executable, "-c", WATCHER, RANK, json.dumps(ranks)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)


def ended(*ranks: str) -> tuple[int, list[str], float]:
    """Exit code, what was said, and seconds."""
    began = time.monotonic()
    process = watch(*ranks)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said.splitlines(), time.monotonic() - began


def test_a_rank_that_is_killed_ends_the_others_and_has_its_last_words() -> None:
    """The other one waits and hears no signal, as in a collective operation."""
    dies = "whisper('step 7/9'); say('out of memory, nearly'); os.kill(os.getpid(), signal.SIGKILL)"
    code, said, seconds = ended(DEAF, dies)
    assert code == 1
    assert seconds < 20
    [told] = [line for line in said if line.startswith("litrecipe: error: ")]
    assert re.fullmatch(
        r"litrecipe: error: rank 1 \(process \d+ on \S+\) was killed by SIGKILL \(was there enough memory\?\); the run "
        r"ends; the same command with --checkpoint\.resume auto goes on from the newest checkpoint",
        told,
    )
    last = ["the last that rank 1 said:", "  both say this", "  step 7/9", "  out of memory, nearly"]
    assert said[said.index(told) + 1 :] == last
    assert sum(line.endswith("both say this") for line in said[: said.index(told)]) == 1
    assert "rank 1: out of memory, nearly" in said
    assert not any("step 7/9" in line for line in said[: said.index(told)]), "what is whispered is not for everybody"


def test_it_is_the_killed_rank_that_is_named_and_not_one_that_missed_it() -> None:
    missed = "time.sleep(0.5); say('Connection closed by peer'); sys.exit(1)"
    code, said, _ = ended(missed, "time.sleep(0.4); os.kill(os.getpid(), signal.SIGSEGV)")
    assert code == 1
    assert [line for line in said if "rank 1" in line and "was killed by SIGSEGV" in line]
    assert not [line for line in said if "error: rank 0" in line]


def test_a_rank_that_fails_by_itself_is_named_with_its_traceback() -> None:
    code, said, _ = ended(DEAF, "raise ZeroDivisionError('of the second')")
    assert code == 1
    assert [line for line in said if line.startswith("litrecipe: error: rank 1 ") and "exit code 1" in line]
    assert said[-1] == "  ZeroDivisionError: of the second"


@pytest.mark.parametrize(("ranks", "code"), [(["", ""], 0), (["sys.exit(2)", "sys.exit(2)"], 2)])
def test_ranks_that_agree_end_as_they_say(ranks: list[str], code: int) -> None:
    done, said, _ = ended(*ranks)
    assert done == code
    assert [line.removeprefix("rank 1: ") for line in said] == ["both say this"], "by whoever was the first"


def test_what_is_wrong_for_one_rank_alone_is_told_by_the_one_that_watches() -> None:
    alone = "whisper('litrecipe: error: data.train: not on this disk'); sys.exit(2)"
    code, said, _ = ended("time.sleep(0.5); say('another rank is gone'); sys.exit(1)", alone)
    assert code == 2
    assert said[-1] == "litrecipe: error: data.train: not on this disk"


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_a_signal_reaches_every_rank(number: int, name: str) -> None:
    process = watch(*[f"on(signal.{name}, 85); say(f'ready {{rank}}'); wait()"] * 2)
    assert process.stderr is not None
    ready = [process.stderr.readline() for _ in range(3)]
    assert sorted(line[-8:] for line in ready) == ["ay this\n", "ready 0\n", "ready 1\n"]
    os.killpg(process.pid, number)
    assert process.wait(30) == 85


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_rank_that_is_not_yet_so_far_that_it_could_answer_has_stopped(number: int, code: int) -> None:
    process = watch("signal.signal(signal.SIGINT, signal.SIG_DFL); say('ready'); wait()")
    assert process.stderr is not None
    assert [process.stderr.readline() for _ in range(2)] == ["both say this\n", "ready\n"]
    os.kill(process.pid, number)
    assert (process.wait(30), process.stderr.read()) == (code, "")


def test_ranks_that_stand_still_say_where_when_they_are_asked_and_go_on() -> None:
    """Also where several stand at the same line, which is otherwise said once."""
    rank = "from litrecipe.config import stop; stop.install(); say('ready {}'); time.sleep(3); say('on {}')"
    process = watch(rank.format(0, 0), rank.format(1, 1))
    assert process.stderr is not None
    for _ in range(3):
        process.stderr.readline()
    process.send_signal(stop.WHERE)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    for rank in "01":
        piece = rf"^litrecipe: rank {rank} \(process \d+ on \S+\) is here:\n(Current thread|Thread) 0x\w+ .*\n"
        assert re.search(piece + r'(  File .*\n)*  File "<string>", line 1 in <module>\n', said, re.MULTILINE)
    assert {"on 0", "rank 1: on 1"} <= set(said.splitlines())


def test_ranks_go_on_where_nobody_reads_what_they_say() -> None:
    """More than their pipes hold."""
    process = watch(*["for n in range(2000): say(f'{rank} {n} ' + 99 * 'x')\nsys.exit(85)"] * 2)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(30) == 85


def test_what_stops_one_rank_stops_the_others_and_one_that_cannot_follow_is_ended() -> None:
    """In set-up a rank answers a signal by itself, which perhaps nobody else was sent."""
    code, _, seconds = ended(MEEK, "time.sleep(0.5); sys.exit(85)")
    assert code == 85
    assert seconds < 15
    code, _, _ = ended(DEAF, "time.sleep(0.5); sys.exit(85)")
    assert code == 85


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An environment in which nobody started or watches this process, but for what is said."""
    for name in list(os.environ):
        if name.startswith("SLURM") or name in (progress.WATCHED, "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)

    def build(**more: str) -> None:
        for name, value in more.items():
            monkeypatch.setenv(name, value)

    return build


def test_who_starts_which_ranks(alone: Callable[..., None]) -> None:
    alone()
    assert launch.ranks_to_start(Fabric(accelerator="cpu")) == []
    assert launch.ranks_to_start(Fabric(accelerator="cpu", devices=2, num_nodes=2)) == [], "who is the other node?"
    first, second = launch.ranks_to_start(Fabric(accelerator="cpu", devices=2))
    assert [one["LOCAL_RANK"] for one in (first, second)] == [one["RANK"] for one in (first, second)] == ["0", "1"]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["WORLD_SIZE"] == "2"
    alone(MASTER_ADDR="n1", MASTER_PORT="7", NODE_RANK="1")
    ranks = launch.ranks_to_start(Fabric(accelerator="cpu", devices=2, num_nodes=2))
    assert [(one["RANK"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in ranks] == [
        ("2", "n1", "7"),
        ("3", "n1", "7"),
    ]
    alone(**{progress.WATCHED: "heard"})
    assert launch.ranks_to_start(Fabric(accelerator="cpu", devices=2)) == []


def test_a_process_of_torchrun_or_srun_watches_one_rank(alone: Callable[..., None]) -> None:
    two = Fabric(accelerator="cpu", devices=2)
    alone(SLURM_NTASKS="2", SLURM_STEP_ID="0")
    assert launch.ranks_to_start(two) == [{}]
    alone(SLURM_STEP_ID="4294967291", SLURM_NTASKS="2")
    assert launch.ranks_to_start(two) == [], "of a script of two tasks, without srun"
    alone(SLURM_NTASKS="1")
    assert len(launch.ranks_to_start(two)) == 2
    alone(SLURM_STEP_ID="0")
    assert len(launch.ranks_to_start(two)) == 2, "in a step of one task, such as `srun --pty bash`"
    alone(LOCAL_RANK="1", WORLD_SIZE="2")
    assert launch.ranks_to_start(two) == [{}]


def rank_of(process: int, rank: int) -> int:
    """The process below this one that computes as such a rank."""
    below = [process]
    for one in below:  # which grows meanwhile
        below += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    said = {one: Path(f"/proc/{one}/environ").read_bytes().split(b"\0") for one in below}
    [found] = [
        one
        for one, words in said.items()
        if f"RANK={rank}".encode() in words and any(word.startswith(f"{progress.WATCHED}=".encode()) for word in words)
    ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "by", [FRESH, [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--module", "litrecipe"]]
)
def test_kill_9_of_one_rank_ends_the_run_and_the_next_start_goes_on_to_the_bit(
    litrecipe: Callable[..., subprocess.CompletedProcess[str]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: Sequence[str],
) -> None:
    """The only ranks here that are started as a user's are, by litrecipe or by torchrun; the others are forked."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = 120

    def command(out: Path) -> list[object]:
        return [
            *("finetune", "--model", tiny_model, "--data.train", "toy:units?n=30&seed=0", "--out_dir", out),
            *("--data.cache_dir", tmp_path / "cache", "--train.micro_batch_tokens", 300, "--log.loggers", "[]"),
            *("--train.global_batch_size", 4, "--train.max_steps", steps, "--checkpoint.every", 20),
            *("--checkpoint.resume", "auto", "--fabric.accelerator", "cpu", "--fabric.devices", 2),
        ]

    broken, unbroken, log = tmp_path / "broken", tmp_path / "unbroken", tmp_path / "log"
    process = start(command(broken), broken, log, by=by)
    try:
        assert wait_until(lambda: steps_done(broken) >= 22, process, seconds=240)
        second = rank_of(process.pid, 1)
        os.kill(second, signal.SIGKILL)
        assert process.wait(60) == 1
    finally:
        process.kill()
    said = log.read_text()
    assert f"litrecipe: error: rank 1 (process {second} on " in said
    assert re.search(r"the last that rank 1 said:\n.*  step \d+/120: loss \d", said, re.DOTALL)
    assert steps_done(broken) < steps
    litrecipe(*command(broken))
    litrecipe(*command(unbroken))
    assert_equal_runs(unbroken, broken, steps)
