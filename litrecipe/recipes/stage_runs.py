"""The runs that a pipeline is made of: what was begun of each, from what, whether it is finished, and what it gave.

`stage.yaml` in a stage's run directory is its recipe as it is run, `stage.json` what the pipeline remembers of it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from litrecipe.checkpoint.manifest import MANIFEST, mistakes_of, write_text
from litrecipe.config import schema
from litrecipe.config.errors import WRONG_INPUT
from litrecipe.config.files import read_json
from litrecipe.config.groups import EvaluateRecipe
from litrecipe.config.pipeline import NOTE, PipelineRecipe, Stage, flat
from litrecipe.config.slurm import LAUNCHER
from litrecipe.engine.child import run_child
from litrecipe.engine.rundir import read_records

FREE = ("checkpoint.", "log.", "fabric.", "slurm.", "data.cache_dir", "train.micro_batch_tokens", "batch_tokens")
"""Keys, or beginnings of keys, that say where and how fast something is made, not what."""
NOT_FREE = ("fabric.precision",)


@dataclass
class StageRun:
    """A stage on disk."""

    pipeline: PipelineRecipe
    name: str

    @property
    def stage(self) -> Stage:
        """Its recipe as it was written."""
        return self.pipeline.stages[self.name]

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return self.pipeline.folder(self.name)

    @cached_property
    def note(self) -> dict[str, Any]:
        """`verb`, `recipe` (key → value, references as written), `made_from` (stage → digest of what it had made),
        `seconds`, `done`; empty before it begins."""
        return self.pipeline.remembered(self.name)

    @property
    def result(self) -> Path:
        """What it makes: a model, results, or what was chosen."""
        recipe = self.pipeline.resolved(self.name)
        if isinstance(recipe, EvaluateRecipe):
            return Path(str(recipe.out))
        return self.folder / ("final" if self.stage.makes_a_model else "sft.jsonl")

    @property
    def done(self) -> bool:
        """Whether it ended well, and what it made is still whole (the digests of weights are not taken again)."""
        if not self.note.get("done") or not self.result.exists():
            return False
        return not self.result.is_dir() or not mistakes_of(self.result, "", digest_weights=False)

    @property
    def digest(self) -> str | None:
        """Of what it made; None where that is not there."""
        path = self.result / MANIFEST if self.result.is_dir() else self.result
        return sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def changes(self) -> list[tuple[str, Any, Any]]:
        """Key, what it was when the stage began, and what it is now."""
        was, now = {"verb": self.note["verb"]} | self.note["recipe"], {"verb": self.stage.verb} | self._settings
        return [(key, was[key], value) for key, value in now.items() if key in was and was[key] != value]

    @property
    def _settings(self) -> dict[str, Any]:
        kept = {key: value for key, value in flat(self.stage.recipe).items() if _counts(key)}
        return dict(json.loads(json.dumps(kept)))

    def run(self, made_from: dict[str, str | None]) -> int:
        """Begin it, or go on with it, in a process of its own; returns the exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = self.folder / "stage.yaml"
        write_text(recipe, schema.dump(self.pipeline.resolved(self.name)))
        before = self.note.get("seconds", 0.0)
        begun = {"verb": self.stage.verb, "recipe": self._settings, "made_from": made_from}
        self._remember(begun | {"seconds": before, "done": False})
        started = time.monotonic()
        launcher = shlex.split(os.environ.get(LAUNCHER, ""))
        program = launcher or [sys.executable, "-m", "litrecipe.cli"]
        code = run_child([*program, *self.stage.verb.split(), "--config", str(recipe)], is_ours=not launcher)
        self._remember(begun | {"seconds": before + time.monotonic() - started, "done": code == 0})
        if code == WRONG_INPUT and not self._made_something:
            (self.folder / NOTE).unlink()  # it never began: who puts the recipe right does not change it
            self.note = {}
        return code

    @property
    def _made_something(self) -> bool:
        """Whether a step was learnt, or a completion sampled."""
        return any(self.folder.glob("checkpoints/step-*")) or any(
            path.is_file() and path.stat().st_size
            for path in (self.folder / name for name in ("metrics.jsonl", "candidates.jsonl"))
        )

    def _remember(self, note: dict[str, Any]) -> None:
        self.note = note
        draft = self.folder / f"{NOTE}.tmp"
        write_text(draft, json.dumps(note, indent=1, ensure_ascii=False))
        draft.replace(self.folder / NOTE)

    def told(self) -> dict[str, Any]:
        """What `pipeline.json` says of it."""
        records = read_records(self.folder / "metrics.jsonl")
        steps = [record["step"] for record in records if "loss" in record]
        last: dict[str, Any] = {}
        for record in records:
            last |= {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        if isinstance(self.stage.recipe, EvaluateRecipe) and self.done:
            from litrecipe.evaluation.run import metrics

            results = read_json(self.result)["results"]
            last = {f"eval_{task}/{name}": one for task, found in results.items() for name, one, _ in metrics(found)}
        return {
            "verb": self.stage.verb,
            "done": self.done,
            "steps": steps[-1] if steps else None,
            "seconds": round(self.note.get("seconds", 0.0), 3),
            "metrics": last,
            "result": str(self.result.relative_to(self.pipeline.out_dir))
            if self.result.is_relative_to(self.pipeline.out_dir)
            else str(self.result),
        }


def _counts(key: str) -> bool:
    return key in NOT_FREE or not key.startswith(FREE)


def what_follows(runs: dict[str, StageRun], name: str) -> list[str]:
    """A stage and all that was begun with what it made, in order."""
    found = [name]
    for other, run in runs.items():
        if run.note and set(run.stage.needs).intersection(found):
            found.append(other)
    return found


def start_anew(runs: dict[str, StageRun], name: str) -> str:
    """The cure for a stage that is not as it was."""
    folders = shlex.join(str(runs[other].folder) for other in what_follows(runs, name))
    return f"name another --out_dir, or start anew from there: rm -r {folders}"


def changed_recipes(runs: dict[str, StageRun], name: str) -> list[str]:
    """A line for each key of a stage that is not what it was when that began."""
    run = runs[name]
    return [
        line
        for key, was, now in (run.changes() if run.note else [])
        for line in run.stage.placed(
            name, [f"{key}: {now}: {run.folder} was made with {was}: put that back, {start_anew(runs, name)}"]
        )
    ]


def other_origins(runs: dict[str, StageRun], name: str) -> list[str]:
    """A line for each stage from another result of which a stage was begun than the present one."""
    lines = []
    for other, digest in runs[name].note.get("made_from", {}).items():
        now = runs[other].digest if other in runs else None
        comes_again = now is None and other in runs and runs[other].note
        if now != digest and not comes_again:
            what = "is gone" if now is None else "is another now"
            lines.append(f"stages.{name}: what it was made from, {other}, {what}: {start_anew(runs, name)}")
    return lines
