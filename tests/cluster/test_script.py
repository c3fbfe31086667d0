"""The script for sbatch, read by bash and looked at line by line; test_submit.py has Slurm run it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from litrecipe.cluster import script
from litrecipe.cluster.script import Job, clock, quoted, text_of
from litrecipe.config.slurm import Slurm

ODD = Path("/data/a b'c\"d#e%j$f/é")


def job(folder: Path = Path("/runs/one"), **keys: Any) -> Job:
    of_job = {key: keys.pop(key) for key in ("runs", "indices", "launches_stages", "resume_from") if key in keys}
    return Job(
        "finetune-one",
        folder,
        Slurm(**{"nodes": 2, "tasks_per_node": 8} | keys),
        ["finetune", "--config", str(folder / "job.yaml")],
        **of_job,
    )


FORMS: dict[str, Job] = {
    "plain": job(),
    "odd names": job(ODD, name="x $HOME", partition="a,b", sbatch_flags=["--mail-type=END"], env={"A": "it's $5"}),
    "everything": job(
        gpus_per_node=8,
        gpu_type="a100",
        cpus_per_task=4,
        mem="64G",
        time="1d2h",
        account="us",
        qos="high",
        constraint="a&b",
        reservation="r",
        requeue=False,
        modules=["cuda/12.4"],
        container="apptainer exec --nv lit.sif",
        pre=["echo before"],
        post=["echo after $code"],
        srun_flags=["--container-image=x y"],
    ),
    "array": job(runs=[ODD / "lr=1", ODD / "lr=2", ODD / "lr=3"], indices=[0, 2], array_limit=1),
    "stage": job(launches_stages=True),
    "from another run": job(resume_from=ODD / "checkpoints" / "step-00000003"),
}


@pytest.mark.parametrize("form", FORMS)
def test_bash_reads_it_and_sbatch_is_shown_no_variable(form: str) -> None:
    text = text_of(FORMS[form], ODD)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert text.splitlines()[2 : 2 + len(asked)] == asked, "sbatch reads up to the first command"
    names = re.sub(re.escape(quoted(str(ODD))), "", "\n".join(asked)).replace('"x $HOME"', "")
    assert "$" not in names.replace(quoted(str(ODD / "job.log").replace("%", "%%")), "")
    tasks = re.findall(r"--ntasks-per-node=(\d+)", text)
    assert tasks == ["8", "8"], "what is asked for, and what srun starts"


def test_all_keys_have_their_line() -> None:
    text = text_of(FORMS["everything"], Path("/here"))
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=a100:8",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=64G",
        "#SBATCH --time=1-02:00:00",
        "#SBATCH --account=us",
        "#SBATCH --qos=high",
        '#SBATCH --constraint="a&b"',
        "#SBATCH --reservation=r",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --no-requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --chdir=/here",
        "#SBATCH --output=/runs/one/job.log",
        "module load cuda/12.4 || exit 1",
        "export OMP_NUM_THREADS=4",
        "export HF_HUB_OFFLINE=1 WANDB_MODE=offline",
        "    apptainer exec --nv lit.sif litrecipe finetune --config /runs/one/job.yaml",
    ):
        assert line in text.splitlines()
    assert "--cpus-per-task=4 --cpu-bind=cores '--container-image=x y' \\\n" in text
    order = ["module load", "MASTER_PORT", "echo before", "srun", "code=$?", "echo after", 'exit "$code"']
    assert sorted(order, key=text.index) == order
    assert "scontrol requeue" not in text and "activate" not in text


def test_requeue_and_offline_are_choices() -> None:
    text = text_of(job(offline=False), Path("/here"))
    assert "HF_HUB_OFFLINE" not in text and "#SBATCH --requeue" in text and 'scontrol requeue "$job"' in text


def test_containers_that_srun_starts_have_a_litrecipe_of_their_own() -> None:
    for flag in ("--container-image=x.sqsh", "--environment=lit"):
        text = text_of(job(srun_flags=[flag]), Path("/here"))
        assert f"{flag} \\\n    litrecipe finetune --config" in text and "activate" not in text
    assert "\n    litrecipe " not in text_of(job(srun_flags=["--mpi=none"]), Path("/here"))


@pytest.mark.parametrize(("found", "code"), [(0, 0), (1, 1)])
def test_a_module_that_is_not_there_ends_the_job(found: int, code: int) -> None:
    text = text_of(job(modules=["a b"]), Path("/here"))
    head = text.partition("export PYTHONUNBUFFERED")[0]
    module = f'module() {{ [ "$1 $2" = "load a b" ] && return {found}; }}\n'
    assert subprocess.run(["bash"], input=f"{module}{head}", text=True).returncode == code


def test_one_process_meets_nobody() -> None:
    assert "MASTER_ADDR" not in text_of(job(nodes=1, tasks_per_node=1), Path("/here"))


def test_a_run_goes_on_from_another_until_it_has_saved(tmp_path: Path) -> None:
    """It makes the folder of its checkpoints when it starts, and drafts there."""
    folder = tmp_path / "a b'c\"d#e%j$f*[g]"
    text = text_of(job(folder, resume_from=Path("/o'ther/step-00000003")), Path("/here"))
    lines = text[text.index("resume=auto") : text.index("srun")].partition("\ntrap")[0]

    def chosen() -> str:
        done = subprocess.run(["bash", "-c", f'{lines}\necho "$resume"'], capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout

    assert chosen() == "/o'ther/step-00000003\n"
    for name in ("step-00000004.tmp", ".step-00000004.abc"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert chosen() == "/o'ther/step-00000003\n"
    (folder / "checkpoints" / "step-00000004").mkdir()
    assert chosen() == "auto\n"


def test_an_array_and_a_stage() -> None:
    text = text_of(FORMS["array"], Path("/here"))
    assert "#SBATCH --array=0,2%1" in text and "run=${runs[$SLURM_ARRAY_TASK_ID]}" in text
    text = text_of(FORMS["stage"], Path("/here"))
    assert re.search(r"^export LITRECIPE_LAUNCHER='srun --ntasks-per-node=8 [^']*'\n\S+ finetune --config", text, re.M)


def test_without_a_venvs_program_the_interpreter_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.sys, "executable", "/nowhere/python")
    assert script.program_of(Slurm()) == ["/nowhere/python", "-P", "-m", "litrecipe"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(90, "00:01:30"), (1.5, "00:00:02"), (3600, "01:00:00"), (93784, "1-02:03:04")]
)
def test_times_are_written_as_slurm_reads_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text
