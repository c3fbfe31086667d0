"""The quickstart, once installed: seconds for training and both measurements, and the scores before and after.

    python benchmarks/quickstart.py

Ends with 1 when it takes five minutes or more, or when training does not help.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import REPO, need_model, run_child, write_result

ALLOWED_SECONDS = 300


def score(results: Path) -> float:
    """The share of right answers in a results file."""
    (task,) = json.loads(results.read_text())["results"].values()
    return float(task["exact_match,none"])


def main() -> None:
    need_model()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        child = run_child([REPO / "scripts" / "quickstart.sh"], extra={"OUT": str(out)}).check()
        before, after = score(out / "before.json"), score(out / "after.json")
    print(f"exact match {before:.3f} before, {after:.3f} after, {child.seconds:.0f} s")
    result = {"seconds": round(child.seconds, 1), "exact_match_before": before, "exact_match_after": after}
    write_result("quickstart", result)
    if child.seconds >= ALLOWED_SECONDS or after <= before:
        sys.exit(f"quickstart: the goal is a better score in less than {ALLOWED_SECONDS} s")


if __name__ == "__main__":
    main()
