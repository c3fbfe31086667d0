"""Makes the tables of docs/scaling.md: plans for 8, 64 and 512 GPUs, published runs beside what is reckoned of them,
and what benchmarks/scaling.py measured.

    python scripts/scaling_tables.py            # prints them
    python scripts/scaling_tables.py --write    # puts them into the page
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe.config import schema
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.engine.forecast import Forecast, forecast, hardware_of
from litrecipe.engine.hardware import KNOWN
from litrecipe.engine.memory import MemoryTable, estimate, kept_bytes
from litrecipe.model.architecture import Architecture
from litrecipe.model.families import read_architecture
from litrecipe.model.row import Row, Sample, Segment, make_row

REPO = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPO / "docs" / "scaling.md", REPO / "benchmarks" / "results" / "scaling.json"
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "mixtral-8x22b")
LAYOUTS = ((8, 1), (64, 1), (64, 8), (512, 1), (512, 8))
"""GPUs, and how many of them share each layer."""
SEQUENCE, SEQUENCES = 8192, 512
"""Tokens of a sequence, and sequences of a step."""
LINKS = 0.2
"""Share of a step from which on waiting for links is what limits."""
ROOM = 0.9
"""Share of a GPU's memory that may be planned for: the rest is the CUDA context's and what lies between tensors."""
PUBLISHED: tuple[tuple[str, str, str, int, int, float, int, str], ...] = (
    ("llama-3.1-8b", "h100", "torchtitan, 2024/12, table 1, compiled", 8, 2, 0.5, 6667, "set by it"),
    ("llama-3.1-8b", "h100", "torchtitan, 2024/12, table 3, compiled", 128, 2, 0.5, 6514, ""),
    ("llama-3.1-8b", "a100-80", "torchtitan, docs/performance.md, selective op", 64, 1, 0.5, 2973, "set by it"),
    ("llama-3.1-70b", "a100-80", "torchtitan, docs/performance.md, full", 64, 1, 1.0, 331, ""),
)
"""Model, hardware, where it is published, GPUs, sequences of each, share of the layers that is computed again, tokens a
second and GPU, and whether the share of the peak was set by it."""


def row_of(sequences: int) -> Row:
    weights = np.ones(SEQUENCE, dtype=np.float32)
    weights[0] = 0
    segment = Segment(np.zeros(SEQUENCE, dtype=np.int64), weights)
    return make_row([Sample("", (segment,))] * sequences)


@cache
def architecture_of(model: str) -> Architecture:
    config = REPO / "config_hub" / "pretrain" / model / "config.json"
    return read_architecture(json.loads(config.read_text()))


def recipe_of(model: str, gpus: int, tensor: int, hardware: str = "h100") -> PretrainRecipe:
    """The hub's recipe on other devices; layers travel in bf16 and are computed again on the way back. (Compiled
    layers cannot be shared by ranks, and nothing here depends on it.)"""
    flags: dict[str, Any] = {
        "fabric.devices": 8,
        "fabric.num_nodes": gpus // 8,
        "fabric.tensor_parallel": tensor,
        "fabric.param_dtype": "bfloat16",
        "fabric.activation_checkpointing": "true",
        "fabric.hardware": hardware,
        "fabric.compile": "false",
    }
    return schema.load(PretrainRecipe, [f"pretrain/{model}"], [(key, str(value)) for key, value in flags.items()])


@cache
def kept(model: str, tensor: int) -> tuple[int, int]:
    """What the activations of a row of one sequence take, which no number of GPUs changes."""
    return kept_bytes(recipe_of(model, 64, tensor), architecture_of(model), row_of(1))


def planned(model: str, gpus: int, tensor: int) -> tuple[MemoryTable, Forecast, int, int]:
    """Memory of a GPU and a step with the longest rows that fit, or else the shortest; rows of a rank, and sequences of
    a row."""
    recipe, architecture = recipe_of(model, gpus, tensor), architecture_of(model)
    own = max(1, SEQUENCES * tensor // gpus)
    for sequences in (one for one in (8, 4, 2, 1) if own % one == 0):
        row, rows = row_of(sequences), own // sequences
        activations, again = kept(model, tensor)
        alike = (sequences * activations, sequences * again)
        table = estimate(recipe, architecture, row, rows=rows, world_size=gpus, device="cuda", kept=alike)
        if fits(table):
            break
    tokens = float(SEQUENCE * own * gpus // tensor)
    step = forecast(recipe, architecture, row, rows=rows, tokens=tokens, hardware=hardware_of(recipe.fabric))
    return table, step, rows, sequences


def fits(table: MemoryTable) -> bool:
    return table.peak < ROOM * KNOWN["h100"].memory


def plans(model: str) -> Iterator[list[str]]:
    """The table of a model."""
    speeds = ["s a step", "waiting", "MFU", "10⁹ tokens a day"]
    yield ["GPUs", "data x tensor", "rows x sequences", "state GB", "peak GB", "sent GB", *speeds, "limit"]
    for gpus, tensor in LAYOUTS:
        table, step, rows, sequences = planned(model, gpus, tensor)
        time = step.time
        assert time is not None and step.mfu is not None
        state, share = table.weights + table.gradients + table.optimizer, time.waiting / time.total
        limit = "memory: does not fit" if not fits(table) else "links" if share > LINKS else "arithmetic"
        a_day = 86400 * step.tokens / time.total / 1e9
        speed = [f"{time.total:.3g}", f"{share:.0%}", f"{step.mfu:.0%}", f"{a_day:,.1f}"]
        yield [
            str(gpus),
            f"{gpus // tensor} x {tensor}",
            f"{rows} x {sequences}",
            f"{state / 1e9:.1f}",
            f"{table.peak / 1e9:.1f}",
            f"{sum(one.sent for one in step.collectives) / 1e9:,.0f}",
            *(speed if fits(table) else ["-"] * len(speed)),
            limit,
        ]


def published() -> Iterator[list[str]]:
    """Runs of others beside what is reckoned of them."""
    yield ["model", "GPUs", "published by", "tokens a second and GPU", "reckoned", "off", ""]
    for model, hardware, where, gpus, sequences, again, measured, note in PUBLISHED:
        recipe, row = recipe_of(model, gpus, 1, hardware), row_of(sequences)
        tokens = float(gpus * sequences * SEQUENCE)
        known = hardware_of(recipe.fabric)
        step = forecast(recipe, architecture_of(model), row, rows=1, tokens=tokens, hardware=known, again=again)
        assert step.time is not None
        rate = tokens / gpus / step.time.total
        yield [model, f"{gpus} {hardware}", where, f"{measured:,}", f"{rate:,.0f}", f"{rate / measured - 1:+.0%}", note]


def measured() -> Iterator[list[str]]:
    """What benchmarks/scaling.py wrote; nothing before it was run."""
    heads = ["collectives of a step", "MB counted", "MB reckoned", "tensors, MiB", "reckoned", "resident, MiB"]
    yield ["run", *heads, "s of a processor", "s reckoned"]
    for name, found in json.loads(RESULTS.read_text() if RESULTS.exists() else "{}").items():
        if isinstance(found, dict) and "equal" in found:
            yield [
                name,
                str(found["collectives"]),
                f"{found['mb_counted']:,.3f}",
                f"{found['mb_reckoned']:,.3f}",
                f"{found['tensors_mib_counted']:,}",
                f"{found['tensors_mib_reckoned']:,} ({found['tensors_ratio'] - 1:+.0%})",
                f"{found['resident_mib_measured']:,}",
                f"{found['seconds_of_processor']:.2f}",
                f"{found['seconds_reckoned']:.2f} ({found['seconds_ratio'] - 1:+.0%})",
            ]


def tables() -> dict[str, str]:
    """Name → Markdown."""
    rows = {model: list(plans(model)) for model in MODELS} | {
        "published": list(published()),
        "measured": list(measured()),
    }
    return {name: markdown(found) for name, found in rows.items()}


def markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def written(page: str, made: dict[str, str]) -> str:
    """The page with these tables between its marks."""
    for name, table in made.items():
        marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marks.search(page):
            raise SystemExit(f"scaling_tables: {PAGE.name} has no place for {name}")
        page = marks.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    made = tables()
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text(), made))
        return
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
