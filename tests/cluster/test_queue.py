"""In what environment sbatch reads a script."""

from __future__ import annotations

import pytest

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
