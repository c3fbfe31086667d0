"""`litrecipe runs ls`: what is told of a run from what lies in its directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from litrecipe.cluster import listing, queue, runs
from litrecipe.cluster.queue import Queued
from litrecipe.cluster.runs import Run
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoRecipe, Train
from litrecipe.engine.rundir import RunDir


def make(folder: Path, steps: int = 4, saved: int | None = 4, total: int = 10, **evaluation: float) -> Run:
    """A run that came so far, at 100 tokens a step and 50 tokens a second."""
    folder.mkdir(parents=True)
    recipe = DpoRecipe(train=Train(max_steps=total + 5))
    (folder / "recipe.yaml").write_text(schema.dump(recipe))
    records: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "tokens": 100 * step, "tokens_per_second": 50.0}
        for step in range(1, steps + 1)
    ]
    records += [{"step": steps, "eval_loss": 0.5} | evaluation] if evaluation else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if saved is not None:
        checkpoint = folder / "checkpoints" / f"step-{saved:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"total_steps": total + 2}))
    return Run(folder)


def test_states_of_runs(tmp_path: Path) -> None:
    assert make(tmp_path / "stopped").state == "stopped"
    assert make(tmp_path / "failed", steps=5).state == "failed"
    assert make(tmp_path / "lost", saved=None).state == "failed"
    fresh = make(tmp_path / "fresh", steps=0, saved=None)
    assert fresh.state == "not begun"
    (fresh.folder / "job.log").write_text("no such data")
    assert fresh.state == "failed"
    done = make(tmp_path / "done")
    (done.folder / "final").mkdir()
    assert done.state == "finished"
    with RunDir(done.folder).held():
        assert done.state == "running", "it goes on"
    assert done.state == "finished"
    measured = Run(tmp_path / "results.job")
    measured.folder.mkdir()
    (measured.folder / "job.yaml").write_text("out: somewhere/results.json\n")
    assert measured.state == "not begun"
    (tmp_path / "results.json").write_text("{}")
    assert measured.state == "finished"
    for state, said in (("PENDING", "waiting (Priority)"), ("RUNNING", "running"), ("SUSPENDED", "suspended")):
        assert Run(done.folder, Queued("7", state, "Priority", "")).state == said


def test_what_is_told_of_a_run(tmp_path: Path) -> None:
    """Ten steps more of 100 tokens at 50 a second take 16 s for the 8 that are left of 12; the total is that of the
    newest record or checkpoint, or the recipe's."""
    run = make(tmp_path / "run", eval_loss=0.25)
    assert (run.verb, run.total, run.measured, run.seconds_left) == ("align dpo", 12, "eval_loss 0.25", None)
    with RunDir(run.folder).held():
        assert run.seconds_left == 16.0
    assert make(tmp_path / "unsaved", saved=None).total == 15
    further = make(tmp_path / "further").folder
    with (further / "metrics.jsonl").open("a") as records:
        records.write('{"step": 5, "loss": 0.2, "total_steps": 14}\n')
    assert Run(further).total == 14, "it went on with another recipe"
    (further / "recipe.yaml").write_text(schema.dump(DpoRecipe(train=Train(max_steps=5))))
    assert Run(further).total == 5, "and has then found nothing left to do"


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and pipelines, with jobs where the queue has them and their script is the one that was noted."""
    for name in ("a", "b", "pipe/sft"):
        make(tmp_path / name)
    (tmp_path / "pipe" / "pipeline.json").write_text(
        json.dumps({"stages": {"sft": {"done": True}, "dpo": {"done": False}}})
    )
    (tmp_path / "c").mkdir()
    for name, job in (("a", "7"), ("b", "8"), ("c", "9_1")):
        note = {"job": job, "verb": "finetune", "script": f"/{name}/job.sh"}
        (tmp_path / name / "job.json").write_text(json.dumps(note))
    there = [Queued("7", "RUNNING", "None", "/a/job.sh"), Queued("8", "RUNNING", "None", "/other/job.sh")]
    there.append(Queued("9_1", "PENDING", "Dependency", "/c/job.sh"))
    monkeypatch.setattr(runs, "there_is_slurm", lambda: True)
    monkeypatch.setattr(runs, "queued", lambda ids: there if ids == {"7", "8", "9_1"} else [])
    monkeypatch.chdir(tmp_path)
    assert listing.ls(".") == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    told = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert told["a"] == ["finetune", "running", "4/12", "0.2500", "-", "50", "16 s", "7"]
    assert told["b"] == ["finetune", "stopped", "4/12", "0.2500", "-", "50", "-", "8"]
    assert told["c"] == ["finetune", "waiting (Dependency)", "-", "-", "-", "-", "-", "9_1"]
    assert told["pipe"][:2] == ["align pipeline", "1 of 2 stages"]
    assert told["pipe/sft"][:3] == ["align dpo", "stopped", "4/12"]


def test_one_folder_that_is_not_as_it_was_written_does_not_end_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "whole")
    empty, bare, lost = (make(tmp_path / name).folder for name in ("empty", "bare", "lost"))
    (empty / "job.json").write_text("")
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    (lost / "checkpoints" / "step-00000004" / "state.json").unlink()
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "pipeline.json").write_text("{}")
    assert listing.ls(str(tmp_path)) == 0
    told = capsys.readouterr()
    rows = {line.split()[0].rpartition("/")[2]: line.split()[1:] for line in told.out.splitlines()[1:]}
    assert rows["whole"] == ["align", "dpo", "stopped", "4/12", "0.2500", "-", "50", "-", "-"]
    assert rows["bare"] == ["align", "dpo", "stopped", "1/12", "-", "-", "-", "-", "-"]
    assert all(rows[name] == ["-", "unreadable", *"------"] for name in ("empty", "lost", "pipe"))
    assert "job.json" in told.err and "step-00000004/state.json: no such file" in told.err


def test_a_queue_that_does_not_answer_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "job.json").write_text(json.dumps({"job": "7", "verb": "finetune", "script": "/a/job.sh"}))
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(runs, "there_is_slurm", lambda: True)
    assert listing.ls(str(tmp_path)) == 0
    told = capsys.readouterr()
    assert "Unable to contact slurm controller: is the cluster up?; without the queue" in told.err
    assert "stopped" in told.out
    assert queue.queued([]) == []


def test_a_folder_without_runs_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs below"):
        listing.ls(str(tmp_path))
