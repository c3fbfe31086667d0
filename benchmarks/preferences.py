"""What is learnt from preferences: reward models, DPO with LoRA and DoRA, and fine-tuning before DPO.

    python benchmarks/preferences.py [--only reward|adapters|tuned]

Runs the real model (SmolLM2-135M-Instruct) on public comparisons: AlpacaEval annotations (held out by prompt),
OpenAssistant rankings, and polite against rude answers (of both a fifth of the first questions is held out here).
Accuracies on held-out pairs come with standard errors that take all pairs of a prompt for one observation. Parts that
are not run keep their numbers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from common import SHARED, Workplace, print_table, read_lines, write_part

PREFERENCES = SHARED / "data" / "pref"
HELD_OUT = 5
"""One first question in this many."""
ADAPTER = ["--adapter.r", 16, "--adapter.alpha", 32]
COMMON = [
    "--data.max_length",
    512,
    "--train.micro_batch_tokens",
    2048,
    "--log.loggers",
    "[]",
    "--checkpoint.every",
    "null",
]
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
TUNED_LR = 2e-4
"""Of DPO after fine-tuning, and of DPO alone beside it."""
SEEDS = range(5)
T_4 = 2.776
"""Quantile .975 of Student's t with the four degrees of freedom of five seeds."""
ASKED = 60
"""Held-out prompts that trained models answer."""

Rows = list[dict[str, Any]]


def rows_of(name: str) -> Rows:
    """The rows of a set."""
    with gzip.open(PREFERENCES / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def question(row: dict[str, Any]) -> str:
    """The first thing that is asked."""
    asked = row.get("prompt") or f"{row['instruction']}\n{row['input']}".strip()
    return asked[0]["content"] if isinstance(asked, list) else asked


def split(rows: Rows) -> tuple[Rows, Rows]:
    """What is trained on and what is held out: no first question is in both."""

    def is_held_out(row: dict[str, Any]) -> bool:
        return int.from_bytes(blake2b(question(row).encode(), digest_size=8).digest(), "big") % HELD_OUT == 0

    return [row for row in rows if not is_held_out(row)], [row for row in rows if is_held_out(row)]


def write(path: Path, rows: Rows, count: int | None = None) -> Path:
    """Some of the rows, chosen by a fixed seed."""
    if count is not None and count < len(rows):
        rows = random.Random(0).sample(rows, count)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Bench(Workplace):
    """Trains reward models and policies, and evaluates them."""

    def train(self, name: str, verb: str, *words: object) -> Path:
        """The run directory of a finished run."""
        return self.finished(name, verb, *ADAPTER, *COMMON, *words)

    def evaluate(self, name: str, *words: object) -> list[dict[str, Any]]:
        """The samples of an evaluation."""
        out = self.work / f"{name}.json"
        if not out.exists():
            self.run("evaluate", *words, "--out", out, "--log_samples")
        [samples] = self.work.glob(f"{name}.samples.*.jsonl")
        return read_lines(samples)

    def reward_model(self, name: str) -> Path:
        """A reward model of one of the sets."""
        if name == "alpacaeval_gpt4":
            parts, counts = (rows_of(f"{name}_train"), rows_of(f"{name}_test")), (600, 500)
        else:
            parts, counts = split(rows_of(name)), (None, None)
        train, val = (self.work / f"{name}-{part}.jsonl" for part in ("train", "val"))
        write(train, parts[0], counts[0]), write(val, parts[1], counts[1])
        flags = ["--model", self.model, "--data.train", train, "--data.val", val, "--adapter.method", "lora"]
        flags += ["--optim.lr", 2e-4, "--train.global_batch_size", 16, "--schedule.warmup_steps", 5]
        epochs = 2 if name == "rasbt_politeness" else 1
        return self.train(f"reward-{name}", "align reward", *flags, "--train.epochs", epochs)


def reward(bench: Bench) -> dict[str, Any]:
    """A reward model a set, and how well it tells held-out pairs apart."""
    found = {}
    for name in ("rasbt_politeness", "oasst_en100_ranked", "alpacaeval_gpt4"):
        out = bench.reward_model(name)
        held_out = json.loads((out / "held_out.json").read_text())
        found[name] = {"training_pairs": len(read_lines(bench.work / f"{name}-train.jsonl")), **held_out}
    names = ("accuracy", "length_accuracy", "shorter_accuracy")
    print_table(
        ["set", "pairs", *names],
        [
            [name, one["pairs"], *(f"{one[key]['value']:.3f} ± {one[key]['stderr']:.3f}" for key in names)]
            for name, one in found.items()
        ],
    )
    return found


def dpo_data(bench: Bench) -> tuple[Path, Path]:
    """240 polite against rude answers, and what is held out."""
    train, val = split(rows_of("rasbt_politeness"))
    return write(bench.work / "dpo-train.jsonl", train, 240), write(bench.work / "dpo-val.jsonl", val)


def dpo(bench: Bench, name: str, *words: object) -> dict[str, float]:
    """A DPO run, and what its last evaluation says."""
    train, val = dpo_data(bench)
    flags = ["--data.train", train, "--data.val", val, "--data.cache_dir", bench.work / "cache"]
    flags += ["--train.global_batch_size", 16, "--schedule.warmup_steps", 2]
    out = bench.train(name, "align dpo", *flags, *words)
    [last] = [record for record in read_lines(out / "metrics.jsonl") if "eval_loss" in record]
    return {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}


def adapters(bench: Bench) -> dict[str, Any]:
    """LoRA and DoRA of one rank, each at its best of three learning rates, five seeds that share their data order."""
    found: dict[str, Any] = {}
    for method in ("lora", "dora"):
        words = ["--model", bench.model, "--adapter.method", method]
        tried = {lr: dpo(bench, f"dpo-{method}-{lr:g}-0", *words, "--optim.lr", lr) for lr in LEARNING_RATES}
        best = min(tried, key=lambda lr: tried[lr]["loss"])
        seeds = [
            dpo(bench, f"dpo-{method}-{best:g}-{seed}", *words, "--optim.lr", best, "--train.seed", seed)
            for seed in SEEDS
        ]
        found[method] = {"tried": {f"{lr:g}": one for lr, one in tried.items()}, "best_lr": best, "seeds": seeds}
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        values = {method: [seed[name] for seed in found[method]["seeds"]] for method in ("lora", "dora")}
        apart = [dora - lora for lora, dora in zip(values["lora"], values["dora"], strict=True)]
        half = T_4 * statistics.stdev(apart) / len(apart) ** 0.5
        found.setdefault("dora_minus_lora", {})[name] = {"mean": statistics.mean(apart), "half_interval_95": half}
        print(
            f"{name}: "
            + ", ".join(
                f"{m} {statistics.mean(v):.4f} ± {T_4 * statistics.stdev(v) / 5**0.5:.4f}" for m, v in values.items()
            ),
            f"DoRA - LoRA {statistics.mean(apart):+.4f} ± {half:.4f}",
        )
    return found


def tuned(bench: Bench) -> dict[str, Any]:
    """Fine-tuning on the chosen answers and then DPO, beside DPO alone; and which answers a reward model prefers."""
    train, val = dpo_data(bench)
    judge = bench.reward_model("rasbt_politeness") / "final"
    chosen = [{"prompt": question(row), "completion": row["chosen"]} for row in read_lines(train)]
    sft = write(bench.work / "sft-train.jsonl", chosen)
    lora = ["--adapter.method", "lora"]
    words = ["--model", bench.model, "--data.train", sft, "--optim.lr", 2e-4, "--train.global_batch_size", 16]
    first = bench.train("sft", "finetune", *words, *lora) / "final"
    lr, alone = ["--optim.lr", TUNED_LR], f"dpo-lora-{TUNED_LR:g}-0"
    found: dict[str, Any] = {
        "dpo": dpo(bench, alone, "--model", bench.model, *lora, *lr),
        "sft_then_dpo": dpo(bench, "sft-dpo", "--model", first, *lr),
    }
    asked = [{"prompt": question(row), "answer": row["chosen"]} for row in read_lines(val)[:ASKED]]
    prompts = write(bench.work / "asked.jsonl", asked)
    models = {
        "base": bench.model,
        "sft": first,
        "dpo": bench.work / alone,
        "sft_then_dpo": bench.work / "sft-dpo",
    }
    answers = {}
    for name, model in models.items():
        task = ["--tasks", f"exact_match:{prompts}", "--generate.max_new_tokens", 64]
        answers[name] = [one["filtered_resps"][0] for one in bench.evaluate(f"answers-{name}", "--model", model, *task)]
    found["preferred_by_the_reward_model"] = {}
    for better, worse in (("dpo", "base"), ("sft", "base"), ("sft_then_dpo", "base"), ("sft_then_dpo", "dpo")):
        pairs = [
            {"prompt": row["prompt"], "chosen": a, "rejected": b}
            for row, a, b in zip(asked, answers[better], answers[worse], strict=True)
            if a.strip() != b.strip() and a.strip() and b.strip()
        ]
        file = write(bench.work / f"{better}-{worse}.jsonl", pairs)
        samples = bench.evaluate(f"judged-{better}-{worse}", "--model", judge, "--tasks", f"preference:{file}")
        share = statistics.mean(one["accuracy"] for one in samples)
        means = [statistics.mean(one["normalised"][place] for one in samples) for place in (0, 1)]
        found["preferred_by_the_reward_model"][f"{better} over {worse}"] = {
            "pairs": len(samples),
            "share": share,
            "mean_normalised_rewards": means,
        }
        print(f"{better} over {worse}: {share:.3f} of {len(samples)} pairs, rewards {means[0]:.2f} and {means[1]:.2f}")
    return found


def main() -> None:
    """Runs the parts and writes the result."""
    parts: dict[str, Callable[[Bench], dict[str, Any]]] = {"reward": reward, "adapters": adapters, "tuned": tuned}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--work", type=Path, help="a folder for runs and data that is kept (default: one that is not)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not PREFERENCES.exists():
        sys.exit("benchmark: the public comparisons are not here")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, arguments.threads)
        for name, part in parts.items():
            if arguments.only in (None, name):
                write_part("preferences", name, part(bench), parts)


if __name__ == "__main__":
    main()
