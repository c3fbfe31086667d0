"""Kill -9 at random moments, resume, and compare with the unbroken run to the last bit.

    python benchmarks/kills.py [--kills 10] [--seed 0] [--methods align …]

For full fine-tuning, LoRA and DoRA, a reward model, and DPO with every kind of reference: a shrunken model trains 40
steps over packed samples, across epoch ends. A second run is killed again and again: while it starts, between two
steps, and inside a save. Final weights, the last checkpoint's weights, optimizer and state, metrics (timing fields
aside) and flight record must be equal. Preference learning is killed three times unless --kills says otherwise, and
kept as a result of its own: `--methods align` is that alone, `--methods finetune` the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import LITRECIPE, REPO, as_hf_folder, environment, print_table, read_lines, write_result

FULL = ["--optim.lr", "1e-3"]
LORA = ["--adapter.method", "lora", "--adapter.r", "8"]
MOVING = ["--dpo.reference", "moving"]
METHODS = {
    "finetune": {
        "full": ["finetune", *FULL],
        "lora": ["finetune", *LORA],
        "dora": ["finetune", "--adapter.method", "dora", "--adapter.r", "8"],
    },
    "align": {
        "reward": ["align", "reward", *LORA, "--reward.centering_coef", "0.01"],
        "dpo, cached": ["align", "dpo", *LORA],
        "dpo, frozen copy": ["align", "dpo", *FULL, "--dpo.reference", "copy"],
        "dpo, moving softly": ["align", "dpo", *LORA, *MOVING, "--dpo.ref_alpha", "0.6"],
        "dpo, moving hard": ["align", "dpo", *FULL, *MOVING, "--dpo.ref_alpha", "1", "--dpo.ref_every", "3"],
        "kto": ["align", "dpo", *LORA, "--dpo.loss", "kto"],
        "aot": ["align", "dpo", *FULL, "--dpo.loss", "aot"],
    },
}
"""Verb and flags of each method."""
DATA = {
    "finetune": {"data.train": "toy:fields?n=100&seed=0"},
    "align": {"data.train": "toy:units-pairs?n=100&seed=0", "train.global_batch_size": 4},
}
KILLS = {"finetune": 10, "align": 3}
NAMES = {"finetune": "kills", "align": "kills-align"}
SHRUNKEN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
STEPS, EVERY = 40, 3
TIMING = ("tokens_per_second", "memory")


@dataclass
class Job:
    """A training command, less its run directory."""

    flags: list[str]

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        command = [*LITRECIPE, *self.flags, "--out_dir", str(out), "--checkpoint.resume", "auto"]
        log = out.with_suffix(".log").open("ab")
        return subprocess.Popen(
            command, cwd=REPO, env=environment(threads=1), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def finish(self, out: Path) -> None:
        if self.start(out).wait():
            sys.exit(f"kills: a run failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def shrunken_job(folder: Path, method: list[str]) -> Job:
    """A two-layer model with the real one's tokenizer and random weights."""
    real = as_hf_folder(folder / "real")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads((real / "config.json").read_text()), **SHRUNKEN}))
    flags = {
        "model.source": config,
        "model.init": "random",
        "model.tokenizer": real,
        **DATA[method[0]],
        "data.cache_dir": folder / "cache",
        "train.max_steps": STEPS,
        "train.micro_batch_tokens": 256,
        "checkpoint.every": EVERY,
        "fabric.accelerator": "cpu",
    }
    return Job([*method, *(str(word) for key, value in flags.items() for word in (f"--{key}", value))])


def drafts(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob("step-*.tmp"))


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_once(job: Job, out: Path, moment: str, chance: random.Random) -> bool:
    """Start, kill at the moment asked for; False when the run ended first."""
    before = steps_done(out)
    for draft in drafts(out):  # an earlier kill's; this one is to wait for a save of its own
        shutil.rmtree(draft)
    process = job.start(out)
    wait = chance.uniform(0.0, 8.0) if moment == "start" else chance.uniform(0.0, 0.3)
    steps = before + chance.randint(1, 6)
    due: float | None = time.monotonic() + wait if moment == "start" else None
    while process.poll() is None:
        if due is None and moment == "step" and steps_done(out) >= steps:
            due = time.monotonic() + wait
        if (moment == "save" and drafts(out)) or (due is not None and time.monotonic() >= due):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal between two finished runs."""
    found = []
    newest = sorted(path.name for path in (a / "checkpoints").iterdir())[-1]
    folders = ["final", f"checkpoints/{newest}"]
    for folder in folders:
        for path in sorted((a / folder).iterdir()):
            other = b / folder / path.name
            if not other.exists() or path.read_bytes() != other.read_bytes():
                found.append(f"{folder}/{path.name}")

    def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]

    for name in ("metrics.jsonl", "flight.jsonl"):
        if without_timing(read_lines(a / name)) != without_timing(read_lines(b / name)):
            found.append(name)
    return found


def killed_and_resumed(method: list[str], kills: int, chance: random.Random) -> dict[str, Any]:
    """How often a run was killed at which moment, and what differs from one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        job = shrunken_job(Path(folder), method)
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        job.finish(unbroken)
        moments = {"start": 0, "step": 0, "save": 0}
        for kill in range(kills):
            moment = ("save", "step", "start")[kill % 3]
            if not kill_once(job, broken, moment, chance):
                break
            moments[moment] += 1
        job.finish(broken)
        return {"killed": moments, "different": differences(unbroken, broken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="kills of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    differ = False
    for kind in args.methods:
        chance = random.Random(args.seed)
        kills = args.kills or KILLS[kind]
        results = {name: killed_and_resumed(method, kills, chance) for name, method in METHODS[kind].items()}
        rows = [[name, *found["killed"].values(), found["different"] or "nothing"] for name, found in results.items()]
        print_table(["method", "at start", "between steps", "inside a save", "different from the unbroken run"], rows)
        settings = {"seed": args.seed, "steps": STEPS, "checkpoint_every": EVERY}
        write_result(NAMES[kind], {**settings, "methods": results})
        differ = differ or any(found["different"] for found in results.values())
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    main()
