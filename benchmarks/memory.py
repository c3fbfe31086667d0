"""The memory table of a dry run beside the measured peak.

    python benchmarks/memory.py

For full fine-tuning (with one row a step, and with several), LoRA and NF4 with LoRA on SmolLM2-135M: the peak that
`--dry_run` announces, and the resident memory of a short run at its peak less that of a process which only imports the
same libraries. Ends with 1 when they are more than 20 % apart.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import LITRECIPE, MIB, SHARED, Child, as_hf_folder, print_table, run_child, write_result

LORA = ["--adapter.method", "lora", "--adapter.r", "16"]
METHODS = {
    "full": [],
    "full, several rows": ["--train.micro_batch_tokens", "300"],
    "lora": LORA,
    "qlora": [*LORA, "--quantize.method", "nf4"],
}
ALLOWED = 0.20
IMPORTS = "import litrecipe.recipes.finetune, peft, bitsandbytes, lightning_fabric, transformers"
STEPS = 3


def finetune(model: Path, flags: list[str], out: Path) -> Child:
    fixed = {
        "model.source": model,
        "data.train": SHARED / "data" / "bench" / "sft128.jsonl",
        "data.cache_dir": out.parent / "cache",
        "train.max_steps": STEPS,
        "fabric.accelerator": "cpu",
        "checkpoint.every": "null",
        "out_dir": out,
    }
    words = [str(word) for key, value in fixed.items() for word in (f"--{key}", value)]
    return run_child([*LITRECIPE, "finetune", *words, *flags]).check()


def announced_peak(dry_run: str) -> float:
    """Bytes in the line `peak` of the table."""
    found = re.search(r"^\s*peak\s+([\d.]+)", dry_run, re.MULTILINE)
    if found is None:
        sys.exit(f"memory: no peak in what --dry_run printed:\n{dry_run}")
    return float(found[1]) * 1e9


def main() -> None:
    baseline = run_child([sys.executable, "-c", IMPORTS]).check().peak_rss
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = as_hf_folder(Path(folder) / "model")
        for method, flags in METHODS.items():
            out = Path(folder) / method
            announced = announced_peak(finetune(model, [*flags, "--dry_run"], out).output)
            measured = finetune(model, flags, out).peak_rss - baseline
            results[method] = {
                "announced_mib": round(announced / MIB),
                "measured_mib": round(measured / MIB),
                "announced_over_measured": round(announced / measured, 3),
            }
    print_table(["method", *results["full"]], [[name, *row.values()] for name, row in results.items()])
    write_result("memory", {"imports_mib": round(baseline / MIB), "steps": STEPS, "methods": results})
    if any(abs(row["announced_over_measured"] - 1) > ALLOWED for row in results.values()):
        sys.exit(f"memory: announced and measured peak are more than {ALLOWED:.0%} apart")


if __name__ == "__main__":
    main()
