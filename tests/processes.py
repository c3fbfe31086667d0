"""Runs as real processes: started, killed, compared. conftest.py puts this folder on the path."""

import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from preloaded import Run, ranks_of, run
from safetensors.torch import load_file

from litrecipe.engine.rundir import read_records
from litrecipe.engine.telling import TIMING

FRESH = (sys.executable, "-m", "litrecipe")
"""As a user starts it, imports and all."""


def start(command, out, log, by=()):
    """Start it, with nothing there that an earlier kill left of a save; `by` these words, or forked."""
    for draft in out.glob("checkpoints/*.tmp"):
        shutil.rmtree(draft)
    words = list(map(str, command))
    file = log.open("ab")
    if ranks_of(words) == 1 and not by:
        return Run(words, file, file, Path.cwd())
    return subprocess.Popen([*(by or FRESH), *words], stdout=file, stderr=subprocess.STDOUT)


@contextmanager
def full_disk(room):
    """Inside, no file can become larger than so many bytes, which stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_until(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def steps_done(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"grad_norm"') if path.exists() else 0


def kill_at(kind, process, out, rng):
    """Send SIGKILL at a moment of the given kind; False when the run was over before it came."""
    if kind == "set-up":
        time.sleep(rng.uniform(0.5, 4))
    elif kind == "inside a save":
        if not wait_until(lambda: any(out.glob("checkpoints/*.tmp")), process):
            return False
    else:
        before = steps_done(out)
        if not wait_until(lambda: steps_done(out) > before + rng.randrange(4), process):
            return False
        time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def assert_equal_runs(a, b, steps):
    """Weights, optimizer, state, metrics and flight record, timing fields aside."""
    for name in ("metrics.jsonl", "flight.jsonl"):
        records = [
            [{k: v for k, v in record.items() if k not in TIMING} for record in read_records(run / name)]
            for run in (a, b)
        ]
        assert records[0] == records[1]
        assert len(records[0]) >= steps
    last = f"checkpoints/step-{steps:08d}"
    for name in ("weights-00000.safetensors", "optimizer-00000.safetensors", "state.json"):
        assert (a / last / name).read_bytes() == (b / last / name).read_bytes(), name
    finals = [sorted(p.name for p in (run / "final").iterdir()) for run in (a, b)]
    assert finals[0] == finals[1]
    for name in finals[0]:
        if name.endswith(".safetensors"):
            assert (a / "final" / name).read_bytes() == (b / "final" / name).read_bytes()


def losses(run):
    return [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]


def final_tensors(run, part=""):
    """Of its final model, or of what lies in a folder there."""
    return {k: v for path in sorted((run / "final" / part).glob("*.safetensors")) for k, v in load_file(path).items()}


def on_ranks(ranks, script, folder, *words):
    """What each rank says of a script that is given the folder, its rank and some words; they meet as torchrun's do.

    One that ends with an error has ended the script of the test, too.
    """
    done = run([str(folder), "{rank}", *map(str, words)], 280, Path.cwd(), ranks=ranks, script=script)
    for rank in done:
        sys.stderr.write(rank.stderr)
    assert not any(rank.returncode for rank in done)
    return [rank.stdout for rank in done]


def on_two_ranks(script, folder, *words):
    return on_ranks(2, script, folder, *words)
