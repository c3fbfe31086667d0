"""The run directory: recipe.yaml, metrics.jsonl, flight.jsonl, checkpoints/, final/ (and final.earlier/)."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from litrecipe.checkpoint import state
from litrecipe.checkpoint.manifest import is_disk_full, mistakes_of, refuse_foreign, write_text
from litrecipe.config.errors import InputError
from litrecipe.config.files import try_writing
from litrecipe.config.progress import say, warn
from litrecipe.engine import lock


class RunDir:
    """Paths of one run, and its append-only files."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    def check(self, resume: str | None) -> None:
        """Raise InputError for what can be told without reading a checkpoint, before anything slow is done."""
        found = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        try:
            try_writing(found)
        except OSError as error:
            why = (
                "disk full: make room" if is_disk_full(error) else f"{found}: {error.strerror}: name another --out_dir"
            )
            raise InputError(f"out_dir: {self.path}: {why}") from error
        refuse_foreign(self.final)
        if resume is None:
            if self.holds_a_run:
                raise InputError(
                    f"out_dir: {self.path}: holds a run already: continue it with --checkpoint.resume auto, or name "
                    "another --out_dir"
                )
        elif resume != "auto":
            folder = Path(resume)
            if not (folder / "state.json").is_file():
                raise InputError(
                    f"checkpoint.resume: {resume}: no checkpoint: give a folder …/checkpoints/step-…, or `auto`"
                )
            if self.holds_a_run and not self.owns(folder):
                raise InputError(
                    f"out_dir: {self.path}: holds another run than the one of checkpoint.resume {resume}: name another "
                    "--out_dir"
                )

    def check_as_run(self, resume: str | None) -> None:
        """`check`, of a run that writes its recipe here, which no other may be: a run makes its `checkpoints` first."""
        self.check(resume)
        if (self.path / "recipe.yaml").exists() and not (self.checkpoints.exists() or self.final.exists()):
            raise InputError(
                f"out_dir: {self.path}: holds a recipe.yaml that no run wrote, and would be written over: name another "
                "--out_dir"
            )

    def find_resume(self, resume: str | None) -> Path | None:
        """The checkpoint to continue from, all of it read and found complete, or None for a fresh start.

        `auto` takes the newest complete checkpoint, if there is one. Raises InputError when `resume` names none, and
        when the run would go over an older one, or over steps of its own that were saved later.
        """
        self.check(resume)
        if resume is None:
            return None
        if resume == "auto":
            found = state.newest_complete(self.checkpoints, warn)
            if found is None and state.all_checkpoints(self.checkpoints):
                warn(f"{self.checkpoints}: no complete checkpoint: starting from the first step")
            elif found is None:
                say(f"{self.path}: no checkpoint to resume: starting from the first step")
            return found
        folder = Path(resume)
        if mistakes := mistakes_of(folder, state.CURE):
            raise InputError(*(f"checkpoint.resume: {mistake}" for mistake in mistakes))
        for path in state.all_checkpoints(self.checkpoints):
            if state.step_of(path) > state.step_of(folder) and not mistakes_of(path, state.CURE):
                raise InputError(
                    f"checkpoint.resume: {resume}: {self.path} holds {path.name}, which is later: name another "
                    "--out_dir, or continue there with --checkpoint.resume auto"
                )
        return folder

    def held(self) -> AbstractContextManager[None]:
        """Keep every other process from training here while the body runs; a dead process keeps nobody.

        Raises InputError when another holds it.
        """
        return lock.held(self.path)

    @property
    def holds_a_run(self) -> bool:
        """Whether something was trained here."""
        return bool(state.all_checkpoints(self.checkpoints)) or self.final.exists()

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run's."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def start(self, recipe_yaml: str, resumed_step: int) -> None:
        """Write the resolved recipe and drop records of steps that will be done again."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        state.clear_leftovers(self.checkpoints)
        write_text(self.path / "recipe.yaml", recipe_yaml)
        for name in ("metrics.jsonl", "flight.jsonl"):
            _truncate_after(self.path / name, resumed_step)

    def put_final_aside(self) -> None:
        """Let nobody take the model of an earlier end for that of the run that goes on."""
        if not self.final.exists():
            return
        earlier = self.path / "final.earlier"
        refuse_foreign(earlier)
        say(f"{self.final}: the run goes on from there: moved to {earlier.name}")
        shutil.rmtree(earlier, ignore_errors=True)
        self.final.replace(earlier)

    def last_evaluation(self) -> int | None:
        """The step of the newest evaluation on record."""
        steps = [r["step"] for r in read_records(self.path / "metrics.jsonl") if any(k.startswith("eval_") for k in r)]
        return steps[-1] if steps else None

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line of JSON; the folder is made again if somebody took it away."""
        if not self.path.exists():
            warn(f"out_dir: {self.path}: is gone, with what was in it: made again")
            self.path.mkdir(parents=True)
        with (self.path / name).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON lines file.

    A last line torn by a crash is left out; what a power cut spoilt is left out with a warning.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        elif line:
            warn(f"{path}:{number}: no record but {line[:20]!r}: left out")
    return records


def _truncate_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    draft = path.with_name(path.name + ".tmp")
    write_text(draft, "".join(json.dumps(record) + "\n" for record in kept))
    draft.replace(path)
