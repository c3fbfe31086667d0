"""PPO on the real model: SmolLM2-135M learns to sound glad, and to write fields as JSON.

    python benchmarks/smollm2_ppo.py [--only sentiment|fields] [--work FOLDER] [--threads 1]

Sentiment: the model learns to write film reviews, and PPO makes it continue their openings gladly, scored by the
lexicon VADER. A lexicon alone is won by saying "great" over and over, so three others judge: a reward model of labelled
sentences that PPO never saw, the share of different pairs of words, and the perplexity of the model PPO started from.
Fields: fine-tuning is stopped where a third to a half of the answers are right, and PPO goes on from there.

Both answer 512 held-out prompts before and after; differences are paired by prompt, and come with the half-width of
their 95 % interval. What is finished in `--work` is not run again, and a run that was interrupted goes on. Parts that
are not run keep their numbers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    RESULTS,
    SHARED,
    Workplace,
    environment,
    read_lines,
    step_seconds,
    write_part,
)

if TYPE_CHECKING:
    from litrecipe.rollout.sources import Completions

SENTENCES = SHARED / "data" / "sentiment"
OPENING, SHORTEST = 4, 10
"""Words of a sentence that are continued, and words that it has at the least."""
HELD_OUT = 512
"""Prompts."""
ASK = "Write a sentence of a film review."
"""What the judge of sentiment takes sentences for answers to."""
A_ROW, ROWS = 8, 200
"""Sentences of one row of the judge's, half of them glad, and how many rows there are."""
JUDGED = 16
"""Completions of each rollout that are judged afterwards."""
SHOWN = 10
"""Pairs of completions that are written down."""
BATCH_TOKENS, CACHE_TOKENS = 4096, 8192
"""Of a forward pass, and places of the cache in sampling."""
QUESTIONS = f"toy:fields?n={HELD_OUT}&seed=1&split=test"
FIELDS = "json?column=answer&schema=hub:experiments/json/person.schema.json"

Rows = list[dict[str, Any]]


def sentences(part: str) -> Rows:
    """Sentences of the Stanford Sentiment Treebank with their labels, 1 for glad ones."""
    with gzip.open(SENTENCES / f"sst2_{part}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def openings(part: str) -> Rows:
    """The first words of long sentences, each once, in a fixed order."""
    texts = [row["text"].split() for row in sentences(part)]
    unique = list(dict.fromkeys(" ".join(words[:OPENING]) for words in texts if len(words) >= SHORTEST))
    random.Random(0).shuffle(unique)
    return [{"text": text} for text in unique]


def labelled(part: str, rows: int) -> Rows:
    """Glad and sad sentences side by side as answers to one prompt, the glad ones scored higher."""
    of_label: dict[int, list[str]] = {0: [], 1: []}
    for row in sentences(part):
        of_label[row["label"]].append(row["text"])
    for texts in of_label.values():
        random.Random(0).shuffle(texts)
    half = A_ROW // 2
    return [
        {
            "prompt": ASK,
            "completions": [text for label in (1, 0) for text in of_label[label][first : first + half]],
            "scores": [1.0] * half + [0.0] * half,
        }
        for first in range(0, rows * half, half)
    ]


def write(path: Path, rows: Rows) -> Path:
    """As JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Bench(Workplace):
    """Runs recipes of `config_hub/experiments`."""

    def train(self, recipe: str, verb: str, *words: object) -> Path:
        """The run directory of `experiments/<recipe>`, finished."""
        flags = ["--config", f"experiments/{recipe}", "--data.cache_dir", self.work / "cache", "--log.loggers", "[]"]
        return self.finished(recipe, verb, *flags, *words, "--checkpoint.resume", "auto")

    def merged(self, run: Path) -> Path:
        """A run's model with its adapter folded into the base."""
        out = run.with_name("start")
        if not (out / "config.json").exists():
            self.run("model", "merge", run, out)
        return out

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` finds, as JSON in a file."""
        path = self.work / name
        if not path.exists():
            made = json.dumps(make())
            path.write_text(made)
        return json.loads(path.read_text())


def answers(model: Path, data: str | Path, new_tokens: int, temperature: float) -> Completions:
    """One answer to each of the prompts, from random streams that are the same for every model."""
    import torch

    from litrecipe.config import groups
    from litrecipe.data.prompts import load_prompts
    from litrecipe.evaluation.session import open_session
    from litrecipe.rollout.sampler import OwnSampler

    session = open_session(groups.Model(source=str(model)), groups.Quantize(), groups.Fabric())
    room = session.model.architecture.max_positions
    asked = groups.Data(train=str(data))
    found = load_prompts(asked, session.tokenizer, max_new_tokens=new_tokens, max_positions=room, seed=0)
    settings = groups.Generate(max_new_tokens=new_tokens, temperature=temperature)
    streams = range(len(found.train))
    with torch.no_grad():
        return OwnSampler(session.model, session.tokenizer, CACHE_TOKENS)(found.train, settings, 1, streams, model.name)


def logps(model: Path, answered: Completions) -> list[float]:
    """Log-probability of each whole completion, in nats."""
    from litrecipe.config import groups
    from litrecipe.evaluation.scoring import loglikelihoods
    from litrecipe.evaluation.session import open_session

    session = open_session(groups.Model(source=str(model)), groups.Quantize(), groups.Fabric())
    asked = [prompt.tokens.tolist() for prompt in answered.prompts]
    requests = list(zip(asked, answered.tokens, strict=True))
    room = session.model.architecture.max_positions
    scored = loglikelihoods(session.model, requests, batch_tokens=BATCH_TOKENS, max_length=room)
    return [total for total, _ in scored]


def scores(spec: str, answered: Completions) -> list[float]:
    """What one of the sources of rewards says that is no model."""
    from litrecipe.config.online import Rewards
    from litrecipe.rollout.sources import light_sources

    return [score for score in light_sources(Rewards({spec: 1.0}))[spec](answered) if score is not None]


def judged(judge: Path, texts: Sequence[str]) -> list[float]:
    """What a reward model says of sentences as answers to `ASK`."""
    from litrecipe.config import groups
    from litrecipe.data.prompts import load_prompts
    from litrecipe.evaluation.session import open_any
    from litrecipe.rollout.sources import Completions, ModelSource

    session = open_any(groups.Model(source=str(judge)), groups.Quantize(), groups.Fabric())
    with tempfile.TemporaryDirectory() as folder:
        asked = groups.Data(train=str(write(Path(folder) / "asked.jsonl", [{"prompt": ASK}])))
        room = session.model.architecture.max_positions
        [prompt] = load_prompts(asked, session.tokenizer, max_new_tokens=1, max_positions=room, seed=0).train
    tokens = [session.tokenizer.encode(text) for text in texts]
    said = Completions([prompt] * len(texts), list(texts), tokens, ["length"] * len(texts))
    source = ModelSource("judge", session.model, session.tokenizer, session.tokenizer, budget=BATCH_TOKENS)
    return [score for score in source(said) if score is not None]


def distinct(texts: Sequence[str]) -> float:
    """Share of pairs of neighbouring words that differ from all others (distinct-2, 1510.03055)."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs)


def mean(values: Sequence[float]) -> dict[str, float]:
    """With the half-width of its 95 % interval."""
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(statistics.mean(values), 4), "half_interval_95": round(half, 4)}


def apart(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Of the difference, paired by prompt."""
    return mean([b - a for a, b in zip(before, after, strict=True)])


def curves(run: Path) -> dict[str, list[list[float]]]:
    """What a run told, as points of steps and values: of each rollout, and of held-out prompts."""
    names = ("reward", "kl", "kl_coef", "objective/entropy", "completions/mean_length", "value/explained_variance")
    found: dict[str, list[list[float]]] = {}
    seen = 0.0
    for record in read_lines(run / "metrics.jsonl"):
        if "eval_reward" in record:
            found.setdefault("eval_reward", []).append([record["step"], round(record["eval_reward"], 4)])
        if record.get("completions", seen) != seen:
            seen = record["completions"]
            for name in names:
                found.setdefault(name, []).append([record["step"] - 1, round(record[name], 4)])
    return found


def told(run: Path) -> dict[str, Any]:
    """How long a run took and what it told."""
    from litrecipe.config.schema import load_run

    steps = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    last = {name: round(steps[-1][name], 4) for name in ("reward", "kl", "kl_coef", "completions")}
    target = load_run(run).ppo.kl_target
    return {
        "steps": len(steps),
        "seconds": round(step_seconds(steps)),
        "kl_target": target,
        "last_rollout": last,
        "curves": curves(run),
    }


def divergence(policy: Path, start: Path, answered: Completions) -> dict[str, Any]:
    """KL of a policy to where it started, from its own completions, and how those surprise the start."""
    by_start = logps(start, answered)
    ratios = [a - b for a, b in zip(logps(policy, answered), by_start, strict=True)] if policy != start else [0.0, 0.0]
    surprise = exp(-sum(by_start) / sum(map(len, answered.tokens)))
    return {"kl": mean(ratios), "perplexity_of_start": round(surprise, 2)}


def sentiment(bench: Bench) -> dict[str, Any]:
    """Glad continuations, by VADER and by judges that PPO did not see."""
    work = bench.work / "sentiment"
    known = openings("train")
    train = write(work / "openings-train.jsonl", known)
    test = write(work / "openings-test.jsonl", [row for row in openings("test") if row not in known][:HELD_OUT])
    start = bench.merged(
        bench.train("sentiment/sft", "finetune", *on(bench.model), *data(SENTENCES / "sst2_train.jsonl.gz"))
    )
    run = bench.train("sentiment/ppo", "align ppo", *on(start), *data(train), "--data.val", test)
    rows = write(work / "labelled.jsonl", labelled("train", ROWS))
    judge = bench.train("sentiment/judge", "align reward", *on(bench.model), *data(rows))

    found: dict[str, Any] = {"judge": bench.once("sentiment/judge.json", lambda: examined(judge))}
    threshold = found["judge"]["threshold"]
    answered = {name: answers(model, test, 16, 1.0) for name, model in (("before", start), ("after", run))}
    measured: dict[str, dict[str, list[float]]] = {}
    for name, said in answered.items():
        whole = [f"{prompt.text}{text}" for prompt, text in zip(said.prompts, said.texts, strict=True)]
        by_judge = judged(judge, whole)
        measured[name] = {
            "vader": scores("sentiment", said),
            "judge": by_judge,
            "judged_glad": [float(one > threshold) for one in by_judge],
        }
        found[name] = {metric: mean(values) for metric, values in measured[name].items()}
        found[name] |= {"distinct_2": round(distinct(said.texts), 4)}
        found[name] |= divergence(start if name == "before" else run, start, said)
    found["after_minus_before"] = {
        metric: apart(measured["before"][metric], measured["after"][metric]) for metric in measured["before"]
    }
    found["ppo"] = told(run)
    found["ppo"]["curves"]["judged_glad"] = bench.once(
        "sentiment/judged.json", lambda: judged_on_the_way(run, judge, threshold)
    )
    found["completions"] = beside(answered)
    return found


def examined(judge: Path) -> dict[str, Any]:
    """How often a judge is right about sentences it has not seen, with the threshold that is best on others."""
    dev, test = sentences("dev")[::2], sentences("test")
    on_dev = sorted(zip(judged(judge, [row["text"] for row in dev]), (row["label"] for row in dev), strict=True))
    right = [sum(label for _, label in on_dev)]  # all are called glad
    for _, label in on_dev:
        right.append(right[-1] + (1 - 2 * label))
    best = max(range(1, len(right) - 1), key=right.__getitem__)
    threshold = (on_dev[best - 1][0] + on_dev[best][0]) / 2
    by_judge = judged(judge, [row["text"] for row in test])
    hits = [float((one > threshold) == bool(row["label"])) for one, row in zip(by_judge, test, strict=True)]
    return {
        "sentences": ROWS * A_ROW,
        "threshold": round(threshold, 4),
        "dev_accuracy": round(right[best] / len(dev), 4),
        "test_sentences": len(test),
        "test_accuracy": mean(hits),
    }


def judged_on_the_way(run: Path, judge: Path, threshold: float) -> list[list[float]]:
    """Share of the completions of a run's rollouts that a judge calls glad, some of each, by step."""
    # Not splitlines: a completion may hold characters that it takes for an end.
    texts = [path.read_text(encoding="utf-8") for path in sorted((run / "rollouts").glob("*.jsonl"))]
    some = [[json.loads(line) for line in text.split("\n")[:JUDGED]] for text in texts]
    by_judge = judged(judge, [one["prompt"] + one["completion"] for rollout in some for one in rollout])
    return [
        [rollout[0]["step"], statistics.mean(one > threshold for one in by_judge[place * JUDGED :][:JUDGED])]
        for place, rollout in enumerate(some)
    ]


def fields(bench: Bench) -> dict[str, Any]:
    """Fields as JSON, by a schema and the right values; the likeliest answers, and sampled ones, which PPO learns."""
    start = bench.merged(bench.train("json/sft", "finetune", *on(bench.model)))
    run = bench.train("json/ppo", "align ppo", *on(start))
    found: dict[str, Any] = {"before": {}, "after": {}, "after_minus_before": {}}
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        before, after = (answers(model, QUESTIONS, 40, temperature) for model in (start, run))
        for metric, spec in (("reward", FIELDS), ("exact", "exact")):
            pair = scores(spec, before), scores(spec, after)
            found["before"][f"{way}_{metric}"], found["after"][f"{way}_{metric}"] = map(mean, pair)
            found["after_minus_before"][f"{way}_{metric}"] = apart(*pair)
    found["after"] |= divergence(run, start, after)
    found["ppo"] = told(run)
    found["completions"] = beside({"before": before, "after": after})
    return found


def beside(answered: dict[str, Completions]) -> Rows:
    """Some prompts with what was said before and after."""
    before, after = answered["before"], answered["after"]
    return [
        {"prompt": prompt.text or prompt.messages[-1]["content"], "before": one, "after": other}
        for prompt, one, other in list(zip(before.prompts, before.texts, after.texts, strict=True))[:SHOWN]
    ]


def on(model: Path) -> list[object]:
    """What names the model."""
    return ["--model", model]


def data(path: Path) -> list[object]:
    """What names what is trained on."""
    return ["--data.train", path]


def draw(name: str, found: dict[str, Any]) -> None:
    """The curves of a part as a PNG beside the results."""
    from litrecipe.evaluation.pictures import Panel, draw_panels

    of_run = found["ppo"]["curves"]
    learnt = {"rollouts": of_run["reward"], "held out, greedy": of_run["eval_reward"]}
    panels = [
        Panel("reward", learnt),
        Panel("KL to the start, nats a completion", {"": of_run["kl"]}, found["ppo"]["kl_target"]),
    ]
    if "judged_glad" in of_run:
        panels.append(Panel("judged glad", {"": of_run["judged_glad"]}))
    draw_panels(panels, RESULTS / f"smollm2_ppo.{name}.png", f"PPO on SmolLM2-135M: {name}")


def main() -> None:
    """Runs the parts and writes the result."""
    parts: dict[str, Callable[[Bench], dict[str, Any]]] = {"sentiment": sentiment, "fields": fields}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--work", type=Path, help="a folder for runs and data that is kept (default: one that is not)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not SENTENCES.exists() and arguments.only != "fields":
        sys.exit("benchmark: the labelled sentences are not here")
    os.environ.update(environment(arguments.threads))  # torch, which is imported later, counts its threads by it
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, arguments.threads)
        for name, part in parts.items():
            if arguments.only in (None, name):
                made = part(bench)
                write_part("smollm2_ppo", name, made, parts)
                draw(name, made)


if __name__ == "__main__":
    main()
