"""What can be told of a run from its directory, and from the queue where its job is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from litrecipe.checkpoint import state
from litrecipe.cluster.queue import Queued, queued, there_is_slurm
from litrecipe.cluster.script import LOG, NOTE, RECIPE
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json
from litrecipe.config.merge import read_own
from litrecipe.config.pipeline import NOTE as STAGE
from litrecipe.config.recipes import RECIPES
from litrecipe.engine.lock import holder_of
from litrecipe.engine.rundir import RunDir, read_records
from litrecipe.recipes.pipeline import worth_telling


def noted(folder: Path) -> dict[str, Any]:
    """What is noted of the job of a run directory: `job`, `verb`, `script`, `submitted`; empty where there is none.

    Raises InputError where the note cannot be read.
    """
    path = folder / NOTE
    note = read_json(path) if path.is_file() else {}
    if note and not note.keys() >= {"job", "script"}:
        raise InputError(f"{path}: names no job: not as it was written: remove it")
    return note


@dataclass
class Run:
    """A run directory."""

    folder: Path
    job: Queued | None = None
    """Its job, where it has one that has not ended."""

    @cached_property
    def note(self) -> dict[str, Any]:
        """Of its job, the last one."""
        return noted(self.folder)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return read_records(self.folder / "metrics.jsonl")

    @cached_property
    def last(self) -> dict[str, Any]:
        """The newest record of a step; empty before the first."""
        return next((record for record in reversed(self.records) if "loss" in record), {})

    @cached_property
    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return state.all_checkpoints(self.folder / "checkpoints")

    @cached_property
    def verb(self) -> str:
        """What it does: as its job or its pipeline noted, or as its recipe looks."""
        stage = self.folder / STAGE
        told = read_json(stage).get("verb") if stage.is_file() else self.note.get("verb")
        if told:
            return str(told)
        kind = schema.kind_with({key: one if isinstance(one, dict) else () for key, one in self.written.items()})
        return next(verb for verb, one in RECIPES.items() if one is kind)

    @property
    def total(self) -> int | None:
        """Steps after which it ends, as its newest record or checkpoint says; no more than its recipe does, with which
        it may have gone on since."""
        found = self.last.get("total_steps")
        if not found and self.checkpoints:
            found = read_json(self.checkpoints[0] / "state.json").get("total_steps")
        train = self.written.get("train")
        steps = str(train.get("max_steps")) if isinstance(train, dict) else ""
        limits = [int(found)] if found else []
        limits += [int(steps)] if steps.isdecimal() else []
        return min(limits, default=None)

    @cached_property
    def written(self) -> dict[str, Any]:
        """The recipe that the run has written, or that its job is to read, all values as text."""
        path = self.folder / "recipe.yaml"
        path = path if path.is_file() else self.folder / RECIPE
        return read_own(path) if path.is_file() else {}

    @property
    def is_finished(self) -> bool:
        """Whether what it makes is there: beside the folder of its job, where that is no run directory."""
        if RunDir(self.folder).final.exists():
            return True
        out = self.written.get("out")
        return isinstance(out, str) and out not in ("", "null") and (self.folder.parent / Path(out).name).exists()

    @property
    def state(self) -> str:
        """What has become of it, in a word or two.

        `stopped` has saved its last step; `failed` has not, and goes on from the newest checkpoint.
        """
        if holder_of(self.folder) is not None or (self.job is not None and self.job.state in ("RUNNING", "COMPLETING")):
            return "running"
        if self.job is not None and self.job.state == "PENDING":
            return f"waiting ({self.job.reason})" if self.job.reason not in ("", "None") else "waiting"
        if self.job is not None:
            return self.job.state.lower()
        if self.is_finished:
            return "finished"
        if not self.last and not self.checkpoints:
            log = self.folder / LOG
            return "failed" if log.is_file() and log.stat().st_size else "not begun"
        if not self.last:
            return "stopped"
        saved = state.step_of(self.checkpoints[0]) if self.checkpoints else 0
        return "stopped" if saved >= self.last["step"] else "failed"

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the newest record."""
        rate, tokens, step = (self.last.get(key) for key in ("tokens_per_second", "tokens", "step"))
        if self.state != "running" or not self.total or not rate or not tokens or not step:
            return None
        return (self.total - step) * (tokens / step) / rate

    @property
    def measured(self) -> str:
        """What was last measured on held-out data."""
        last: dict[str, Any] = {}
        for record in self.records:
            last |= {key: value for key, value in record.items() if key.startswith("eval_")}
        return " · ".join(f"{name} {value:.4g}" for name, value in worth_telling(last))


def jobs_of(folders: Iterable[Path]) -> dict[str, Queued]:
    """The jobs of run directories that have not ended, by id; none where there is no Slurm.

    Raises InputError where Slurm does not answer.
    """
    ids = {note["job"] for folder in folders if (note := noted(folder))}
    return {job.id: job for job in queued(ids)} if ids and there_is_slurm() else {}


def job_of(folder: Path, queue: Mapping[str, Queued]) -> Queued | None:
    """The job of a run directory among those that have not ended, by id. Ids are used anew, so the script must be the
    one that was noted."""
    note = noted(folder)
    job = queue.get(note.get("job", ""))
    return job if job is not None and job.script == note["script"] else None
