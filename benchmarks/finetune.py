"""Fine-tuning beside the peers: seconds, peak memory and losses of the same job in the same run.

    python benchmarks/finetune.py [--peers-python VENV/bin/python] [--litgpt-python VENV/bin/python] [--repeats 3]

The job is benchmarks/finetune.yaml. The peers get our tokens, our mask and our order, so they learn the same; each
contestant is a process of its own, and the contestants take turns, so that a machine that slows down slows all.
Training time is what the steps took; set-up (imports, loading, tokenising) is told beside it.

TRL runs three times: as it comes (8 rows in a padded batch, activations recomputed), the same without recomputing, and
row by row, which is the best for it on a CPU. Says which goals are missed, and ends with 1 when one of those is missed
that are promised: against a batch of 8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import LITRECIPE, MIB, REPO, SHARED, as_hf_folder, print_table, read_lines, run_child, write_result

RECIPE = REPO / "benchmarks" / "finetune.yaml"
PEERS = REPO / "benchmarks" / "peers"
TRL = {
    "trl, its defaults": ["--micro", "8", "--checkpointing"],
    "trl, 8 at once": ["--micro", "8"],
    "trl, 1 at a time": ["--micro", "1"],
}
PROMISED = ("trl, its defaults", "trl, 8 at once")
FASTER, LARGER, APART = 2.5, 1.0, 0.01
"""What we aim at against TRL: times its speed, share of its peak memory, relative difference of a step's loss."""


def ours(model: Path, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """One run of litrecipe."""
    out = work / "ours"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--model", model, "--data.train", data, "--out_dir", out, "--data.cache_dir", work / "cache"]
    child = run_child([*LITRECIPE, "finetune", "--config", RECIPE, *flags], threads=threads).check()
    steps = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    before, train = 0, 0.0
    for step in steps:
        train += (step["tokens"] - before) / step["tokens_per_second"]
        before = step["tokens"]
    return measured(child.seconds, child.peak_rss, train, [step["loss"] for step in steps])


def peer(command: list[str | Path], out: Path, threads: int) -> dict[str, Any]:
    """One run of another library, which writes its own numbers to `out`."""
    child = run_child(command, threads=threads).check()
    told = json.loads(out.read_text())
    assert told["threads"] == threads
    return measured(child.seconds, child.peak_rss, told["train_seconds"], told["losses"])


def measured(wall: float, peak_rss: int, train: float, losses: list[float]) -> dict[str, Any]:
    return {
        "train_seconds": round(train, 2),
        "wall_seconds": round(wall, 2),
        "peak_rss_mib": round(peak_rss / MIB),
        "losses": [round(loss, 5) for loss in losses],
    }


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and each peer against ours."""
    summary: dict[str, Any] = {}
    for name, repeats in runs.items():
        keys = ("train_seconds", "wall_seconds", "peak_rss_mib")
        summary[name] = {key: statistics.median(run[key] for run in repeats) for key in keys}
    for name in runs.keys() - {"litrecipe"}:
        own, other = runs["litrecipe"][0]["losses"], runs[name][0]["losses"]
        apart = [abs(a - b) / b for a, b in zip(own, other, strict=True)]
        summary[name]["times_our_seconds"] = round(
            summary[name]["train_seconds"] / summary["litrecipe"]["train_seconds"], 2
        )
        summary[name]["times_our_memory"] = round(
            summary[name]["peak_rss_mib"] / summary["litrecipe"]["peak_rss_mib"], 2
        )
        summary[name]["largest_relative_loss_difference"] = round(max(apart), 5)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "bench" / "sft128.jsonl")
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with trl")
    parser.add_argument("--litgpt-python", type=Path, help="interpreter of an environment with litgpt")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = as_hf_folder(work / "model")
        rows, told = work / "rows.jsonl", work / "told.json"
        contestants: dict[str, list[str | Path]] = {}
        if args.peers_python:
            trl = [args.peers_python, PEERS / "trl_sft.py", model, rows, told]
            contestants = {name: [*trl, *flags] for name, flags in TRL.items()}
        if args.litgpt_python:
            contestants["litgpt"] = [args.litgpt_python, PEERS / "litgpt_lora.py", model, rows, told]
        runs: dict[str, list[dict[str, Any]]] = {"litrecipe": [], **{name: [] for name in contestants}}
        for repeat in range(args.repeats):
            runs["litrecipe"].append(ours(model, args.data, work, args.threads))
            if repeat == 0:
                run_child([LITRECIPE[0], PEERS / "rows.py", work / "ours" / "recipe.yaml", rows]).check()
            for name, command in contestants.items():
                runs[name].append(peer(command, told, args.threads))
        tokenised = read_lines(rows)

    summary = compare(runs)
    table = [[name, *(entry.get(key, "") for key in HEADER)] for name, entry in summary.items()]
    print_table(["", *HEADER], table)
    versions = {name: version(python, package) for name, python, package in peers(args)}
    job = {
        "rows": len(tokenised),
        "tokens": sum(len(row["input_ids"]) for row in tokenised),
        "learnt": sum(label != -100 for row in tokenised for label in row["labels"]),
        "threads": args.threads,
        "repeats": args.repeats,
    }
    write_result("finetune", {"job": job, "peers": versions, "summary": summary, "runs": runs})
    missed = {name: misses(name, summary[name]) for name in TRL if name in summary}
    print("\n".join(line for lines in missed.values() for line in lines))
    if any(missed.get(name) for name in PROMISED):
        sys.exit("finetune: missed what is promised")


def misses(name: str, entry: dict[str, Any]) -> list[str]:
    """The goals that were not reached against one contestant."""
    faster, memory, apart = (
        entry[key] for key in ("times_our_seconds", "times_our_memory", "largest_relative_loss_difference")
    )
    found = []
    if faster < FASTER:
        found.append(f"{name}: {faster} times our seconds, the goal is {FASTER}")
    if memory < LARGER:
        found.append(f"{name}: {memory} times our memory, the goal is {LARGER}")
    if apart > APART:
        found.append(f"{name}: losses {apart:.2%} apart, the goal is {APART:.0%}")
    return found


HEADER = (
    "train_seconds",
    "wall_seconds",
    "peak_rss_mib",
    "times_our_seconds",
    "times_our_memory",
    "largest_relative_loss_difference",
)


def peers(args: argparse.Namespace) -> list[tuple[str, Path, str]]:
    pairs = [("trl", args.peers_python), ("litgpt", args.litgpt_python)]
    return [(name, python, name) for name, python in pairs if python]


def version(python: Path, package: str) -> dict[str, str]:
    """Versions in a peer's environment."""
    code = "import importlib.metadata as m, sys; print(*(m.version(p) for p in sys.argv[1:]))"
    names = [package, "torch", "transformers", "peft"] if package == "trl" else [package, "torch"]
    return dict(zip(names, run_child([python, "-c", code, *names]).check().output.split(), strict=True))


if __name__ == "__main__":
    main()
