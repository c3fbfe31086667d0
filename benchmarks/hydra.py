"""SFT and PPO's four layouts: memory, the largest row under a cap, time, and passes through transformers.

    python benchmarks/hydra.py [--repeats 3] [--cap 3] [--no-verify] [--folder FOLDER]

SmolLM2-135M in fp32, adapters of rank 16. A short joint stage makes one hydra, which all layouts start from and are
judged by, so that all draw the same first completions and score them alike; SFT learns those. `separate` holds policy,
critic, reference and reward model, `lora` and `joined` one base and the reward model, `hydra` one base.

- memory: resident at its peak, less that of a process which only imports the same libraries, beside what `--dry_run`
  announces; fresh processes, with one arena of the C library.
- largest row: how many samples go through one forward and backward pass such that the same peak stays under `--cap`
  GiB; the dry run says where to look, and of PPO the last that fits and the first that does not are run.
- time: CPU seconds a sample of the second step, its rollout included, of one thread, in turns: those of a machine that
  is shared are longer than on one's own, but not by the share.
- passes: tokens that transformers read for each token that is learnt, counted.

On a CPU time a sample hardly depends on the batch, so the lower latency of the paper (2309.00754), which is that of a
larger batch in freed memory, cannot be shown here: `gpu_check.py` measures it. Ends with 1 when announced and measured
peak are more than 20 % apart, when layouts do not begin alike, or when one holds more transformers than it should.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    LITRECIPE,
    MIB,
    REPO,
    RESULTS,
    SHARED,
    Child,
    as_hf_folder,
    print_table,
    read_lines,
    run_child,
    write_result,
)

NEW_TOKENS, BATCH, STEPS, THREADS = 16, 8, 2, 1
WORDS = range(6, 10)
"""Of a prompt: all are about as long."""
ALLOWED = 0.20
IMPORTS = "import litrecipe.recipes.ppo, peft, lightning_fabric, transformers, torch.utils.tensorboard"
LORA = ["--adapter.method", "lora", "--adapter.r", "16"]
WHOLE = ["--adapter.method", "none", "--optim.lr", "1e-6"]
SFT = {"sft, full": WHOLE, "sft, lora": LORA}
PPO = {
    "separate": ["--ppo.layout", "separate", *WHOLE],
    "lora": ["--ppo.layout", "lora", *LORA],
    "joined": ["--ppo.layout", "joined", *LORA],
    "hydra": ["--ppo.layout", "hydra", *LORA],
}
METHODS = [*SFT, *PPO]
BACKBONES = {"separate": 4, "lora": 2, "joined": 2, "hydra": 1}
STATIC = ("weights", "reference", "judges", "gradients", "optimizer")
"""Lines of the memory table for what does not depend on the batch."""


@dataclass
class Bench:
    """A working folder with the hydra, prompts, and what SFT learns."""

    folder: Path
    sample: int = 128
    """Tokens of the longest prompt and completion; a first guess."""

    def prepare(self) -> None:
        """The joint stage; prompts; completions of them. What is there already stays."""
        if self.told.exists():
            self.sample = self.kept("one sample", lambda: self.announced("hydra", 1))["tokens"]
            return
        write_prompts(self.prompts)
        model, joint = as_hf_folder(self.folder / "model"), self.folder / "joint"
        pairs = ["--data.train", "toy:units-pairs?n=16&seed=0", "--reward.sft_coef", "1", "--optim.lr", "1e-4"]
        if not self.hydra.exists():
            stage = ["align", "reward", "--model.source", str(model), *pairs, *LORA, *self.fixed(4096)]
            self.run("joint", stage).check()
            run_child([*LITRECIPE, "model", "merge", joint, self.hydra], threads=THREADS).check()
        self.sample = self.kept("one sample", lambda: self.announced("hydra", 1))["tokens"]
        first = self.command("hydra", 2 * BATCH, BATCH)
        self.run("first", [*first, "--train.max_steps", "1"]).check()
        write_told(self.folder / "first" / "rollouts" / "000001.jsonl", self.told)

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def told(self) -> Path:
        """Conversations that end with a completion."""
        return self.folder / "told.jsonl"

    @property
    def hydra(self) -> Path:
        return self.folder / "hydra"

    def fixed(self, row: int) -> list[str]:
        """Flags of every run; `row` tokens go through a forward pass together."""
        given = {
            "train.max_steps": STEPS,
            "train.micro_batch_tokens": row,
            "data.cache_dir": self.folder / "cache",
            "checkpoint.every": "null",
            "fabric.accelerator": "cpu",
        }
        return [str(word) for key, value in given.items() for word in (f"--{key}", value)]

    def command(self, method: str, batch: int, in_a_row: int) -> list[str]:
        """Verb and flags of a method that learns `batch` samples a step, `in_a_row` of them in one pass."""
        shared = ["--model.source", str(self.hydra), *self.fixed(in_a_row * self.sample)]
        if method in SFT:
            return ["finetune", *shared, "--data.train", str(self.told), *SFT[method], *sized("train.global", batch)]
        judge = [] if method == "hydra" else ["--rewards.sources", json.dumps({f"model:{self.hydra}": 1.0})]
        sampled = ["--ppo.max_new_tokens", str(NEW_TOKENS), "--ppo.epochs", "1", *sized("ppo.rollout", batch)]
        return ["align", "ppo", *shared, "--data.train", str(self.prompts), *judge, *sampled, *PPO[method]]

    def run(self, name: str, command: list[str]) -> Child:
        """One fresh process, measured, and its run directory; what it did is counted in `passes.json`."""
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        program = [sys.executable, REPO / "benchmarks" / "passes.py", self.folder / "passes.json"]
        words = [*program, *command, "--out_dir", out]
        return run_child(words, threads=THREADS, extra={"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(REPO)})

    def kept(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found under this name before in the same folder, or is found now."""
        path = self.folder / "found.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if name not in found:
            found[name] = find()
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found[name], flush=True)
        return dict(found[name])

    def imports(self) -> dict[str, Any]:
        """What a process holds that imports and does nothing."""
        words = [sys.executable, "-c", IMPORTS]
        return {"bytes": run_child(words, extra={"MALLOC_ARENA_MAX": "1"}).check().peak_rss}

    def announced(self, method: str, in_a_row: int) -> dict[str, Any]:
        """The dry run's table in bytes, with `tokens` of the largest row."""
        shown = self.run("dry", [*self.command(method, in_a_row, in_a_row), "--dry_run"]).check().output
        table = {name: float(gb) * 1e9 for name, gb in re.findall(r"^\s*(\w+)\s+(\d+\.\d{3})\b", shown, re.MULTILINE)}
        tokens = re.search(r"largest row: (\d+) tokens", shown)
        if tokens is None or "peak" not in table:
            sys.exit(f"hydra: no memory table in what --dry_run printed:\n{shown}")
        return {**table, "tokens": int(tokens[1])}

    def measured(self, method: str, in_a_row: int, baseline: int) -> dict[str, Any]:
        """Peak, time and passes of a run whose steps are one row each."""
        child = self.run("run", self.command(method, in_a_row, in_a_row)).check()
        steps = [line for line in read_lines(self.folder / "run" / "metrics.jsonl") if "loss" in line]
        counted = json.loads((self.folder / "passes.json").read_text())
        found = {
            "peak_mib": round((child.peak_rss - baseline) / MIB),
            "tokens_a_sample": round(steps[-1]["tokens"] / STEPS / in_a_row, 1),
            "cpu_seconds_a_sample": round((counted["cpu"][-1] - counted["cpu"][-2]) / in_a_row, 3),
            "backbones": counted["backbones"],
            "passes": {kind: round(read / steps[-1]["tokens"], 2) for kind, read in counted["tokens"].items()},
        }
        if method in PPO:
            found["first_reward"] = steps[0]["reward"]
        shutil.rmtree(self.folder / "run")  # all weights of two models, and their optimizer
        return found


def sized(key: str, count: int) -> list[str]:
    """Samples of a step."""
    return [f"--{key}_batch_size", str(count)]


def write_prompts(out: Path) -> None:
    """Questions of about the same length that ask for more than `NEW_TOKENS` tokens."""
    rows = read_lines(SHARED / "data" / "bench" / "sft128.jsonl")
    asked = [row["messages"][0]["content"] for row in rows]
    kept = [text for text in asked if len(text.split()) in WORDS]
    out.write_text("".join(json.dumps({"prompt": f"{text} Explain it at length."}) + "\n" for text in kept))


def write_told(rollout: Path, out: Path) -> None:
    """Prompts with their completions as conversations."""
    told = [[*row["prompt"], {"role": "assistant", "content": row["completion"]}] for row in read_lines(rollout)]
    out.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in told))


def largest_row(
    bench: Bench, method: str, table: dict[str, Any], cap: float, baseline: int, *, verify: bool
) -> dict[str, Any]:
    """The most samples that go through one pass with the peak under `cap` bytes: announced, and measured."""
    announced = 0
    while announced_peak(table, announced + 1) <= cap:
        announced += 1
    if method in SFT or not announced or not verify:
        return {"announced": announced}
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        name = f"{method}, {count} in a row"
        peaks[count] = bench.kept(name, lambda: bench.measured(method, count, baseline))["peak_mib"]
        return peaks[count] * MIB <= cap

    return {"announced": announced, "measured": walk(fits, announced), "peaks_mib": dict(sorted(peaks.items()))}


def announced_peak(table: dict[str, Any], samples: int) -> float:
    """That of a row of so many samples, from the table of `BATCH` of them: see `engine.memory.MemoryTable.peak`."""
    share = samples / BATCH
    always = sum(table.get(name, 0) for name in ("weights", "reference", "judges", "optimizer"))
    return always + share * (table["scratch"] + table["holes"]) + max(share * table["activations"], table["gradients"])


def walk(fits: Callable[[int], bool], count: int) -> int:
    """The largest count that fits, from a guess on."""
    if fits(count):
        while fits(count + 1):
            count += 1
        return count
    while count > 1 and not fits(count - 1):
        count -= 1
    return count - 1


def draw(methods: dict[str, Any], cap: float, out: Path) -> None:
    """Peaks, largest rows and times as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(methods)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    memory, rows, times = figure.subplots(1, 3)
    for shift, key, color in ((-0.2, "announced_mib", "#9a9a9a"), (0.2, "measured_mib", "#2a7f62")):
        places = [place + shift for place in range(len(names))]
        memory.bar(places, [methods[name][key] / 1024 for name in names], 0.4, color=color, label=key[:-4])
    memory.set(ylabel="GiB", title=f"peak, {BATCH} samples in a row")
    memory.legend(frameon=False)
    for shift, key, color in ((-0.2, "announced", "#9a9a9a"), (0.2, "measured", "#2a7f62")):
        places = [place + shift for place in range(len(names))]
        counts = [methods[name]["largest_row"].get(key, 0) for name in names]
        rows.bar(places, counts, 0.4, color=color, label=key)
    rows.set(ylabel="samples", title=f"largest row under {cap:g} GiB")
    times.bar(range(len(names)), [methods[name]["cpu_seconds_a_sample"] for name in names], color="#2a7f62")
    times.set(ylabel="CPU seconds", title="time a sample, one thread")
    for axes in (memory, rows, times):
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    figure.suptitle("SFT and PPO's layouts, SmolLM2-135M in fp32, rank 16")
    FigureCanvasAgg(figure).print_png(str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cap", type=float, default=3.0, help="GiB")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="run the largest rows")
    parser.add_argument("--folder", help="to work in; a benchmark that was stopped goes on there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(args.folder or folder))
        bench.prepare()
        baseline = bench.kept("imports", bench.imports)["bytes"]
        tables = {
            method: bench.kept(f"{method}, announced", lambda method=method: bench.announced(method, BATCH))
            for method in METHODS
        }
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for turn in range(args.repeats):
            for method in METHODS:
                name = f"{method}, turn {turn}"
                run = bench.kept(name, lambda method=method: bench.measured(method, BATCH, baseline))
                runs[method].append(run)
        methods: dict[str, Any] = {}
        cap = args.cap * 2**30
        for method in METHODS:
            methods[method] = summary(tables[method], runs[method])
            methods[method]["largest_row"] = largest_row(
                bench, method, tables[method], cap, baseline, verify=args.verify
            )
    columns = ("static_mib", "announced_mib", "measured_mib", "cpu_seconds_a_sample", "backbones", "passes")
    print_table(
        ["", *columns, "largest row"],
        [
            [name, *(row[key] for key in columns), row["largest_row"].get("measured", row["largest_row"]["announced"])]
            for name, row in methods.items()
        ],
    )
    result = {
        "threads": THREADS,
        "samples_in_a_row": BATCH,
        "tokens_of_the_longest_sample": bench.sample,
        "new_tokens": NEW_TOKENS,
        "imports_mib": round(baseline / MIB),
        "cap_gib": args.cap,
        "methods": methods,
    }
    write_result("hydra", result)
    draw(methods, args.cap, RESULTS / "hydra.png")
    missed = failures(methods)
    if missed:
        sys.exit("hydra: " + "; ".join(missed))


def summary(table: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, beside the dry run's table."""
    numbers = ("peak_mib", "tokens_a_sample", "cpu_seconds_a_sample")
    median = {key: statistics.median(run[key] for run in runs) for key in numbers}
    announced, measured = table["peak"] / MIB, median.pop("peak_mib")
    return {
        "static_mib": round(sum(table.get(name, 0) for name in STATIC) / MIB),
        "announced_mib": round(announced),
        "measured_mib": round(measured),
        "announced_over_measured": round(announced / measured, 3),
        **{key: round(value, 3) for key, value in median.items()},
        **{key: value for key, value in runs[0].items() if key not in numbers},
        "runs": runs,
    }


def failures(methods: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = []
    for name, row in methods.items():
        if abs(row["announced_over_measured"] - 1) > ALLOWED:
            found.append(f"{name}: announced over measured peak is {row['announced_over_measured']}")
        if row["backbones"] != BACKBONES.get(name, 1):
            found.append(f"{name}: {row['backbones']} transformers, not {BACKBONES.get(name, 1)}")
    rewards = [methods[name]["first_reward"] for name in PPO]
    if max(rewards) - min(rewards) > 1e-3:
        found.append(f"first completions are not the same: mean rewards {rewards}")
    return found


if __name__ == "__main__":
    main()
