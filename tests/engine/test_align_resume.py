"""Preference learning that was killed goes on to the last bit, with its reference; and stops while that is computed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import FRESH, assert_equal_runs, kill_at, start, steps_done, wait_until

STEPS = 18
LORA = ("--adapter.method", "lora", "--adapter.r", 4, "--optim.lr", "5e-3")
MOVING = ("--dpo.reference", "moving")
VERBS = {
    "reward": ("reward", *LORA, "--reward.centering_coef", 0.01),
    "cache": ("dpo", *LORA, "--adapter.dropout", 0.1),
    "copy": ("dpo", "--dpo.reference", "copy", "--optim.lr", "1e-3"),
    "soft": ("dpo", *LORA, *MOVING, "--dpo.ref_alpha", 0.6),
    "hard": ("dpo", *MOVING, "--dpo.ref_alpha", 1, "--dpo.ref_every", 3, "--optim.lr", "1e-3"),
    "kto": ("dpo", *LORA, "--dpo.loss", "kto"),
    "aot": ("dpo", "--dpo.loss", "aot", "--optim.lr", "1e-3"),
}
KILLS = {"soft": ("set-up", "between steps", "inside a save"), "cache": ("set-up",), "copy": ("inside a save",)}
"""When each case is killed, if not between steps; `benchmarks/kills.py` kills each three times."""
PAIRS = "toy:units-pairs?n=26&seed=0"
Command = Callable[..., list[object]]


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> Command:
    def build(out: Path, case: str, *flags: object, pairs: str = PAIRS) -> list[object]:
        verb, *settings = VERBS[case]
        return [
            *("align", verb, "--model", tiny_model, "--data.train", pairs, "--out_dir", out),
            *("--data.val", "toy:units-pairs?n=4&seed=0&split=test", "--data.cache_dir", tmp_path / "cache"),
            *("--train.max_steps", STEPS, "--train.global_batch_size", 4, "--train.micro_batch_tokens", 300),
            *("--checkpoint.every", 2, "--checkpoint.resume", "auto", "--eval.every", 7),
            *("--fabric.accelerator", "cpu", *settings, *flags),
        ]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("case", list(VERBS))
def test_kill_9_and_resume_equals_the_unbroken_run(litrecipe, command: Command, tmp_path: Path, case: str) -> None:
    rng = random.Random(case)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    litrecipe(*command(unbroken, case))
    for kind in KILLS.get(case, ("between steps",)):
        process = start(command(broken, case), broken, tmp_path / "log", by=FRESH if kind == "set-up" else ())
        assert kill_at(kind, process, broken, rng), (tmp_path / "log").read_text()
    litrecipe(*command(broken, case))
    assert_equal_runs(unbroken, broken, STEPS)
    if case in ("soft", "hard"):
        weights = broken / f"checkpoints/step-{STEPS:08d}" / "weights-00000.safetensors"
        assert b'"reference.model.' in weights.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_equal(
    litrecipe, command: Command, tmp_path: Path, number: int, code: int
) -> None:
    """After two of three steps of a hard reference, which no checkpoint was due at."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    process = start(command(broken, "hard", "--checkpoint.every", 1000), broken, tmp_path / "log")
    assert wait_until(lambda: steps_done(broken) >= 4, process)
    process.send_signal(number)
    assert process.wait(30) == code, (tmp_path / "log").read_text()
    [saved] = (broken / "checkpoints").iterdir()
    assert json.loads((saved / "state.json").read_text())["step"] == steps_done(broken) < STEPS
    if number == signal.SIGTERM:
        litrecipe(*command(broken, "hard", "--checkpoint.every", 1000))
        litrecipe(*command(unbroken, "hard", "--checkpoint.every", 1000))
        assert_equal_runs(unbroken, broken, STEPS)


MANY = "toy:fields-pairs?n=800&seed=0"
"""So many that their log-probabilities take longer than a signal."""


FEW = MANY.replace("800", "200")


def half_made(tmp_path: Path) -> Callable[[], bool]:
    """Whether some log-probabilities are computed and others not."""
    return lambda: any(path.stat().st_size for path in (tmp_path / "cache" / "reference").glob("*.part/extra-*.bin"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "flags"),
    [
        (signal.SIGTERM, 85, ()),
        (signal.SIGUSR1, 85, ()),
        (signal.SIGINT, 130, ()),
        (signal.SIGTERM, 85, ("--fabric.devices", 2, "--fabric.strategy", "ddp")),
    ],
)
def test_a_signal_while_the_reference_is_asked_ends_the_program(
    command: Command, tmp_path: Path, number: int, code: int, flags: tuple[object, ...]
) -> None:
    """At once, nothing half made is left, and no rank outlives the others."""
    out = tmp_path / "run"
    process = start(command(out, "cache", *flags, pairs=MANY), out, tmp_path / "log")
    assert wait_until(half_made(tmp_path), process)
    process.send_signal(number)
    assert process.wait(20) == code, (tmp_path / "log").read_text()
    assert wait_until(lambda: not others_of(out), subprocess.Popen(["sleep", "20"]))
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [path.suffix for path in (tmp_path / "cache" / "reference").iterdir()] == [".lock"]


def others_of(out: Path) -> list[str]:
    """Processes whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # gone
            pass
    return found


@pytest.mark.slow
def test_two_runs_at_once_ask_the_reference_once(litrecipe, command: Command, tmp_path: Path) -> None:
    """The second waits for the first, or where that is killed computes itself; both then learn the same."""
    outs = [tmp_path / name for name in ("killed", "one", "other")]
    logs = [tmp_path / f"{out.name}.log" for out in outs]
    first = start(command(outs[0], "cache", pairs=FEW), outs[0], logs[0])
    assert wait_until(half_made(tmp_path), first)
    first.send_signal(signal.SIGSTOP)
    rest = [start(command(out, "cache", pairs=FEW), out, log) for out, log in zip(outs[1:], logs[1:], strict=True)]
    waiting = "waiting for another process that prepares the same data"
    assert all(wait_until(lambda log=log: waiting in log.read_text(), first) for log in logs[1:])
    first.kill()
    first.wait()
    assert [process.wait(200) for process in rest] == [0, 0]
    assert len(list((tmp_path / "cache" / "reference").glob("*/complete.json"))) == 2  # of train and of val
    assert_equal_runs(outs[1], outs[2], STEPS)
