"""The run directory: recipe.yaml, metrics.jsonl, flight.jsonl, checkpoints/, final/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from litrecipe.checkpoint import state
from litrecipe.config.errors import InputError
from litrecipe.config.progress import warn


class RunDir:
    """Paths of one run, and its append-only files."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    def find_resume(self, resume: str | None) -> Path | None:
        """The checkpoint to continue from, or None for a fresh start.

        `auto` takes the newest complete checkpoint, if there is one. Raises InputError when `resume` names none, and
        when a fresh start would run over an older run.
        """
        if resume == "auto":
            return state.newest_complete(self.checkpoints, warn)
        if resume is not None:
            folder = Path(resume)
            if not folder.is_dir():
                raise InputError(f"checkpoint.resume: {resume}: no such folder: give a checkpoint folder or `auto`")
            return folder
        if self.checkpoints.exists() or self.final.exists():
            raise InputError(
                f"out_dir: {self.path}: holds a run already: continue it with --checkpoint.resume auto, or name "
                "another --out_dir"
            )
        return None

    def start(self, recipe_yaml: str, resumed_step: int) -> None:
        """Write the resolved recipe and drop records of steps that will be done again."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        state.write_text(self.path / "recipe.yaml", recipe_yaml)
        for name in ("metrics.jsonl", "flight.jsonl"):
            _truncate_after(self.path / name, resumed_step)

    def last_evaluation(self) -> int | None:
        """The step of the newest evaluation on record."""
        steps = [r["step"] for r in read_records(self.path / "metrics.jsonl") if any(k.startswith("eval_") for k in r)]
        return steps[-1] if steps else None

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line of JSON."""
        with (self.path / name).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSON lines file; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _truncate_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    draft = path.with_name(path.name + ".tmp")
    state.write_text(draft, "".join(json.dumps(record) + "\n" for record in kept))
    draft.replace(path)
