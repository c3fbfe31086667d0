"""DPO beside TRL: seconds, peak memory and losses of the same job in the same run.

    python benchmarks/dpo.py [--peers-python VENV/bin/python] [--repeats 3]

The job is benchmarks/dpo.yaml. TRL gets our tokens, our order and the adapter that we start from, so it learns the
same; each contestant is a process of its own, and the contestants take turns, so that a machine that slows down slows
all. Training time is what the reference's log-probabilities and the steps took (none are remembered: our cache is new
in each run); set-up (imports, loading, tokenising) is told beside it.

TRL runs three times: as it comes (8 pairs in a padded batch, activations recomputed), the same without recomputing,
and as it comes with the reference's log-probabilities computed beforehand. Then both learn a few pairs with ever longer
prompts, which we compute once a pair.

Says which goals are missed, and ends with 1 when one of those is missed that are promised: against TRL as it comes, and
that the first loss is log 2.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
    print_table,
    read_lines,
    run_child,
    step_seconds,
    train,
    write_result,
)

RECIPE = REPO / "benchmarks" / "dpo.yaml"
PEERS = REPO / "benchmarks" / "peers"
TRL = {
    "trl, its defaults": ["--checkpointing"],
    "trl, no recomputing": [],
    "trl, reference beforehand": ["--checkpointing", "--precompute"],
}
PROMISED = ("trl, its defaults",)
GOALS = Goals(faster=3.5, larger=1.0, apart=1e-4)
LONG = {100: 48, 200: 124, 350: 236}
"""Tokens of a prompt, about, with what the chat template adds, and the words that make them."""
ANSWER_WORDS = 45
"""About 60 tokens."""
LONG_PAIRS = 4


def ours(model: Path, data: Path, work: Path, threads: int, batch: int = 8) -> dict[str, Any]:
    """One run of litrecipe."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    flags = ["--config", RECIPE, "--model", model, "--data.train", data, "--data.cache_dir", cache]
    flags += ["--train.global_batch_size", str(batch)]
    child, steps = train(["align", "dpo"], work / "ours", flags, threads)
    reference = reference_seconds(cache)
    return measured(
        child,
        reference + step_seconds(steps),
        [step["loss"] for step in steps],
        reference_seconds=round(reference, 2),
        tokens=steps[-1]["tokens"],
        margins=[round(step["rewards/margins"], 7) for step in steps],
    )


def reference_seconds(cache: Path) -> float:
    """What a run took for the reference's log-probabilities, from the lock of their entry to its last file."""
    seconds = 0.0
    for lock in (cache / "reference").glob("*.lock"):
        seconds += (lock.with_suffix("") / "complete.json").stat().st_mtime - lock.stat().st_mtime
    return seconds


def tokenised(work: Path) -> dict[str, int]:
    """Writes the pairs and the adapter of our last run for the peer; counts the tokens."""
    rows = work / "rows.jsonl"
    words = ["align dpo", work / "ours" / "recipe.yaml", rows, work / "adapter.safetensors"]
    run_child([LITRECIPE[0], PEERS / "rows.py", *words]).check()
    pairs = read_lines(rows)
    counts = {name: sum(len(pair[f"{name}_ids"]) for pair in pairs) for name in ("prompt", "chosen", "rejected")}
    return {"pairs": len(pairs), **{f"{name}_tokens": count for name, count in counts.items()}}


def long_pairs(rows: Sequence[Mapping[str, Any]], words: int) -> list[dict[str, str]]:
    """Pairs with prompts of so many words and the same answers whatever the prompts, all from texts of `rows`."""
    said = {name: [message["content"] for row in rows for message in row[name]] for name in ("chosen", "rejected")}
    longest = max(LONG.values())
    starts = pieces(said["chosen"], longest)
    answers = pieces(said["rejected"], ANSWER_WORDS)
    return [
        {"prompt": " ".join(start[:words]), "chosen": " ".join(next(answers)), "rejected": " ".join(next(answers))}
        for start in (next(starts) for _ in range(LONG_PAIRS))
    ]


def pieces(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    """The words of all texts, `size` at a time."""
    words = list(chain.from_iterable(text.split() for text in texts))
    return (words[start : start + size] for start in range(0, len(words) - size + 1, size))


def grow(model: Path, data: Path, work: Path, threads: int, peers_python: Path | None) -> list[dict[str, Any]]:
    """Seconds a pair as prompts grow, ours and TRL's without recomputing; one step each."""
    found = []
    for words in LONG.values():
        file = work / "long.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in long_pairs(read_lines(data), words)))
        own = ours(model, file, work, threads, LONG_PAIRS)
        counts = tokenised(work)
        pairs = counts["pairs"]
        entry: dict[str, Any] = {name: round(count / pairs) for name, count in counts.items() if name != "pairs"}
        entry["seconds_a_pair"] = round(own["train_seconds"] / pairs, 2)
        if peers_python:
            told = peer(trl(peers_python, model, work, LONG_PAIRS), work / "told.json", threads)
            entry["trl_seconds_a_pair"] = round(told["train_seconds"] / pairs, 2)
            entry["times_our_seconds"] = round(told["train_seconds"] / own["train_seconds"], 2)
        found.append(entry)
    return found


def trl(python: Path, model: Path, work: Path, batch: int) -> list[str | Path]:
    """TRL on what `tokenised` wrote."""
    files = [model, work / "rows.jsonl", work / "adapter.safetensors", work / "told.json"]
    return [python, PEERS / "trl_dpo.py", *files, "--batch", str(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "bench" / "pref64.jsonl")
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with trl")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step, for a try with less data")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = as_hf_folder(work / "model")
        contestants: dict[str, list[str | Path]] = {}
        if args.peers_python:
            command = trl(args.peers_python, model, work, args.batch)
            contestants = {name: [*command, *flags] for name, flags in TRL.items()}
        runs: dict[str, list[dict[str, Any]]] = {"litrecipe": [], **{name: [] for name in contestants}}
        for repeat in range(args.repeats):
            runs["litrecipe"].append(ours(model, args.data, work, args.threads, args.batch))
            if repeat == 0:
                counts = tokenised(work)
            for name, command in contestants.items():
                runs[name].append(peer(command, work / "told.json", args.threads))
        grown = grow(model, args.data, work, args.threads, args.peers_python)

    summary = compare(runs)
    for name in contestants:
        summary[name]["largest_margin_difference"] = apart(runs["litrecipe"][0]["margins"], runs[name][0]["margins"])
    summary["litrecipe"]["first_loss_less_log_2"] = round(runs["litrecipe"][0]["losses"][0] - math.log(2), 7)
    print_summary(summary)
    print_table(list(grown[0]), [list(entry.values()) for entry in grown])
    versions = {"trl": peer_versions(args.peers_python, TRL_PACKAGES)} if args.peers_python else {}
    job = {**counts, "batch": args.batch, "threads": args.threads, "repeats": args.repeats}
    result = {"job": job, "peers": versions, "summary": summary, "long_prompts": grown, "runs": runs}
    write_result("dpo", result)
    missed = {name: GOALS.missed(name, summary[name]) for name in contestants}
    print("\n".join(line for lines in missed.values() for line in lines))
    if abs(summary["litrecipe"]["first_loss_less_log_2"]) > GOALS.apart:
        sys.exit("dpo: the first loss is not log 2")
    if any(missed.get(name) for name in PROMISED):
        sys.exit("dpo: missed what is promised")


def apart(own: Sequence[float], other: Sequence[float]) -> float:
    """The largest absolute difference."""
    return round(max(abs(a - b) for a, b in zip(own, other, strict=True)), 7)


if __name__ == "__main__":
    main()
