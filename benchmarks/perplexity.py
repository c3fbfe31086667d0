"""Perplexity of the real model on two texts: shows that weights, tokenizer and decoder are right together.

    python benchmarks/perplexity.py

Eight windows of 1,024 tokens of raw text, 8,184 predictions, in fp32. The reference for WikiText-2 (test) is 23.6: the
same windows through `transformers` on the same weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import LITRECIPE, MIB, SHARED, need_model, print_table, run_child, write_result

TEXTS = {"wikitext2": "wikitext2.test.txt.gz", "tinyshakespeare": "tinyshakespeare.txt.gz"}
REFERENCE, TOLERANCE = 23.6, 0.1


def main() -> None:
    model = need_model()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in TEXTS.items():
            out = Path(folder) / f"{name}.json"
            text = SHARED / "data" / "pretrain" / file
            task = f"perplexity:{text}?window=1024&windows=8"
            command = [*LITRECIPE, "evaluate", "--model", model, "--tasks", task, "--fabric.accelerator", "cpu"]
            child = run_child([*command, "--out", out]).check()
            (metrics,) = json.loads(out.read_text())["results"].values()
            found[name] = {
                "perplexity": round(metrics["perplexity,none"], 4),
                "bits_per_byte": round(metrics["bits_per_byte,none"], 5),
                "wall_seconds": round(child.seconds, 1),
                "peak_rss_mib": round(child.peak_rss / MIB),
            }
    print_table(["text", *found["wikitext2"]], [[name, *row.values()] for name, row in found.items()])
    write_result("perplexity", {"windows": 8, "window": 1024, "reference_wikitext2": REFERENCE, "texts": found})
    if abs(found["wikitext2"]["perplexity"] - REFERENCE) > TOLERANCE:
        sys.exit(f"perplexity: WikiText-2 is not {REFERENCE} ± {TOLERANCE}")


if __name__ == "__main__":
    main()
