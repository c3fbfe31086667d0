"""In what environment sbatch reads a script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from litrecipe.cluster import queue
from litrecipe.cluster.queue import environment_for

SCRIPT = "#!/bin/bash\n#SBATCH --time=01:00:00\n#SBATCH --partition=gpu\n#SBATCH --requeue\n"


def test_nothing_of_it_beats_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SBATCH_*` beats lines of a script; where it has no line, it is meant."""
    for name in ("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_NO_REQUEUE", "SBATCH_ACCOUNT", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    found = environment_for(SCRIPT)
    assert found.keys().isdisjoint({"SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_NO_REQUEUE"})
    assert found["SBATCH_ACCOUNT"] == found["SLURM_CONF"] == "x"


def test_neither_a_launcher_nor_an_allocation_shows_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_NTASKS")
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "c")
    found = environment_for(SCRIPT)
    assert found.keys().isdisjoint(names) and found["SLURM_CONF"] == "c"


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put programs in the place of sbatch and squeue."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(sbatch: str, squeue: str) -> None:
        for name, body in (("sbatch", sbatch), ("squeue", squeue)):
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)

    (tmp_path / "job.sh").write_text(SCRIPT)
    return put


def test_a_busy_slurm_may_have_queued_what_it_did_not_answer(
    tmp_path: Path, slurm_says: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is looked for by its script; an older one of the same script, whose id is known, is not it. What a site's
    own sbatch says besides the number does not count."""
    script = tmp_path / "job.sh"
    slurm_says("echo Welcome, you have 12; echo '34;big'", "exit 1")
    assert queue.submit(script, None) == "34"
    busy = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    both = f"echo '7_[1]|PENDING|None|{script}'; echo '5|RUNNING|None|/other'; echo '8|PENDING|None|{script}'"
    slurm_says(busy, both)
    assert queue.submit(script, None, known={"7"}) == "8"
    for squeue in (both, "exit 0", "exit 1"):  # two that may be it, none, and no answer
        slurm_says(busy, squeue)
        with pytest.raises(queue.Unanswered, match="it may have been queued nevertheless: look with `squeue --me`"):
            queue.submit(script, None)
    slurm_says("echo 'sbatch: error: invalid account' >&2; exit 1", both)
    with pytest.raises(queue.InputError, match=r"^sbatch: invalid account: look at slurm\.account$"):
        queue.submit(script, None, known={"7"})
    monkeypatch.setattr(queue, "PATIENCE", 0.3)
    slurm_says("exec sleep 9", f"echo '9_[0-3]|PENDING|None|{script}'")
    assert queue.submit(script, None) == "9"
