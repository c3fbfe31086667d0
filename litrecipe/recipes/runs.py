"""`litrecipe runs`: list runs and compare two of them step by step."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from litrecipe.checkpoint import state
from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.pipeline import NOTE, flat
from litrecipe.config.schema import load_run
from litrecipe.engine.recorder import diff as diff_runs
from litrecipe.engine.rundir import read_records


def ls(folder: str = "runs") -> int:
    """A table of the runs below a folder: step, loss, newest checkpoint, whether it is finished."""
    root = Path(folder)
    runs = sorted(path.parent for path in root.rglob("recipe.yaml") if (path.parent / "metrics.jsonl").exists())
    if not runs:
        raise InputError(f"{folder}: no runs below this folder: give the folder that holds run directories")
    table = Table("run", "step", "loss", "tokens/s", "checkpoint", "final", box=None)
    for run in runs:
        steps = [record for record in read_records(run / "metrics.jsonl") if "loss" in record]
        last = steps[-1] if steps else {}
        checkpoints = state.all_checkpoints(run / "checkpoints")
        table.add_row(
            str(run),
            str(last.get("step", "-")),
            f"{last['loss']:.4f}" if last else "-",
            f"{last['tokens_per_second']:.0f}" if last else "-",
            checkpoints[0].name if checkpoints else "-",
            "yes" if (run / "final").exists() else "no",
        )
    progress.console().print(table)
    return 0


def diff(a: str, b: str, tolerance: float = 0.0) -> int:
    """Say at which step two runs part and why; exit 0 when they agree, 1 when they do not."""
    if not 0 <= tolerance < math.inf:
        raise InputError(f"--tolerance: {tolerance}: give a number of 0 or more")
    if mistakes := [line for folder in dict.fromkeys((a, b)) for line in _of_pipeline(Path(folder))]:
        raise InputError(*mistakes)
    lines = diff_runs(Path(a), Path(b), tolerance)
    if lines:
        lines += [f"recipe: {line}" for line in _of_recipes(Path(a), Path(b))]
    print("\n".join(lines) if lines else "the two runs agree in every step")
    return 1 if lines else 0


WHERE_AND_WHAT_ELSE = ("out_dir", "log.", "checkpoint.", "slurm.", "data.cache_dir")
"""Keys in which two runs that are to be alike may differ."""


def _of_recipes(a: Path, b: Path) -> list[str]:
    """Keys in which the recipes of two runs differ, with both values."""
    first, second = ({} if (recipe := load_run(run)) is None else flat(recipe) for run in (a, b))
    return [
        f"{key}: {first.get(key, 'absent')} and {second.get(key, 'absent')}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key) and not key.startswith(WHERE_AND_WHAT_ELSE)
    ]


def _of_pipeline(folder: Path) -> list[str]:
    """What is wrong with a folder that holds the runs of a pipeline and is none itself; nothing otherwise."""
    noted = [path.parent for path in folder.glob(f"*/{NOTE}")]
    if not noted or (folder / "flight.jsonl").exists():
        return []
    stages = sorted(str(path) for path in noted if (path / "flight.jsonl").exists())
    return [f"{folder}: a pipeline, not a run: compare its stages: {', '.join(stages) or 'none has trained yet'}"]
