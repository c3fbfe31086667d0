"""Pretraining beside the peers: seconds, share of the processor's peak, peak memory and losses of the same job.

    python benchmarks/pretrain.py [--peers-python VENV/bin/python] [--litgpt-python VENV/bin/python] [--repeats 3]

The job is benchmarks/pretrain.yaml: all weights of SmolLM2-135M, sequences of 512 tokens, fp32. The peers get our
tokens in our order; each contestant is a process of its own, and they take turns. transformers runs as people run it,
with its Trainer, all sequences of a step at once, and one by one.

MFU is the model's operations by the seconds of a step and by the peak: what `litrecipe/model/flops.py` counts (two a
weight and token in the layers, the head where something is predicted, causal attention as the half that it is, three
times that for forward and backward), the same for all contestants; the peak is the best of some fp32 matrix products of
1,536 x 1,536 with as many threads, measured before each turn. The first step, which warms up, does not count. Says
which goals are missed, and ends with 1 when one is missed that is promised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    LITRECIPE,
    REPO,
    SHARED,
    as_hf_folder,
    measured,
    peer,
    peer_versions,
    print_table,
    read_lines,
    run_child,
    train,
    write_result,
)

RECIPE = REPO / "benchmarks" / "pretrain.yaml"
PEERS = REPO / "benchmarks" / "peers"
STEPS = 6
FASTER, APART = 1.15, 1e-3
"""How many times as fast as transformers, and how far apart losses may lie."""
PEAK = "from litrecipe.engine.peak import measured_flops; import torch; print(measured_flops(torch.float32))"
FLOPS = """
import json, sys, numpy as np
from litrecipe.checkpoint.source import open_model
from litrecipe.model.flops import training_flops
from litrecipe.model.row import Sample, Segment
weights = np.ones(512, dtype=np.float32)
weights[0] = 0
sample = Sample("", (Segment(np.zeros(512, dtype=np.int64), weights),))
print(training_flops(open_model(sys.argv[1]).architecture, [sample] * 2))
"""


def ours(model: Path, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """One run of litrecipe."""
    flags = ["--config", RECIPE, "--model", model, "--data.train", data, "--data.cache_dir", work / "cache"]
    child, steps = train(["pretrain"], work / "ours", flags, threads)
    ends = [0, *(step["tokens"] for step in steps)]
    seconds = [(b - a) / s["tokens_per_second"] for a, b, s in zip(ends, ends[1:], steps, strict=False)]
    losses = [step["loss"] for step in steps]
    return measured(child, sum(seconds), losses, steps_seconds=[round(one, 3) for one in seconds])


def texts(work: Path) -> Path:
    """Books, or where they are not at hand text that is made here."""
    books = SHARED / "data" / "pretrain" / "books-val.jsonl.gz"
    if books.exists():
        return books
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]
    made = work / "made.jsonl"
    lines = [" ".join(words[(n * n * 7 + m * m * 3) % len(words)] for m in range(400)) for n in range(200)]
    made.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers-python", type=Path, default=LITRECIPE[0], help="interpreter of an environment with transformers"
    )
    parser.add_argument("--litgpt-python", type=Path, help="interpreter of an environment with litgpt")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, data = as_hf_folder(work / "model"), texts(work)
        rows, told = work / "rows.jsonl", work / "told.json"
        theirs = [args.peers_python, PEERS / "transformers_pretrain.py", model, rows, told]
        contestants: dict[str, list[str | Path]] = {
            "transformers": theirs,
            "transformers, 1 at a time": [*theirs, "--micro", "1"],
        }
        if args.litgpt_python:
            contestants["litgpt"] = [args.litgpt_python, PEERS / "litgpt_pretrain.py", model, rows, told]
        flops = float(run_child([LITRECIPE[0], "-c", FLOPS, model]).check().output)
        runs: dict[str, list[dict[str, Any]]] = {"litrecipe": [], **{name: [] for name in contestants}}
        for repeat in range(args.repeats):
            for name, command in {"litrecipe": [], **contestants}.items():
                peak = float(run_child([LITRECIPE[0], "-c", PEAK], threads=args.threads).check().output)
                run = peer(command, told, args.threads) if command else ours(model, data, work, args.threads)
                step = statistics.median(run["steps_seconds"][1:])
                runs[name].append(run | {"step_seconds": step, "peak_gflops": round(peak / 1e9, 1)})
                runs[name][-1]["mfu"] = round(flops / step / peak, 3)
                if not command and repeat == 0:
                    run_child([LITRECIPE[0], PEERS / "rows.py", "pretrain", work / "ours/recipe.yaml", rows]).check()
        assert len(read_lines(rows)) == 2 * STEPS

    summary = {name: compared(found, runs["litrecipe"]) for name, found in runs.items()}
    print_table(["", *summary["transformers"]], [[name, *map(str, entry.values())] for name, entry in summary.items()])
    versions = {"litgpt": peer_versions(args.litgpt_python, ("litgpt", "torch"))} if args.litgpt_python else {}
    job = {"sequences": 2, "tokens": 512, "steps": STEPS, "flops": flops, "threads": args.threads}
    write_result(
        "pretrain", {"job": job | {"repeats": args.repeats}, "peers": versions, "summary": summary, "runs": runs}
    )
    missed = [
        f"{name}: {entry['times_our_seconds']} times our seconds, the goal is {FASTER}; losses {entry['apart']} apart"
        for name, entry in summary.items()
        if name.startswith("transformers") and (entry["times_our_seconds"] < FASTER or entry["apart"] > APART)
    ]
    if missed:
        sys.exit("\n".join(missed))


def compared(found: list[dict[str, Any]], own: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over repeats, and a contestant against ours."""

    def median(runs: list[dict[str, Any]], key: str) -> float:
        return float(statistics.median(run[key] for run in runs))

    losses = zip(own[0]["losses"], found[0]["losses"], strict=True)
    return {
        "step_seconds": round(median(found, "step_seconds"), 3),
        "mfu": round(median(found, "mfu"), 3),
        "peak_rss_mib": median(found, "peak_rss_mib"),
        "times_our_seconds": round(median(found, "step_seconds") / median(own, "step_seconds"), 3),
        "times_our_memory": round(median(found, "peak_rss_mib") / median(own, "peak_rss_mib"), 2),
        "apart": round(max(abs(a - b) / b for a, b in losses), 7),
    }


if __name__ == "__main__":
    main()
