"""What does not break litrecipe: kills, wrong recipes and data, damaged checkpoints, attacks, an hour of running.

    python benchmarks/reliability.py [--work runs/reliability] [--only kills recipes …] [--seed 0] [--minutes 60]

- `kills`: 50 times kill -9 at random moments over all verbs that train; resumed runs must equal unbroken ones to the
  last bit (`kills.py` says what is compared);
- `recipes`, `data`: 200 of each, which hypothesis draws over all verbs (`tests/generated.py`): exit code 2, one line a
  mistake, no traceback, nothing written. Recipes are told by processes of their own, whose seconds are measured;
- `checkpoints`: damaged in one place (`damage.py`);
- `attacks`: files made to do harm (`tests/hostile.py`): one line each, in 6 GiB of address space and 120 CPU seconds;
- `soak`: memory of runs of an hour (`soak.py`).

Parts that are not run keep their numbers; what is finished in --work is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import (
    LITRECIPE,
    MACHINE,
    REPO,
    RESULTS,
    Child,
    environment,
    error_lines,
    not_refused,
    print_table,
    run_child,
)
from common import write_part as write_one_part

sys.path.append(str(REPO / "tests"))

import damage
import generated
import hostile
import kills
import soak
from preloaded import Run
from tiny import TINY_CONFIG, write_random_model, write_tiny_tokenizer

KILLS, DRAWN = 50, 200
KILLED = {
    "pretrain": ["pretrain in stages"],
    "finetune": ["full", "lora"],
    "align": ["reward", "dpo, cached", "kto"],
    "online": ["ppo, separate", "grpo", "iterative-dpo", "rejection-sampling"],
    "pipeline": ["pipeline"],
}
"""Kinds of `kills.py` and their methods."""
ADDRESS_SPACE = 6 * 2**30
CPU_SECONDS = 120


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What was made before and kept in a file, or made now."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def forked(words: list[Any], cwd: Path, limited: bool = False) -> Child:
    """A run of litrecipe from a process that has imported everything, to its end."""
    os.environ.update(environment(threads=1, extra={"LITRECIPE_CACHE": str(cwd / "cache"), "COLUMNS": "10000"}))
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = Run([str(word) for word in words], output, output, cwd)
        if limited:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        code = process.wait()
        output.seek(0)
        return Child(code, time.monotonic() - began, 0.0, 0, output.read())


def tiny_model(folder: Path) -> Path:
    """A random two-layer Llama with a tokenizer of its own."""
    if not (folder / "model.safetensors").exists():
        write_tiny_tokenizer(folder)
        write_random_model(folder, TINY_CONFIG, seed=0)
    return folder


def killed(work: Path, seed: int, _: float) -> dict[str, Any]:
    """50 kills over all methods."""
    methods = [(kind, name) for kind, names in KILLED.items() for name in names]
    found: dict[str, dict[str, Any]] = {}
    while missing := KILLS - sum(kills_of(one) for one in found.values()):  # some runs are over before theirs comes
        again = f", {len(found) // len(methods) + 1}" if found else ""
        for number, (kind, name) in enumerate(methods):
            if not (count := missing // len(methods) + (number < missing % len(methods))):
                continue
            chance = random.Random(f"{seed} {name}{again}")
            plan = kills.at_random(kind, count, chance)
            method = kills.METHODS[kind][name]
            found[name + again] = once(
                work / "kills" / f"{name}{again}.json",
                lambda kind=kind, method=method, plan=plan, chance=chance: kills.killed_and_resumed(
                    kind, method, plan, chance, forked=True
                ),
            )
            print(name + again, json.dumps(found[name + again]), flush=True)
    done = {name: kills_of(one) for name, one in found.items()}
    exact = sum(done[name] for name, one in found.items() if not one["different"])
    return {"kills": sum(done.values()), "exact_resumes": exact, "methods": found}


def kills_of(found: dict[str, Any]) -> int:
    """How many came in time."""
    return sum(found["killed"].values())


def left(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Refusals:
    """What was answered to files with mistakes, of each verb as many as come to `DRAWN`."""

    def __init__(self, verbs: Iterable[str]) -> None:
        self.verbs = sorted(verbs)
        self.done: list[Child] = []
        self.mistakes = 0
        self.answered_otherwise: dict[str, dict[str, str]] = {}

    def ask(
        self,
        cases: Callable[[list[str]], Any],
        seed: int,
        run: Callable[[list[Any], Path], Child],
        name: str | None = None,
        model: Path | None = None,
    ) -> None:
        """Write each file, as `name` or under its own, beside a model or none, and run what reads it in an empty
        folder: it must end with 2 and one line a mistake, and write nothing but locks of the cache."""
        for number, verb in enumerate(self.verbs):
            count = DRAWN // len(self.verbs) + (number < DRAWN % len(self.verbs))
            for index, case in enumerate(generated.drawn(cases([verb]), count, seed)):
                with tempfile.TemporaryDirectory() as folder:
                    place, empty = Path(folder) / "given", Path(folder) / "empty"
                    place.mkdir()
                    empty.mkdir()
                    given = place / (name or case.name), model or place / "model", empty / "out"
                    case.write(*given)
                    done = run(case.command(*given), empty)
                    complaint = self.complaint(done, case.must_say, empty)
                self.done.append(done)
                if complaint:
                    content = case.content[-2000:].decode(errors="replace")
                    self.answered_otherwise[f"{verb} {index}"] = {"complaint": complaint, "content": content}
                    print(verb, index, complaint, flush=True)

    def complaint(self, done: Child, must_say: list[str], empty: Path) -> str | None:
        """What is wrong with an answer."""
        told = error_lines(done.output)
        self.mistakes += len(told)
        if written := [one for one in left(empty) if not is_only_a_lock(empty / one)]:
            return f"written: {written}"
        if len(told) != len(must_say):
            return f"{len(told)} lines of {len(must_say)} mistakes: {done.output[-300:]}"
        return not_refused(done.returncode, done.output, must_say)


def wrong_recipes(work: Path, seed: int, _: float) -> dict[str, Any]:
    """200 wrong recipes, each read by a process of its own."""

    def run(words: list[Any], empty: Path) -> Child:
        cache = {"LITRECIPE_CACHE": str(empty / "cache"), "PYTHONPATH": str(REPO), "COLUMNS": "10000"}
        return run_child([*LITRECIPE, *words], threads=1, extra=cache, cwd=empty)

    refusals = Refusals(generated.RIGHT)
    refusals.ask(generated.wrong_recipes, seed, run, name="recipe.yaml")
    taken = {
        "cpu_seconds": [done.cpu_seconds for done in refusals.done],
        "wall_seconds": [done.seconds for done in refusals.done],
    }
    return {
        "recipes": len(refusals.done),
        "verbs": len(refusals.verbs),
        "mistakes": refusals.mistakes,
        **{what: {"median": round(statistics.median(s), 2), "most": round(max(s), 2)} for what, s in taken.items()},
        "answered_otherwise": refusals.answered_otherwise,
    }


def wrong_data(work: Path, seed: int, _: float) -> dict[str, Any]:
    """200 wrong data files."""
    refusals = Refusals(generated.READERS)
    refusals.ask(generated.wrong_data, seed, forked, model=tiny_model(work / "model"))
    return {
        "files": len(refusals.done),
        "verbs": len(refusals.verbs),
        "mistakes": refusals.mistakes,
        "answered_otherwise": refusals.answered_otherwise,
    }


def is_only_a_lock(path: Path) -> bool:
    """Whether something in the cache says nothing: a folder, or a lock."""
    return path.is_dir() or path.suffix == ".lock"


def checkpoints(work: Path, seed: int, _: float) -> dict[str, Any]:
    """Damaged training state, models and shards."""
    place = work / "checkpoints"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    model = tiny_model(work / "model")
    texts = place / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the quick brown fox {n} " * 20}) + "\n" for n in range(60)))

    def run(*words: Any) -> None:
        done = forked(list(words), place)
        if done.returncode:
            sys.exit(f"reliability: a run failed:\n{done.output[-3000:]}")

    flags = ["finetune", "--model", model, "--data.train", "toy:units?n=50", "--train.max_steps", 6]
    flags += ["--checkpoint.every", 2, "--checkpoint.keep", 3, "--train.global_batch_size", 4]
    flags += ["--fabric.accelerator", "cpu", "--log.loggers", "[]"]
    originals = damage.Originals(place, run, flags, texts, model)
    undetected: dict[str, str] = {}
    detected: list[str] = []
    for one in damage.damaged(originals, seed):
        done = forked(one.command, place)
        if one.falls_back:
            out = Path(str(one.command[one.command.index("--out_dir") + 1]))
            told = one.must_say in done.output and "falling back to step-00000004" in done.output
            same = done.returncode == 0 and not kills.differences(originals.full, out)
            complaint = None if told and same else f"exit {done.returncode}: {done.output[-300:]}"
        else:
            complaint = not_refused(done.returncode, done.output, [one.must_say])
        if complaint:
            undetected[one.name] = complaint
            print(one.name, complaint, flush=True)
        else:
            detected.append(one.name)
    return {"damaged": len(detected) + len(undetected), "detected": len(detected), "undetected": undetected}


def attacked(work: Path, seed: int, _: float) -> dict[str, Any]:
    """Hostile files."""
    place = work / "attacks"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    counts: dict[str, int] = {}
    through: dict[str, str] = {}
    longest = 0.0
    for attack in hostile.attacks(place / "files", tiny_model(work / "model")):
        done = forked(attack.command, place, limited=True)
        complaint = not_refused(done.returncode, done.output, [attack.must_say])
        told = error_lines(done.output)
        if complaint is None and attack.lines not in (None, len(told)):
            complaint = f"{len(told)} lines: {done.output[-300:]}"
        if escaped := [str(path) for path in place.rglob(hostile.ESCAPED)]:
            complaint = f"came through: {escaped}"
        counts[attack.kind] = counts.get(attack.kind, 0) + 1
        longest = max(longest, done.seconds)
        if complaint:
            through[f"{attack.kind}: {attack.name}"] = complaint
            print(attack.kind, attack.name, complaint, flush=True)
    shutil.rmtree(place)
    return {"attacks": counts, "longest_seconds": round(longest, 1), "not_refused": through}


def soaked(work: Path, _: int, minutes: float) -> dict[str, Any]:
    """Memory of long runs, side by side with a thread each."""
    with ThreadPoolExecutor() as together:
        samples = list(together.map(lambda verb: soak.soak(work / "soak", verb, minutes), soak.RUNS))
    found = {verb: soak.told(path) for verb, path in zip(soak.RUNS, samples, strict=True)}
    soak.draw(found, RESULTS / "reliability.png")
    return found


PARTS: dict[str, Callable[[Path, int, float], dict[str, Any]]] = {
    "kills": killed,
    "recipes": wrong_recipes,
    "data": wrong_data,
    "checkpoints": checkpoints,
    "attacks": attacked,
    "soak": soaked,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "reliability")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=63.0, help="of the soak")
    args = parser.parse_args()
    rows = []
    for part in args.only:
        made = PARTS[part](args.work.resolve(), args.seed, args.minutes)
        write_one_part("reliability", part, {"commit": MACHINE["commit"], "seed": args.seed, **made}, list(PARTS))
        told = {key: value for key, value in made.items() if not isinstance(value, dict)}
        rows.append([part, json.dumps(told)])
    print_table(["part", "found"], rows)


if __name__ == "__main__":
    main()
