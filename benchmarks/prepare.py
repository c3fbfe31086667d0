"""Throughput of `litrecipe data prepare` against bare `tokenizers.encode_batch`, on the same text and the same cores.

    python benchmarks/prepare.py [--megabytes 24] [--repeats 3]

The text is books of shared/data/pretrain where they are there, else sentences made here; the tokenizer is that of the
real model, or one learnt from the text. Bare is a process that has the texts in memory and keeps the ids, in one call
of `encode_batch` for all of them, and in calls of a megabyte as they would come from a file; its clock starts when the
tokenizer is loaded. Ours reads the compressed file, tokenises in as many processes, and writes shards with their
hashes; its clock is that of its progress line, which runs before the processes start. Beside it stands the whole of the
command, imports included, and the seconds that processors spent on it, imports included too: those others on the
machine lengthen least. All run in turn, and the best of each counts; our share is of the faster way of calling
`encode_batch`. The tokens of all are compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import GGUF, LITRECIPE, MIB, SHARED, as_hf_folder, print_table, run_child, write_result

GOAL = 0.9
"""Share of the bare throughput."""
BARE_CALLS = {"encode_batch, one call": float("inf"), "encode_batch, calls of 1 MB": 1e6}
"""How often the library is called → characters of a call."""

BARE = r"""
import gzip, hashlib, json, sys, time
import numpy as np
import tokenizers

source, folder, out, most = sys.argv[1:]
texts = [json.loads(line)["text"] for line in gzip.open(source, "rt", encoding="utf-8")]
backend = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
backend.no_truncation()
backend.no_padding()
began, used = time.monotonic(), time.process_time()
ids, batch, size = [], [], 0
for number, text in enumerate(texts, start=1):
    batch.append(text)
    size += len(text)
    if size > float(most) or number == len(texts):
        ids += [encoding.ids for encoding in backend.encode_batch(batch, add_special_tokens=False)]
        batch, size = [], 0
seconds, cpu = time.monotonic() - began, time.process_time() - used
digest = hashlib.sha256()
for each in ids:
    digest.update(np.array(each, dtype=np.int64).tobytes())
found = {"seconds": seconds, "cpu_seconds": cpu, "tokens": sum(map(len, ids)), "sha256": digest.hexdigest()}
json.dump(found, open(out, "w"))
"""

OURS = r"""
import hashlib, json, sys
import numpy as np
from litrecipe.data.shards import Shards

shards = Shards(sys.argv[1])
digest = hashlib.sha256()
for number in range(len(shards)):
    digest.update(np.ascontiguousarray(shards.read(number)[:-1]).tobytes())
json.dump({"tokens": shards.tokens - len(shards), "sha256": digest.hexdigest()}, open(sys.argv[2], "w"))
"""


def sentences(size: int) -> list[str]:
    """Documents of made-up sentences."""
    dice = random.Random(0)
    letters = "etaoinshrdlucmfwygpb"
    words = ["".join(dice.choice(letters) for _ in range(dice.randint(1, 9))) for _ in range(5000)]
    documents = []
    while size > 0:
        documents.append(" ".join(dice.choice(words) for _ in range(dice.randint(100, 2000))) + ".")
        size -= len(documents[-1])
    return documents


def write_texts(work: Path, size: int) -> tuple[Path, int, str]:
    """A file of about `size` bytes of text, its true size, and where the text is from."""
    books = sorted((SHARED / "data" / "pretrain").glob("books-0*.jsonl.gz"))
    origin = "books of shared/data/pretrain" if books else "made here"
    lines = (line for book in books for line in gzip.decompress(book.read_bytes()).splitlines())
    rows = (json.loads(line)["text"] for line in lines)
    path, total = work / "texts.jsonl.gz", 0
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
        for text in rows if books else sentences(size):
            if total < size:
                total += len(text.encode())
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path, total, origin


def tokenizer_of(work: Path, texts: Path) -> tuple[Path, str]:
    """A folder with a tokenizer.json, and what it is."""
    if GGUF.exists():
        return as_hf_folder(work / "model"), "SmolLM2-135M-Instruct"
    folder = work / "tokenizer"
    run_child([*LITRECIPE, "data", "train-tokenizer", texts, folder, "--vocab_size", "8000"]).check()
    return folder, "byte-level BPE of 8000 ids, learnt from the text"


def bare(work: Path, texts: Path, folder: Path, cores: int, most: float) -> dict[str, Any]:
    """Seconds of `encode_batch`, called with at most about that many characters."""
    out = work / "bare.json"
    command = [sys.executable, "-c", BARE, texts, folder, out, str(most)]
    child = run_child(command, threads=cores, extra={"RAYON_NUM_THREADS": str(cores)}).check()
    return {**json.loads(out.read_text()), "peak_rss_mib": round(child.peak_rss / MIB)}


def ours(work: Path, texts: Path, folder: Path, cores: int) -> dict[str, Any]:
    """Seconds of our command, and of the work in it."""
    shards, out = work / "shards", work / "ours.json"
    shutil.rmtree(shards, ignore_errors=True)
    flags = ["--tokenizer", folder, "--out", shards, "--workers", cores]
    before = cpu_of_children()
    child = run_child([*LITRECIPE, "data", "prepare", texts, *map(str, flags)], threads=1).check()
    cpu = cpu_of_children() - before
    told = re.search(r"in ([\d.]+) s\b", child.output)
    assert told, child.output
    run_child([sys.executable, "-c", OURS, shards, out]).check()
    told_seconds = {"seconds": float(told[1]), "cpu_seconds": cpu, "command_seconds": round(child.seconds, 2)}
    return told_seconds | json.loads(out.read_text())


def cpu_of_children() -> float:
    """Seconds that all processors spent on finished children, and on theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts, size, origin = write_texts(work, int(options.megabytes * 1e6))
        tokenizer, name = tokenizer_of(work, texts)
        runs: dict[str, list[dict[str, Any]]] = {one: [] for one in (*BARE_CALLS, "litrecipe")}
        for _ in range(options.repeats):
            for one, most in BARE_CALLS.items():
                runs[one].append(bare(work, texts, tokenizer, options.cores, most))
            runs["litrecipe"].append(ours(work, texts, tokenizer, options.cores))
    same = len({run["sha256"] for of_one in runs.values() for run in of_one}) == 1
    speeds = {}
    for clock in ("seconds", "cpu_seconds"):
        speed = {who: size / 1e6 / min(run[clock] for run in of_one) for who, of_one in runs.items()}
        share = speed["litrecipe"] / max(speed[one] for one in BARE_CALLS)
        speeds[clock] = {"share_of_bare": round(share, 3)} | {who: round(value, 3) for who, value in speed.items()}
    print_table(["MB/s", *speeds["seconds"]], [[clock, *values.values()] for clock, values in speeds.items()])
    print(f"the same tokens: {same}")
    result = {
        "text": {"megabytes": round(size / 1e6, 2), "from": origin},
        "tokenizer": name,
        "cores": options.cores,
        "megabytes_per_second": speeds,
        "goal": GOAL,
        "same_tokens": same,
        "runs": runs,
    }
    write_result("prepare", result)
    if speeds["seconds"]["share_of_bare"] < GOAL or not same:
        sys.exit(f"benchmark: the goal is {GOAL} of bare encode_batch, and the same tokens")


if __name__ == "__main__":
    main()
