"""What a dry run says of several ranks, beside what was counted and measured of 1, 2 and 4 real ones.

    python benchmarks/scaling.py [--only NAME …]

Each case is a run of a few steps over gloo on this machine: every collective of a step is counted where torch is asked
for it (`benchmarks/ranks.py`), resident memory is measured at its peak, less that of a process that only imports the
same libraries, and steps are timed. Ranks have one thread each; where there are more of them than cores they take
turns, and the reckoned arithmetic counts as many times over. Ends with 1 where a count is not the reckoned one, or
memory is more than 10 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MIB, REPO, as_hf_folder, environment, print_table, run_child, write_part

RANKS = REPO / "benchmarks" / "ranks.py"
IMPORTS = "import litrecipe.recipes.pretrain, litrecipe.recipes.finetune, lightning_fabric"
LAYERS, STEPS, LENGTH = 8, 4, 256
"""Layers of the model, which is SmolLM2-135M's otherwise; steps of a run; tokens of a sequence."""
ALLOWED = 0.10
SMALL = 4096
"""Bytes up to which a collective is one by which ranks agree on numbers."""
FSDP = ["--fabric.strategy", "fsdp"]
TENSOR = ["--fabric.tensor_parallel", "2"]
LORA = ["--adapter.method", "lora", "--adapter.r", "16"]
CASES: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "ddp, 2": (2, []),
    "ddp, 4": (4, []),
    "fsdp, 2": (2, FSDP),
    "fsdp, 4": (4, FSDP),
    "fsdp, layers stay, 2": (2, [*FSDP, "--fabric.reshard_after_forward", "false"]),
    "fsdp, layers computed again, 2": (2, [*FSDP, "--fabric.activation_checkpointing", "true"]),
    "fsdp, lora, 2": (2, [*FSDP, *LORA]),
    "fsdp, lora on nf4, 2": (2, [*FSDP, *LORA, "--quantize.method", "nf4"]),
    "tensor parallel, 2": (2, TENSOR),
    "tensor parallel and fsdp, 4": (4, [*TENSOR, *FSDP]),
}
"""Name → ranks, flags."""


def together(ranks: int, words: Sequence[str | Path]) -> None:
    """Run the program of a rank so many times at once, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    meet |= {"TORCHELASTIC_RUN_ID": "scaling", "GROUP_RANK": "0"}
    processes = []
    for rank in range(ranks):
        own = environment(1, meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        command = [sys.executable, str(RANKS), *map(str, words)]
        processes.append(subprocess.Popen(command, cwd=REPO, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            said, _ = process.communicate(timeout=1800)
            if process.returncode:
                sys.exit(f"scaling: a rank ended with {process.returncode}:\n{said.decode()[-3000:]}")
    finally:
        for process in processes:
            process.kill()


def measure(name: str, work: Path, flags: Sequence[str | Path], baseline: int) -> dict[str, Any]:
    """One case: counted, measured and reckoned."""
    ranks, own = CASES[name]
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = [*flags, "--train.global_batch_size", str(4 * ranks), "--fabric.devices", str(ranks), *own]
    words += ["--out_dir", work / "run"]
    shutil.rmtree(work / "run", ignore_errors=True)
    run_child([sys.executable, RANKS, "reckon", out, *words], threads=1).check()
    together(ranks, ["count", out, *words])
    reckoned = json.loads((out / "reckoned.json").read_text())
    told = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    counted, expected = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for kind, size, times in told[0]["counted"]:
        if size > SMALL:
            counted[kind, size] += times
    for kind, size, times in reckoned["collectives"]:
        expected[kind, size] += times
    peak = max(one["peak"] for one in told) - baseline
    turns = max(1.0, ranks / (os.cpu_count() or 1))
    time_of = reckoned["time"]
    seconds = turns * (time_of["arithmetic"] + time_of["optimizer"]) + time_of["waiting"]
    measured = statistics.median(told[0]["seconds"])
    return {
        "ranks": ranks,
        "collectives": sum(counted.values()),
        "mb_counted": round(sum(size * times for (_, size), times in counted.items()) / 1e6, 6),
        "mb_reckoned": round(sum(size * times for (_, size), times in expected.items()) / 1e6, 6),
        "equal": counted == expected,
        "small": sum(times for _, size, times in told[0]["counted"] if size <= SMALL),
        "memory_mib_measured": round(peak / MIB),
        "memory_mib_reckoned": round(reckoned["memory"]["peak"] / MIB),
        "memory_ratio": round(reckoned["memory"]["peak"] / peak, 3),
        "seconds_measured": round(measured, 3),
        "seconds_reckoned": round(seconds, 3),
        "seconds_ratio": round(seconds / measured, 2),
    }


def prepared(work: Path) -> list[str | Path]:
    """Model, text and the flags that all cases share."""
    model = as_hf_folder(work / "model")
    small = work / "small"
    if not small.exists():
        code = (
            "import sys; from litrecipe.checkpoint.source import open_model\n"
            "from litrecipe.checkpoint.hf import save_model; from litrecipe.checkpoint.load import load_model\n"
            "from pathlib import Path\n"
            "files = open_model(sys.argv[1], layers=int(sys.argv[3]))\n"
            "save_model(Path(sys.argv[2]), load_model(files), files.tokenizer_dir)"
        )
        run_child([sys.executable, "-c", code, model, small, str(LAYERS)]).check()
    text = work / "text.jsonl"
    lines = (" ".join(f"{n} times {m} is {n * m}," for m in range(60)) for n in range(400))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    flags: list[str | Path] = ["pretrain", "--model", small, "--data.train", text]
    flags += ["--data.max_length", str(LENGTH), "--train.micro_batch_tokens", str(2 * LENGTH), "--data.workers", "1"]
    flags += ["--data.cache_dir", work / "cache", "--train.max_steps", str(STEPS), "--fabric.accelerator", "cpu"]
    flags += ["--checkpoint.every", "null", "--log.loggers", "[]"]
    run_child([sys.executable, RANKS, "reckon", work, *flags], threads=1).check()  # prepares the text once
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="cases to measure; the others stay as they are")
    args = parser.parse_args()
    baseline = run_child([sys.executable, "-c", IMPORTS], threads=1).check().peak_rss
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        flags = prepared(work)
        (work / "probe").mkdir()
        together(2, ["probe", work / "probe"])
        told = json.loads((work / "probe" / "rank-0.json").read_text())
        write_part("scaling", "exchange of two ranks, bytes: seconds", told, ["exchange of two ranks, bytes: seconds"])
        for name in args.only or CASES:
            began = time.monotonic()
            rows[name] = measure(name, work, flags, baseline)
            write_part("scaling", name, rows[name], ["exchange of two ranks, bytes: seconds", *CASES])
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    print_table(["", *next(iter(rows.values()))], [[name, *map(str, row.values())] for name, row in rows.items()])
    missed = [f"{name}: other collectives than reckoned" for name, row in rows.items() if not row["equal"]]
    missed += [
        f"{name}: memory {row['memory_ratio']} times what was measured"
        for name, row in rows.items()
        if abs(row["memory_ratio"] - 1) > ALLOWED
    ]
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
