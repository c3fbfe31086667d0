"""What the benchmarks share: the machine, child processes with their peak memory, contests with peers, result files.

A benchmark's own process imports neither torch nor litrecipe: a child's peak memory is read from the kernel, which
counts from the size of the process that started it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
GGUF = REPO / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = Path(os.environ.get("LITRECIPE_SHARED", REPO.parent / "shared"))
LITRECIPE = [sys.executable, "-m", "litrecipe.cli"]
PACKAGES = ("torch", "lightning-fabric", "peft", "transformers", "bitsandbytes", "tokenizers", "numpy", "lm-eval")
MIB = 2**20
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile .975 of Student's t by the number of seeds."""


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, memory, versions and the commit; null for what is not here."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "litrecipe", "benchmarks")
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _git(*command: str) -> str | None:
    """What git says; None in a copy of the tree without its history, and where there is no git."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(REPO), *command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra that this benchmark does not need
        return None


MACHINE = machine()
"""Asked before anything is measured: by its end others may have committed, and nothing may be lost then."""


@dataclass
class Child:
    """A finished process."""

    returncode: int
    seconds: float
    """Wall-clock time."""
    cpu_seconds: float
    """That it computed, in its own code and the kernel's."""
    peak_rss: int
    """Largest resident memory, bytes."""
    output: str
    """Standard output and error together."""

    def check(self) -> Child:
        """Ends the benchmark with the child's last lines when it failed."""
        if self.returncode:
            sys.exit(f"benchmark: a child ended with {self.returncode}:\n{self.output[-4000:]}")
        return self


def environment(threads: int = 2, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: offline, and with a fixed number of threads."""
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **fixed, **(extra or {})}


def run_child(
    command: Sequence[str | Path], *, threads: int = 2, extra: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Child:
    """Runs `command` from the top of the checkout, or from a folder, and measures it."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd or REPO,
            env=environment(threads, extra),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    scale = 1 if sys.platform == "darwin" else 1024
    return Child(process.returncode, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale, text)


def not_refused(code: int, output: str, must_say: Sequence[str]) -> str | None:
    """What is wrong with the answer to a wrong input, or None: it must end with code 2, lines that say what is wrong,
    and no traceback."""
    if code != 2:
        return f"exit {code}: {output[-300:]}"
    if "Traceback" in output:
        return f"traceback: {output[-300:]}"
    if not error_lines(output):
        return f"no error line: {output[-300:]}"
    missing = [words for words in must_say if not any(words in line for line in error_lines(output))]
    return f"does not say {missing[0]!r}: {output[-300:]}" if missing else None


def error_lines(output: str) -> list[str]:
    """The lines by which litrecipe says what is wrong."""
    return [line for line in output.splitlines() if line.startswith("litrecipe: error: ")]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json with the machine it was measured on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": MACHINE, **result}, indent=1) + "\n")
    print(f"written: {path.relative_to(REPO)}")
    return path


def student(values: Sequence[float]) -> dict[str, Any]:
    """The mean over seeds, and half of Student's 95 % interval where there are two to five."""
    if not values:
        return {"seeds": 0, "mean": None, "half": None}
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T_975 else None
    return {"seeds": len(values), "mean": round(statistics.mean(values), 4), "half": half and round(half, 4)}


def write_part(name: str, part: str, made: Any, parts: Collection[str]) -> Path:
    """Writes one of the parts of a result; the others keep what they have."""
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    return write_result(name, {other: kept[other] for other in parts if other in kept} | {part: made})


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns, aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def need_model() -> Path:
    """The real model, or a clear end."""
    if not GGUF.exists():
        sys.exit("benchmark: the real model is not here: run `make model`")
    return GGUF


def as_hf_folder(folder: Path) -> Path:
    """The real model as a Hugging Face folder, made once."""
    if not (folder / "config.json").exists():
        run_child([*LITRECIPE, "model", "import", need_model(), folder]).check()
    return folder


class Workplace:
    """A folder in which litrecipe runs; what is finished there is not run again."""

    def __init__(self, work: Path, threads: int) -> None:
        self.work, self.threads = work, threads
        self.model = as_hf_folder(work / "model")

    def run(self, *words: object) -> None:
        """A command, which must end well."""
        run_child([str(word) for word in (*LITRECIPE, *words)], threads=self.threads).check()

    def finished(self, name: str, verb: str, *words: object) -> Path:
        """The run directory of a finished run."""
        out = self.work / name
        if not (out / "final").exists():
            self.run(*verb.split(), *words, "--out_dir", out)
        return out


@dataclass(frozen=True)
class Goals:
    """What we aim at against a peer."""

    faster: float
    """Times our seconds."""
    larger: float
    """Times our peak memory."""
    apart: float
    """Relative difference of a step's loss."""

    def missed(self, name: str, entry: Mapping[str, Any]) -> list[str]:
        """Those that were not reached against one contestant of `compare`."""
        faster, memory, apart = (entry[key] for key in AGAINST)
        found = []
        if faster < self.faster:
            found.append(f"{name}: {faster} times our seconds, the goal is {self.faster}")
        if memory < self.larger:
            found.append(f"{name}: {memory} times our memory, the goal is {self.larger}")
        if apart > self.apart:
            found.append(f"{name}: losses {apart:.2g} apart, the goal is {self.apart:.2g}")
        return found


MEASURED = ("train_seconds", "wall_seconds", "peak_rss_mib")
AGAINST = ("times_our_seconds", "times_our_memory", "largest_relative_loss_difference")


def train(verb: Sequence[str], out: Path, flags: Sequence[str | Path], threads: int) -> tuple[Child, list[dict]]:
    """One run of litrecipe into a fresh `out`, and the steps that it told of."""
    shutil.rmtree(out, ignore_errors=True)
    child = run_child([*LITRECIPE, *verb, *flags, "--out_dir", out], threads=threads).check()
    return child, [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]


def step_seconds(steps: Sequence[Mapping[str, Any]]) -> float:
    """What the steps of a run took, all together."""
    before, seconds = 0, 0.0
    for step in steps:
        seconds += (step["tokens"] - before) / step["tokens_per_second"]
        before = step["tokens"]
    return seconds


def peer(command: Sequence[str | Path], out: Path, threads: int) -> dict[str, Any]:
    """One run of another library, which writes its own numbers to `out`."""
    child = run_child(command, threads=threads).check()
    told = json.loads(out.read_text())
    assert told.pop("threads") == threads
    told.pop("setup_seconds")
    return measured(child, **told)


def measured(child: Child, train_seconds: float, losses: Sequence[float], **more: Any) -> dict[str, Any]:
    """One run of a contestant."""
    return {
        "train_seconds": round(train_seconds, 2),
        "wall_seconds": round(child.seconds, 2),
        "peak_rss_mib": round(child.peak_rss / MIB),
        "losses": [round(loss, 7) for loss in losses],
        **more,
    }


def compare(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians, and each peer against ours."""
    summary: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(run[key] for run in repeats) for key in MEASURED}
        for name, repeats in runs.items()
    }
    ours = summary["litrecipe"]
    for name in summary.keys() - {"litrecipe"}:
        own, other = runs["litrecipe"][0]["losses"], runs[name][0]["losses"]
        apart = max(abs(a - b) / b for a, b in zip(own, other, strict=True))
        seconds, _, memory = (summary[name][key] / ours[key] for key in MEASURED)
        summary[name] |= zip(AGAINST, (round(seconds, 2), round(memory, 2), round(apart, 7)), strict=True)
    return summary


def print_summary(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """What `compare` found, as a table."""
    header = (*MEASURED, *AGAINST)
    print_table(["", *header], [[name, *(entry.get(key, "") for key in header)] for name, entry in summary.items()])


def peer_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions in a peer's environment."""
    code = "import importlib.metadata as m, sys; print(*(m.version(p) for p in sys.argv[1:]))"
    return dict(zip(packages, run_child([python, "-c", code, *packages]).check().output.split(), strict=True))


TRL_PACKAGES = ("trl", "torch", "transformers", "peft")
