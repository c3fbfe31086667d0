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
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    LITRECIPE,
    REPO,
    SHARED,
    TRL_PACKAGES,
    Goals,
    as_hf_folder,
    compare,
    measured,
    peer,
    peer_versions,
    print_summary,
    read_lines,
    run_child,
    step_seconds,
    train,
    write_result,
)

RECIPE = REPO / "benchmarks" / "finetune.yaml"
PEERS = REPO / "benchmarks" / "peers"
TRL = {
    "trl, its defaults": ["--micro", "8", "--checkpointing"],
    "trl, 8 at once": ["--micro", "8"],
    "trl, 1 at a time": ["--micro", "1"],
}
PROMISED = ("trl, its defaults", "trl, 8 at once")
GOALS = Goals(faster=2.5, larger=1.0, apart=0.01)


def ours(model: Path, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """One run of litrecipe."""
    flags = ["--config", RECIPE, "--model", model, "--data.train", data, "--data.cache_dir", work / "cache"]
    child, steps = train(["finetune"], work / "ours", flags, threads)
    return measured(child, step_seconds(steps), [step["loss"] for step in steps])


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
                run_child([LITRECIPE[0], PEERS / "rows.py", "finetune", work / "ours" / "recipe.yaml", rows]).check()
            for name, command in contestants.items():
                runs[name].append(peer(command, told, args.threads))
        tokenised = read_lines(rows)

    summary = compare(runs)
    print_summary(summary)
    packages = {"trl": (args.peers_python, TRL_PACKAGES), "litgpt": (args.litgpt_python, ("litgpt", "torch"))}
    versions = {name: peer_versions(python, those) for name, (python, those) in packages.items() if python}
    job = {
        "rows": len(tokenised),
        "tokens": sum(len(row["input_ids"]) for row in tokenised),
        "learnt": sum(label != -100 for row in tokenised for label in row["labels"]),
        "threads": args.threads,
        "repeats": args.repeats,
    }
    write_result("finetune", {"job": job, "peers": versions, "summary": summary, "runs": runs})
    missed = {name: GOALS.missed(name, summary[name]) for name in TRL if name in summary}
    print("\n".join(line for lines in missed.values() for line in lines))
    if any(missed.get(name) for name in PROMISED):
        sys.exit("finetune: missed what is promised")


if __name__ == "__main__":
    main()
