"""Memory of long runs, sampled from outside: does it stay where it is?

A shrunken model with the real tokenizer trains for as long as it is told, saves and is evaluated again and again, and
its resident memory is read from the kernel every few seconds, but for mapped files, whose pages the kernel keeps or
drops as it likes. A run that samples and learns by turns holds now more and now less: what must not grow is the mean of
ten minutes. How far the medians of single minutes lie apart is told beside it. The first ten minutes do not count:
while a run warms up, the allocator still takes from the system what it will keep.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import LITRECIPE, MACHINE, MIB, REPO, environment, read_lines
from kills import METHODS, shrunken_job, steps_done

EVERY = 5.0
"""Seconds between two looks."""
WARM_UP = 10
"""Minutes that do not count, and over which memory is averaged."""
GOAL = 0.02
"""Largest range of means of ten minutes, and largest drift over an hour, as shares of the mean."""
RUNS: dict[str, tuple[str, list[str]]] = {
    "align ppo": ("online", METHODS["online"]["ppo, separate"]),
    "finetune": ("finetune", METHODS["finetune"]["lora"]),
}
"""Verb → what `kills.py` calls its kind, and its flags."""
LONG: dict[str, Any] = {
    "train.max_steps": 1_000_000,
    "train.epochs": None,
    "checkpoint.every": 20,
    "eval.every": 50,
    "data.val": "toy:units?n=16&seed=0&split=test",
}


def soak(work: Path, verb: str, minutes: float) -> Path:
    """Run for so many minutes; the file of samples, a line each: seconds, resident bytes, steps done."""
    place = work / verb.replace(" ", "-")
    samples, out = place / "samples.jsonl", place / "run"
    if samples.exists():
        return samples
    place.mkdir(parents=True, exist_ok=True)
    kind, method = RUNS[verb]
    flags = {**LONG, "train.max_time": f"{round(minutes * 60)}s"}
    job = shrunken_job(place, kind, method, flags)
    (place / "commit").write_text(str(MACHINE["commit"]))
    draft = samples.with_suffix(".tmp")
    with draft.open("w") as file, (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [*LITRECIPE, *job.flags, "--out_dir", str(out)],
            cwd=REPO,
            env=environment(threads=1),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        began = time.monotonic()
        while process.poll() is None:
            sample = {"seconds": round(time.monotonic() - began, 1), "rss": resident(process.pid)}
            if sample["rss"]:
                file.write(json.dumps(sample | {"steps": steps_done(out)}) + "\n")
                file.flush()
            time.sleep(EVERY)
    if process.returncode:
        sys.exit(f"soak: the run ended with {process.returncode}:\n{(place / 'log').read_text()[-3000:]}")
    draft.rename(samples)
    return samples


def resident(pid: int) -> int:
    """Bytes of a process that lie in memory and in no file; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def told(samples: Path) -> dict[str, Any]:
    """How flat the memory of a run was, and what the run did meanwhile."""
    lines = read_lines(samples)
    minutes = by_minute(lines)
    flat = minutes[WARM_UP:-1] or minutes  # the last one also holds the end: merging, saving
    mean = statistics.mean(flat)
    means = [statistics.mean(flat[first : first + WARM_UP]) for first in range(0, len(flat) - WARM_UP + 1, WARM_UP)]
    means = means or [mean]
    spread = (max(means) - min(means)) / mean
    drift = statistics.linear_regression(range(len(flat)), flat).slope * 60 if len(flat) > 1 else 0.0
    run = samples.with_name("run")
    evaluations = sum('"eval_' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    return {
        "commit": samples.with_name("commit").read_text(),
        "minutes": round(lines[-1]["seconds"] / 60, 1),
        "steps": lines[-1]["steps"],
        "evaluations": evaluations,
        "checkpoints": lines[-1]["steps"] // LONG["checkpoint.every"],
        "samples": len(lines),
        "warm_up_minutes": WARM_UP if len(minutes) > WARM_UP + 1 else 0,
        "mean_mib": round(mean / MIB, 1),
        "range_of_minutes": round((max(flat) - min(flat)) / mean, 4),
        "range_of_ten_minutes": round(spread, 4),
        "drift_an_hour": round(drift / mean, 4),
        "is_flat": bool(spread <= GOAL and abs(drift) / mean <= GOAL),
        "mib_by_minute": [round(one / MIB, 1) for one in minutes],
    }


def by_minute(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The median of each minute, bytes."""
    found: dict[int, list[int]] = {}
    for line in lines:
        found.setdefault(int(line["seconds"] // 60), []).append(line["rss"])
    return [statistics.median(of_one) for _, of_one in sorted(found.items())]


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Memory over time, a line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    for verb, found in results.items():
        axes.plot(found["mib_by_minute"], label=f"{verb}: {found['steps']:,} steps")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.axvspan(0, WARM_UP, alpha=0.1, color="black", label="warm-up")
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)
