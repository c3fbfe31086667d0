"""Sampling beside transformers: tokens a second on the same weights in the same run.

    python benchmarks/sampling.py [--repeats 3] [--threads 1]

SmolLM2-135M in fp32 and 32 prompts of about 165 tokens, continued by 64 at temperature 1 as one batch: each prompt
once, a quarter of the prompts four times each (whose prompts we read once), and 64 completions of unlike lengths, 32 at
a time, where we let the next begin as soon as one ends and transformers finishes its batches. Both sides take turns in
one process, so that a machine that slows down slows both; end tokens are tokens as others, so both sample equally many.

Ends with 1 when a goal is missed, or when the two do not continue the same prompts alike greedily.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPO, SHARED, as_hf_folder, print_table, read_lines, run_child, write_result

PEER = REPO / "benchmarks" / "peers" / "transformers_sample.py"
GOALS = {"one each": 1.5, "four each": 1.75, "other lengths": 1.75}
"""Times transformers' tokens a second."""
PROMPTS, SHORTEST, LONGEST = 32, 140, 190
"""How many, and their tokens."""


def write_prompts(model: Path, out: Path) -> list[int]:
    """Pieces of conversations as lines of token ids; returns their lengths."""
    from tokenizers import Tokenizer  # light: a child's peak memory is not measured here

    rows = read_lines(SHARED / "data" / "bench" / "sft128.jsonl")
    text = "\n".join(message["content"] for row in rows for message in row["messages"])
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    chance, start, prompts = random.Random(0), 0, []
    for _ in range(PROMPTS):
        stop = start + chance.randint(SHORTEST, LONGEST)
        prompts.append(ids[start:stop])
        start = stop
    assert start <= len(ids)
    out.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return [len(prompt) for prompt in prompts]


def rates(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Tokens a second of wall-clock time: the median, and each."""
    each = [run["tokens"] / run["seconds"] for run in runs]
    return {"tokens": runs[0]["tokens"], "tokens_per_second": round(statistics.median(each), 2), "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = as_hf_folder(work / "model")
        lengths = write_prompts(model, work / "prompts.jsonl")
        flags = ["--repeats", args.repeats, "--new_tokens", args.new_tokens]
        files = [model, work / "prompts.jsonl", work / "told.json"]
        run_child([sys.executable, PEER, *files, *map(str, flags)], threads=args.threads).check()
        told = json.loads((work / "told.json").read_text())
    assert told["threads"] == args.threads
    jobs: dict[str, dict[str, Any]] = {}
    for job, sides in told["jobs"].items():
        jobs[job] = {name: rates(runs) for name, runs in sides.items()}
        ours, theirs = (jobs[job][name]["tokens_per_second"] for name in ("litrecipe", "transformers"))
        jobs[job] |= {"times_their_rate": round(ours / theirs, 2), "goal": GOALS[job]}
    print_table(
        ["tokens/s", "litrecipe", "transformers", "times", "goal"],
        [
            [
                job,
                entry["litrecipe"]["tokens_per_second"],
                entry["transformers"]["tokens_per_second"],
                entry["times_their_rate"],
                entry["goal"],
            ]
            for job, entry in jobs.items()
        ],
    )
    result = {
        "threads": args.threads,
        "prompt_tokens": lengths,
        "new_tokens": args.new_tokens,
        "same_greedily": told["same_greedily"],
        "jobs": jobs,
    }
    write_result("sampling", result)
    missed = [
        f"{job}: {e['times_their_rate']}, not {e['goal']}"
        for job, e in jobs.items()
        if e["times_their_rate"] < e["goal"]
    ]
    if told["same_greedily"] < 1:
        missed.append(f"only {told['same_greedily']:.0%} of the greedy completions are the same")
    if missed:
        sys.exit("sampling: " + "; ".join(missed))


if __name__ == "__main__":
    main()
