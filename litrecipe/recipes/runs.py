"""`litrecipe runs diff`: compare two runs step by step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from litrecipe.config.errors import InputError
from litrecipe.config.pipeline import NOTE, flat
from litrecipe.config.schema import load_run
from litrecipe.engine.recorder import diff as diff_runs


def diff(a: str, b: str, tolerance: float = 0.0) -> int:
    """Say at which step two runs part and why; exit 0 when they agree, 1 when they do not."""
    if not 0 <= tolerance < math.inf:
        raise InputError(f"--tolerance: {tolerance}: give a number of 0 or more")
    if mistakes := [line for folder in dict.fromkeys((a, b)) for line in _of_pipeline(Path(folder))]:
        raise InputError(*mistakes)
    lines = diff_runs(Path(a), Path(b), tolerance)
    if lines and (others := _of_recipes(Path(a), Path(b))):
        lines[1:1] = ["their recipes are not the same:", *(f"  {line}" for line in others), "apart from that:"]
    print("\n".join(lines) if lines else "the two runs agree in every step")
    return 1 if lines else 0


WHERE_AND_WHAT_ELSE = ("out_dir", "log.", "checkpoint.", "slurm.", "data.cache_dir")
"""Keys in which two runs that are to be alike may differ."""


def _of_recipes(a: Path, b: Path) -> list[str]:
    """Keys in which the recipes of two runs differ, with both values."""
    return differing(load_run(a), load_run(b))


def differing(a: Any, b: Any) -> list[str]:
    """Keys in which two recipes differ, with both values, but for where and how they run; None has no keys."""
    first, second = ({} if recipe is None else flat(recipe) for recipe in (a, b))
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
