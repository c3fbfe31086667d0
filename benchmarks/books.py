"""A model of 13.8M weights from nothing on books, beside the same model trained by transformers on the same tokens.

    python benchmarks/books.py [--tokens 2.2e6] [--work FOLDER]

From 98 MB of text: a tokenizer of 8,192 tokens, shards, and `pretrain/books-14m` with sequences that attend across
documents, as transformers' Trainer would have them. The Trainer gets our first weights, our sequences in our order and
our learning rates. Written down are both's losses at each step, how far they lie apart (promised: 1e-4 over the first
20 steps, 1 % everywhere), and bits per byte of the held-out books, read by the same code. What is finished in `--work`
is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import LITRECIPE, REPO, SHARED, print_table, read_lines, run_child, step_seconds, write_result

PEERS = REPO / "benchmarks" / "peers"
BOOKS = SHARED / "data" / "pretrain"
HELD_OUT = BOOKS / "books-val.jsonl.gz"
FIRST, EXACT, APART = 20, 1e-4, 0.01
"""Steps that must agree to so much (absolute), and what all must agree to (relative)."""
START = """
import sys
from dataclasses import replace
from pathlib import Path
from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_asked
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.config.schema import load
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.recipes.pretrain import as_asked
recipe = load(PretrainRecipe, [sys.argv[1]])
files = open_asked(recipe.model)
tokenizer = Tokenizer.load(files.tokenizer_dir)
files = replace(files, architecture=as_asked(recipe, files.architecture, tokenizer))
save_model(Path(sys.argv[2]), load_model(files, init="random", seed=recipe.train.seed), files.tokenizer_dir)
"""


def once(made: Path, *command: object, threads: int) -> None:
    """Run a command whose result is `made`, unless that is there."""
    if not made.exists():
        run_child([str(word) for word in command], threads=threads).check()


def bits_per_byte(model: Path, threads: int, work: Path) -> float:
    """Of the held-out books, read in windows of 512 tokens."""
    out = work / f"{model.parent.name}-{model.name}.json"
    task = f"perplexity:{HELD_OUT}?window=512"
    once(out, *LITRECIPE, "evaluate", "--model", model, "--tasks", task, "--out", out, threads=threads)
    (metrics,) = json.loads(out.read_text())["results"].values()
    return float(metrics["bits_per_byte,none"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=2.2e6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if not HELD_OUT.exists():
        sys.exit("books: the books are not here")
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    texts = work / "texts"
    if not texts.exists():
        texts.mkdir()
        for path in BOOKS.glob("books-0*.jsonl.gz"):
            shutil.copy(path, texts)
    threads: Any = {"threads": args.threads}
    tokenizer, shards, run = work / "tokenizer", work / "shards", work / "run"
    once(tokenizer, *LITRECIPE, "data", "train-tokenizer", texts, tokenizer, "--vocab_size", 8192, **threads)
    prepare = ["data", "prepare", texts, "--tokenizer", tokenizer, "--out", shards]
    once(shards / "manifest.json", *LITRECIPE, *prepare, **threads)
    flags = ["--model.tokenizer", tokenizer, "--data.train", shards, "--data.attend_across", "true"]
    flags += ["--train.max_tokens", args.tokens, "--log.loggers", "[]", "--fabric.accelerator", "cpu", "--out_dir", run]
    once(run / "final", *LITRECIPE, "pretrain", "--config", "pretrain/books-14m", *flags, **threads)

    start, rows, rates, told = (work / name for name in ("start", "rows.jsonl", "rates.json", "told.json"))
    once(start, LITRECIPE[0], "-c", START, run / "recipe.yaml", start, **threads)
    once(rows, LITRECIPE[0], PEERS / "rows.py", "pretrain", run / "recipe.yaml", rows, **threads)
    steps = [line for line in read_lines(run / "metrics.jsonl") if "grad_norm" in line]
    rates.write_text(json.dumps([step["lr"] for step in steps]))
    theirs = [LITRECIPE[0], PEERS / "transformers_pretrain.py", start, rows, told, "--batch", 16, "--micro", 8]
    once(told, *theirs, "--lr", max(step["lr"] for step in steps), "--rates", rates, "--save", work / "peer", **threads)

    ours, peer = [step["loss"] for step in steps], json.loads(told.read_text())["losses"]
    apart = [abs(a - b) for a, b in zip(ours, peer, strict=True)]
    relative = max(distance / b for distance, b in zip(apart, peer, strict=True))
    shutil.copy(tokenizer / "tokenizer.json", work / "peer")
    shutil.copy(tokenizer / "tokenizer_config.json", work / "peer")
    bits = {
        name: bits_per_byte(model, args.threads, work)
        for name, model in (("litrecipe", run / "final"), ("transformers", work / "peer"))
    }
    result = {
        "tokens": steps[-1]["tokens"],
        "steps": len(steps),
        "training_seconds": round(step_seconds(steps), 1),
        "threads": args.threads,
        "bits_per_byte": {name: round(value, 4) for name, value in bits.items()},
        "first_steps_apart": max(apart[:FIRST]),
        "all_steps_apart": round(relative, 6),
        "losses": {"litrecipe": [round(x, 5) for x in ours], "transformers": [round(x, 5) for x in peer]},
    }
    print_table(["", "bits per byte"], [[name, f"{value:.4f}"] for name, value in bits.items()])
    print(f"losses apart: {max(apart[:FIRST]):.2g} over {FIRST} steps, {relative:.2%} of the loss over all")
    write_result("books", result)
    if max(apart[:FIRST]) > EXACT or relative > APART or not math.isfinite(relative):
        sys.exit("books: losses are further apart than is promised")


if __name__ == "__main__":
    main()
