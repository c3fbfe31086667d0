"""The ladder of 2404.10719, on sums: what large batches, normalised advantages and a moving reference are worth to PPO.

    python benchmarks/ladder.py [--only aggressive|tuned|too_high] [--seeds 0,1,2,3,4] [--work runs/ladder] [--tables]

A model of 0.33M weights learns sums of three digits until one in ten of its samples is right; from there each rung of
the ladder draws equally many completions, rewarded with 10 or 0 at their end, and answers held-out sums greedily on its
way. A rung is the one before with one thing changed. A seed gives all rungs the same sums, in the same order, and they
are compared seed by seed.

What is worth what depends on the learning rate, so there are two regimes: `aggressive`, where all take 3e-4, which is
too much for few completions, and `tuned`, where each takes the best of three for a seed that is not among the others.
`too_high` is one seed at 1e-3, which is too much for all. Runs in --work that are finished are not run again; --tables
runs nothing. Parts that are not run keep their numbers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there; a model of this size gains nothing by a second thread

from common import REPO, RESULTS, print_table, read_lines, student, write_result

HUB = "experiments/addition"
ARMS = {
    "ppo-small-batch": "64 completions a rollout",
    "ppo-advantage-normalisation": "+ normalised advantages",
    "ppo-large-batch": "+ 512 completions a rollout",
    "ppo-ref-ema": "+ a reference that follows",
}
"""Recipes, each of which extends the one before, and what they change."""
AGGRESSIVE, TOO_HIGH = 3e-4, 1e-3
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
TUNING_SEED = 100
SEEDS = range(5)
EPISODES = 25_600
MEASURES = ("final", "worst", "final_sampled")
"""Success on held-out sums: of the likeliest answers, at the end and where it was lowest; of samples at the end."""
COMPLETIONS_PER_PROMPT = 4


class Ladder:
    """Runs litrecipe in a folder; what is finished there is not run again."""

    def __init__(self, work: Path, *, may_run: bool) -> None:
        self.work, self.may_run = work, may_run
        self.missing: list[str] = []
        """Names of runs that are not finished and may not run."""

    @cached_property
    def start(self) -> Path:
        """What all runs start from."""
        return self.run("sft", "finetune", "--config", f"{HUB}/sft")

    def rung(self, arm: str, lr: float, seed: int) -> Path | None:
        """One run of PPO; None where it is not finished and may not run."""
        sums = f"toy:addition?n={EPISODES // COMPLETIONS_PER_PROMPT}&seed={seed + 1}"
        words = ["--model", self.start, "--data.train", sums, "--optim.lr", lr, "--train.seed", seed]
        out = self.run(f"{arm}-{lr:g}-{seed}", "align", "ppo", "--config", f"{HUB}/{arm}", *words)
        if (out / "final").exists():
            return out
        self.missing.append(out.name)
        return None

    def run(self, name: str, *words: object) -> Path:
        """The run directory of a run, which is done if it has to be."""
        out = self.work / name
        if not (out / "final").exists() and self.may_run:
            began = time.monotonic()
            forked([*map(str, words), "--out_dir", str(out), "--checkpoint.resume", "auto"], self.work / f"{name}.log")
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        return out


def forked(words: Sequence[str], log: Path) -> None:
    """litrecipe in a child of this process, which has imported all it needs: that takes longer than some runs."""
    child = os.fork()
    if child == 0:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            code = 1
            try:
                sys.argv = ["litrecipe", *words]
                code = cli().main()
            except SystemExit as leave:
                code = leave.code if isinstance(leave.code, int) else 1
            finally:
                sys.stdout.flush()
                os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"benchmark: {' '.join(words)} failed:\n{log.read_text()[-4000:]}")


def cli() -> Any:
    """The program, with everything that it imports late."""
    sys.path.insert(0, str(REPO))
    for module in ("lightning_fabric.strategies", "litrecipe.recipes.finetune", "litrecipe.recipes.ppo"):
        importlib.import_module(module)
    return importlib.import_module("litrecipe.cli")


def told(out: Path) -> dict[str, Any]:
    """What a run says of itself: success on held-out sums over its episodes, reward and KL at the end."""
    records = read_lines(out / "metrics.jsonl")
    steps = [one for one in records if "loss" in one]
    last = steps[-1]["step"]
    curve = [(one["step"] / last * EPISODES, one["eval_success"]) for one in records if "eval_success" in one]
    sampled = [one["eval_sampled/success"] for one in records if "eval_success" in one]
    end = steps[-max(1, len(steps) // 20) :]
    begin = steps[0]["reward"]
    return {
        "start": curve[0][1],
        "final": curve[-1][1],
        "worst": min(success for _, success in curve[1:]),
        "best": max(success for _, success in curve),
        "sampled": sampled,
        "final_sampled": sampled[-1],
        "steps": last,
        "reward_gained": round(statistics.mean(one["reward"] for one in end) - begin, 3),
        "kl": round(statistics.mean(one["kl"] for one in end), 3),
        "beta_kl": round(statistics.mean(one["kl_coef"] * one["kl"] for one in end), 3),
        "ratio_max": round(max(one["policy/ratio_max"] for one in steps), 1),
        "curve": [[round(episodes), round(success, 4)] for episodes, success in curve],
    }


def compare(ladder: Ladder, rates: dict[str, float], seeds: Iterable[int]) -> dict[str, Any]:
    """All rungs at their learning rates: each seed's run, and each rung less the one before, seed by seed."""
    found: dict[str, Any] = {arm: {"lr": lr, "runs": {}} for arm, lr in rates.items()}
    for seed in seeds:
        for arm, lr in rates.items():
            out = ladder.rung(arm, lr, seed)
            if out is not None:
                found[arm]["runs"][str(seed)] = told(out)
    for one in found.values():
        for name in MEASURES:
            one[name] = student([run[name] for run in one["runs"].values()])
    arms = list(rates)
    apart: dict[str, Any] = {}
    for worse, better in [*pairwise(arms), (arms[0], arms[-1])] if arms else []:
        ours, theirs = (found[arm]["runs"] for arm in (better, worse))
        shared = [seed for seed in ours if seed in theirs]
        apart[f"{better} - {worse}"] = {
            name: student([ours[seed][name] - theirs[seed][name] for seed in shared]) for name in MEASURES
        }
    return {"arms": found, "paired_by_seed": apart}


def aggressive(ladder: Ladder, seeds: Sequence[int]) -> dict[str, Any]:
    """All rungs at one high rate."""
    return compare(ladder, dict.fromkeys(ARMS, AGGRESSIVE), seeds)


def too_high(ladder: Ladder, seeds: Sequence[int]) -> dict[str, Any]:
    """All rungs at a rate that none of them stands."""
    return compare(ladder, dict.fromkeys(ARMS, TOO_HIGH), seeds[:1])


def tuned(ladder: Ladder, seeds: Sequence[int]) -> dict[str, Any]:
    """Each rung at its best rate of three, by what a seed that is not used otherwise ends with."""
    tried: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        runs = {f"{lr:g}": ladder.rung(arm, lr, TUNING_SEED) for lr in LEARNING_RATES}
        tried[arm] = {lr: told(out)["final"] for lr, out in runs.items() if out is not None}
    rates = {arm: float(max(finals, key=finals.__getitem__)) for arm, finals in tried.items() if finals}
    return {"tried": tried, **compare(ladder, rates, seeds)}


def show(regime: str, found: dict[str, Any]) -> None:
    """Print what a regime found."""

    def said(one: dict[str, float | None]) -> str:
        return "" if one["mean"] is None else f"{one['mean']:.3f}" + (f" ± {one['half']:.3f}" if one["half"] else "")

    print(f"\n{regime}: success on held-out sums, mean over seeds and half of its 95 % interval")
    rows = [
        [arm, f"{one['lr']:g}", len(one["runs"]), *(said(one[name]) for name in MEASURES)]
        for arm, one in found["arms"].items()
    ]
    print_table(["rung", "lr", "seeds", *MEASURES], rows)
    rows = [[pair, *(said(one[name]) for name in MEASURES)] for pair, one in found["paired_by_seed"].items()]
    print_table(["paired by seed", *MEASURES], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Success against episodes, the mean over the seeds and how far they spread, a panel a regime."""
    from litrecipe.evaluation.pictures import Panel, draw_panels

    panels = []
    for regime in ("aggressive", "tuned"):
        lines, bands = {}, {}
        for arm, one in result.get(regime, {"arms": {}})["arms"].items():
            curves = [run["curve"] for run in one["runs"].values()]
            if not curves:
                continue
            name = f"{ARMS[arm]} (lr {one['lr']:g})"
            at = [[point[1] for point in points] for points in zip(*curves, strict=True)]
            episodes = [point[0] for point in curves[0]]
            lines[name] = [(x, statistics.mean(y)) for x, y in zip(episodes, at, strict=True)]
            bands[name] = [(x, min(y), max(y)) for x, y in zip(episodes, at, strict=True)]
        if lines:
            panels.append(Panel(f"{regime}: success on held-out sums", lines, bands=bands))
    draw_panels(panels, path, "Sums: mean and range of the seeds", xlabel="completions")


def main() -> None:
    """Runs the regimes, writes and draws the result."""
    parts = {"aggressive": aggressive, "tuned": tuned, "too_high": too_high}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="which, with commas between")
    parser.add_argument("--work", type=Path, help="a folder for runs that is kept (default: one that is not)")
    parser.add_argument("--tables", action="store_true", help="run nothing, tell what there is")
    arguments = parser.parse_args()
    path = RESULTS / "ladder.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if not arguments.tables:
            cli()
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        for name, part in parts.items():
            if arguments.only in (None, name):
                ladder = Ladder(work, may_run=not arguments.tables)
                made = part(ladder, seeds) | {"missing": ladder.missing}
                if not any(one["runs"] for one in [*made["arms"].values(), {"runs": made.get("tried")}]):
                    continue
                show(name, made)
                kept = json.loads(path.read_text()) if path.exists() else {}
                result = {"episodes": EPISODES, **{one: kept[one] for one in parts if one in kept}, name: made}
                write_result("ladder", result)
                draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
