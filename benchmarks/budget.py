"""PPO, iterative DPO and DPO at equal budget, judged by a gold classifier that none of them sees as it learns.

    python benchmarks/budget.py [--model small|smollm2] [--seeds 0,1,2,3,4] [--work runs/budget] [--tables]

A language model of 3.1M weights learns Yelp sentences from nothing; a gold classifier learns half of their labels. The
gold labels pairs of the model's own completions, with the noise of a Bradley-Terry model. DPO and a proxy reward model
learn exactly these pairs; PPO and four rounds of iterative DPO then draw as many completions as the pairs hold, judged
by the proxy. Every policy that a run saved on its way answers held-out prompts, one completion each with the same
random numbers: the gold's and the proxy's rewards against the exact KL to the fine-tuned model. Methods are compared at
equal KL, prompt by prompt. Rewards count spreads of the fine-tuned model's own, from its mean.

`smollm2` is the same with SmolLM2-135M as the language model, an eighth of pairs and completions, and LoRA; gold and
proxy stay small. A seed takes everything but the fine-tuned model and the gold anew. Seeds in
benchmarks/results/budget.json are not run again; runs that are finished, or were interrupted, in --work neither.
--tables runs nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    LITRECIPE,
    MACHINE,
    REPO,
    RESULTS,
    SHARED,
    as_hf_folder,
    print_table,
    read_lines,
    run_child,
    student,
    write_part,
)

HUB = REPO / "config_hub" / "experiments" / "budget"
SENTENCES = SHARED / "data" / "sentiment" / "yelp_train.jsonl.gz"
TESTED = 20
"""One sentence in so many is for testing only."""
VOCABULARY = 2048
PROMPT_TOKENS, NEW_TOKENS = 4, 16
GOLD_PAIRS, GOLD_TESTED = 16_000, 2_000
HELD_OUT = 512


@dataclass(frozen=True)
class Scale:
    """A language model, and how much it is given."""

    name: str
    recipes: str
    """What the names of its own recipes begin with."""
    pairs: int
    """To learn from; the methods that sample draw twice as many completions."""
    pairs_tested: int
    """To test the proxy on."""
    spare_pairs: int
    """Besides: two equal completions are no pair."""

    @property
    def sampled_pairs(self) -> int:
        """All of them."""
        return self.pairs + self.pairs_tested + self.spare_pairs

    def folder(self, work: Path) -> Path:
        """Where its seeds are."""
        return work if self is SMALL else work / self.name


SMALL = Scale("small", "", 8192, 512, 512)
SMOLLM2 = Scale("smollm2", "smollm2-", 1024, 512, 128)
SCALES = {scale.name: scale for scale in (SMALL, SMOLLM2)}
SMOLLM2_SENTENCES, SMOLLM2_TESTED = 2048, 512
"""That SmolLM2 is fine-tuned on, and its loss measured on."""
SEEDS = range(5)
METHODS = ("dpo", "iterative-dpo", "ppo")
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Nats of KL at which methods are compared, where they reach that far."""
RESAMPLED = 2000
SHOWN = 3
"""Completions that are kept for people to read."""

Rows = list[dict[str, Any]]


def is_tested(text: str, one_in: int = TESTED) -> bool:
    """Whether a text is held out: equal texts always together."""
    return _hash(text) % one_in == 0


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def gold_pairs(rows: Iterable[dict[str, Any]], count: int) -> Rows:
    """A positive against a negative sentence with the same first word, which is the prompt; some of them, shuffled.

    Sentences of the rarer side are used again and again.
    """
    by_word: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for row in rows:
        word, space, rest = row["text"].partition(" ")
        if word and rest:
            by_word[word][row["label"]].append(space + rest)
    pairs = []
    for word, (negative, positive) in by_word.items():
        for place in range(max(len(negative), len(positive)) if negative and positive else 0):
            chosen, rejected = positive[place % len(positive)], negative[place % len(negative)]
            pairs.append({"prompt": word, "chosen": chosen, "rejected": rejected})
    random.Random(0).shuffle(pairs)
    return pairs[:count]


def prompts_of(texts: Iterable[str], tokenizer: Any) -> list[str]:
    """The first tokens of sentences that are at least twice as long, each once, and only where the text of these tokens
    has these tokens."""
    found: dict[str, None] = {}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= 2 * PROMPT_TOKENS:
            prompt = tokenizer.decode(ids[:PROMPT_TOKENS])
            if tokenizer.encode(prompt, add_special_tokens=False).ids == ids[:PROMPT_TOKENS]:
                found[prompt] = None
    return list(found)


def label(candidates: Rows, spread: float, seed: int) -> tuple[Rows, dict[str, float]]:
    """Pairs of two completions of a prompt; how sure and how often right the labels are.

    The first is chosen with the probability σ(difference of the gold's log-odds), which are `spread` times its rewards.
    """
    chance = random.Random(f"labels {seed}")
    pairs, sure, right = [], [], []
    for one, other in zip(candidates[::2], candidates[1::2], strict=True):
        texts = one["completion"], other["completion"]
        if texts[0] == texts[1] or not all(text.strip() for text in texts):
            continue
        odds = spread * (one["reward"] - other["reward"])
        first_is_better = chance.random() < 1 / (1 + exp(-odds))
        better, worse = texts if first_is_better else texts[::-1]
        pairs.append({"prompt": one["prompt"][0]["content"], "chosen": better, "rejected": worse})
        sure.append(1 / (1 + exp(-abs(odds))))
        right.append(first_is_better == (odds > 0))
    return pairs, {"sure": statistics.mean(sure), "as_the_gold_ranks": statistics.mean(right)}


class Bench:
    """Runs litrecipe in a folder; what is finished there is not run again, what was interrupted goes on."""

    def __init__(self, work: Path, threads: int, scale: Scale) -> None:
        self.work, self.threads, self.scale = work, threads, scale
        self.folder = scale.folder(work)
        self.seconds: dict[str, float] = {}
        """Run → wall-clock seconds here, processes and all; a run that was found finished is not in it."""

    def run(self, name: str, verb: str, recipe: str, *words: object, made: str = "final") -> Path:
        """The run directory of a finished run of a recipe of the hub."""
        out = self.work / name
        if not (out / made).exists():
            flags = [*words, "--out_dir", out, "--checkpoint.resume", "auto"]
            command = [*LITRECIPE, *verb.split(), "--config", HUB / f"{recipe}.yaml", *flags]
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            child = run_child([str(word) for word in command], threads=self.threads).check()
            self.seconds[name.rpartition("/")[2]] = round(child.seconds, 1)
        return out

    def write(self, name: str, rows: Rows) -> Path:
        """A file of JSON lines."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def litrecipe(self, *words: object) -> None:
        """A command, which must end well."""
        run_child([str(word) for word in (*LITRECIPE, *words)], threads=self.threads).check()

    def common(self) -> dict[str, Any]:
        """What all seeds share: data, tokenizer, language model and gold classifier; how good the latter two are."""
        with gzip.open(SENTENCES, "rt") as file:
            rows = [json.loads(line) for line in file]
        learnt = [row for row in rows if not is_tested(row["text"])]
        tested = [row for row in rows if is_tested(row["text"])]
        sentences, test = (
            self.write(f"{name}.jsonl", [{"text": row["text"]} for row in some])
            for name, some in (("sentences", learnt), ("test", tested))
        )
        folder = self.work / "tokenizer"
        if not folder.exists():
            self.litrecipe("data", "train-tokenizer", sentences, folder, "--vocab_size", VOCABULARY)
        words = ["--model", HUB / "config.json", "--model.tokenizer", folder]
        fine_tuned = self.run("sft", "finetune", "sft", *words, "--data.train", sentences, "--data.val", test)
        half = [row for row in learnt if _hash(row["text"]) // TESTED % 2]
        train, val = (
            self.write(f"gold-{name}.jsonl", gold_pairs(some, count))
            for name, some, count in (("train", half, GOLD_PAIRS), ("val", tested, GOLD_TESTED))
        )
        words = ["--model", fine_tuned, "--data.train", train, "--data.val", val]
        gold = self.run("gold", "align reward", "gold", *words)
        if self.scale is not SMALL:
            random.Random(0).shuffle(learnt)
            learnt = learnt[:SMOLLM2_SENTENCES]
            fine_tuned, folder = self.fine_tune_smollm2(learnt, tested[:SMOLLM2_TESTED])
        self.write_prompts(folder, rows)
        losses = [record["eval_loss"] for record in read_lines(fine_tuned / "metrics.jsonl") if "eval_loss" in record]
        return {
            "fine_tuned": {"sentences": len(learnt), "eval_loss": losses[-1]},
            "gold": {
                "labels": len(half),
                "learnt_pairs": GOLD_PAIRS,
                **json.loads((gold / "held_out.json").read_text()),
            },
        }

    def fine_tune_smollm2(self, learnt: Rows, tested: Rows) -> tuple[Path, Path]:
        """The run, whose adapter is folded into `start`, and the model before it; it never sees a chat template."""
        model = as_hf_folder(self.folder / "model")
        for name in ("chat_template.jinja", "manifest.json"):  # a manifest would tell that something is missing
            (model / name).unlink(missing_ok=True)
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        train, val = (
            self.write(f"{self.scale.name}/{name}.jsonl", [{"text": row["text"]} for row in some])
            for name, some in (("sentences", learnt), ("test", tested))
        )
        recipe = f"{self.scale.recipes}sft"
        words = ["--model", model, "--data.train", train, "--data.val", val]
        run = self.run(f"{self.scale.name}/sft", "finetune", recipe, *words)
        if not (self.folder / "start" / "config.json").exists():
            self.litrecipe("model", "merge", run, self.folder / "start")
        return run, model

    @property
    def start(self) -> Path:
        """The model that alignment begins with."""
        return self.folder / ("sft" if self.scale is SMALL else "start")

    def write_prompts(self, tokenizer_folder: Path, rows: Rows) -> None:
        """Shuffled once for all seeds, which draw other completions, not other prompts."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        prompts = prompts_of((row["text"] for row in rows if not is_tested(row["text"])), tokenizer)
        random.Random(0).shuffle(prompts)
        known = set(prompts)
        held_out = prompts_of((row["text"] for row in rows if is_tested(row["text"])), tokenizer)
        of_pairs = self.scale.sampled_pairs
        for name, some in (
            ("prompts-of-pairs", prompts[:of_pairs]),
            ("prompts", prompts[of_pairs : of_pairs + 2 * self.scale.pairs]),
            ("held-out", [one for one in held_out if one not in known][:HELD_OUT]),
        ):
            self.write(str(self.folder / f"{name}.jsonl"), [{"prompt": prompt} for prompt in some])

    def seed(self, seed: int) -> dict[str, Any]:
        """Pairs, proxy, the three methods, and the judgement."""
        self.seconds = {}
        here, gold, own = self.folder / str(seed), self.work / "gold", self.scale.recipes
        name = str(here.relative_to(self.work))
        common = ["--model", self.start, "--train.seed", seed]
        words = ["--data.train", self.folder / "prompts-of-pairs.jsonl", "--rewards.sources", f"{{model:{gold}: 1.0}}"]
        sampled = self.run(
            f"{name}/sample", "align rejection-sampling", f"{own}sample", *common, *words, made="best_of.json"
        )
        config = json.loads((gold / "final" / "config.json").read_text())
        pairs, labels = label(read_lines(sampled / "candidates.jsonl"), config["reward_std"], seed)
        tested, learnt = pairs[: self.scale.pairs_tested], pairs[self.scale.pairs_tested :][: self.scale.pairs]
        assert len(learnt) == self.scale.pairs, f"{len(learnt)} pairs: raise spare_pairs"
        train = self.write(f"{name}/pairs.jsonl", learnt)
        val = self.write(f"{name}/pairs-held-out.jsonl", tested)
        of_pairs = ["--train.seed", seed, "--data.train", train]
        proxy = self.run(
            f"{name}/proxy", "align reward", "proxy", "--model", self.work / "sft", *of_pairs, "--data.val", val
        )
        self.run(f"{name}/dpo", "align dpo", f"{own}dpo", "--model", self.start, *of_pairs)
        sampling = [*common, "--data.train", self.folder / "prompts.jsonl"]
        sampling += ["--rewards.sources", f"{{model:{proxy}: 1.0}}"]
        self.run(f"{name}/iterative-dpo", "align iterative-dpo", f"{own}iterative-dpo", *sampling)
        self.run(f"{name}/ppo", "align ppo", f"{own}ppo", *sampling)
        judged = self.judge(here, seed)
        start = judged.pop("sft/0")
        curves: dict[str, Curve] = {}
        for method in METHODS:
            found = {int(name.rpartition("/")[2]): one for name, one in judged.items() if name.startswith(f"{method}/")}
            curves[method] = {0: start} | found
        tokens = {method: read_lines(here / method / "metrics.jsonl")[-1].get("tokens") for method in METHODS}
        return {
            "commit": MACHINE["commit"],
            "labels": labels,
            "proxy": json.loads((proxy / "held_out.json").read_text()),
            "learnt_tokens": tokens,
            "seconds": self.seconds,
            **verdict(curves, seed),
        }

    def judge(self, here: Path, seed: int) -> dict[str, Any]:
        """What gold and proxy say of the answers of all policies, `method/step`, to the held-out prompts."""
        out = here / "judged.json"
        if not out.exists():
            policies = {"sft/0": str(self.start)}
            for method in METHODS:
                for saved in sorted((here / method / "checkpoints").glob("step-*")):
                    policies[f"{method}/{int(saved.name.removeprefix('step-'))}"] = str(saved)
            sources = {"reference": self.start, "gold": self.work / "gold", "proxy": here / "proxy"}
            plan: dict[str, Any] = {name: str(path) for name, path in sources.items()} | {"policies": policies}
            plan |= {"prompts": str(self.folder / "held-out.jsonl"), "max_new_tokens": NEW_TOKENS, "seed": seed}
            planned = here / "plan.json"
            planned.write_text(json.dumps(plan))
            print(f"{time.strftime('%H:%M:%S')} {seed}/judging", flush=True)
            child = run_child([sys.executable, REPO / "benchmarks" / "judged.py", planned, out], threads=self.threads)
            self.seconds["judging"] = round(child.check().seconds, 1)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


Curve = Mapping[int, Mapping[str, Any]]
"""Step → what was judged: `gold`, `proxy`, `kl`, `length` and more, one a held-out prompt."""


def verdict(curves: Mapping[str, Curve], seed: int) -> dict[str, Any]:
    """Where each method went, and differences of the gold's rewards: at equal KL, and of the last policies.

    Rewards are told in spreads of the fine-tuned model's, from its mean. Intervals hold 95 % of bootstrap samples of
    the prompts.
    """
    start = next(iter(curves.values()))[0]
    units = {name: (float(np.mean(start[name])), float(np.std(start[name]))) for name in ("gold", "proxy")}
    gold = {m: {step: _scaled(one["gold"], units["gold"]) for step, one in c.items()} for m, c in curves.items()}
    told = {
        method: [
            {
                "step": step,
                "kl": round(float(np.mean(one["kl"])), 4),
                "gold": round(float(gold[method][step].mean()), 4),
                "proxy": round(float(_scaled(one["proxy"], units["proxy"]).mean()), 4),
                "gold_stderr": round(float(gold[method][step].std(ddof=1) / sqrt(len(one["kl"]))), 4),
                "length": round(float(np.mean(one["length"])), 2),
                "ended": round(float(np.mean(one["ended"])), 4),
                "different": round(len(set(one["texts"])) / len(one["texts"]), 4),
            }
            for step, one in sorted(curve.items())
        ]
        for method, curve in curves.items()
    }
    draw = np.random.default_rng(seed).integers(0, len(start["kl"]), (RESAMPLED, len(start["kl"])))
    last = {method: gold[method][max(curve)] for method, curve in curves.items()}
    last["sft"] = gold[METHODS[0]][0]
    versus = [(one, other) for place, other in enumerate(METHODS) for one in METHODS[place + 1 :]]
    contests = [*versus, *((method, "sft") for method in METHODS)]
    levels = {}
    for level in LEVELS:
        there = {m: r for m, c in curves.items() if (r := at_kl(c, gold[m], level)) is not None}
        pairs = {f"{a} - {b}": interval(there[a] - there[b], draw) for a, b in versus if a in there and b in there}
        levels[f"{level:g}"] = {"gold": {m: round(float(r.mean()), 4) for m, r in there.items()}, "apart": pairs}
    return {
        "units": {name: {"mean": mean, "spread": spread} for name, (mean, spread) in units.items()},
        "curves": told,
        "at_equal_kl": levels,
        "last": {
            "apart": {f"{a} - {b}": interval(last[a] - last[b], draw) for a, b in versus},
            "wins": {f"{a} over {b}": interval(np.heaviside(last[a] - last[b], 0.5), draw) for a, b in contests},
        },
        "samples": {method: list(curve[max(curve)]["texts"][:SHOWN]) for method, curve in curves.items()}
        | {"sft": list(start["texts"][:SHOWN])},
    }


def _scaled(values: Sequence[float], unit: tuple[float, float]) -> np.ndarray:
    return (np.asarray(values) - unit[0]) / unit[1]


def at_kl(curve: Curve, rewards: Mapping[int, np.ndarray], level: float) -> np.ndarray | None:
    """Each prompt's reward where a run first comes as far as `level` nats, between the two policies that it saved
    before and after; None where it never does.

    In between, rewards are taken to go straight along √KL, as they do at first (2210.10760).
    """
    steps = sorted(curve)
    far = [sqrt(max(0.0, float(np.mean(curve[step]["kl"])))) for step in steps]
    for place in range(1, len(steps)):
        if far[place - 1] < sqrt(level) <= far[place]:
            share = (sqrt(level) - far[place - 1]) / (far[place] - far[place - 1])
            mixed: np.ndarray = (1 - share) * rewards[steps[place - 1]] + share * rewards[steps[place]]
            return mixed
    return None


def interval(values: np.ndarray, draw: np.ndarray) -> dict[str, float]:
    """The mean, and what holds 95 % of the means of bootstrap samples, whose places are `draw` (samples, values)."""
    low, high = np.quantile(values[draw].mean(1), (0.025, 0.975))
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def over_seeds(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and half of Student's 95 % interval from two seeds on."""

    def gathered(path: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, list[float]] = defaultdict(list)
        for one in seeds.values():
            values: Any = one
            for name in path:
                values = values.get(name, {})
            for name, value in values.items():
                found[name].append(value["mean"])
        return {name: student(values) for name, values in found.items()}

    return {
        "at_equal_kl": {level: gathered(["at_equal_kl", level, "apart"]) for level in (f"{one:g}" for one in LEVELS)},
        "last": {name: gathered(["last", name]) for name in ("apart", "wins")},
    }


def show(seeds: Mapping[str, Mapping[str, Any]]) -> None:
    """Tables of what came out."""
    print_table(
        ["seed", "method", "step", "KL", "gold", "proxy", "tokens", "ended", "different"],
        [
            [seed, method, *(one[name] for name in ("step", "kl", "gold", "proxy", "length", "ended", "different"))]
            for seed, found in seeds.items()
            for method, curve in found["curves"].items()
            for one in curve
        ],
    )
    for seed, found in seeds.items():
        parts = {f"KL {level}": one["apart"] for level, one in found["at_equal_kl"].items()}
        for where, apart in (parts | {f"last, {name}": one for name, one in found["last"].items()}).items():
            for name, one in apart.items():
                print(f"seed {seed}, {where}: {name} {one['mean']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})")


def draw(seeds: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Gold and proxy rewards against √KL, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for judge, axes in zip(("gold", "proxy"), panels, strict=True):
        for method, colour in zip(METHODS, ("#b5482f", "#3b6ea5", "#2a7f62"), strict=True):
            for place, found in enumerate(seeds.values()):
                curve = found["curves"][method]
                x = [sqrt(max(0.0, one["kl"])) for one in curve]
                label = method if place == 0 else None
                axes.plot(x, [one[judge] for one in curve], "o-", ms=3, lw=1, alpha=0.8, color=colour, label=label)
        axes.set(xlabel="√KL to the fine-tuned model, √nats a completion", title=f"{judge} reward")
    panels[0].set_ylabel("spreads of the fine-tuned model's")
    panels[0].legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Runs the seeds that are not in the result, and writes it after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SCALES, default=SMALL.name, help="the language model")
    parser.add_argument("--seeds", help="which, with commas between (default: five, or one of smollm2)")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "budget", help="a folder for runs and data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only show and draw what the result has")
    arguments = parser.parse_args()
    scale = SCALES[arguments.model]
    seeds = arguments.seeds or ",".join(map(str, SEEDS if scale is SMALL else SEEDS[:1]))
    part, picture = ("seeds", "budget") if scale is SMALL else (scale.name, f"budget.{scale.name}")
    path = RESULTS / "budget.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    done: dict[str, Any] = result.get(part, {})
    missing = [seed for seed in seeds.split(",") if seed not in done]
    if missing and not arguments.tables:
        if not SENTENCES.exists():
            sys.exit("benchmark: the Yelp sentences are not here")
        bench = Bench(arguments.work.resolve(), arguments.threads, scale)
        common = bench.common()
        for seed in missing:
            done[seed] = bench.seed(int(seed)) | {"common": common}
            done = dict(sorted(done.items()))
            write_part("budget", part, done, ("seeds", "all", SMOLLM2.name))
            if scale is SMALL:
                write_part("budget", "all", over_seeds(done), ("seeds", "all", SMOLLM2.name))
            draw(done, RESULTS / f"{picture}.png")
    show(done)
    if arguments.tables:
        draw(done, RESULTS / f"{picture}.png")


if __name__ == "__main__":
    main()
