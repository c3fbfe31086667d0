"""`litrecipe runs ls`: the runs below a folder, and how they are doing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from litrecipe.cluster.runs import Run, job_of, jobs_of, noted
from litrecipe.cluster.script import NOTE
from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json


def ls(folder: str = "runs") -> int:
    """A table of the runs below a folder: what they do, their state, step, loss, what was measured, and the time that
    is left. Where Slurm is there, jobs that wait are told as such."""
    root = Path(folder)
    runs = found(root)
    pipelines = sorted(path.parent for path in root.rglob("pipeline.json"))
    if not runs and not pipelines:
        raise InputError(f"{folder}: no runs below this folder: give the folder that holds run directories")
    try:
        jobs = jobs_of(filter(is_noted_well, runs))
    except InputError as error:
        progress.warn(f"{error}; without the queue")
        jobs = {}
    table = Table("run", "verb", "state", "step", "loss", "measured", "tokens/s", "left", "job", box=None)
    rows = {path: readable(path, lambda path: row_of(Run(path, job_of(path, jobs)))) for path in runs}
    rows |= {path: readable(path, row_of_pipeline) for path in pipelines}
    for path in sorted(rows, key=by_numbers):
        table.add_row(str(path), *rows[path])
    console = progress.console()
    if not console.is_terminal:  # a program reads this: do not fold lines
        console.width = 300
    console.print(table, highlight=False, markup=False)
    return 0


def is_noted_well(folder: Path) -> bool:
    """Whether what is noted of a run's job can be read."""
    try:
        noted(folder)
    except InputError:  # its row says so
        return False
    return True


def readable(path: Path, row: Callable[[Path], list[str]]) -> list[str]:
    """A row; where its folder is not as it was written, one that says so."""
    try:
        return row(path)
    except (InputError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        progress.warn(f"{path}: {str(error) or type(error).__name__}")
        return ["-", "unreadable", *["-"] * 6]


def by_numbers(path: Path) -> list[int | str]:
    """A key for sorting in which `r=8` comes before `r=16`."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"([0-9]+)", str(path))]


def found(root: Path) -> list[Path]:
    """Run directories below a folder: those that have told of a step or saved one, and those that have a job."""
    told = {
        path.parent
        for path in root.rglob("recipe.yaml")
        if any((path.parent / made).exists() for made in ("metrics.jsonl", "checkpoints"))
    }
    return sorted(told | {path.parent for path in root.rglob(NOTE)})


def row_of(run: Run) -> list[str]:
    """A run's cells, but for its name."""
    last, total, left = run.last, run.total, run.seconds_left
    return [
        run.verb,
        run.state,
        f"{last.get('step', '-')}" + (f"/{total}" if total else ""),
        in_digits(last.get("loss"), 4),
        run.measured or "-",
        in_digits(last.get("tokens_per_second"), 0),
        "-" if left is None else progress.duration(left),
        run.note.get("job", "-"),
    ]


def in_digits(value: float | None, digits: int) -> str:
    """A number, where there is one."""
    return "-" if value is None else f"{value:.{digits}f}"


def row_of_pipeline(folder: Path) -> list[str]:
    """A pipeline's cells: how many of its stages are finished."""
    stages = read_json(folder / "pipeline.json")["stages"]
    done = sum(stage["done"] for stage in stages.values())
    state = "finished" if done == len(stages) else f"{done} of {len(stages)} stages"
    return ["align pipeline", state, "-", "-", "-", "-", "-", "-"]
