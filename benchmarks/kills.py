"""Kill -9 at random moments, resume, and compare with the unbroken run to the last bit.

    python benchmarks/kills.py [--kills 10] [--seed 0] [--methods align …] [--only grpo …] [--forked]

For pretraining in stages, full fine-tuning, LoRA and DoRA, a reward model, and DPO with every kind of reference: a
shrunken model trains 40 steps over packed samples, across epoch ends. A second run is killed again and again: while it
starts, between two steps, and inside a save. Final weights, the last checkpoint's weights, optimizer and state, metrics
(timing fields aside) and flight record must be equal. Preference learning is killed three times unless --kills says
otherwise. Methods that sample are killed in the midst of sampling too, and what they sampled, paired and kept of rounds
must be equal as well. A pipeline of five stages is killed in each of them and between them; no stage may outlive it.
Each of `pretrain`, `finetune`, `align`, `online` and `pipeline` has a result of its own; `--methods` names those that
are wanted, `--only` some methods of them, where the others keep their numbers. `--forked` starts runs from a process
that has imported everything, which saves seconds each time; they are processes like any other, but nobody is killed
while he imports.
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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import LITRECIPE, REPO, RESULTS, as_hf_folder, environment, print_table, read_lines, write_result

from litrecipe.engine.telling import TIMING

FULL = ["--optim.lr", "1e-3"]
LORA = ["--adapter.method", "lora", "--adapter.r", "8"]
MOVING = ["--dpo.reference", "moving"]


def align(flags: str, **sizes: object) -> list[str]:
    """A verb with its flags, and keys of the group that is named after it."""
    verb, *others = flags.split()
    return ["align", verb, *others, *(f"--{verb.replace('-', '_')}.{key}={value}" for key, value in sizes.items())]


ROLLOUT: dict[str, object] = {"rollout_batch_size": 16, "minibatches": 2, "epochs": 2, "max_new_tokens": 12}
METHODS = {
    "pretrain": {"pretrain in stages": ["pretrain", "--optim.lr", "1e-3"]},
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
    "online": {
        "ppo, separate": align(
            "ppo --adapter.method none --ppo.layout separate --ppo.normalise_values true", **ROLLOUT
        ),
        "ppo, lora": align("ppo --adapter.r 8 --ppo.kl_target 0.5 --ppo.kl_horizon 100 --ppo.ref_ema 0.2", **ROLLOUT),
        "ppo, joined": align("ppo --adapter.r 8 --ppo.layout joined --rewards.scale running", **ROLLOUT),
        "ppo, hydra": align("ppo --adapter.r 8 --ppo.layout hydra --ppo.policy_ema 0.9", **ROLLOUT),
        "grpo": align("grpo --adapter.method none --grpo.kl_coef 0.1 --grpo.completions_per_prompt 4", **ROLLOUT),
        "mdloo": align("rloo --adapter.r 8 --rloo.loss mirror --rloo.ratio token", **ROLLOUT),
        "iterative-dpo": align(
            "iterative-dpo --adapter.method none --iterative_dpo.history 0.5",
            prompts_per_round=8,
            minibatches=4,
            max_new_tokens=12,
        ),
        "rejection-sampling": align(
            "rejection-sampling --adapter.method none",
            completions_per_prompt=4,
            max_new_tokens=12,
            truncated="learn",
        ),
    },
    "pipeline": {"pipeline": ["align", "pipeline", "--config", str(Path(__file__).with_name("kills-pipeline.yaml"))]},
}
"""Verb and flags of each method."""
DATA: dict[str, dict[str, Any]] = {
    "pretrain": {
        "data.mix": "{books: 0.6, notes: 0.4}",
        "data.max_length": 64,
        "data.workers": 1,
        "stages.core.train.max_steps": 24,
        "stages.core.train.global_batch_size": 8,
        "stages.core.train.initial_batch_size": 2,
        "stages.core.train.batch_warmup_steps": 6,
        "stages.core.schedule.name": "constant",
        "stages.long.train.max_steps": 16,
        "stages.long.train.global_batch_size": 3,
        "stages.long.data.max_length": 192,
        "stages.long.model.rope_theta": 2e5,
    },
    "finetune": {"data.train": "toy:fields?n=100&seed=0"},
    "align": {"data.train": "toy:units-pairs?n=100&seed=0", "train.global_batch_size": 4},
    "online": {
        "data.train": "toy:units?n=300&seed=0",
        "rewards.sources": '{"length?target=60&unit=characters": 1.0, "repetition": 0.1}',
        "optim.lr": "1e-3",
        "train.epochs": 9,
    },
}
HELD_OUT: dict[str, Any] = {"data.val": "toy:units?n=4&seed=0&split=test", "eval.every": 7}
KILLS = {"pretrain": 10, "finetune": 10, "align": 3, "online": 10, "pipeline": 10}
NAMES = {
    "pretrain": "kills-pretrain",
    "finetune": "kills",
    "align": "kills-align",
    "online": "kills-online",
    "pipeline": "kills-pipeline",
}
MOMENTS = {
    "pretrain": ("save", "step", "start"),
    "finetune": ("save", "step", "start"),
    "align": ("save", "step", "start"),
    "online": ("sampling", "start", "sampling", "save", "step"),
    "pipeline": ("step", "between", "save", "between", "sampling", "between", "step", "save", "between", "step"),
}
SAID = {
    "start": "at start",
    "sampling": "in sampling",
    "step": "between steps",
    "save": "inside a save",
    "between": "between stages",
}
STAGES = ("sft", "sft", "reward", "reward", "rejection", "rejection", "ppo", "ppo", "ppo", "dpo")
"""Of a pipeline: in which one it is killed, or after which."""
SHRUNKEN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
STEPS = {"pretrain": None, "finetune": 40, "align": 40, "online": 60, "pipeline": None}
EVERY = 3
A_ROLLOUT = 4
"""Steps in which a rollout is learnt."""
MADE = ("final", "best", "best.json", "rounds", "pairs", "rollouts", "candidates.jsonl", "sft.jsonl", "best_of.json")
"""What runs leave besides checkpoints and records."""


@dataclass
class Job:
    """A training command, less its run directory."""

    flags: list[str]
    forked: bool = False
    """Whether it starts from a process that has imported everything."""

    def start(self, out: Path) -> Any:
        """The process: a `subprocess.Popen`, or what is like one."""
        words = [*self.flags, "--out_dir", str(out), "--checkpoint.resume", "auto"]
        log = out.with_suffix(".log").open("ab")
        if self.forked:
            sys.path.append(str(REPO / "tests"))
            from preloaded import Run

            os.environ.update(environment(threads=1))
            return Run(words, log, log, REPO)
        return subprocess.Popen(
            [*LITRECIPE, *words], cwd=REPO, env=environment(threads=1), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def finish(self, out: Path) -> None:
        if self.start(out).wait():
            sys.exit(f"kills: a run failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def shrunken_model(folder: Path) -> dict[str, Any]:
    """Keys of a two-layer model with the real one's tokenizer and random weights, and of how it is trained."""
    real = as_hf_folder(folder / "real")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads((real / "config.json").read_text()), **SHRUNKEN}))
    return {
        "model.source": config,
        "model.init": "random",
        "model.tokenizer": real,
        "data.cache_dir": folder / "cache",
        "train.micro_batch_tokens": 256,
        "fabric.accelerator": "cpu",
        "log.loggers": "[]",
    }


def shrunken_job(folder: Path, kind: str, method: list[str], changes: Mapping[str, Any] | None = None) -> Job:
    """A method that trains the shrunken model; `changes` are keys that differ, None where one is left out."""
    flags = shrunken_model(folder)
    if kind == "pipeline":  # its other keys are in its recipe
        model = {f"stages.sft.{key}": value for key, value in flags.items() if key.startswith("model.")}
        caches = {f"stages.{stage}.data.cache_dir": folder / "cache" for stage in STAGES}
        return words(method, model | caches)
    if "hydra" in method:  # starts from what a reward model and a language model learnt together
        joint = ["align", "reward", *FULL, "--reward.sft_coef", "1"]
        words(joint, flags | DATA["align"] | {"train.max_steps": 2}).finish(folder / "joint")
        flags = flags | {"model.source": folder / "joint", "model.init": "pretrained"}
    if kind == "pretrain":
        flags["data.sources"] = write_documents(folder)
    flags |= DATA[kind] | {"train.max_steps": STEPS[kind], "checkpoint.every": EVERY}
    if kind == "online" and "rejection-sampling" not in method:
        flags |= HELD_OUT
    if "rejection-sampling" in method:
        flags["train.epochs"] = None  # the steps alone end it
    return words(method, flags | dict(changes or {}))


def write_documents(folder: Path) -> str:
    """Two sources of words drawn at random, and the key that names them."""
    for name, count in (("books", 120), ("notes", 90)):
        draw = random.Random(name)
        texts = (" ".join(str(draw.randrange(10_000)) for _ in range(draw.randrange(5, 90))) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"{{books: {folder / 'books.jsonl'}, notes: {folder / 'notes.jsonl'}}}"


def words(method: list[str], flags: dict[str, Any]) -> Job:
    given = ((f"--{key}", str(value)) for key, value in flags.items() if value is not None)
    return Job([*method, *(word for pair in given for word in pair)])


def drafts(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob("step-*.tmp"))


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"grad_norm"') if path.exists() else 0


def candidates(out: Path) -> int | None:
    """Bytes of what is chosen among while it is still sampled; None where nothing is."""
    path = out / "candidates.jsonl"
    return path.stat().st_size if path.exists() and not (out / "sft.jsonl").exists() else None


def is_done(stage: Path) -> bool:
    """Whether a pipeline has noted that a stage ended well."""
    note = stage / "stage.json"
    return note.exists() and bool(json.loads(note.read_text())["done"])


def left_behind(out: Path) -> list[int]:
    """Processes that work on a run, but for the dead that nobody buried."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            about_it = str(out).encode() in (folder / "cmdline").read_bytes()
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:  # it has just ended
            continue
        if about_it and not dead and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def kill_once(job: Job, whole: Path, moment: str, chance: random.Random, stage: str = "") -> bool:
    """Start, kill at the moment asked for (of a stage); False when the run, or that stage, ended first."""
    out = whole / stage
    if moment == "between" and is_done(out):
        return False
    before, sampled = steps_done(out), candidates(out)
    for draft in drafts(out):  # an earlier kill's; this one is to wait for a save of its own
        shutil.rmtree(draft)
    process = job.start(whole)
    wait = chance.uniform(0.0, 8.0) if moment in ("start", "between") else chance.uniform(0.0, 0.3)
    steps = before + chance.randint(1, 6)
    if moment == "sampling":  # a rollout follows when the one before is learnt
        steps = (before // A_ROLLOUT + 1) * A_ROLLOUT
    due: float | None = time.monotonic() + wait if moment == "start" else None
    while process.poll() is None:
        now = candidates(out)
        if due is None and moment == "between" and is_done(out):
            due = time.monotonic() + wait
        if due is None and moment in ("step", "sampling") and steps_done(out) >= steps:
            due = time.monotonic() + wait
        if due is None and moment == "sampling" and now is not None and now > (sampled or 0):
            due = time.monotonic() + wait
        if (moment == "save" and drafts(out)) or (due is not None and time.monotonic() >= due):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(1)
            if pids := left_behind(whole):
                sys.exit(f"kills: processes outlived the one that was killed: {pids}")
            return True
        time.sleep(0.001)
    return False


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal between two finished runs."""
    found = []
    newest = sorted(path.name for path in (a / "checkpoints").iterdir())[-1]
    made = [a / name for name in (*MADE, f"checkpoints/{newest}")]
    files = [file for path in made for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    for file in files:
        other = b / file.relative_to(a)
        # What lies there until no checkpoint needs it is told how long it took to make.
        if file.parent.suffix != ".samples" and (not other.exists() or file.read_bytes() != other.read_bytes()):
            found.append(str(file.relative_to(a)))

    def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]

    for name in ("metrics.jsonl", "flight.jsonl"):
        if without_timing(read_lines(a / name)) != without_timing(read_lines(b / name)):
            found.append(name)
    return found


Plan = list[tuple[str, str]]
"""Moments to kill at; of a pipeline each with the stage."""


def in_turn(kind: str, kills: int) -> Plan:
    """All moments of a kind, one after the other."""
    moments, stages = MOMENTS[kind], STAGES if kind == "pipeline" else ("",)
    return [(moments[kill % len(moments)], stages[kill % len(stages)]) for kill in range(kills)]


def at_random(kind: str, kills: int, chance: random.Random) -> Plan:
    """Moments as they come; those of a pipeline in the order of its stages."""
    stages = [chance.choice(list(dict.fromkeys(STAGES))) if kind == "pipeline" else "" for _ in range(kills)]
    plan = []
    for stage in sorted(stages, key=lambda name: STAGES.index(name) if name else 0):
        samples = kind != "pipeline" or stage in ("rejection", "ppo")
        moments = sorted(set(MOMENTS[kind]) - (set() if samples else {"sampling"}))
        plan.append((chance.choice(moments), stage))
    return plan


def killed_and_resumed(
    kind: str, method: list[str], plan: Plan, chance: random.Random, forked: bool = False
) -> dict[str, Any]:
    """How often a run was killed at which moment, and what differs from one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        job = replace(shrunken_job(Path(folder), kind, method), forked=forked)
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "run"
        job.finish(broken)
        broken.rename(unbroken)  # both are made at one place: names of sources and samples tell it
        moments = {moment: 0 for moment in SAID if moment in MOMENTS[kind]}
        for moment, stage in plan:
            if not kill_once(job, broken, moment, chance, stage):
                break
            moments[moment] += 1
        job.finish(broken)
        parts = dict.fromkeys(STAGES) if kind == "pipeline" else [""]
        different = [str(Path(part, name)) for part in parts for name in differences(unbroken / part, broken / part)]
        return {"killed": moments, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="kills of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", nargs="+", default=[], help="names of methods: the others keep their numbers")
    parser.add_argument("--forked", action="store_true", help="start runs from a process that has imported everything")
    args = parser.parse_args()
    differ = False
    for kind in args.methods:
        chance = random.Random(args.seed)
        kills = args.kills or KILLS[kind]
        settings: dict[str, Any] = {"seed": args.seed, "steps": STEPS[kind], "checkpoint_every": EVERY}
        if args.forked:
            settings["started"] = "forked from a process that had imported everything"
        if kind == "pipeline":
            settings["killed_in_or_after"] = STAGES[:kills]
        kept = RESULTS / f"{NAMES[kind]}.json"
        known = json.loads(kept.read_text())["methods"] if args.only and kept.exists() else {}
        for name, method in METHODS[kind].items():
            if args.only and name not in args.only:
                continue
            known[name] = killed_and_resumed(kind, method, in_turn(kind, kills), chance, args.forked)
            print(name, json.dumps(known[name]), flush=True)
            results = {other: known[other] for other in METHODS[kind] if other in known}
            write_result(NAMES[kind], {**settings, "methods": results})
        rows = [[name, *found["killed"].values(), found["different"] or "nothing"] for name, found in results.items()]
        moments = [said for moment, said in SAID.items() if moment in MOMENTS[kind]]
        print_table(["method", *moments, "different from the unbroken run"], rows)
        differ = differ or any(found["different"] for found in results.values())
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    main()
