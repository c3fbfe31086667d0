"""What a dry run says of several ranks, beside what was counted and measured of 1, 2 and 4 real ones.

    python benchmarks/scaling.py [--only NAME …]

Each case is a run of a few steps over gloo on this machine: every collective of a step is counted where torch is asked
for it, and the tensors that are held, at their peak (`benchmarks/ranks.py`). In a run of its own that nothing disturbs,
resident memory is measured at its peak, less what the same run with a model of next to nothing has beside its tensors;
what it is above the tensors is gloo's and the C library's. Steps are timed by the clock, and by the processor's time,
which is what the reckoned seconds are held against, as other work on the machine does not lengthen it. Ranks have one
thread each. Ends with 1 where a count is not the reckoned one, or tensors are more than 10 % off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MIB, REPO, as_hf_folder, environment, print_table, write_part

RANKS = REPO / "benchmarks" / "ranks.py"
LAYERS, STEPS, LENGTH = 4, 3, 128
"""Layers of the model, which is SmolLM2-135M's but for its heads; steps of a run; tokens of a sequence."""
ALLOWED = 0.10
SMALL = 4096
"""Bytes up to which a collective is one by which ranks agree on numbers."""
FSDP = ["--fabric.strategy", "fsdp"]
TENSOR = ["--fabric.tensor_parallel", "2"]
PROBE = "exchange of two ranks, bytes to seconds"
CASES: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "ddp, 2": (2, []),
    "ddp, 4": (4, []),
    "fsdp, 2": (2, FSDP),
    "fsdp, 4": (4, FSDP),
    "fsdp, layers stay, 2": (2, [*FSDP, "--fabric.reshard_after_forward", "false"]),
    "fsdp, layers computed again, 2": (2, [*FSDP, "--fabric.activation_checkpointing", "true"]),
    "tensor parallel, 2": (2, TENSOR),
    "tensor parallel and fsdp, 4": (4, [*TENSOR, *FSDP]),
}
"""Name → ranks, flags."""


def run_of(name: str, work: Path, flags: Sequence[str | Path]) -> list[str]:
    """Verb and flags of a case."""
    ranks, own = CASES[name]
    words = [*flags, "--train.global_batch_size", 4 * ranks, "--fabric.devices", ranks, *own]
    words += ["--out_dir", work / "runs" / f"{name}, {Path(flags[2]).parent.name}"]
    return [str(word) for word in words]


def nothing_of(name: str) -> str:
    """What the same run with a model of next to nothing is called."""
    return f"{name}, of nothing"


def told_by(folder: Path, what: str) -> list[dict[str, Any]]:
    """What each rank of a run wrote: what was `counted` or `measured`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{what}-*.json"))]


def at_peak(ranks: list[dict[str, Any]]) -> int:
    """Bytes of the rank with most."""
    return max(int(one["peak"]) for one in ranks)


def compared(name: str, folder: Path, reckoned: dict[str, Any], others: int) -> dict[str, Any]:
    """One case: counted, measured and reckoned. `others`: resident bytes of a rank that are no tensors of the model."""
    counts, measures = told_by(folder, "counted"), told_by(folder, "measured")
    counted, expected = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for kind, size, times in counts[0]["collectives"]:
        if size > SMALL:
            counted[kind, size] += times
    for kind, size, times in reckoned["collectives"]:
        expected[kind, size] += times
    memory = reckoned["memory"]["peak"] - reckoned["memory"]["holes"]
    by_clock, by_processor = (statistics.median(one[place] for one in measures[0]["seconds"]) for place in (0, 1))
    seconds = sum(reckoned["time"].values())
    return {
        "ranks": CASES[name][0],
        "collectives": sum(counted.values()),
        "mb_counted": round(sum(size * times for (_, size), times in counted.items()) / 1e6, 6),
        "mb_reckoned": round(sum(size * times for (_, size), times in expected.items()) / 1e6, 6),
        "equal": counted == expected,
        "small": sum(times for _, size, times in counts[0]["collectives"] if size <= SMALL),
        "tensors_mib_counted": round(at_peak(counts) / MIB),
        "tensors_mib_reckoned": round(memory / MIB),
        "tensors_ratio": round(memory / at_peak(counts), 3),
        "resident_mib_measured": round((at_peak(measures) - others) / MIB),
        "seconds_by_clock": round(by_clock, 3),
        "seconds_of_processor": round(by_processor, 3),
        "seconds_reckoned": round(seconds, 3),
        "seconds_ratio": round(seconds / by_processor, 2),
    }


def prepared(work: Path) -> tuple[list[str | Path], list[str | Path]]:
    """The flags that all cases share, for the model and for one of next to nothing with the same tokenizer."""
    model = as_hf_folder(work / "model")
    text = work / "text.jsonl"
    # Two documents, so that all sequences but one have as many predictions: what is exchanged follows their number.
    lines = (" ".join(f"{n} times {m} is {n * m}," for m in range(60)) for n in range(400))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in (" ".join(lines), "the end")))
    config = json.loads((model / "config.json").read_text())
    folders = []
    for name, changes in {
        # Heads that two ranks can share: SmolLM2 has 9, and 3 of keys and values.
        "model": {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        "nothing": {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 48, "head_dim": 8}
        | {"num_attention_heads": 6, "num_key_value_heads": 2},
    }.items():
        folder = work / "made" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | changes))
        folders.append(folder)
    shared: list[str | Path] = ["--model.init", "random", "--model.tokenizer", model, "--data.train", text]
    shared += ["--data.max_length", str(LENGTH), "--train.micro_batch_tokens", str(2 * LENGTH), "--data.workers", "1"]
    shared += ["--data.cache_dir", work / "cache", "--train.max_steps", str(STEPS), "--fabric.accelerator", "cpu"]
    shared += ["--checkpoint.every", "null", "--log.loggers", "[]"]
    whole, nothing = (["pretrain", "--model.source", folder / "config.json", *shared] for folder in folders)
    return whole, nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="cases to measure; the others stay as they are")
    names = parser.parse_args().only or list(CASES)
    rows: dict[str, dict[str, Any]] = {}
    parts = [PROBE, *CASES]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        flags, nothing = prepared(work)
        runs = [
            (case, CASES[name][0], run_of(name, work, words))
            for name in names
            for case, words in ((nothing_of(name), nothing), (name, flags))
        ]
        (work / "cases.json").write_text(json.dumps({name: words for name, _, words in runs}))
        (work / "runs.json").write_text(json.dumps([*runs, (PROBE, 2, [])]))
        ranks = subprocess.Popen(
            [sys.executable, str(RANKS), folder], cwd=REPO, env=environment(1), stdout=subprocess.PIPE
        )
        assert ranks.stdout is not None
        began = time.monotonic()
        for line in ranks.stdout:
            name = line.decode().strip()
            if name in names:
                reckoned = json.loads((work / "reckoned.json").read_text())
                nothing = work / nothing_of(name)
                others = at_peak(told_by(nothing, "measured")) - at_peak(told_by(nothing, "counted"))
                rows[name] = compared(name, work / name, reckoned[name], others)
                write_part("scaling", name, rows[name], parts)
            elif name == PROBE:
                write_part("scaling", PROBE, told_by(work / name, "measured")[0], parts)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if ranks.wait():
            sys.exit("scaling: ranks failed")
    print_table(["", *next(iter(rows.values()))], [[name, *map(str, row.values())] for name, row in rows.items()])
    missed = [f"{name}: other collectives than reckoned" for name, row in rows.items() if not row["equal"]]
    missed += [
        f"{name}: tensors reckoned at {row['tensors_ratio']} times what they were"
        for name, row in rows.items()
        if abs(row["tensors_ratio"] - 1) > ALLOWED
    ]
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
