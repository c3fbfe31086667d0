"""`litrecipe submit` on a real Slurm.

Where only the job's doing counts the program on the nodes is one that has imported everything already
(`preloaded.ask`), started as a container would be.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import preloaded
import pytest
from cluster import Cluster, running
from processes import assert_equal_runs, losses, steps_done

from litrecipe import cli
from litrecipe.checkpoint.source import open_model
from litrecipe.cluster import queue, script
from litrecipe.cluster.script import Job, text_of
from litrecipe.config.slurm import Slurm

STEPS = 24
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a space in its name, in which the cluster is found, and one's own defaults for it."""
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("LITRECIPE_SLURM", str(tmp_path / "slurm.yaml"))
    (tmp_path / "slurm.yaml").write_text("time: 10m\nsignal: 30\n")
    return folder


@pytest.fixture
def words(tiny_model: Path, here: Path) -> list[str]:
    """A fine-tuning with data in this folder."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(64)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model": tiny_model,
        "data.train": "rows.jsonl",
        "data.cache_dir": "cache",
        "fabric.accelerator": "cpu",
        "optim.lr": 1e-3,
        "train.max_steps": STEPS,
        "log.loggers": "[]",
    }
    return ["finetune", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]


def forked() -> list[str]:
    """Words before the program's name that have it forked."""
    return [sys.executable, str(REPO / "tests" / "preloaded.py"), preloaded.address()]


def submit(*words: object) -> int:
    return cli.main(["submit", *map(str, words)])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = capsys.readouterr().err.splitlines()
    return [line.removeprefix("litrecipe: error: ") for line in said if line.startswith("litrecipe: error: ")]


def job_of(folder: Path) -> str:
    return str(json.loads((folder / "job.json").read_text())["job"])


@pytest.mark.slow
def test_jobs_are_as_runs_without_a_cluster_and_go_on_after_a_stop(
    slurm: Cluster, here: Path, words: list[str], litrecipe: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two machines with a task each, and one with two, which is asked to save in the midst and is queued again: the
    same weights, metrics and samples as two processes on one machine, to the bit. What is told are the commands."""
    litrecipe(*words, "--out_dir", "direct", "--fabric.devices", 2)
    asked = ["--slurm.container", shlex.join(forked())]
    assert submit(*words, "--out_dir", "two machines", "--slurm.nodes", 2, *asked) == 0
    told = capsys.readouterr()
    first = job_of(here / "two machines")
    assert submit(*words, "--out_dir", "stopped", "--slurm.tasks_per_node", 2, *asked) == 0
    stopped = job_of(here / "stopped")
    slurm.wait(stopped, lambda _: steps_done(here / "stopped") > 2)
    slurm.call("scancel", "--signal=USR1", stopped)
    slurm.hasten(stopped)
    assert slurm.wait(first) == slurm.wait(stopped) == "COMPLETED"
    log = (here / "stopped" / "job.log").read_text()
    [saved] = {int(step) for step in re.findall(rf"stopped by SIGUSR1: step (\d+) of {STEPS} is saved", log)}
    assert 2 < saved < STEPS
    assert_equal_runs(here / "direct", here / "two machines", STEPS)
    assert_equal_runs(here / "direct", here / "stopped", STEPS)
    assert "sbatch --test-only: Job" in told.err and "#SBATCH --nodes=2\n" in told.out
    assert f"submitted: job {first} (two machines)" in told.out and f"scancel {first}" in told.out
    assert submit(*words, "--out_dir", "stopped", "--slurm.tasks_per_node", 2) == 2
    assert errors(capsys) == [
        "out_dir: stopped: this run is finished: ask for more steps to go on, or name another --out_dir"
    ]


@pytest.mark.slow
def test_a_sweep_is_an_array_with_a_run_a_point(
    slurm: Cluster, here: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own values; the table has a row for each; what is finished is not done again."""
    short = [*words, "--train.max_steps", 2, "--adapter.method", "lora", "--out_dir", "sweep"]
    short += ["--sweep", "optim.lr=1e-3,2e-3", "--sweep", "adapter.r=2,4", "--slurm.array_limit", 3]
    assert submit(*short, "--slurm.container", shlex.join(forked())) == 0
    points = {f"lr={lr}_r={r}": (float(lr), r) for lr in ("1e-3", "2e-3") for r in (2, 4)}
    assert {path.parent.name for path in here.glob("sweep/*/job.yaml")} == set(points)
    for name in points:
        slurm.wait(job_of(here / "sweep" / name))
    by_loss = set()
    for name, (lr, r) in points.items():
        written = (here / "sweep" / name / "recipe.yaml").read_text()
        assert f"lr: {lr}\n" in written and f"  r: {r}\n" in written
        assert (here / "sweep" / name / "job.log").read_text()
        by_loss.add(losses(here / "sweep" / name)[1])
    assert len(by_loss) == 4, "the runs differ"
    capsys.readouterr()
    assert cli.main(["runs", "ls", "sweep"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [f"sweep/{name}" for name in points]
    assert all(" finetune " in row and " finished " in row and " 2/2 " in row for row in rows)
    shutil.rmtree(here / "sweep" / "lr=2e-3_r=2" / "final")
    assert submit(*short, "--dry_run") == 0
    told = capsys.readouterr()
    assert "#SBATCH --array=2%3\n" in told.out and "lr=1e-3_r=2: finished before: left out" in told.err


@pytest.mark.slow
def test_a_pipeline_is_a_chain_of_its_stages(
    slurm: Cluster, here: Path, words: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job waits for the first, which is requeued in the midst and goes on, starts from what that made, and
    the pipeline knows of both; one of them has two tasks."""
    steps = 10 * STEPS  # or a busy machine is through before it is requeued
    stage = "data: {train: rows.jsonl, cache_dir: cache}, log: {loggers: []}"
    stage += ", fabric: {accelerator: cpu}"
    other = slurm.call("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").stdout.strip()
    (here / "p.yaml").write_text(
        f"slurm: {{time: 5m}}\nstages:\n  one: {{verb: finetune, model: {{source: {tiny_model}}}, {stage}, "
        f"train: {{max_steps: {steps}}}}}\n"
        f'  two: {{verb: finetune, model: {{source: "stage:one"}}, '
        f"slurm: {{tasks_per_node: 2, dependency: 'afterany:{other}'}}, {stage}, "
        "train: {max_steps: 2}}\n"
    )
    monkeypatch.setattr(script, "own_program", lambda: [*forked(), "litrecipe"])
    assert submit("align", "pipeline", "--config", "p.yaml", "--out_dir", "pipe") == 0
    one, two = job_of(here / "pipe" / "one"), job_of(here / "pipe" / "two")
    waits_for = slurm.told(two)["Dependency"]
    assert waits_for.startswith(f"afterok:{one}") and f"afterany:{other}" in waits_for
    slurm.call("scancel", other)
    slurm.wait(one, lambda _: steps_done(here / "pipe" / "one") > 2)
    slurm.call("scontrol", "requeue", one)
    slurm.hasten(one)
    assert slurm.wait(one) == slurm.wait(two) == "COMPLETED"
    log = (here / "pipe" / "one" / "job.log").read_text()
    assert re.search(rf"stopped by SIGTERM: step \d+ of {steps} is saved", log) and "one: finetune: was stopped" in log
    told = json.loads((here / "pipe" / "pipeline.json").read_text())
    assert [one["done"] for one in told["stages"].values()] == [True, True] and told["final"] == "two/final"
    state = json.loads((here / "pipe" / "two" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["identity"]["base weights"] == open_model(str(here / "pipe" / "one")).weights_hash()
    assert state["world_size"] == 2


def test_a_script_runs_this_program_and_what_follows_a_failure_is_called_off(
    slurm: Cluster, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program beside the interpreter, in its environment, from the folder of the command; commands before and after
    it; a path that is hard to quote."""
    folder = here / "a'b\"c#d%j$e é"
    folder.mkdir()
    monkeypatch.setenv("RANK", "3")
    keys: dict[str, Any] = {"nodes": 1, "tasks_per_node": 1, "env": {"A": "it's $x"}}
    keys |= {"pre": ['echo "before: $PWD, $A, ${RANK:-no rank}"'], "post": ["echo after $code"]}
    job = Job("odd $name", folder, Slurm(**keys), ["--version"])
    job.script.write_text(text_of(job, folder))
    number = queue.submit(job.script, None)
    assert slurm.wait(number) == "COMPLETED"
    before, version, after = job.log.read_text().splitlines()
    assert before == f"before: {folder}, it's $x, no rank"
    assert version == f"litrecipe {cli.__version__}" and after == "after 0"
    failing = Job("failing", here, Slurm(nodes=1, tasks_per_node=1), ["finetun"])
    failing.script.write_text(text_of(failing, here))
    first = queue.submit(failing.script, None)
    second = queue.submit(failing.script, f"afterok:{first}")
    assert slurm.wait(first) == "FAILED" and slurm.told(first)["ExitCode"] == "2:0"
    assert slurm.wait(second) == "CANCELLED"
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")  # as some sites have it
    program = "bash -c 'echo task: $A'"
    bare = Job("bare", here, Slurm(nodes=1, tasks_per_node=1, container=program, env={"A": "given"}), ["x"])
    bare.script.write_text(text_of(bare, here))
    assert slurm.wait(queue.submit(bare.script, None)) == "COMPLETED"
    assert bare.log.read_text().endswith("task: given\n")


def test_tasks_of_an_array_are_queued_again_by_their_script(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster that does nothing by itself and does not answer at once, each by its own number; what was cancelled
    is not, nor what has come no further."""
    with running(nodes=1, more=()) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        folders = [here / "x", here / "y", here / "z", here / "w"]
        for folder in folders:
            folder.mkdir()
        program = 'bash -c \'[ -n "$SLURM_RESTART_COUNT" ] || { trap : TERM; [ -e z ] && sleep 30; '
        program += "[ -e w ] || mkdir -p checkpoints/step-1; exit 85; }'"
        (here / "squeue").write_text(f'#!/bin/bash\n[ -e asked ] && exec {which("squeue")} "$@"\ntouch asked; exit 1\n')
        (here / "squeue").chmod(0o755)
        monkeypatch.setattr(script, "PAUSE", 1)
        slurm = Slurm(nodes=1, tasks_per_node=1, container=program, pre=['cd "$run"', 'touch "${run: -1}"'])
        slurm.env["PATH"] = f"{here}:{os.environ['PATH']}"
        job = Job("again", here, slurm, ["finetune"], runs=folders, indices=[0, 2, 3])
        job.script.write_text(text_of(job, here))
        number = queue.submit(job.script, None)
        cluster.wait(f"{number}_2", lambda told: (here / "z" / "z").exists())
        cluster.call("scancel", f"{number}_2")
        cluster.hasten(f"{number}_0")
        assert cluster.wait(f"{number}_0") == "COMPLETED" and cluster.wait(f"{number}_2") == "CANCELLED"
        assert cluster.told(f"{number}_2")["Restarts"] == "0"
        assert cluster.wait(f"{number}_3") == "FAILED" and cluster.told(f"{number}_3")["Restarts"] == "0"
        assert (here / "w" / "job.log").read_text().endswith(f"litrecipe: {script.NOTHING_NEW}\n")
        assert not (here / "y" / "job.log").exists()


def test_what_sbatch_refuses_is_told_in_its_words_and_leaves_nothing(
    slurm: Cluster, here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """But that machines are out of order now, for which jobs wait, is said only."""
    assert submit(*words, "--out_dir", "out/run", "--slurm.partition", "nowhere") == 2
    assert "sbatch: invalid partition specified: nowhere: look at slurm.partition" in errors(capsys)
    assert submit(*words, "--out_dir", "out/run", "--slurm.nodes", 2, "--slurm.time", "3h") == 2
    assert any("time limit" in line for line in errors(capsys))
    assert submit(*words, "--out_dir", "out/run", "--slurm.nodes", 2, "--fabric.num_nodes", 3, "--optim.lr", -1) == 2
    assert errors(capsys) == ["optim.lr: -1.0: give a number above 0"]
    assert submit(*words, "--out_dir", "out/run", "--slurm.nodes", 2, "--fabric.num_nodes", 3) == 2
    assert errors(capsys) == ["fabric.num_nodes: 3: slurm.nodes is 2: make them the same"]
    assert submit(*words, "--out_dir", "out/run", "--sweep", "optim.lr=1,-1", "--sweep", "train.max_step=1,2") == 2
    assert "no such key: did you mean `train.max_steps`?" in "\n".join(errors(capsys))
    assert not (here / "out").exists()
    nodes = "nodename=" + ",".join(slurm.nodes)
    slurm.call("scontrol", "update", nodes, "state=drain", "reason=test")
    try:
        assert submit(*words, "--out_dir", "out/run") == 0
        job = job_of(here / "out" / "run")
        assert slurm.told(job)["JobState"] == "PENDING"
        slurm.call("scancel", job)
    finally:
        slurm.call("scontrol", "update", nodes, "state=resume")
    assert "sbatch --test-only: allocation failure: Requested node configuration is not available" in (
        capsys.readouterr().err
    )


def test_a_sweep_grows_while_its_points_wait(
    slurm: Cluster, here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Points that have a job are left out, as long as they are asked for as they were; there are logs to follow."""
    held = [*words, "--out_dir", "sweep", "--slurm.sbatch_flags", "[--hold]", "--sweep"]
    assert submit(*held, "optim.lr=1e-3,2e-3") == 0
    first = job_of(here / "sweep" / "lr=1e-3").partition("_")[0]
    assert [path.read_text() for path in here.glob("sweep/*/job.log")] == ["", ""]
    capsys.readouterr()
    assert submit(*held, "optim.lr=1e-3,2e-3,3e-3") == 0
    told = capsys.readouterr()
    assert "#SBATCH --array=2\n" in told.out and f"lr=2e-3: its job {first}_1 is pending: left out" in told.err
    second = job_of(here / "sweep" / "lr=3e-3").partition("_")[0]
    assert second != first == job_of(here / "sweep" / "lr=1e-3").partition("_")[0]
    assert submit(*held, "optim.lr=1e-3,3e-3") == 2
    assert errors(capsys) == ["out_dir: sweep: all 2 runs of this sweep are finished, or have a job"]
    assert submit(*held, "optim.lr=1e-3,4e-3", "--train.max_steps", 5) == 2
    assert f"its job {first}_0 is pending: wait for it" in errors(capsys)[0]
    slurm.call("scancel", first, second)


@pytest.mark.slow
def test_a_point_that_was_taken_up_by_itself_is_left_out(
    slurm: Cluster, here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """While it runs with other steps, and when it has taken more of them than it is asked for."""
    sweep = [*words, "--slurm.container", shlex.join(forked()), "--train.max_steps", 2, "--out_dir", "sweep", "--sweep"]
    assert submit(*sweep, "optim.lr=1e-3,2e-3") == 0
    for point in ("lr=1e-3", "lr=2e-3"):
        slurm.wait(job_of(here / "sweep" / point))
    for point, steps in (("lr=1e-3", 5000), ("lr=2e-3", 3)):
        assert submit("finetune", "--config", f"sweep/{point}/job.yaml", "--train.max_steps", steps) == 0
    job = job_of(here / "sweep" / "lr=1e-3")
    slurm.wait(job_of(here / "sweep" / "lr=2e-3"))
    slurm.wait(job, lambda told: told["JobState"] == "RUNNING")
    capsys.readouterr()
    assert submit(*sweep, "optim.lr=1e-3,2e-3,3e-3", "--dry_run") == 0
    said = capsys.readouterr()
    assert f"lr=1e-3: its job {job}, which was asked for otherwise, is running: left out" in said.err
    assert "lr=2e-3: finished before: left out" in said.err
    assert "#SBATCH --array=2\n" in said.out
    slurm.call("scancel", job)


def test_a_run_is_not_submitted_twice(
    slurm: Cluster, here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """While its job is held it waits; once cancelled it may be submitted, and ids of other jobs do not count."""
    held = [*words, "--out_dir", "run", "--slurm.sbatch_flags", "[--hold]"]
    assert submit(*held) == 0
    job = job_of(here / "run")
    capsys.readouterr()
    assert submit(*held) == 2
    folder = here / "run"
    assert errors(capsys) == [f"out_dir: {folder}: its job {job} is pending: wait for it, or `scancel {job}` first"]
    assert cli.main(["runs", "ls", "."]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "run" in line and job in line]
    assert "waiting (JobHeldUser)" in row and f"-/{STEPS}" in row
    note = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps(note | {"script": "/another/job.sh"}))
    assert submit(*held, "--dry_run") == 0
    (folder / "job.json").write_text(json.dumps(note))
    slurm.call("scancel", job)
    assert submit(*held, "--dry_run") == 0


def test_a_dry_run_needs_no_slurm(
    here: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))
    asked = [*words, "--out_dir", "run", "--slurm.gpus_per_node", 8, "--fabric.accelerator", "auto"]
    assert submit(*asked, "--dry_run") == 0
    told = capsys.readouterr()
    assert "no Slurm here: whether it would take the job was not looked at" in told.err
    assert "#SBATCH --gpus-per-node=8\n" in told.out and (here / "run" / "job.sh").read_text() in told.out
    written = (here / "run" / "job.yaml").read_text()
    assert "  devices: 8\n" in written and "  accelerator: cuda\n" in written and "  resume: auto\n" in written
    assert submit(*asked) == 2
    assert errors(capsys) == [
        "sbatch: not found: no Slurm here: submit on a machine of the cluster; --dry_run works without"
    ]
    program, said = here / "sbatch", "Could not establish a configuration source"  # Debian's, without a cluster
    program.write_text(f"#!/bin/sh\necho 'sbatch: fatal: {said}' >&2\nexit 1\n")
    program.chmod(0o755)
    assert submit(*asked, "--dry_run") == 0
    assert f"sbatch: {said}: is the cluster up? Whether it would take the job" in capsys.readouterr().err
    assert submit(*asked) == 2
    assert errors(capsys) == [f"sbatch: {said}: is the cluster up?"]


@pytest.mark.parametrize("shell", [["salloc", "--quiet"], ["bash", "-c"]])
def test_python_in_an_allocation_without_srun_is_told_so(slurm: Cluster, here: Path, shell: list[str]) -> None:
    """A shell of salloc's, and the script of sbatch itself; with srun it goes on, and finds the others at the address
    of a node whose name Slurm alone knows."""
    code = "from litrecipe.engine import allocation as a; a.refuse_plain_start(); print('goes on', a.meeting_place())"
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    flags = ["--nodes=2", "--ntasks-per-node=1"]
    both = f"{python}; srun {python}"
    if shell[0] == "salloc":
        done = slurm.call(*shell, *flags, "bash", "-c", both, check=False, cwd=here)
        said = done.stdout + done.stderr
    else:
        slurm.call("sbatch", "--wait", *flags, "--output=out", f"--wrap={both}", check=False, cwd=here)
        said = (here / "out").read_text()
    assert "InputError: SLURM_NTASKS: 2: litrecipe was started without srun" in said
    assert said.count("goes on 127.0.0.1\n") == 2
